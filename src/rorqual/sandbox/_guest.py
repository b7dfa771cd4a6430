"""Client of the guest agent: one multiplexed connection, commands, files.

Interface in place first; the bodies follow with the agent (native/guest, docs/guest-protocol.md).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

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
    """0..255 from exit(); 128 + signal if a signal ended it; 127 not found, 126 not executable, bad cwd or user."""
    signal: int
    """The signal that ended the main process, 0 if none."""
    timed_out: bool
    truncated: bool
    """Some output is missing from what this client could read (over max_output, or overwritten before attach)."""
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


class GuestProcess:
    """One command, as seen through one connection."""

    pid: int
    """Process id of the command's main process, in the guest's namespace."""

    def events(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        """Output in order of arrival, until the command has ended and everything kept was delivered."""
        raise NotImplementedError

    async def wait(self) -> GuestExit:
        """Wait for the end. Output nobody iterates is buffered up to `max_output` a stream, and events() still has it."""
        raise NotImplementedError

    async def send_stdin(self, data: bytes) -> None: ...

    async def close_stdin(self) -> None: ...

    async def resize(self, size: PtySize) -> None: ...

    async def kill(self, signal: int = 9) -> bool:
        raise NotImplementedError

    async def detach(self) -> None:
        """Stop receiving output; the command runs on and can be attached again."""


class GuestClient:
    """One connection to a guest agent."""

    info: GuestInfo

    @classmethod
    async def connect(cls, path: str | Path, *, timeout: float = 10.0) -> GuestClient:
        """Connect to the agent's Unix socket and shake hands; retries until `timeout` while nobody listens."""
        raise NotImplementedError

    async def __aenter__(self) -> GuestClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        stdin: bool = False,
        pty: PtySize | None = None,
        timeout: float | None = None,
        max_output: int = MAX_OUTPUT,
        tag: str = "",
    ) -> GuestProcess:
        """Start a command. `env` is laid over the agent's own environment; `cwd` None is the user's home."""
        raise NotImplementedError

    async def attach(self, pid: int) -> GuestProcess:
        raise NotImplementedError

    async def list(self) -> list[GuestProcessInfo]:
        raise NotImplementedError

    async def kill(self, pid: int, *, signal: int = 9) -> bool:
        raise NotImplementedError

    async def read_file(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        raise NotImplementedError

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
        """`mode` None keeps an existing file's bits, else 0o644; `user` owns what is created (None: the agent's user)."""
        raise NotImplementedError

    async def stat(self, path: str) -> FileInfo:
        raise NotImplementedError

    async def list_dir(self, path: str) -> list[FileInfo]:
        raise NotImplementedError

    async def make_dir(self, path: str, *, parents: bool = True, user: str | int | None = None) -> bool:
        """False if the directory was already there."""
        raise NotImplementedError

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        raise NotImplementedError

    async def rename(self, src: str, dst: str) -> None:
        raise NotImplementedError

    async def exists(self, path: str) -> bool:
        raise NotImplementedError

    async def close(self) -> None:
        """Close the connection; commands run on. Idempotent."""
        raise NotImplementedError
