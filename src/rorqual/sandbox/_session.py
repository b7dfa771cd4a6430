"""What `commands`, `files` and `pty` of one sandbox share: the agent's connection, the log, the news of its
end.

Turns a lost connection into the sandbox's cause: whoever waits when a sandbox dies gets SandboxEnded, not a
socket error. One session belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from rorqual.sandbox._guest import GuestClient, GuestProcess
from rorqual.sandbox.errors import Cause, GuestGone, InvalidRequest, SandboxEnded
from rorqual.sandbox.substrates import Launched
from rorqual.sandbox.trajectory import Log

VERDICT_S = 2.0
"""How long a lost connection waits for the keeper's word on the cause."""


@dataclass(kw_only=True, eq=False)
class Session:
    """One client's hold on one live sandbox."""

    launched: Launched
    guest: GuestClient
    log: Log
    envs: Mapping[str, str]
    shell: str = ""
    """Path of bash or sh inside, looked up at the first command."""
    oom_seen: int = 0
    ended: tuple[str, str] | None = None
    """(cause, detail) once it is over."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    processes: dict[int, GuestProcess] = field(default_factory=dict)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.launched.keeper.watch(self.id, self._on_ended)

    @property
    def id(self) -> str:
        return self.launched.sandbox_id

    def _on_ended(self, cause: str, detail: str) -> None:
        self.ended = (cause, detail)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        """Wakes whoever waits. A dead keeper leaves the agent running: hang up, so that nobody waits for it."""
        self.over.set()
        self.spawn(self._loop.create_task(self.guest.close()))

    def end_error(self) -> SandboxEnded:
        cause, detail = self.ended or ("infra", "the keeper gave no cause")
        return SandboxEnded(self.id, cause=cast(Cause, cause), detail=detail)

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Raises SandboxEnded before anything is logged or sent to a sandbox that is over."""
        if self.ended is not None:
            raise self.end_error()
        yield

    async def verdict(self, error: GuestGone) -> Exception:
        """What to raise for a lost connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(VERDICT_S):
                await self.over.wait()
        return self.end_error() if self.ended is not None else error

    def path(self, path: str) -> str:
        """Absolute path inside; a relative one starts at the working directory."""
        if not path or "\0" in path:
            raise InvalidRequest(f"path: {path!r} is empty or holds a NUL byte")
        while path.startswith("./"):
            path = path[2:].lstrip("/")
        return self.launched.workdir if path in ("", ".") else posixpath.join(self.launched.workdir, path)

    def spawn(self, task: asyncio.Task[Any]) -> None:
        """Keeps a background task until it is done; closing the session cancels it."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def close(self) -> None:
        """Drops the connection. The sandbox lives on. Idempotent."""
        self.launched.keeper.unwatch(self.id, self._on_ended)
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)
        await self.guest.close()
