"""Failures: every exception of a request as OpenAI's error object. Owns the words of validation errors."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from rorqual.serve.errors import BadRequest, EngineFailed, ServeError
from rorqual.serve.metrics import Metrics
from rorqual.serve.transport import ApiResponse, ClientGone

__all__ = ["add_error_handlers"]


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Turns every exception of a request into an answer, and counts it."""

    def answer(error: ServeError, status: int | None = None) -> Response:
        metrics.rejected(error.code or "error")
        return ApiResponse(error.envelope(), status_code=status or error.status, headers=dict(error.headers))

    @app.exception_handler(ServeError)
    async def ours(_: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(_validation_error(error))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)
        return answer(BadRequest(error.detail, code=code), error.status_code)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the number is nginx's

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> Response:
        return answer(EngineFailed(f"internal error: {type(error).__name__}", code="internal_error"))


_TAGS = frozenset({"system", "developer", "user", "assistant", "tool", "str", "int"})
"""What pydantic puts into a path for the branch of a union that it tried."""


def _validation_error(error: RequestValidationError) -> BadRequest:
    """pydantic's findings as one line: the deepest is the closest to what was meant."""
    found = max(error.errors(), key=lambda one: len(one["loc"]))
    path = [str(part) for part in found["loc"][1:]]
    where = [*path[:1], *(part for part in path[1:] if part not in _TAGS and "[" not in part)]
    if found["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {found['ctx']['error']}", code="invalid_json")
    param = ".".join(where)
    if found["type"] == "extra_forbidden":
        return BadRequest(
            f"{param} is not supported by this server: leave it out", param=param, code="unknown_parameter"
        )
    if not where:
        return BadRequest(f"the body must be a JSON object, sent as application/json: {found['msg']}")
    code = "missing_required_parameter" if found["type"] == "missing" else None
    return BadRequest(f"{param}: {found['msg']}", param=param, code=code)
