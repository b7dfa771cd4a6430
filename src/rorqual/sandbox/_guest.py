"""Client of the guest agent: one multiplexed connection, its commands, its file calls.

Owns requests and answers and the trust boundary: whatever the guest sends is bounded by what was asked for,
and the first frame that breaks the protocol ends the connection (every call then raises GuestProtocolError).
Commands belong to the agent: closing a connection leaves them running, another one attaches by pid.
Bytes are sandbox/_protocol.py's; the other end is native/guest; docs/guest-protocol.md describes both.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import posixpath
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from . import _protocol as wire
from ._again import connect_again, was_reset
from ._dial import Address, Dialed, PortsBusy, dial
from ._guest_process import (
    MAX_OUTPUT,
    WINDOW,
    FileInfo,
    GuestExit,
    GuestInfo,
    GuestProcess,
    GuestProcessInfo,
    PtySize,
    StreamName,
    pty_size,
)
from ._guest_tcp import WINDOW as TCP_WINDOW
from ._guest_tcp import GuestStream
from ._protocol import Frame, Type
from .errors import GuestError, GuestFileError, GuestGone, GuestProtocolError, GuestRefused

__all__ = [
    "MAX_OUTPUT",
    "FileInfo",
    "GuestClient",
    "GuestExit",
    "GuestInfo",
    "GuestProcess",
    "GuestProcessInfo",
    "GuestStream",
    "PtySize",
    "StreamName",
]

_T = TypeVar("_T")

MAX_READ = 256 << 20
"""`read_file` without `limit` refuses a larger file (EFBIG): a sparse one must not eat the host's memory."""
MAX_ENTRIES = 100_000
"""`list_dir` refuses a larger directory (EFBIG)."""
_HANDLED = frozenset({Type.READ_NEXT, Type.WRITE_NEXT, Type.DIR_NEXT, Type.CLOSE})
"""Calls about a handle, which is gone with its connection."""
CALL_SECONDS = 60.0
"""An agent that answers a call later than this counts as gone. Reading stdin and wait() may take for ever."""


class _Connection(asyncio.Protocol):
    """Bytes between the socket and the client."""

    def __init__(self, client: GuestClient, dialed: Dialed) -> None:
        self._client = client
        self._dialed = dialed
        self._decoder = wire.Decoder()
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def write(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data if self._dialed.codec is None else self._dialed.codec.encode(data))

    def data_received(self, data: bytes) -> None:
        try:
            if self._dialed.codec is not None:
                data = self._dialed.codec.decode(data)
            for got in self._decoder.feed(data):
                self._client._on_frame(got)
        except GuestProtocolError as error:
            self._client._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        why = (
            f"the connection to the guest agent broke: {exc}"
            if exc
            else "the guest agent closed the connection"
        )
        self._client._lost(self, GuestGone(why))
        self._dialed.sock.close()  # the VMM must see the end of this client before the next one has the port
        self._dialed.release()
        if not self.closed.done():
            self.closed.set_result(None)


