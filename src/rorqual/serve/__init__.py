"""Server: a V4 model behind OpenAI's HTTP API: chat and completions, streamed or not. Needs 'rorqual[serve]'."""

from __future__ import annotations

from rorqual.serve.app import create_app
from rorqual.serve.config import ServeConfig, key_digest
from rorqual.serve.errors import (
    BadRequest,
    BodyTooLarge,
    ContextTooLong,
    EngineFailed,
    NotFound,
    Overloaded,
    ServeError,
    ShuttingDown,
    Unauthorized,
    WrongHost,
)
from rorqual.serve.server import Server, open_socket
from rorqual.serve.service import Service

__all__ = [
    "BadRequest",
    "BodyTooLarge",
    "ContextTooLong",
    "EngineFailed",
    "NotFound",
    "Overloaded",
    "ServeConfig",
    "ServeError",
    "Server",
    "Service",
    "ShuttingDown",
    "Unauthorized",
    "WrongHost",
    "create_app",
    "key_digest",
    "open_socket",
]
