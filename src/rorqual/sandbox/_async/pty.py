"""`sandbox.pty`: an interactive terminal inside. Output comes through `on_data`, as bytes."""

# ruff: noqa: ASYNC109 -- the guest kills the terminal after `timeout`

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rorqual.sandbox._async.commands import AsyncCommands, account
from rorqual.sandbox._guest import GuestProcess, PtySize
from rorqual.sandbox._reattach import reattach, type_in
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import CommandNotFound, GuestGone, GuestRefused, SandboxEnded
from rorqual.sandbox.trajectory import TrajectoryEntry

DEFAULT_SIZE = PtySize(rows=24, cols=80)
OnData = Callable[[bytes], Awaitable[None] | None]


class AsyncPtyHandle:
    """One terminal."""

    def __init__(self, session: Session, process: GuestProcess | None, *, pid: int = 0) -> None:
        self._session = session
        self._process = process
        self._pid = process.pid if process is not None else pid
        self._task: asyncio.Task[int] | None = None

    @property
    def id(self) -> int:
        """Process id of its first process."""
        return self._pid

    async def send_stdin(self, data: str | bytes) -> None:
        """Types into the terminal; in the log before it is sent."""
        fed = data.encode() if isinstance(data, str) else data
        await type_in(self._session, self._process, self.id, fed, eof=False)

    async def resize(self, size: PtySize) -> None:
        """Changes its size; its foreground process gets SIGWINCH."""
        if self._process is None:
            raise CommandNotFound(self._session.id, self.id)
        await self._process.resize(size)

    async def kill(self) -> bool:
        """Ends it, with everything that runs in it."""
        return await AsyncCommands(self._session).kill(self.id)

    async def wait(self) -> int:
        """Exit code of its first process. Raises SandboxEnded when the sandbox ends first.

        CommandNotFound: it had ended before this client was attached, and its exit code was not logged.
        """
        if self._task is None:
            raise CommandNotFound(self._session.id, self.id)
        return await asyncio.shield(self._task)

    def _start(self, on_data: OnData | None) -> None:
        self._task = asyncio.create_task(self._pump(on_data))
        self._task.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        self._session.spawn(self._task)

    async def _pump(self, on_data: OnData | None) -> int:
        process = self._process
        assert process is not None
        try:
            async for _, data in process.events():
                if on_data is not None:
                    outcome = on_data(data)
                    if inspect.isawaitable(outcome):
                        await outcome
            return (await process.wait()).exit_code
        except GuestGone as error:
            raise await self._session.verdict(error) from error
        finally:
            self._session.processes.pop(self.id, None)


class AsyncPty:
    """Terminals of one sandbox."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def create(
        self,
        *,
        size: PtySize = DEFAULT_SIZE,
        cmd: str | Sequence[str] | None = None,
        cwd: str | None = None,
        envs: Mapping[str, str] | None = None,
        user: str | None = None,
        on_data: OnData | None = None,
        timeout: float | None = None,
    ) -> AsyncPtyHandle:
        """Starts a shell (or `cmd`) on a terminal. timeout: seconds until it is killed; None: the sandbox's
        lifetime."""
        session = self._session
        where, user = session.path(cwd or session.launched.workdir), user or session.launched.user
        request: dict[str, Any] = {"cmd": _text(cmd), "cwd": where, "user": user}
        entry = session.forwarded("pty", request)
        if entry is not None:
            again = await self._again(entry, on_data)
            if again is not None:
                return again
        with session.alive():
            shell = await AsyncCommands(session)._shell()
            argv = [shell, "-i"] if cmd is None else [shell, "-c", cmd] if isinstance(cmd, str) else list(cmd)
            request["agent"] = session.guest.info.boot_id
            begun = session.log.begin
            seq = entry.seq if entry else await begun(sandbox=session.id, kind="pty", request=request)
        try:
            process = await session.guest.start(
                argv,
                cwd=where,
                env={"TERM": "xterm-256color", **account(user), **session.envs, **(envs or {})},
                user=user,
                stdin=True,
                pty=size,
                timeout=timeout,
                max_output=1 << 40,  # a terminal streams; nothing of it is kept here
                tag=session.tag(seq),
            )
        except GuestGone as error:
            raise await session.verdict(error) from error
        session.log.finish(sandbox=session.id, seq=seq, result={"id": process.pid})
        session.processes[process.pid] = process
        handle = AsyncPtyHandle(session, process)
        handle._start(on_data)
        return handle

    async def _again(self, entry: TrajectoryEntry, on_data: OnData | None) -> AsyncPtyHandle | None:
        """The terminal of a row: it, when the guest still has it; an ended one; None when it never started."""
        session = self._session
        if entry.result is None:
            process = await reattach(session, entry)
            if process is None:
                return None
            session.log.finish(sandbox=session.id, seq=entry.seq, result={"id": process.pid})
        else:
            try:
                process = await self._attach(entry.result["id"])
            except (CommandNotFound, SandboxEnded):
                return AsyncPtyHandle(session, None, pid=entry.result["id"])
        handle = AsyncPtyHandle(session, process)
        handle._start(on_data)
        return handle

    async def connect(self, id: int, *, on_data: OnData | None = None) -> AsyncPtyHandle:
        """A handle on a terminal that runs, with its recent output first. Raises CommandNotFound."""
        handle = AsyncPtyHandle(self._session, await self._attach(id))
        handle._start(on_data)
        return handle

    async def send_stdin(self, id: int, data: str | bytes) -> None:
        """Types into a terminal."""
        fed = data.encode() if isinstance(data, str) else data
        process = self._session.processes.get(id)
        if process is None and not self._session.forward:
            process = await self._attach(id)
        await type_in(self._session, process, id, fed, eof=False)

    async def resize(self, id: int, size: PtySize) -> None:
        """Changes a terminal's size."""
        await (await self._find(id)).resize(size)

    async def kill(self, id: int) -> bool:
        """Ends a terminal, with everything that runs in it; False when there is none."""
        return await AsyncCommands(self._session).kill(id)

    async def _find(self, id: int) -> GuestProcess:
        known = self._session.processes.get(id)
        return known if known is not None else await self._attach(id)

    async def _attach(self, id: int) -> GuestProcess:
        session = self._session
        try:
            with session.alive():
                process = await session.guest.attach(id)
        except GuestGone as error:
            raise await session.verdict(error) from error
        except GuestRefused as error:
            raise CommandNotFound(session.id, id) from error
        session.processes[id] = process
        return process


def _text(cmd: str | Sequence[str] | None) -> str:
    return "" if cmd is None else cmd if isinstance(cmd, str) else "\0".join(cmd)
