"""`sandbox.ports`: reach a TCP port inside from the host, on any substrate, whatever its network is.

The guest agent connects to the port on its own loopback and carries the bytes (native/guest/tcp.c); no interface and
no address of the sandbox is involved. What goes through a port is not in the trajectory log.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from types import TracebackType

from rorqual.sandbox._guest import GuestStream
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import GuestError, GuestGone, GuestRefused, InvalidRequest
from rorqual.sandbox.records import Address

MAX_FORWARDED = 64
"""Connections at once through one forward; the next ones wait in the listener's queue."""
_PIECE = 64 << 10


class AsyncPortStream:
    """A connection to a port inside. Use it as a context manager, or call `close`."""

    def __init__(self, session: Session, stream: GuestStream) -> None:
        self._session = session
        self._stream = stream

    async def read(self) -> bytes:
        """What has arrived, at least one byte; b'' at the end. Raises ConnectionError after a reset, SandboxEnded."""
        try:
            return await self._stream.read()
        except GuestGone as error:
            raise await self._session.verdict(error) from error

    async def write(self, data: bytes) -> None:
        """Returns when the sandbox has taken it all. Raises ConnectionError, SandboxEnded."""
        try:
            await self._stream.write(data)
        except GuestGone as error:
            raise await self._session.verdict(error) from error

    async def write_eof(self) -> None:
        """Nothing more will be written; reading goes on."""
        try:
            await self._stream.write_eof()
        except GuestGone as error:
            raise await self._session.verdict(error) from error

    async def close(self) -> None:
        """Ends the connection. Idempotent."""
        await self._stream.close()

    async def __aenter__(self) -> AsyncPortStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncForward:
    """A listener on the host whose connections end at a port inside. A context manager, which gives the address."""

    def __init__(self, session: Session, port: int, *, host: str, local_port: int) -> None:
        self._session = session
        self._port = port
        self._host = host
        self._local_port = local_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_FORWARDED)

    async def start(self) -> Address:
        """Begins to listen. Raises OSError: the local port is taken."""
        with self._session.alive():
            self._server = await asyncio.start_server(
                self._accepted, self._host, self._local_port, limit=_PIECE
            )
        host, port = self._server.sockets[0].getsockname()[:2]
        return Address(host, port)

    async def close(self) -> None:
        """Stops listening and ends every connection. Idempotent."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=5.0)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> Address:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection. Whatever breaks one side ends the other."""
        try:
            async with self._room:
                stream = await self._session.guest.tcp_open(self._port)
                try:
                    async with asyncio.TaskGroup() as both:
                        both.create_task(_inwards(reader, stream))
                        both.create_task(_outwards(stream, writer))
                finally:
                    await asyncio.shield(asyncio.ensure_future(stream.close()))
        except* (OSError, GuestError):
            _reset(writer)  # nobody listens inside, a reset, or the end of the sandbox
        except* asyncio.CancelledError:
            _reset(writer)  # the forward ends
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class AsyncPorts:
    """TCP ports of one sandbox."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def connect(self, port: int) -> AsyncPortStream:
        """A connection to a port of its loopback.

        Raises:
            ConnectionRefusedError: nobody listens on it.
            ConnectionError: 256 connections are open. SandboxEnded. InvalidRequest: not a port.
        """
        _check(port)
        session = self._session
        try:
            with session.alive():
                stream = await session.guest.tcp_open(port)
        except GuestGone as error:
            raise await session.verdict(error) from error
        except GuestRefused as error:
            kind = ConnectionRefusedError if error.errno == errno.ECONNREFUSED else ConnectionError
            raise kind(error.errno, f"{session.id}: {error}") from error
        return AsyncPortStream(session, stream)

    def forward(self, port: int, *, host: str = "127.0.0.1", local_port: int = 0) -> AsyncForward:
        """A listener on the host for that port: `async with sb.ports.forward(8080) as address`.

        host: the host's address to listen on; everybody who can reach it reaches the sandbox. local_port: 0 is a free
        one. A connection while nobody listens inside is reset. It ends with the block.
        """
        _check(port)
        if isinstance(local_port, bool) or not isinstance(local_port, int) or not 0 <= local_port <= 65535:
            raise InvalidRequest(f"local_port: {local_port!r} must be a number from 0 to 65535")
        return AsyncForward(self._session, port, host=host, local_port=local_port)


def _check(port: int) -> None:
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise InvalidRequest(f"port: {port!r} must be a number from 1 to 65535")


def _reset(writer: asyncio.StreamWriter) -> None:
    """Tells the other side that this is not an orderly end."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    writer.transport.abort()


async def _inwards(reader: asyncio.StreamReader, stream: GuestStream) -> None:
    while data := await reader.read(_PIECE):
        await stream.write(data)
    await stream.write_eof()


async def _outwards(stream: GuestStream, writer: asyncio.StreamWriter) -> None:
    while data := await stream.read():
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
