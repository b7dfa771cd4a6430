"""Server: uvicorn on the edge's sockets, the lock that keeps a second edge of the name away, and the way down."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from rorqual.sandbox.edge.app import create_app
from rorqual.sandbox.edge.edge import Edge
from rorqual.sandbox.errors import HostUnfit

GRACE_S = 2
"""Seconds that open connections have to end after a signal."""


class Server(uvicorn.Server):
    """Serves until a signal. `run(sockets=[...])` returns then; `signal` says which it was."""

    def __init__(self, edge: Edge, *, on_ready: Callable[[], None] | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(edge),
                lifespan="on",
                ws="websockets-sansio",
                ws_max_size=edge.config.max_body_bytes,
                ws_ping_interval=None,  # clients ping: that renews their leases, too
                ws_per_message_deflate=False,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self.signal: int | None = None
        self._edge = edge
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, then calls `on_ready`."""
        await super().startup(sockets=sockets)
        if self.started and self._on_ready is not None:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. Not passed on: the caller turns `signal` into an exit code."""
        if self.signal is not None:
            self.force_exit = True
        self.signal = sig
        self._edge.draining = True
        self.should_exit = True


@contextlib.contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Holds the lock of an edge's home while it runs. Raises HostUnfit when another has it."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(home / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise HostUnfit(
                f"an edge named {home.name!r} runs here already.", fix="rorqual edge --name ANOTHER"
            ) from error
        yield
    finally:
        os.close(lock)


def unix_socket(path: Path) -> socket.socket:
    """A bound Unix socket that its owner alone may use; a dead edge's gives way. Raises HostUnfit."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            if not path.is_socket():
                raise HostUnfit(f"{path} is there and is no socket.", fix=f"rm {path}")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise HostUnfit(f"somebody listens on {path} already.")
            path.unlink()
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
    except OSError as error:
        sock.close()
        raise HostUnfit(f"cannot listen on {path}: {error.strerror or error}.") from error
    except BaseException:
        sock.close()
        raise
    return sock


def tcp_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one. Raises HostUnfit."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise HostUnfit(f"cannot listen on {host}:{port}: {error.strerror or error}.") from error
    return sock
