"""Server: uvicorn on one socket, and the way down.

The first signal stops accepting and lets running requests go on for `drain_seconds`; those that are not done then
get an error event that says so. The second signal does that at once. Owns sockets and signals.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from rorqual.serve.app import create_app
from rorqual.serve.errors import ShuttingDown
from rorqual.serve.service import Service

__all__ = ["Server", "open_socket"]

GRACE_SECONDS = 5
"""For the last bytes of aborted answers, before connections are cut."""


def open_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    sock.set_inheritable(True)
    return sock


class Server(uvicorn.Server):
    """Serves until a signal. `run(sockets=[...])` returns then; `signal` says which it was."""

    def __init__(self, service: Service, *, on_ready: Callable[[], None] | None = None) -> None:
        drain = service.config.drain_seconds
        super().__init__(
            uvicorn.Config(
                create_app(service),
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(drain) + 1 + GRACE_SECONDS,
            )
        )
        self.signal: int | None = None
        self._service = service
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, then calls `on_ready`."""
        await super().startup(sockets=sockets)
        if self.started and self._on_ready is not None:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. Not passed on: the caller turns `signal` into an exit code."""
        if self.signal is not None:
            self._abort()
        self.signal = sig
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, waits for what runs, gives up what takes too long."""
        self._service.scheduler.drain()
        timer = asyncio.get_running_loop().call_later(self._service.config.drain_seconds, self._abort)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            timer.cancel()

    def _abort(self) -> None:
        name = signal.Signals(self.signal).name if self.signal is not None else "a stop"
        self._service.scheduler.abort_all(
            ShuttingDown(f"the server was stopped by {name} before the answer was done")
        )
