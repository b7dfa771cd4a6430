"""Guard: what stands before every path of an edge: the Host header, then (except on /health) the token, then sizes.

Tokens are compared as digests, in constant time. A body is counted while it comes, whatever its header says. Writes
the audit line of each HTTP request.
"""

from __future__ import annotations

import hmac
import json
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.sandbox._remote_codec import encode_error
from rorqual.sandbox.edge.audit import audit
from rorqual.sandbox.edge.config import EdgeConfig, token_digest
from rorqual.sandbox.edge.metrics import Metrics
from rorqual.sandbox.errors import EdgeRefused

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no token."""
CONTENT = "/files/content"
"""Ends the paths whose bodies are files: bounded where they are written, not here."""


class Guard:
    """ASGI middleware for HTTP and WebSocket. Puts who it is into `scope["state"]["who"]`."""

    def __init__(self, app: ASGIApp, *, config: EdgeConfig, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        began = time.monotonic()
        who, status = "nobody", 500
        try:
            self._check_host(headers)
            who = "anybody" if scope["path"] in OPEN_PATHS else self._who(headers)
            if scope["type"] == "http" and not scope["path"].endswith(CONTENT):
                self._check_length(headers)
        except EdgeRefused as error:
            status = error.status
            await _refuse(scope, send, error)
            self._line(scope, who, status, began)
            return
        scope.setdefault("state", {})["who"] = who
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)  # the channel writes a line per call
            return

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        counted = receive if scope["path"].endswith(CONTENT) else self._counted(receive)
        try:
            await self._app(scope, counted, noting)
        finally:
            self._line(scope, who, status, began)

    def _line(self, scope: Scope, who: str, status: int, began: float) -> None:
        parts = scope["path"].split("/")
        sandbox = parts[3] if len(parts) > 3 and parts[2] == "sandboxes" else ""
        path = scope["path"].replace(sandbox, "{id}") if sandbox else scope["path"]
        call = f"{scope.get('method', 'WEBSOCKET')} {path}"
        audit(who, call, sandbox=sandbox, outcome=str(status), seconds=time.monotonic() - began)
        self._metrics.requests.labels("http", str(status)).inc()

    def _check_host(self, headers: Headers) -> None:
        allowed = self._config.allowed_hosts
        if not allowed:
            return
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in (one.lower() for one in allowed):
            raise EdgeRefused(f"this edge does not answer to the host {name[:200]!r}", status=421)

    def _who(self, headers: Headers) -> str:
        if not self._config.token_digests:
            return "local"
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not bearer.strip():
            raise EdgeRefused(
                "a token is needed: pass token=..., set RORQUAL_EDGE_TOKEN, or send `Authorization: Bearer TOKEN`",
                status=401,
            )
        digest = token_digest(bearer.strip())
        known = [hmac.compare_digest(digest, one) for one in self._config.token_digests]
        if not any(known):
            raise EdgeRefused("this token is not accepted here", status=401)
        return digest[:8]

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._config.max_body_bytes:
            raise EdgeRefused(self._too_large(), status=413)

    def _too_large(self) -> str:
        return f"the body is larger than {self._config.max_body_bytes} bytes"

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._config.max_body_bytes:
                raise HTTPException(
                    413, self._too_large()
                )  # the only kind that FastAPI's reading lets through
            return message

        return counted


async def _refuse(scope: Scope, send: Send, error: EdgeRefused) -> None:
    body = json.dumps({"error": encode_error(error)}).encode()
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # an unread body would be taken for the next request
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    prefix = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
            return
        prefix = "websocket.http.response"
    start: dict[str, Any] = {"type": f"{prefix}.start", "status": error.status, "headers": headers}
    await send(start)
    await send({"type": f"{prefix}.body", "body": body})
