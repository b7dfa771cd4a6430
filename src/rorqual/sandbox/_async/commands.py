"""`sandbox.commands`: run, list, kill, connect. E2B's nouns; a command's failure is a result.

Order of a command: intent in the trajectory log (durable) -> start in the guest -> output -> result in the
log.
"""

# ruff: noqa: ASYNC109 -- `timeout` is the guest's deadline for the command, enforced there, and E2B's name
# for it

from __future__ import annotations

import asyncio
import builtins
import codecs
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, overload

from rorqual.sandbox._forward import digest
from rorqual.sandbox._guest import MAX_OUTPUT, GuestExit, GuestProcess
from rorqual.sandbox._reattach import cached, forward_of, reattach, rest_of_input, type_in
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import CommandNotFound, GuestGone, GuestRefused, InvalidRequest
from rorqual.sandbox.records import CommandInfo, CommandResult
from rorqual.sandbox.trajectory import TrajectoryEntry

OnOutput = Callable[[str], Awaitable[None] | None]
"""Called with each piece of output as it arrives; may be a coroutine function."""
STARTED: ContextVar[Callable[[AsyncCommandHandle], None] | None] = ContextVar("started", default=None)
"""Told of a command that has started: an edge's client must know its id before its end."""
GRACE_S = 15.0
"""How much longer than the guest's own deadline the host waits before it calls the agent dead."""


class AsyncCommandHandle:
    """A command that runs in the background."""

    def __init__(
        self, session: Session, process: GuestProcess | None, *, seq: int, log_result: bool, pid: int = 0
    ) -> None:
        self._session = session
        self._process = process
        self._pid = process.pid if process is not None else pid
        self._seq = seq
        self._log_result = log_result
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._task: asyncio.Task[CommandResult] | None = None

    @property
    def id(self) -> int:
        """Process id inside the sandbox: what `commands.connect(id)` takes."""
        return self._pid

    @property
    def seq(self) -> int:
        """Its number in the trajectory log."""
        return self._seq

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._stdout.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        return self._stderr.decode("utf-8", "replace")

    async def wait(self) -> CommandResult:
        """Waits for its end. Raises SandboxEnded when the sandbox ends first."""
        assert self._task is not None
        return await asyncio.shield(self._task)

    async def kill(self, *, signal: int = 9) -> bool:
        """Signals its whole process group; False when it had ended."""
        return await AsyncCommands(self._session).kill(self.id, signal=signal)

    async def send_stdin(self, data: str | bytes) -> None:
        """Writes to its standard input (started with `stdin=True`); in the log before it is sent."""
        fed = data.encode() if isinstance(data, str) else data
        await type_in(self._session, self._process, self.id, fed, eof=False)

    async def close_stdin(self) -> None:
        """Ends its standard input."""
        await type_in(self._session, self._process, self.id, b"", eof=True)

    def _start(self, on_stdout: OnOutput | None, on_stderr: OnOutput | None) -> None:
        self._task = asyncio.create_task(self._pump(on_stdout, on_stderr, deadline=None))
        self._task.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        self._session.spawn(self._task)

    def _known(self, result: CommandResult) -> None:
        """It had ended before: nothing runs."""
        self._stdout += result.stdout.encode()
        self._stderr += result.stderr.encode()

        async def known() -> CommandResult:
            return result

        self._task = asyncio.create_task(known())
        self._session.spawn(self._task)

    async def _pump(
        self, on_stdout: OnOutput | None, on_stderr: OnOutput | None, *, deadline: float | None
    ) -> CommandResult:
        """Collects output until the end, hands it to the callbacks, logs the result."""
        session, process = self._session, self._process
        assert process is not None
        targets = {
            "stdout": (self._stdout, _decoded(on_stdout)),
            "stderr": (self._stderr, _decoded(on_stderr)),
        }
        try:
            async with session.deadline(deadline):
                async for stream, data in process.events():
                    buffer, callback = targets[stream]
                    buffer += data
                    if callback is not None:
                        await callback(data)
                exit_ = await process.wait()
        except BaseException as error:
            await self._abandon(error)
            if isinstance(error, GuestGone):
                raise await session.verdict(error) from error
            if isinstance(error, TimeoutError):
                raise GuestGone(f"{session.id}: the agent let a deadline pass by {GRACE_S:g} s") from error
            raise
        finally:
            session.processes.pop(self.id, None)
        for _, callback in targets.values():
            if callback is not None:
                await callback(b"", final=True)
        oom = exit_.exit_code != 0 and not exit_.timed_out and await session.oom_happened()
        return self._result(exit_, oom=oom)

    async def _kill_and_wait(self) -> None:
        await self._session.guest.kill(self.id)
        if self._process is not None:
            await self._process.wait()

    async def _abandon(self, error: BaseException) -> None:
        """Cancelled, or the connection died: the command must not run on unseen; the log says what
        happened."""
        letting_go = self._session.closing and self._session.ended is None
        if letting_go and isinstance(error, asyncio.CancelledError | GuestGone):
            return
        if isinstance(error, asyncio.CancelledError | Exception) and not isinstance(error, GuestGone):
            kill = asyncio.ensure_future(self._kill_and_wait())
            kill.add_done_callback(lambda task: None if task.cancelled() else task.exception())
            await asyncio.wait([kill], timeout=5.0)
        if self._log_result:
            self._session.log.finish(
                sandbox=self._session.id,
                seq=self._seq,
                result={"abandoned": type(error).__name__},
                stdout=bytes(self._stdout),
                stderr=bytes(self._stderr),
            )

    def _result(self, exit_: GuestExit, *, oom: bool) -> CommandResult:
        session = self._session
        if self._log_result:
            session.log.finish(
                sandbox=session.id,
                seq=self._seq,
                result={
                    "exit_code": exit_.exit_code,
                    "timed_out": exit_.timed_out,
                    "truncated": exit_.truncated,
                    "oom": oom,
                    "duration": exit_.duration,
                    "error": exit_.error,
                    "pid": self.id,
                    "stdout_bytes": exit_.stdout_bytes,
                    "stderr_bytes": exit_.stderr_bytes,
                    "stdout_text_sha256": digest(self.stdout.encode()),
                    "stderr_text_sha256": digest(self.stderr.encode()),
                },
                stdout=bytes(self._stdout),
                stderr=bytes(self._stderr),
            )
        return CommandResult(
            stdout=self.stdout,
            stderr=self.stderr,
            exit_code=exit_.exit_code,
            timed_out=exit_.timed_out,
            truncated=exit_.truncated,
            oom=oom,
            seq=self._seq,
            duration=exit_.duration,
            stdout_bytes=exit_.stdout_bytes,
            stderr_bytes=exit_.stderr_bytes,
            error=exit_.error,
        )


