"""One command seen through one guest connection, and the records the guest client hands out.

Owns a command's output on the host side: chunks, credit (flow control), what may be buffered. Never touches
the socket: sandbox/_guest.py does, and feeds frames in here.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from . import _protocol as wire
from ._protocol import Type
from .errors import GuestError, GuestProtocolError, GuestRefused

if TYPE_CHECKING:
    from ._guest import GuestClient

StreamName: TypeAlias = Literal["stdout", "stderr"]
_NAMES: tuple[StreamName, StreamName] = ("stdout", "stderr")

MAX_OUTPUT = 10 << 20
"""Default of `max_output`: bytes per stream that are kept and forwarded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PtySize:
    """A terminal's size in characters, each 1 to 65535."""

    rows: int = 24
    cols: int = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestInfo:
    """What the agent said of itself in the handshake."""

    protocol: int
    agent: str
    """The agent's version, for logs."""
    pid: int
    """The agent's process id in its own namespace; 1 in a sandbox."""
    boot_id: str
    """32 hex digits, drawn when the agent started: two connections with one boot_id see the same commands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestExit:
    """How a command ended."""

    exit_code: int
    """From exit(), or 128 + signal; 127 program not found; 126 not executable, bad cwd, bad user."""
    signal: int
    """The signal that ended the main process, 0 if none."""
    timed_out: bool
    truncated: bool
    """Output is missing from what this client could read (over max_output, or overwritten before attach)."""
    stdout_bytes: int
    """Bytes the command wrote, kept or not."""
    stderr_bytes: int
    duration: float
    """Seconds from start to the end of the main process."""
    error: str
    """Why the command could not be started ("" if it was); the same text is the last line of its stderr."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestProcessInfo:
    """One line of `GuestClient.list`."""

    pid: int
    argv: tuple[str, ...]
    """What was started, cut to 256 bytes by the agent."""
    tag: str
    running: bool
    pty: bool
    started: float
    """Seconds since the command was started."""
    exit_code: int | None
    """None while it runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """lstat of one path in the guest."""

    path: str
    name: str
    type: Literal["file", "dir", "symlink", "other"]
    size: int
    mode: int
    """Permission bits, 0..0o7777."""
    uid: int
    gid: int
    mtime: float
    target: str | None
    """Where a symlink points, else None."""


WINDOW = 512 * 1024
"""Bytes of a command's output that may be under way or unread; the guest stops beyond."""


def pty_size(size: PtySize) -> tuple[int, int]:
    """Rows and columns, checked. Raises ValueError."""
    if not (1 <= size.rows <= 65535 and 1 <= size.cols <= 65535):
        raise ValueError(f"terminal of {size.rows} rows, {size.cols} columns: each must be 1 to 65535")
    return size.rows, size.cols


