"""Errors of the server, each with its HTTP status and OpenAI's envelope.

ServeError                 status, type, param, code, headers
├── BadRequest             400: a field is wrong, or names something this server does not do
├── ContextTooLong         400 context_length_exceeded: the numbers are in the text and in fields
├── Unauthorized           401: no key, or a wrong one
├── WrongHost              403: the Host header names another server
├── NotFound               404: no such model or path
├── BodyTooLarge           413: the request's body
├── Overloaded             429: the queue is full; Retry-After says when to come back
├── EngineFailed           500: the engine raised; the request is lost, the server goes on
└── ShuttingDown           503: the server accepts no more requests, or gave up this one
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "BadRequest",
    "BodyTooLarge",
    "ContextTooLong",
    "EngineFailed",
    "NotFound",
    "Overloaded",
    "ServeError",
    "ShuttingDown",
    "Unauthorized",
    "WrongHost",
]


class ServeError(Exception):
    """Base: what a client sees of a failure."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, text: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(text)
        self.param = param
        self.code = code or type(self).code
        self.headers: Mapping[str, str] = {}

    def envelope(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class BadRequest(ServeError):
    """A field of the request is wrong, or asks for something this server does not do."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class ContextTooLong(BadRequest):
    """Prompt and answer do not fit the model's context, or their cache not its memory."""

    code = "context_length_exceeded"

    def __init__(self, text: str, *, prompt_tokens: int, max_tokens: int, limit: int) -> None:
        super().__init__(text, param="messages")
        self.prompt_tokens, self.max_tokens, self.limit = prompt_tokens, max_tokens, limit


class Unauthorized(ServeError):
    """No API key, or a wrong one."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class WrongHost(ServeError):
    """The Host header names none of the hosts that this server answers to."""

    status, type, code = 403, "permission_error", "wrong_host"


class NotFound(ServeError):
    """No such model or path."""

    status, type, code = 404, "invalid_request_error", "not_found"


class BodyTooLarge(ServeError):
    """The body is over the limit."""

    status, type, code = 413, "invalid_request_error", "body_too_large"


class Overloaded(ServeError):
    """The queue is full. `retry_after` is in seconds."""

    status, type, code = 429, "rate_limit_error", "queue_full"

    def __init__(self, text: str, *, retry_after: int) -> None:
        super().__init__(text)
        self.retry_after = retry_after
        self.headers = {"retry-after": str(retry_after)}


class EngineFailed(ServeError):
    """The engine raised: a bug or a lack of memory. The text names the exception."""

    code = "engine_failed"


class ShuttingDown(ServeError):
    """The server is going down."""

    status, code = 503, "shutting_down"