class AsyncCommands:
    """Commands of one sandbox."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @overload
    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = 60.0,
        cwd: str | None = None,
        envs: Mapping[str, str] | None = None,
        user: str | None = None,
        on_stdout: OnOutput | None = None,
        on_stderr: OnOutput | None = None,
        background: Literal[False] = False,
        stdin: str | bytes | bool = False,
        max_output: int = MAX_OUTPUT,
    ) -> CommandResult: ...

    @overload
    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = 60.0,
        cwd: str | None = None,
        envs: Mapping[str, str] | None = None,
        user: str | None = None,
        on_stdout: OnOutput | None = None,
        on_stderr: OnOutput | None = None,
        background: Literal[True],
        stdin: str | bytes | bool = False,
        max_output: int = MAX_OUTPUT,
    ) -> AsyncCommandHandle: ...

    @overload
    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = 60.0,
        cwd: str | None = None,
        envs: Mapping[str, str] | None = None,
        user: str | None = None,
        on_stdout: OnOutput | None = None,
        on_stderr: OnOutput | None = None,
        background: bool,
        stdin: str | bytes | bool = False,
        max_output: int = MAX_OUTPUT,
    ) -> CommandResult | AsyncCommandHandle: ...

    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = 60.0,
        cwd: str | None = None,
        envs: Mapping[str, str] | None = None,
        user: str | None = None,
        on_stdout: OnOutput | None = None,
        on_stderr: OnOutput | None = None,
        background: bool = False,
        stdin: str | bytes | bool = False,
        max_output: int = MAX_OUTPUT,
    ) -> CommandResult | AsyncCommandHandle:
        """Runs a shell command (a string, through bash or sh) or a program (a list of arguments).

        timeout: seconds until the guest kills its whole process group; None: as long as the sandbox lives.
        stdin: text to feed it, or True to feed a background command by `send_stdin`.
        max_output: bytes kept per stream; the rest is read and dropped (`truncated`).
        background: returns a handle at once instead of the result.
        on_stdout, on_stderr: called with each piece as it arrives; with `Sandbox` in the SDK's own thread.

        Raises:
            SandboxEnded: the sandbox is over, or ends while the command runs. `cause` says why.
            InvalidRequest: an argument is wrong; nothing ran and nothing was logged.
            TrajectoryError: the log cannot be written, so nothing ran.
            TrajectoryMismatch, UnknownOutcome: after `attach` alone.
        """
        session = self._session
        text = _check(cmd, timeout=timeout, max_output=max_output)
        feed = stdin.encode() if isinstance(stdin, str) else stdin
        cwd, user = session.path(cwd or session.launched.workdir), user or session.launched.user
        request = _request(cmd, text, cwd=cwd, user=user, timeout=timeout, envs=envs, feed=feed)
        if background:
            request["background"] = True
        entry = session.forwarded("command", request)
        if entry is not None and entry.result is not None:
            return await self._from_log(entry, on_stdout, on_stderr, background=background)
        process = await reattach(session, entry) if entry is not None else None
        again = process is not None
        with session.alive():
            argv = [await self._shell(), "-c", cmd] if isinstance(cmd, str) else list(cmd)
            request["agent"] = session.guest.info.boot_id
            fed = feed if isinstance(feed, bytes) else b""
            begun = session.log.begin
            seq = (
                entry.seq
                if entry is not None
                else await begun(sandbox=session.id, kind="command", request=request, input=fed)
            )
        try:
            if process is None:
                process = await session.guest.start(
                    argv,
                    cwd=cwd,
                    env={**account(user), **session.envs, **(envs or {})},
                    user=user,
                    stdin=feed is not False,
                    timeout=timeout,
                    max_output=max_output,
                    tag=session.tag(seq),
                )
        except GuestGone as error:
            raise await session.verdict(error) from error
        closed = False
        if again and entry is not None and isinstance(feed, bytes):
            feed, closed = await rest_of_input(session, entry, process.pid, feed)
        handle = AsyncCommandHandle(session, process, seq=seq, log_result=True)
        session.processes[process.pid] = process
        if (tell := STARTED.get()) is not None:
            tell(handle)
        feeding = None
        if isinstance(feed, bytes) and not closed:
            feeding = asyncio.create_task(_feed(session, process, feed))
        if background:
            handle._start(on_stdout, on_stderr)
            if feeding is not None:
                session.spawn(feeding)
            return handle
        try:
            deadline = None if timeout is None else timeout + GRACE_S
            return await handle._pump(on_stdout, on_stderr, deadline=deadline)
        finally:
            if feeding is not None and not feeding.cancel():
                feeding.result()

    async def _from_log(
        self,
        entry: TrajectoryEntry,
        on_stdout: OnOutput | None,
        on_stderr: OnOutput | None,
        *,
        background: bool,
    ) -> CommandResult | AsyncCommandHandle:
        """What a restarted client gets for a command that has ended: the same, without running it."""
        result = cached(self._session, entry)
        for callback, text in ((on_stdout, result.stdout), (on_stderr, result.stderr)):
            outcome = callback(text) if callback is not None and text else None
            if inspect.isawaitable(outcome):
                await outcome
        if not background:
            return result
        pid = (entry.result or {}).get("pid", 0)
        handle = AsyncCommandHandle(self._session, None, seq=entry.seq, log_result=False, pid=pid)
        handle._known(result)
        return handle

    async def list(self) -> builtins.list[CommandInfo]:
        """Commands that run, or ended a short while ago."""
        try:
            with self._session.alive():
                infos = await self._session.guest.list()
        except GuestGone as error:
            raise await self._session.verdict(error) from error
        return [
            CommandInfo(
                id=info.pid,
                command=info.argv[2] if len(info.argv) == 3 and info.argv[1] == "-c" else " ".join(info.argv),
                running=info.running,
                pty=info.pty,
                started=info.started,
                exit_code=info.exit_code,
            )
            for info in infos
        ]

    async def kill(self, id: int, *, signal: int = 9) -> bool:
        """Signals the whole process group of a command; False when there is none that runs."""
        session = self._session
        request = {"command": id, "signal": signal}
        entry = session.forwarded("kill", request)
        if entry is not None and entry.result is not None:
            return bool(entry.result["found"])
        if entry is not None and session.ended is not None:
            raise forward_of(session).unknown(entry, f"the sandbox ended ({session.ended[0]})")
        try:
            with session.alive():
                if entry is not None and signal != 9:
                    raise forward_of(session).unknown(entry, "the signal may have been delivered", running=id)
                seq = (
                    entry.seq
                    if entry is not None  # nothing is killed twice by SIGKILL
                    else await session.log.begin(sandbox=session.id, kind="kill", request=request)
                )
                found = await session.guest.kill(id, signal=signal)
        except GuestGone as error:
            raise await session.verdict(error) from error
        session.log.finish(sandbox=session.id, seq=seq, result={"found": found})
        return found

    async def connect(
        self, id: int, *, on_stdout: OnOutput | None = None, on_stderr: OnOutput | None = None
    ) -> AsyncCommandHandle:
        """A handle on a command that runs or ended a short while ago, with its output from the start
        (bounded).

        Raises:
            CommandNotFound: no such command.
        """
        session = self._session
        try:
            with session.alive():
                info = next((info for info in await session.guest.list() if info.pid == id), None)
                if info is None:
                    raise CommandNotFound(session.id, id)
                process = await session.guest.attach(id)
        except GuestGone as error:
            raise await session.verdict(error) from error
        except GuestRefused as error:
            raise CommandNotFound(session.id, id) from error
        seq = session.seq_of(info.tag)
        handle = AsyncCommandHandle(session, process, seq=seq, log_result=False)
        handle._start(on_stdout, on_stderr)
        return handle

    async def _shell(self) -> str:
        session = self._session
        if not session.shell:
            try:
                bash = await session.guest.exists("/bin/bash")
            except GuestGone as error:
                raise await session.verdict(error) from error
            session.shell = "/bin/bash" if bash else "/bin/sh"
        return session.shell


def account(user: str) -> dict[str, str]:
    home = "/root" if user == "root" else f"/home/{user}"
    return {"HOME": home, "USER": user, "LOGNAME": user}


def _check(cmd: str | Sequence[str], *, timeout: float | None, max_output: int) -> str:
    parts = [cmd] if isinstance(cmd, str) else list(cmd)
    if not parts or not all(isinstance(part, str) and "\0" not in part for part in parts) or not parts[0]:
        raise InvalidRequest(f"cmd: {cmd!r} must be a non-empty string or list of strings, without NUL bytes")
    if timeout is not None and not timeout > 0:
        raise InvalidRequest(f"timeout: {timeout!r} must be above 0 seconds, or None for no limit")
    if max_output < 0:
        raise InvalidRequest(f"max_output: {max_output!r} must be 0 bytes or more")
    return cmd if isinstance(cmd, str) else "\0".join(parts)


def _request(
    cmd: str | Sequence[str],
    text: str,
    *,
    cwd: str,
    user: str,
    timeout: float | None,
    envs: Mapping[str, str] | None,
    feed: bytes | bool,
) -> dict[str, Any]:
    """What the log has of a command before it starts."""
    request: dict[str, Any] = {"cmd": text, "cwd": cwd, "user": user, "timeout": timeout}
    if not isinstance(cmd, str):
        request["list"] = True
    if envs:
        request["envs"] = dict(envs)
    if isinstance(feed, bytes):
        request |= {"stdin": feed.decode("utf-8", "replace"), "input_sha256": digest(feed)}
    elif feed:
        request["stdin"] = True
    return request


async def _feed(session: Session, process: GuestProcess, data: bytes) -> None:
    try:
        await process.send_stdin(data)
        await process.close_stdin()
    except (GuestGone, GuestRefused):
        pass  # it ended without reading all of its input; its result says how
    except Exception:
        await session.guest.kill(process.pid)  # it would wait for ever for the rest
        raise


def _decoded(callback: OnOutput | None) -> Callable[..., Awaitable[None]] | None:
    """Wraps a callback on text around pieces of bytes: a character split over two pieces arrives once,
    whole."""
    if callback is None:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    async def deliver(data: bytes, final: bool = False) -> None:
        text = decoder.decode(data, final)
        if text:
            outcome = callback(text)
            if inspect.isawaitable(outcome):
                await outcome

    return deliver