class GuestProcess:
    """One command, as seen through one connection. Made by `GuestClient.start` and `.attach`."""

    def __init__(self, client: GuestClient, ident: int, limit: int, *, strict: bool) -> None:
        self.pid = 0
        """Process id of the command's main process, in the guest's namespace."""
        self._client = client
        self._id = ident
        self._limit = limit
        self._strict = strict  # we set max_output ourselves: more than that is a broken guest, not a cut
        self._chunks: deque[tuple[StreamName, bytes]] = deque()
        self._got = [0, 0]
        self._credit = WINDOW  # what the guest may still send
        self._owed = 0  # consumed, not granted again yet
        self._greedy = False  # wait() was called: buffer up to the limit instead of holding the command back
        self._cut = False
        self._exit: GuestExit | None = None
        self._error: GuestError | None = None
        self._wake = asyncio.Event()
        self._stdin = asyncio.Lock()
        self._detached = False

    def events(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        """Output in order of arrival, each chunk once, until the command ended and all of it was delivered.

        A consumer that pauses holds the command back (flow control). Raises GuestGone, GuestProtocolError.
        """
        return self._events()

    async def _events(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        while True:
            while self._chunks:
                name, data = self._chunks.popleft()
                if not self._greedy:
                    self._consumed(len(data))
                yield name, data
            if self._exit is not None or self._detached:
                return
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()

    async def wait(self) -> GuestExit:
        """Wait for the end. Raises GuestGone, GuestProtocolError.

        From here on nothing is held back: output nobody iterates is buffered, at most `max_output` bytes a
        stream, and a later events() still has it.
        """
        if not self._greedy:
            self._greedy = True
            self._consumed(sum(len(data) for _, data in self._chunks))
        while self._exit is None:
            if self._error is not None:
                raise self._error
            if self._detached:
                raise GuestRefused(
                    "detached from this command: attach again to wait for it", errno=errno.ESTALE
                )
            self._wake.clear()
            await self._wake.wait()
        return self._exit

    async def send_stdin(self, data: bytes) -> None:
        """Write to the command's stdin; returns when the command's pipe or terminal has taken it all.

        Raises GuestRefused: EPIPE (not open, or the command reads no more), EBUSY (another client writes).
        """
        async with self._stdin:
            for at in range(0, len(data), wire.MAX_CHUNK // 2):
                await self._send(data[at : at + wire.MAX_CHUNK // 2], eof=False)

    async def close_stdin(self) -> None:
        """End of input; ^D on a terminal. Idempotent."""
        async with self._stdin:
            try:
                await self._send(b"", eof=True)
            except GuestRefused as error:
                if error.errno not in (errno.EPIPE, errno.ESRCH):
                    raise

    async def _send(self, data: bytes, *, eof: bool) -> None:
        await self._client._call(
            Type.STDIN, wire.u32(self.pid), wire.u8(eof), data, read=wire.read_empty, deadline=None
        )

    async def resize(self, size: PtySize) -> None:
        """Tell the terminal its size. Raises GuestRefused (ENOTTY: no terminal; EIO: it is gone)."""
        rows, cols = pty_size(size)
        size_bytes = wire.u16(rows) + wire.u16(cols)
        await self._client._call(Type.RESIZE, wire.u32(self.pid), size_bytes, read=wire.read_empty)

    async def kill(self, signal: int = 9) -> bool:
        """As `GuestClient.kill`."""
        return await self._client.kill(self.pid, signal=signal)

    async def detach(self) -> None:
        """Stop receiving; the command runs on, unhindered, and can be attached again. Idempotent."""
        if self._detached or self._exit is not None or self._error is not None:
            return
        self._detached = True
        self._wake.set()
        await self._client._detach(self._id)

    def _consumed(self, count: int) -> None:
        """`count` bytes need no room any more: grant them again, in steps that keep the frames few."""
        self._owed += count
        if not self._client.connected:
            return
        if self._owed < WINDOW // 4 or self._exit is not None or self._error is not None or self._detached:
            return
        self._credit += self._owed
        self._client._write(wire.frame(Type.CREDIT, self._id, wire.u32(self._owed)))
        self._owed = 0

    def _resume(self) -> bytes | None:
        """The request that goes on where a lost connection ended; None when nobody can tell where that was."""
        if self.pid == 0 or not self._strict or self._detached:
            return None
        self._credit, self._owed = self._credit + self._owed, 0
        have = (wire.u64(count) for count in self._got)
        return wire.frame(Type.RESUME, self._id, wire.u32(self.pid), wire.u32(self._credit), *have)

    def _on_data(self, stream: int, data: bytes) -> None:
        self._credit -= len(data)
        if self._credit < 0:
            raise GuestProtocolError(
                f"the guest sent more output of command {self.pid} than it had credit for"
            )
        room = max(0, self._limit - self._got[stream])
        if len(data) > room:
            if self._strict:
                raise GuestProtocolError(
                    f"the guest sent over max_output ({self._limit}) bytes of {_NAMES[stream]}"
                )
            self._cut = True
        self._got[stream] += len(data)
        kept = data[:room]
        if kept and not self._detached:
            self._chunks.append((_NAMES[stream], kept))
        self._consumed(len(data) if self._greedy else len(data) - len(kept))
        self._wake.set()

    def _on_exit(self, end: wire.Exit) -> None:
        self._exit = GuestExit(
            exit_code=end.exit_code,
            signal=end.signal,
            timed_out=end.timed_out,
            truncated=end.truncated or self._cut,
            stdout_bytes=end.stdout_bytes,
            stderr_bytes=end.stderr_bytes,
            duration=end.duration_ns / 1e9,
            error=end.error,
        )
        self._wake.set()

    def _on_failure(self, error: GuestError) -> None:
        if self._exit is None:
            self._error = error
        self._wake.set()
