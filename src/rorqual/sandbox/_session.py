"""What `commands`, `files` and `pty` of one sandbox share: the agent's connection, the log, the news of its
end.

Turns a lost connection into the sandbox's cause: whoever waits when a sandbox dies gets SandboxEnded, not a
socket error. Resumes a paused sandbox before any call to its agent, whoever paused it, and stops the clocks of the
calls that wait for one. One session belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from rorqual.sandbox._forward import Forward
from rorqual.sandbox._guest import GuestClient, GuestProcess
from rorqual.sandbox.errors import (
    Cause,
    GuestError,
    GuestGone,
    InvalidRequest,
    SandboxEnded,
    SandboxError,
    Unsupported,
)
from rorqual.sandbox.keeper.client import KeeperDied
from rorqual.sandbox.substrates import Launched
from rorqual.sandbox.trajectory import Log, TrajectoryEntry

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
    paused: bool = False
    closing: bool = False
    """This client lets go: its commands run on, and their rows stay open for whoever attaches."""
    forward: Forward | None = None
    """What a restarted client goes through again before it goes on live (`attach`)."""

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadlines: dict[asyncio.Timeout, float | None] = {}
        self._waking: asyncio.Task[None] | None = None
        self.guest.gate = self.awake
        self.launched.keeper.watch(self.id, self._on_ended)
        self.launched.keeper.watch_still(self.id, self._on_still)

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

    def _on_still(self, still: bool, paused: bool) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._set_still, still, paused)

    def _set_still(self, still: bool, paused: bool) -> None:
        held, self.paused = self.guest.still and not self.paused, paused
        if held and not still:
            self.guest.renew()
        if still != self.guest.still:
            self.guest.still = still
            self.guest.stills += still
            for scope, seconds in self._deadlines.items():
                again = None if still or seconds is None else self._loop.time() + seconds
                if not scope.expired():
                    scope.reschedule(again)
        if paused and self.guest.awaited:  # a call was under way: it reached a sandbox that is paused now
            self.spawn(self._loop.create_task(self.awake()))

    @contextlib.asynccontextmanager
    async def deadline(self, seconds: float | None) -> AsyncIterator[None]:
        """Raises TimeoutError after `seconds` of a running sandbox; a pause starts them anew."""
        async with asyncio.timeout(None if self.guest.still else seconds) as scope:
            self._deadlines[scope] = seconds
            try:
                yield
            finally:
                del self._deadlines[scope]

    async def awake(self) -> None:
        """Resumes it when it is paused; waits while its disk is copied. Raises SandboxError when that fails."""
        while self.guest.still and self.ended is None:
            if self._waking is None or self._waking.done():
                self._waking = self._loop.create_task(self._wake())
                self.spawn(self._waking)
            await asyncio.shield(self._waking)

    async def _wake(self) -> None:
        if self.paused:
            await self.resume(by="call")
        else:
            await self.keeper_call("resume")

    async def resume(self, *, by: str) -> None:
        seq = await self.log.begin(sandbox=self.id, kind="resume", request={"by": by})
        answer: dict[str, Any] = {}
        try:
            answer = await self.keeper_call("resume")
        finally:
            self.log.finish(sandbox=self.id, seq=seq, result={"paused": answer.get("paused")})

    async def keeper_call(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request about this sandbox. Raises SandboxEnded, or SandboxError with the keeper's reason."""
        try:
            answer = await asyncio.wrap_future(self.launched.keeper.request(op, sandbox=self.id, **fields))
        except KeeperDied as error:
            raise (await self.verdict(GuestGone(str(error)))) from error
        if "gone" in answer:
            raise self.end_error()
        if "error" in answer:
            stage, detail = answer["error"]["stage"], answer["error"]["detail"]
            raise SandboxError(f"{self.id}: {op} failed ({stage}): {detail}")
        return answer

    async def oom_happened(self) -> bool:
        """Whether a memory limit has killed a process since the last look: the host's, or the machine's own kernel."""
        kills = self.launched.oom_kills()
        if self.launched.own_kernel:
            # Its end is told by the next call; in a machine that is only looked at there is nobody to ask.
            with contextlib.suppress(GuestError, Unsupported):
                text = await self.guest.read_file("/proc/vmstat", limit=1 << 16)
                counts = dict(
                    line.split() for line in text.decode("ascii", "replace").splitlines() if " " in line
                )
                kills += int(counts.get("oom_kill", 0))
        happened, self.oom_seen = kills > self.oom_seen, kills
        return happened

    def end_error(self) -> SandboxEnded:
        cause, detail = self.ended or ("infra", "the keeper gave no cause")
        return SandboxEnded(self.id, cause=cast(Cause, cause), detail=detail)

    def forwarded(self, kind: str, request: Mapping[str, Any]) -> TrajectoryEntry | None:
        """The row of a call that was made before; None: it is to be done now. Raises TrajectoryMismatch."""
        return self.forward.take(kind, request) if self.forward is not None else None

    def tag(self, seq: int) -> str:
        """What a command is called in its guest. With the id: a fork of a memory has its parent's commands."""
        return f"{self.id}/{seq}"

    def seq_of(self, tag: str) -> int:
        """The number of a command of this sandbox; 0 when it is another's."""
        head, _, seq = tag.rpartition("/")
        return int(seq) if head == self.id and seq.isdigit() else 0

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
        """Drops the connection. The sandbox and its commands live on. Idempotent."""
        self.closing = True
        self.launched.keeper.unwatch(self.id, self._on_ended)
        self.launched.keeper.unwatch_still(self.id, self._on_still)
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)
        await self.guest.close()
