"""Failures: every exception of a request as its protocol's error object. Owns the words of validation errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from rorqual.serve.anthropic import anthropic_error
from rorqual.serve.anthropic_paths import MESSAGES
from rorqual.serve.errors import BadRequest, EngineFailed, ServeError
from rorqual.serve.metrics import Metrics
from rorqual.serve.transport import ApiResponse, ClientGone

__all__ = ["add_error_handlers", "error_body"]


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Turns every exception of a request into an answer, and counts it."""

    def answer(http: Request, error: ServeError, status: int | None = None) -> Response:
        metrics.rejected(error.code or "error")
        body = error_body(http.url.path, error, status)
        return ApiResponse(body, status_code=status or error.status, headers=dict(error.headers))

    @app.exception_handler(ServeError)
    async def ours(http: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        return answer(http, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(http, _validation_error(error))

    @app.exception_handler(HTTPException)
    async def plain(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)
        return answer(http, BadRequest(error.detail, code=code), error.status_code)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the number is nginx's

    @app.exception_handler(Exception)
    async def internal(http: Request, error: Exception) -> Response:
        return answer(http, EngineFailed(f"internal error: {type(error).__name__}", code="internal_error"))


def error_body(path: str, error: ServeError, status: int | None = None) -> dict[str, Any]:
    """The error as clients of this path read it."""
    if path == MESSAGES or path.startswith(f"{MESSAGES}/"):
        return anthropic_error(error, status)
    return error.envelope()


def _validation_error(error: RequestValidationError) -> BadRequest:
    """pydantic's findings as one line: the deepest is the closest to what was meant."""
    found = max(error.errors(), key=lambda one: len(one["loc"]))
    if found["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {found['ctx']['error']}", code="invalid_json")
    param = ".".join(_where(found, error.body))
    if found["type"] == "extra_forbidden":
        return BadRequest(
            f"{param} is not supported by this server: leave it out", param=param, code="unknown_parameter"
        )
    if found["type"] == "union_tag_invalid":
        named = found["ctx"]["discriminator"]
        field = "type" if named.endswith("()") else named.strip("'")
        known = found["ctx"]["expected_tags"]
        return BadRequest(
            f"{param}: {field} {found['ctx']['tag']!r} is not supported here, only {known}",
            param=f"{param}.{field}",
        )
    if not param:
        return BadRequest(f"the body must be a JSON object, sent as application/json: {found['msg']}")
    code = "missing_required_parameter" if found["type"] == "missing" else None
    return BadRequest(f"{param}: {found['msg']}", param=param, code=code)


def _where(found: Mapping[str, Any], body: Any) -> list[str]:
    """The path of a finding in the body; pydantic's has the branches of unions in it that it tried."""
    path = found["loc"][1:]
    out: list[str] = []
    value = body
    for at, part in enumerate(path):
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
        if inside or (at == len(path) - 1 and found["type"] == "missing"):
            out.append(str(part))
    return out
