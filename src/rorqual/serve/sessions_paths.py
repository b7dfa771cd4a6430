"""`/v1/sessions`: list, inspect, pin, fork, checkpoint and delete, each done between two steps of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from rorqual.engine import EngineError
from rorqual.serve.errors import BadRequest
from rorqual.serve.schemas import Strict
from rorqual.serve.service import Service, tenant_of
from rorqual.serve.transport import ApiResponse

__all__ = ["add_sessions"]

T = TypeVar("T")


class PinRequest(Strict):
    """`POST /v1/sessions/{session_id}/pin`."""

    pinned: bool = True


class ForkRequest(Strict):
    """`POST /v1/sessions/{session_id}/fork`."""

    id: str | None = Field(default=None, min_length=1, max_length=128)
    """Of the new session; made up if it is left out."""


def add_sessions(app: FastAPI, service: Service) -> None:
    """Adds the paths."""
    sessions = service.sessions

    async def ask(act: Callable[[], T]) -> T:
        return await asyncio.wrap_future(service.scheduler.call(act))

    @app.get("/v1/sessions", response_class=ApiResponse)
    async def list_sessions(http: Request) -> Response:
        """The conversations that a name was given to, the last used first."""
        found = await ask(lambda: sessions.list(tenant_of(http)))
        return ApiResponse({"object": "list", "data": found})

    @app.get("/v1/sessions/{session_id}", response_class=ApiResponse)
    async def inspect(http: Request, session_id: str) -> Response:
        """A session, and where its tokens lie: live, in memory, on disk."""
        return ApiResponse(await ask(lambda: sessions.inspect(tenant_of(http), session_id)))

    @app.post("/v1/sessions/{session_id}/pin", response_class=ApiResponse)
    async def pin(http: Request, session_id: str, body: PinRequest) -> Response:
        """Keeps a session's cache from eviction, or no longer."""
        return ApiResponse(await ask(lambda: sessions.pin(tenant_of(http), session_id, pinned=body.pinned)))

    @app.post("/v1/sessions/{session_id}/fork", response_class=ApiResponse)
    async def fork(http: Request, session_id: str, body: ForkRequest) -> Response:
        """A second session that begins where this one is; they share what is cached."""
        return ApiResponse(await ask(lambda: sessions.fork(tenant_of(http), session_id, name=body.id)))

    @app.post("/v1/sessions/{session_id}/checkpoint", response_class=ApiResponse)
    async def checkpoint(http: Request, session_id: str) -> Response:
        """Writes what memory holds of a session to disk now."""
        try:
            return ApiResponse(await ask(lambda: sessions.checkpoint(tenant_of(http), session_id)))
        except EngineError as error:
            raise BadRequest(
                f"the session cannot be written: {error}", param="session_id", code="no_checkpoint"
            ) from None

    @app.delete("/v1/sessions/{session_id}", response_class=ApiResponse)
    async def delete(http: Request, session_id: str) -> Response:
        """Forgets a session, and what only it has in the cache."""
        await ask(lambda: sessions.delete(tenant_of(http), session_id))
        return ApiResponse({"id": session_id, "object": "session", "deleted": True})
