"""Commands and terminals of a sandbox that an edge keeps.

A command belongs to the sandbox, its result to the edge's log; here its output is followed. When the connection
breaks, the handle attaches to the command again by its id and goes on where it was: an edge may be killed and
started anew while a command runs, and `wait()` returns its result.
"""

# ruff: noqa: ASYNC109 -- `timeout` is the guest's deadline for the command

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rorqual.sandbox._async.commands import (
    AsyncCommandHandle,
    AsyncCommands,
    OnOutput,
    _check,
    _decoded,
)
from rorqual.sandbox._async.pty import DEFAULT_SIZE, AsyncPty, AsyncPtyHandle, OnData
from rorqual.sandbox._guest import MAX_OUTPUT, PtySize
from rorqual.sandbox._remote_channel import Broken, Channel, chunks
from rorqual.sandbox._remote_codec import decode, encode
from rorqual.sandbox.errors import EdgeLost, GuestRefused
from rorqual.sandbox.records import CommandResult

RING = 1 << 20
"""Bytes of a stream that a guest agent keeps for whoever attaches."""
INLINE_STDIN = 256 << 10


async def _send_stdin(channel: Channel, command: int, data: str | bytes, *, eof: bool = False) -> None:
    content = data.encode() if isinstance(data, str) else bytes(data)
    for piece in chunks(content):
        text = base64.b64encode(piece).decode("ascii")
        await channel.call("stdin", name="send_stdin", command=command, data=text, eof=False)
    if eof:
        await channel.call("stdin", name="close_stdin", command=command, data="", eof=True)


class _Follower:
    """Takes the pieces of one command's streams, over as many connections as it needs."""

    def __init__(self, channel: Channel, op: str, fields: dict[str, Any], *, again: str, call: str) -> None:
        self._channel = channel
        self._op = op
        self._fields = fields
        self._again = again
        self._call = call
        self.begun: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.begun.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    async def follow(self, take: Any) -> Any:
        """Hands each (stream's number, bytes) to `take`, once, in order; returns the edge's answer."""
        got, skip = [0, 0, 0], [0, 0, 0]
        op, fields = self._op, self._fields
        while True:
            try:
                async with self._channel.streaming(op, **fields) as stream:
                    started = await stream.started
                    if not self.begun.done():
                        self.begun.set_result(started)
                    async for number, data in stream.pieces():
                        dropped = min(skip[number], len(data))
                        skip[number] -= dropped
                        got[number] += len(data) - dropped
                        if dropped < len(data):
                            await take(number, data[dropped:])
                    return await stream.answer
            except Broken as broken:
                if not self.begun.done():
                    lost = EdgeLost(self._call, self._channel.sandbox_id)
                    self.begun.set_exception(lost)
                    raise lost from broken
                # The agent replays the last RING bytes of a stream: what we have of them is passed over.
                op, fields, skip = (
                    self._again,
                    {"command": self.begun.result()["id"]},
                    [min(n, RING) for n in got],
                )
            except BaseException as error:
                if not self.begun.done():
                    self.begun.set_exception(error) if isinstance(error, Exception) else self.begun.cancel()
                raise


class RemoteCommandHandle(AsyncCommandHandle):
    """A command that runs at an edge."""

    def __init__(self, channel: Channel, follower: _Follower) -> None:
        self._channel = channel
        self._follower = follower
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._task: asyncio.Task[CommandResult] | None = None

    @property
    def id(self) -> int:
        """Process id inside the sandbox: what `commands.connect(id)` takes."""
        return cast(int, self._follower.begun.result()["id"])

    @property
    def seq(self) -> int:
        """Its number in the trajectory log."""
        return cast(int, self._follower.begun.result()["seq"])

    async def kill(self, *, signal: int = 9) -> bool:
        """Signals its whole process group; False when it had ended."""
        arguments = {"id": self.id, "signal": signal}
        return bool(
            await self._channel.call("call", name="commands.kill", method="commands.kill", args=arguments)
        )

    async def send_stdin(self, data: str | bytes) -> None:
        """Writes to its standard input (started with `stdin=True`)."""
        await _send_stdin(self._channel, self.id, data)

    async def close_stdin(self) -> None:
        """Ends its standard input."""
        await _send_stdin(self._channel, self.id, b"", eof=True)

    def _start(self, on_stdout: OnOutput | None, on_stderr: OnOutput | None) -> None:
        self._task = asyncio.create_task(self._collect(on_stdout, on_stderr))
        self._task.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        self._channel.keep(self._task)

    async def _collect(self, on_stdout: OnOutput | None, on_stderr: OnOutput | None) -> CommandResult:
        targets = {1: (self._stdout, _decoded(on_stdout)), 2: (self._stderr, _decoded(on_stderr))}

        async def take(number: int, data: bytes) -> None:
            buffer, callback = targets[number]
            buffer += data
            if callback is not None:
                await callback(data)

        answer = await self._follower.follow(take)
        for _, callback in targets.values():
            if callback is not None:
                await callback(b"", final=True)
        return cast(
            CommandResult, decode(CommandResult, {**answer, "stdout": self.stdout, "stderr": self.stderr})
        )


