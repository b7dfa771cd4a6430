"""`sandbox.pty`: an interactive terminal inside. Output comes through `on_data`, as bytes."""

# ruff: noqa: ASYNC109 -- the guest kills the terminal after `timeout`

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence

from rorqual.sandbox._async.commands import AsyncCommands, account
from rorqual.sandbox._guest import GuestProcess, PtySize
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import CommandNotFound, GuestGone, GuestRefused

DEFAULT_SIZE = PtySize(rows=24, cols=80)
OnData = Callable[[bytes], Awaitable[None] | None]


class AsyncPtyHandle:
    """One terminal."""

    def __init__(self, session: Session, process: GuestProcess) -> None:
        self._session = session
        self._process = process
        self._task: asyncio.Task[int] | None = None

    @property
    def id(self) -> int:
        """Process id of its first process."""
        return self._process.pid

    async def send_stdin(self, data: str | bytes) -> None:
        """Types into the terminal."""
        await self._process.send_stdin(data.encode() if isinstance(data, str) else data)

    async def resize(self, size: PtySize) -> None:
        """Changes its size; its foreground process gets SIGWINCH."""
        await self._process.resize(size)

    async def kill(self) -> bool:
        """Ends it, with everything that runs in it."""
        return await self._session.guest.kill(self.id)

    async def wait(self) -> int:
        """Exit code of its first process. Raises SandboxEnded when the sandbox ends first."""
        assert self._task is not None
        return await asyncio.shield(self._task)

    def _start(self, on_data: OnData | None) -> None:
        self._task = asyncio.create_task(self._pump(on_data))
        self._task.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        self._session.spawn(self._task)

    async def _pump(self, on_data: OnData | None) -> int:
        try:
            async for _, data in self._process.events():
                if on_data is not None:
                    outcome = on_data(data)
                    if inspect.isawaitable(outcome):
                        await outcome
            return (await self._process.wait()).exit_code
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
        with session.alive():
            shell = await AsyncCommands(session)._shell()
            argv = [shell, "-i"] if cmd is None else [shell, "-c", cmd] if isinstance(cmd, str) else list(cmd)
            where = session.path(cwd or session.launched.workdir)
            user = user or session.launched.user
            seq = await session.log.begin(
                sandbox=session.id, kind="pty", request={"cmd": "\0".join(argv), "cwd": where, "user": user}
            )
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
                tag=str(seq),
            )
        except GuestGone as error:
            raise await session.verdict(error) from error
        session.log.finish(sandbox=session.id, seq=seq, result={"id": process.pid})
        session.processes[process.pid] = process
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
        process = await self._find(id)
        await process.send_stdin(data.encode() if isinstance(data, str) else data)

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
