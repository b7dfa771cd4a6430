"""One connection to a TCP port of the sandbox, carried in frames of the guest connection.

Owns the host's side of it: what has arrived, credit for more, one chunk at a time on its way in. Never touches the
socket: sandbox/_guest.py does, and feeds frames in here. The other end is native/guest/tcp.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import deque
from typing import TYPE_CHECKING

from . import _protocol as wire
from ._protocol import Type
from .errors import GuestError, GuestProtocolError, GuestRefused

if TYPE_CHECKING:
    from ._guest import GuestClient

WINDOW = 512 * 1024
"""Bytes from the sandbox that may be under way or unread; the guest stops beyond."""


class GuestStream:
    """A connection, both ways. Made by `GuestClient.tcp_open`."""

    def __init__(self, client: GuestClient, ident: int, port: int) -> None:
        self.port = port
        self._client = client
        self._id = ident
        self._chunks: deque[bytes] = deque()
        self._credit = WINDOW
        self._owed = 0
        self._end: int | None = None
        self._error: GuestError | None = None
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._closed = False

    async def read(self) -> bytes:
        """The next piece, as it arrived; b'' when the other side sends no more.

        Raises ConnectionError (with errno) after a reset, GuestGone, GuestProtocolError.
        """
        while True:
            if self._chunks:
                data = self._chunks.popleft()
                self._consumed(len(data))
                return data
            if self._error is not None:
                raise self._error
            if self._closed or self._end == 0:
                return b""
            if self._end is not None:
                raise ConnectionResetError(self._end, os.strerror(self._end))
            self._wake.clear()
            await self._wake.wait()

    async def write(self, data: bytes) -> None:
        """Returns when the sandbox's socket has taken it all. Raises ConnectionError, GuestGone."""
        async with self._writing:
            for at in range(0, len(data), wire.MAX_CHUNK):
                await self._send(data[at : at + wire.MAX_CHUNK], eof=False)

    async def write_eof(self) -> None:
        """Says that nothing more comes; reading goes on. Idempotent."""
        async with self._writing:
            with contextlib.suppress(ConnectionError):  # the other side is gone already
                await self._send(b"", eof=True)

    async def close(self) -> None:
        """Ends it, both ways. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        if self._error is None:
            await self._client._tcp_close(self._id)

    async def _send(self, data: bytes, *, eof: bool) -> None:
        if self._closed:
            raise ConnectionAbortedError(errno.ECONNABORTED, "this connection was closed")
        try:
            await self._client._call(
                Type.TCP_SEND, wire.u32(self._id), wire.u8(eof), data, read=wire.read_empty, deadline=None
            )
        except GuestRefused as error:
            raise ConnectionError(error.errno, os.strerror(error.errno)) from error

    def _consumed(self, count: int) -> None:
        self._owed += count
        if self._owed < WINDOW // 4 or self._end is not None or self._closed or self._error is not None:
            return
        self._credit += self._owed
        self._client._write(wire.frame(Type.TCP_CREDIT, self._id, wire.u32(self._owed)))
        self._owed = 0

    def _on_data(self, data: bytes) -> None:
        self._credit -= len(data)
        if self._credit < 0 or not data:
            raise GuestProtocolError(
                f"the guest sent {len(data)} bytes of port {self.port} without credit for them"
            )
        if self._end is not None:
            raise GuestProtocolError(f"the guest sent more of port {self.port} after its end")
        if not self._closed:
            self._chunks.append(data)
        self._wake.set()

    def _on_end(self, code: int) -> None:
        if self._end is not None:
            raise GuestProtocolError(f"the guest ended the connection to port {self.port} twice")
        self._end = code
        self._wake.set()

    def _on_failure(self, error: GuestError) -> None:
        self._error = error
        self._wake.set()