class GuestClient:
    """One connection to a guest agent. Use as an async context manager, or call `close`."""

    info: GuestInfo

    def __init__(self) -> None:
        self._connection: _Connection | None = None
        self._calls: dict[int, tuple[Type, Callable[[Frame], Any], asyncio.Future[Any]]] = {}
        self._streams: dict[int, GuestProcess] = {}
        self._ports: dict[int, GuestStream] = {}
        self._last_id = 0
        self._error: GuestError | None = None
        self._address: Address | None = None
        """Where to connect again: over vsock, a snapshot of the machine resets every connection."""
        self._again: asyncio.Task[None] | None = None
        self._resets = 0
        self.gate: Callable[[], Awaitable[None]] | None = None
        """Awaited before each call: a paused sandbox is resumed there (_session.py)."""
        self.still = False
        """The sandbox stands still, so that no answer can be late."""
        self.stills = 0
        """How often it has stood still."""
        self.awaited = 0
        """Calls that await an answer and have a deadline."""

    @classmethod
    async def connect(cls, path: str | Path, *, timeout: float = 10.0) -> GuestClient:  # noqa: ASYNC109 - public
        """Connect to the agent and shake hands; retries for `timeout` s while nobody listens.

        path: an address of `_dial.py`; a Path is a Unix socket's.
        Raises GuestGone (nobody there, no answer in time), GuestProtocolError (not an agent, other version),
        ValueError (not an address).
        """
        client = cls()
        address = Address.parse(path)
        loop = asyncio.get_running_loop()
        pause, problem = 0.001, "no answer"
        try:
            async with asyncio.timeout(timeout):
                while client._connection is None:
                    try:
                        client._connection = await _open(loop, address, client)
                    except (FileNotFoundError, ConnectionRefusedError, PortsBusy) as error:
                        problem = error.strerror or str(error)
                        await asyncio.sleep(pause)
                        pause = min(pause * 2, 0.05)
                    except OSError as error:
                        raise GuestGone(f"guest agent at {path}: {error.strerror or error}") from error
                problem = "connected, but no answer to HELLO"
                ident, future = client._expect(Type.WELCOME, wire.read_welcome)
                client._write(wire.hello(ident))
                welcome: wire.Welcome = await future
        except TimeoutError as error:
            await client.close()
            raise GuestGone(f"guest agent at {path}: {problem} within {timeout} s") from error
        except BaseException:
            await client.close()
            raise
        client.info = _who(welcome)
        client._address = address if address.kind == "vsock" else None
        return client

    async def __aenter__(self) -> GuestClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; commands run on. Idempotent."""
        self._fail(GuestGone("this connection to the guest agent was closed"))
        if self._again is not None:
            self._again.cancel()
            await asyncio.wait([self._again])
        if self._connection is not None:
            await asyncio.shield(self._connection.closed)

    # --- commands ---

    async def start(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        stdin: bool = False,
        pty: PtySize | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - enforced in the guest
        max_output: int = MAX_OUTPUT,
        tag: str = "",
    ) -> GuestProcess:
        """Start a command.

        `env` is laid over the agent's environment; `cwd` None is the user's home; without `stdin` it reads
        /dev/null. `timeout` (s) counts in the guest, which then kills the command and its descendants. A
        program not found, a bad cwd, an unknown user are results (exit 127 or 126, `GuestExit.error`).
        Raises GuestRefused (E2BIG: argv and env over 256 KiB; EAGAIN: too many commands), ValueError.
        """
        if timeout is not None and not 0 < timeout < 4e9:
            raise ValueError(f"timeout is {timeout} s; give a positive number, or None for no limit")
        if not 0 <= max_output <= wire.NO_LIMIT:
            raise ValueError(f"max_output is {max_output} bytes; give a number from 0 on")
        await self._ready()
        process = GuestProcess(self, self._new_id(), max_output, strict=True)
        request = wire.start(
            process._id,
            argv,
            cwd=cwd,
            env=env,
            who=user,
            stdin=stdin,
            pty=pty_size(pty) if pty is not None else None,
            timeout_ms=0 if timeout is None else max(1, round(timeout * 1000)),
            max_output=max_output,
            credit=WINDOW,
            tag=tag,
        )
        return await self._open_stream(process, request, kill=True)

    async def attach(self, pid: int, *, max_output: int = MAX_OUTPUT) -> GuestProcess:
        """A running or recently ended command: its output from the start, then live, then its end.

        The agent keeps the last 1 MiB of each stream; if the start is gone, `truncated` says so. `max_output`
        bounds what wait() may buffer here. Raises GuestRefused (ESRCH: no such command).
        """
        await self._ready()
        process = GuestProcess(self, self._new_id(), max_output, strict=False)
        request = wire.frame(Type.ATTACH, process._id, wire.u32(_pid(pid)), wire.u32(WINDOW))
        return await self._open_stream(process, request, kill=False)

    async def _open_stream(self, process: GuestProcess, request: bytes, *, kill: bool) -> GuestProcess:
        ident, future = self._expect(Type.STARTED, wire.read_started, ident=process._id)
        self._streams[ident] = process
        try:
            self._write(request)
            started: wire.Started = await self._answer(future, "start" if kill else "attach", CALL_SECONDS)
        except asyncio.CancelledError:
            # The command may be running and nobody will know its pid: stop it once the answer names it.
            future.add_done_callback(lambda done: self._abandon(ident, done, kill=kill))
            raise
        except BaseException:
            self._streams.pop(ident, None)
            raise
        process.pid = started.pid
        return process

    def _abandon(self, ident: int, done: asyncio.Future[Any], *, kill: bool) -> None:
        if done.cancelled() or done.exception() is not None or self._error is not None or not self.connected:
            self._streams.pop(ident, None)
            return
        if kill:
            call, _ = self._expect(Type.RESULT, wire.read_flag)
            self._write(wire.frame(Type.KILL, call, wire.u32(done.result().pid), wire.u32(9)))
        self._expect(Type.RESULT, wire.read_empty, ident=ident)
        self._write(wire.frame(Type.DETACH, ident))

    async def _detach(self, ident: int) -> None:
        if not self.connected:  # reset: the agent has forgotten it, and it will not be resumed
            self._streams.pop(ident, None)
            return
        _, future = self._expect(Type.RESULT, wire.read_empty, ident=ident)
        self._write(wire.frame(Type.DETACH, ident))
        await self._answer(future, "detach", CALL_SECONDS)

    async def list(self) -> _Processes:
        """Running commands and the last 256 ended ones, in order of start."""
        found: _Processes = []
        after = 0
        while True:
            listed, next_after = await self._call(Type.LIST, wire.u64(after), read=wire.read_list)
            for one in listed:
                found.append(
                    GuestProcessInfo(
                        pid=one.pid,
                        argv=one.argv,
                        tag=one.tag,
                        running=one.running,
                        pty=one.pty,
                        started=one.age_ns / 1e9,
                        exit_code=None if one.running else one.exit_code,
                    )
                )
            if next_after == 0:
                return found
            if next_after <= after or len(found) > 4096:
                raise self._fail(GuestProtocolError("the guest's list of commands does not end"))
            after = next_after

    async def kill(self, pid: int, *, signal: int = 9) -> bool:
        """Signal a command's process group; 9 also hunts down what left the group. False: nothing to hit."""
        if not 1 <= signal <= 64:
            raise ValueError(f"signal {signal} is not a number from 1 to 64")
        try:
            return await self._call(Type.KILL, wire.u32(_pid(pid)), wire.u32(signal), read=wire.read_flag)
        except GuestRefused as error:
            if error.errno == errno.ESRCH:
                return False
            raise

    async def stdin_at(self, pid: int) -> tuple[int, bool]:
        """How many bytes of input a running command has been given, and whether its input was closed.

        Raises GuestRefused (ESRCH: it does not run).
        """
        return await self._call(Type.STDIN_AT, wire.u32(_pid(pid)), read=wire.read_stdin_at)

    # --- ports ---

    async def tcp_open(self, port: int) -> GuestStream:
        """Connects to a port of the sandbox's loopback.

        Raises GuestRefused: ECONNREFUSED (nobody listens), EAGAIN (256 connections are open). ValueError.
        """
        if not 1 <= port <= 65535:
            raise ValueError(f"port {port} is not a number from 1 to 65535")
        await self._ready()
        stream = GuestStream(self, self._new_id(), port)
        ident, future = self._expect(Type.RESULT, wire.read_empty, ident=stream._id)
        self._ports[ident] = stream
        try:
            self._write(wire.frame(Type.TCP_OPEN, ident, wire.u16(port), wire.u32(TCP_WINDOW)))
            await self._answer(future, f"connect to port {port}", CALL_SECONDS)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: self._drop_port(ident, done))
            raise
        except BaseException:
            self._ports.pop(ident, None)
            raise
        return stream

    def _drop_port(self, ident: int, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or done.exception() is not None or self._error is not None or not self.connected:
            self._ports.pop(ident, None)
        else:
            self._expect(Type.RESULT, wire.read_empty, ident=ident)[1].add_done_callback(
                lambda _: self._ports.pop(ident, None)
            )
            self._write(wire.frame(Type.TCP_CLOSE, ident))

    async def _tcp_close(self, ident: int) -> None:
        if self._error is not None or ident not in self._ports:
            return
        _, future = self._expect(Type.RESULT, wire.read_empty, ident=ident)
        future.add_done_callback(lambda _: self._ports.pop(ident, None))
        self._write(wire.frame(Type.TCP_CLOSE, ident))
        with contextlib.suppress(GuestGone):
            await self._answer(future, "close of a port", CALL_SECONDS)

    # --- files: paths are absolute, in the guest's view ---

    async def read_file(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """Bytes of a regular file from `offset`, at most `limit`.

        Raises GuestFileError (EFBIG: no limit, and over MAX_READ).
        """
        if offset < 0 or (limit is not None and limit < 0):
            raise ValueError(f"offset {offset}, limit {limit}: neither may be negative")
        most = MAX_READ + 1 if limit is None else limit
        data = bytearray()
        async for chunk in self.read_pieces(path, offset=offset, limit=most):
            data += chunk
        if limit is None and len(data) > MAX_READ:
            raise GuestFileError(errno.EFBIG, path, call="read without limit")
        return bytes(data)

    async def read_pieces(self, path: str, *, offset: int, limit: int) -> AsyncGenerator[bytes, None]:
        """At most `limit` bytes of one opened file, from `offset`, as they come. Raises GuestFileError."""
        got = handle = 0
        try:
            ask = (wire.u64(offset), wire.u64(limit), wire.path(path))
            handle, chunk = await self._file(Type.READ_OPEN, path, *ask, read=self._tagged(wire.read_chunk))
            while True:
                got += len(chunk)
                if got > limit or (handle and not chunk):
                    raise self._fail(
                        GuestProtocolError(f"the guest's answer to a read of {path} does not add up")
                    )
                yield chunk
                if not handle:
                    return
                handle, chunk = await self._file(
                    Type.READ_NEXT, path, self._handle(handle), read=self._tagged(wire.read_chunk)
                )
        except BaseException:
            self._drop_handle(handle)
            raise

    async def write_file(
        self,
        path: str,
        data: bytes,
        *,
        mode: int | None = None,
        append: bool = False,
        make_parents: bool = True,
        user: str | int | None = None,
    ) -> None:
        """Write a whole file, atomically (temporary beside it, then rename), or append to it.

        `mode` None keeps a file's bits, or is 0o644 for a new one. `user` (None: the agent's) owns new ones.
        Through a symlink the target is written. Raises GuestFileError; GuestRefused if there is no such user.
        """
        if mode is not None and not 0 <= mode <= 0o7777:
            raise ValueError(f"mode {mode:#o} is not permission bits (0 to 0o7777)")
        first, rest = data[: wire.MAX_CHUNK], memoryview(data)[wire.MAX_CHUNK :]
        flags = append | make_parents << 1 | bool(rest) << 2 | (mode is not None) << 3
        handle = 0
        try:
            ask = (wire.u8(flags), wire.u32(mode or 0), wire.user(user), wire.path(path), first)
            handle = await self._file(Type.WRITE_OPEN, path, *ask, read=self._tagged(wire.read_handle))
            for at in range(0, len(rest), wire.MAX_CHUNK):
                chunk = bytes(rest[at : at + wire.MAX_CHUNK])
                more = at + wire.MAX_CHUNK < len(rest)
                step = (self._handle(handle), wire.u8(more), chunk)
                await self._file(Type.WRITE_NEXT, path, *step, read=wire.read_handle)
            handle = 0
        except BaseException:
            self._drop_handle(handle)
            raise

    async def stat(self, path: str) -> FileInfo:
        """What lies at `path` itself (a symlink is not followed). Raises GuestFileError."""
        found = await self._file(Type.STAT, path, wire.path(path), read=wire.read_stat)
        return _info(found, path, posixpath.basename(path.rstrip("/")) or "/")

    async def list_dir(self, path: str) -> _Files:
        """Entries of a directory, sorted by name. Raises GuestFileError (EFBIG: over MAX_ENTRIES)."""
        found: _Files = []
        handle = 0
        try:
            handle, page = await self._file(
                Type.DIR_OPEN, path, wire.path(path), read=self._tagged(wire.read_page)
            )
            while True:
                found += [_info(one, posixpath.join(path, one.name), one.name) for one in page]
                if not handle:
                    return sorted(found, key=lambda info: info.name)
                if len(found) > MAX_ENTRIES:
                    raise GuestFileError(errno.EFBIG, path, call="list")
                handle, page = await self._file(
                    Type.DIR_NEXT, path, self._handle(handle), read=self._tagged(wire.read_page)
                )
        except BaseException:
            self._drop_handle(handle)
            raise

    async def make_dir(self, path: str, *, parents: bool = True, user: str | int | None = None) -> bool:
        """False if it was already there (with `parents`; without, that is GuestFileError EEXIST)."""
        ask = (wire.u8(parents), wire.user(user), wire.path(path))
        return await self._file(Type.MKDIR, path, *ask, read=wire.read_flag)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link, an empty directory, or with `recursive` a tree. Raises GuestFileError."""
        ask = (wire.u8(recursive), wire.path(path))
        await self._file(Type.REMOVE, path, *ask, read=wire.read_empty, deadline=None)

    async def rename(self, src: str, dst: str) -> None:
        """rename(2): replaces a file at `dst`. Raises GuestFileError (its path is `src`)."""
        await self._file(Type.RENAME, src, wire.path(src), wire.path(dst), read=wire.read_empty)

    async def exists(self, path: str) -> bool:
        """Whether something lies at `path`, a dangling symlink included."""
        try:
            await self.stat(path)
        except GuestFileError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    # --- machines ---

    async def refresh(
        self, *, hostname: str = "", machine_id: str = "", entropy: bytes = b"", clock: bool = False
    ) -> None:
        """Makes a restored or forked machine one of its own; what is left out stays as it is.

        entropy: 32 to 512 bytes, credited to the kernel's random generator, which is reseeded, and new boot ids of
        the kernel and the agent are drawn. machine_id: 32 hex digits for /etc/machine-id. clock: the guest's wall
        clock becomes ours. Raises GuestRefused: EPERM from an agent that shares its kernel; the step that failed and
        its errno otherwise (the earlier ones are done: do not use that machine). ValueError for a bad argument.
        """
        await self._ready()
        now = time.time_ns() if clock else 0
        payload = wire.identity(wall_ns=now, hostname=hostname, machine_id=machine_id, entropy=entropy)
        await self._call(Type.REFRESH, payload, read=wire.read_empty)

    # --- requests and answers ---

    def _new_id(self) -> int:
        while True:
            self._last_id = self._last_id % 0xFFFFFFFF + 1
            if not any(self._last_id in used for used in (self._calls, self._streams, self._ports)):
                return self._last_id

    def _expect(
        self, kind: Type, read: Callable[[Frame], Any], *, ident: int = 0
    ) -> tuple[int, asyncio.Future[Any]]:
        """Await an answer of `kind`. `read` decodes it as it arrives: a bad one ends the connection."""
        if self._error is not None:
            raise self._error
        ident = ident or self._new_id()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[ident] = (kind, read, future)
        return ident, future

    def _write(self, data: bytes) -> None:
        if self._error is not None:
            raise self._error
        if self._connection is None:
            raise was_reset()
        self._connection.write(data)

    async def _answer(self, future: asyncio.Future[Any], call: str, deadline: float | None) -> Any:
        self.awaited += deadline is not None
        try:
            while True:
                stills = self.stills
                try:
                    async with asyncio.timeout(deadline):
                        # shielded: cancelled callers leave the answer to be read and dropped
                        return await asyncio.shield(future)
                except TimeoutError:
                    if not self.still and self.stills == stills:
                        raise self._fail(
                            GuestGone(f"the guest agent did not answer {call} within {deadline} s")
                        ) from None
        except GuestRefused as error:
            raise GuestRefused(f"{call}: {error}", errno=error.errno) from None
        finally:
            self.awaited -= deadline is not None

    async def _call(
        self, kind: Type, *parts: bytes, read: Callable[[Frame], _T], deadline: float | None = CALL_SECONDS
    ) -> _T:
        resets = self._resets
        await self._ready()
        if resets != self._resets and kind in _HANDLED:
            raise was_reset()
        ident, future = self._expect(Type.RESULT, read)
        try:
            self._write(wire.frame(kind, ident, *parts))
        except BaseException:
            self._calls.pop(ident, None)
            raise
        answer: _T = await self._answer(future, kind.name.lower().replace("_", " "), deadline)
        return answer

    async def _file(
        self,
        kind: Type,
        path: str,
        *parts: bytes,
        read: Callable[[Frame], _T],
        deadline: float | None = CALL_SECONDS,
    ) -> _T:
        try:
            return await self._call(kind, *parts, read=read, deadline=deadline)
        except GuestRefused as error:
            if error.errno in (errno.EUSERS, errno.E2BIG):
                raise  # no such user, too large a request: not about the path
            raise GuestFileError(error.errno, path, call=kind.name.lower().partition("_")[0]) from None

    def _tagged(self, read: Callable[[Frame], Any]) -> Callable[[Frame], Any]:
        """A handle, alone or before something else, marked with the connection that it belongs to."""

        def tagged(got: Frame) -> Any:
            answer, tag = read(got), self._resets << 8
            if isinstance(answer, int):
                return answer and answer | tag
            return answer[0] and answer[0] | tag, answer[1]

        return tagged

    def _handle(self, handle: int) -> bytes:
        if handle >> 8 != self._resets:
            raise was_reset()
        return wire.u32(handle & 0xFF)

    def _drop_handle(self, handle: int) -> None:
        if handle and self._error is None and self.connected and handle >> 8 == self._resets:
            ident, _ = self._expect(Type.RESULT, wire.read_empty)
            self._write(wire.frame(Type.CLOSE, ident, self._handle(handle)))

    def _on_frame(self, got: Frame) -> None:
        if self._error is not None:
            return
        if got.type in (Type.DATA, Type.EXIT):
            process = self._streams.get(got.id)
            if process is None:
                raise GuestProtocolError(f"the guest sent output for attachment {got.id}, which is not open")
            if got.type is Type.DATA:
                process._on_data(*wire.read_data(got))
            else:
                process._on_exit(wire.read_exit(got))
                del self._streams[got.id]
            return
        if got.type in (Type.TCP_DATA, Type.TCP_END):
            stream = self._ports.get(got.id)
            if stream is None:
                raise GuestProtocolError(f"the guest sent data of connection {got.id}, which is not open")
            if got.type is Type.TCP_DATA:
                stream._on_data(got.payload)
            else:
                stream._on_end(wire.read_code(got))
            return
        if got.id == 0 and got.type is Type.ERROR:
            raise GuestProtocolError(f"the guest agent refused our frame and hung up: {wire.read_error(got)}")
        if got.id not in self._calls or got.type not in (self._calls[got.id][0], Type.ERROR):
            raise GuestProtocolError(
                f"the guest sent {got.type.name} for request {got.id}, which awaits none"
            )
        expected, read, future = self._calls.pop(got.id)
        if got.type is Type.ERROR or expected is Type.RESULT:
            self._streams.pop(got.id, None)  # a refused START or ATTACH, a DETACH carried out
        try:
            answer = wire.read_error(got) if got.type is Type.ERROR else read(got)
        except GuestProtocolError as error:
            self._settle(future, error)
            raise
        self._settle(future, answer)

    @staticmethod
    def _settle(future: asyncio.Future[Any], answer: object) -> None:
        if future.done():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
            future.exception()  # retrieved: a call nobody waits for any more is no news
        else:
            future.set_result(answer)

    # --- a connection that is reset, and made anew ---

    @property
    def connected(self) -> bool:
        """False for the moment in which a connection that was reset is made anew."""
        return self._connection is not None

    def renew(self) -> None:
        """After a moment in which the machine may have been taken: what is sent on a connection over vsock may still
        seem to arrive, and is lost. A connection of another kind stays. For a moment nobody called in."""
        connection = self._connection
        if self._address is not None and connection is not None and self._error is None:
            self._lost(connection, was_reset())
            if connection.transport is not None:
                connection.transport.abort()

    async def _ready(self) -> None:
        """Before each call: it runs, and there is a connection."""
        while True:
            if self.gate is not None:
                await self.gate()
            if self._again is None or self._again.done():
                return
            await asyncio.wait([self._again])

    def _lost(self, connection: _Connection, error: GuestGone) -> None:
        if self._address is None or self._error is not None:
            self._fail(error)
            return
        if connection is not self._connection:
            return
        self._connection = None
        self._resets += 1
        calls, self._calls = self._calls, {}
        for _, _, future in calls.values():
            self._settle(future, was_reset())
        for stream in self._ports.values():
            stream._on_failure(was_reset())
        self._ports.clear()
        if self._again is None or self._again.done():
            self._again = asyncio.get_running_loop().create_task(connect_again(self, self._address, error))

    async def _reopen(self, address: Address) -> None:
        connection = await _open(asyncio.get_running_loop(), address, self)
        if connection.closed.done():
            raise was_reset()
        self._connection = connection

    def _drop_connection(self) -> None:
        """Of an attempt that failed."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.transport is not None:
            connection.transport.abort()

    def _fail(self, error: GuestError) -> GuestError:
        """End everything with `error`, once; later calls raise the first. Returns what was kept."""
        if self._error is None:
            self._error = error
            if self._connection is not None and self._connection.transport is not None:
                self._connection.transport.abort()
            for _, _, future in self._calls.values():
                self._settle(future, error)
            for process in self._streams.values():
                process._on_failure(error)
            for stream in self._ports.values():
                stream._on_failure(error)
            self._calls.clear()
            self._streams.clear()
            self._ports.clear()
        return self._error


_Processes: TypeAlias = list[GuestProcessInfo]  # inside GuestClient, `list` is the method
_Files: TypeAlias = list[FileInfo]


async def _open(loop: asyncio.AbstractEventLoop, address: Address, client: GuestClient) -> _Connection:
    dialed = await dial(address)
    try:
        _, connection = await loop.create_unix_connection(
            lambda: _Connection(client, dialed), sock=dialed.sock
        )
    except BaseException:
        dialed.close()
        raise
    return connection


def _who(welcome: wire.Welcome) -> GuestInfo:
    return GuestInfo(protocol=welcome.version, agent=welcome.agent, pid=welcome.pid, boot_id=welcome.boot_id)


def _pid(pid: int) -> int:
    if not 1 <= pid < 2**31:
        raise ValueError(f"pid {pid} is not a process id")
    return pid


def _info(found: wire.Stat, path: str, name: str) -> FileInfo:
    return FileInfo(
        path=path,
        name=name,
        type=found.type,
        size=found.size,
        mode=found.mode,
        uid=found.uid,
        gid=found.gid,
        mtime=found.mtime,
        target=found.target if found.type == "symlink" else None,
    )
