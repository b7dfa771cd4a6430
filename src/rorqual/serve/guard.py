"""Guard: what stands before the paths: the Host header, then (except on /health) the API key, then the body's limit.

Keys are compared as digests, in constant time. A body is counted while it comes, whatever its header says.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.serve.config import ServeConfig, key_digest
from rorqual.serve.errors import BodyTooLarge, ServeError, Unauthorized, WrongHost
from rorqual.serve.failures import error_body
from rorqual.serve.metrics import Metrics
from rorqual.serve.transport import ApiResponse

__all__ = ["OPEN_PATHS", "Guard"]

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key."""


class Guard:
    """ASGI middleware. Puts the digest of the key, or an empty string, into `scope["state"]["tenant"]`."""

    def __init__(self, app: ASGIApp, *, config: ServeConfig, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            tenant = "" if scope["path"] in OPEN_PATHS else self._tenant(headers)
            self._check_length(headers)
        except ServeError as error:
            self._metrics.rejected(error.code or "error")
            challenge = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            # An unread body would be taken for the next request.
            response = ApiResponse(
                error_body(scope["path"], error),
                status_code=error.status,
                headers={"connection": "close", **challenge},
            )
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, self._counted(receive), send)

    def _check_host(self, headers: Headers) -> None:
        allowed = self._config.allowed_hosts
        if not allowed:
            return
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in (one.lower() for one in allowed):
            raise WrongHost(f"this server does not answer to the host {name[:200]!r}")

    def _tenant(self, headers: Headers) -> str:
        if not self._config.key_digests:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not key:
            raise Unauthorized("an API key is needed: send it as `Authorization: Bearer KEY`")
        digest = key_digest(key)
        known = [hmac.compare_digest(digest, one) for one in self._config.key_digests]
        if not any(known):
            raise Unauthorized("this API key is not accepted here")
        return digest

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._config.max_body_bytes:
            raise BodyTooLarge(self._too_large())

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
                )  # the only kind that passes through FastAPI's reading
            return message

        return counted