class RemoteCommands(AsyncCommands):
    """Commands of one sandbox of an edge."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def run(  # type: ignore[override]  # the overloads are AsyncCommands's
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
        """As AsyncCommands.run."""
        _check(cmd, timeout=timeout, max_output=max_output)
        feed = stdin.encode() if isinstance(stdin, str) else stdin
        inline = isinstance(feed, bytes) and len(feed) <= INLINE_STDIN
        arguments: dict[str, Any] = {
            "cmd": cmd if isinstance(cmd, str) else list(cmd),
            "timeout": timeout,
            "cwd": cwd,
            "envs": encode(envs, name="envs"),
            "user": user,
            "max_output": max_output,
            "stdin": feed if isinstance(feed, bool) else not inline,
            "background": background,
        }
        if isinstance(feed, bytes) and inline:
            arguments["stdin_data"] = encode(feed)
        follower = _Follower(self._channel, "run", {"args": arguments}, again="attach", call="commands.run")
        handle = RemoteCommandHandle(self._channel, follower)
        feeding: asyncio.Task[None] | None = None
        if isinstance(feed, bytes) and not inline:
            feeding = asyncio.create_task(_feed(self._channel, follower, feed))
            self._channel.keep(feeding)
        if background:
            handle._start(on_stdout, on_stderr)
            await follower.begun
            return handle
        try:
            return await handle._collect(on_stdout, on_stderr)
        finally:
            if feeding is not None:
                feeding.cancel()

    async def connect(
        self, id: int, *, on_stdout: OnOutput | None = None, on_stderr: OnOutput | None = None
    ) -> AsyncCommandHandle:
        """As AsyncCommands.connect."""
        follower = _Follower(
            self._channel, "attach", {"command": id}, again="attach", call="commands.connect"
        )
        handle = RemoteCommandHandle(self._channel, follower)
        handle._start(on_stdout, on_stderr)
        await follower.begun
        return handle


async def _feed(channel: Channel, follower: _Follower, data: bytes) -> None:
    """Standard input that is too long for one message."""
    command = (await follower.begun)["id"]
    with contextlib.suppress(GuestRefused):  # it ended without reading all of it; its result says how
        await _send_stdin(channel, command, data, eof=True)


class RemotePtyHandle(AsyncPtyHandle):
    """A terminal at an edge."""

    def __init__(self, channel: Channel, follower: _Follower) -> None:
        self._channel = channel
        self._follower = follower
        self._task: asyncio.Task[int] | None = None

    @property
    def id(self) -> int:
        """Process id of its first process."""
        return cast(int, self._follower.begun.result()["id"])

    async def send_stdin(self, data: str | bytes) -> None:
        """Types into the terminal."""
        await _send_stdin(self._channel, self.id, data)

    async def resize(self, size: PtySize) -> None:
        """Changes its size; its foreground process gets SIGWINCH."""
        arguments = {"id": self.id, "size": encode(size)}
        await self._channel.call("call", name="pty.resize", repeat=True, method="pty.resize", args=arguments)

    async def kill(self) -> bool:
        """Ends it, with everything that runs in it."""
        arguments = {"id": self.id}
        return bool(await self._channel.call("call", name="pty.kill", method="pty.kill", args=arguments))

    def _start(self, on_data: OnData | None) -> None:
        self._task = asyncio.create_task(self._collect(on_data))
        self._task.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        self._channel.keep(self._task)

    async def _collect(self, on_data: OnData | None) -> int:
        async def take(number: int, data: bytes) -> None:
            if on_data is not None:
                outcome = on_data(data)
                if inspect.isawaitable(outcome):
                    await outcome

        return cast(int, (await self._follower.follow(take))["exit_code"])


class RemotePty(AsyncPty):
    """Terminals of one sandbox of an edge."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

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
        """As AsyncPty.create."""
        arguments = {
            "size": encode(size),
            "cmd": encode(cmd),
            "cwd": cwd,
            "envs": encode(envs, name="envs"),
            "user": user,
            "timeout": timeout,
        }
        follower = _Follower(self._channel, "pty", {"args": arguments}, again="attach_pty", call="pty.create")
        return await self._handle(follower, on_data)

    async def connect(self, id: int, *, on_data: OnData | None = None) -> AsyncPtyHandle:
        """As AsyncPty.connect."""
        follower = _Follower(
            self._channel, "attach_pty", {"command": id}, again="attach_pty", call="pty.connect"
        )
        return await self._handle(follower, on_data)

    async def send_stdin(self, id: int, data: str | bytes) -> None:
        """Types into a terminal."""
        await _send_stdin(self._channel, id, data)

    async def _handle(self, follower: _Follower, on_data: OnData | None) -> AsyncPtyHandle:
        handle = RemotePtyHandle(self._channel, follower)
        handle._start(on_data)
        await follower.begun
        return handle
