"""The calls of a channel that stream: commands, terminals, file contents.

Owns flow control per call (Flow) and the running handles of commands that clients feed. A handle belongs to the
edge, not to the connection: when that breaks, output is dropped here and goes on to the log.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from rorqual.sandbox._async.commands import STARTED, AsyncCommandHandle
from rorqual.sandbox._remote_channel import CHUNK, WINDOW
from rorqual.sandbox._remote_codec import encode
from rorqual.sandbox.edge.calls import arguments, model_of
from rorqual.sandbox.edge.transfer import Spool, pieces
from rorqual.sandbox.errors import EdgeError, InvalidRequest
from rorqual.sandbox.records import CommandResult

if TYPE_CHECKING:
    from rorqual.sandbox.edge.channel import Channel


class Flow:
    """What a client has room for."""

    def __init__(self) -> None:
        self._credit = WINDOW
        self._wake = asyncio.Event()
        self.gone = False

    def grant(self, count: int) -> None:
        self._credit = min(WINDOW, self._credit + max(0, count))
        self._wake.set()

    def drop(self) -> None:
        """The client is gone: nobody waits for room any more."""
        self.gone = True
        self._wake.set()

    async def take(self, count: int) -> bool:
        """Waits for room for `count` bytes; False when the client is gone."""
        while not self.gone and self._credit < count:
            self._wake.clear()
            await self._wake.wait()
        self._credit -= count
        return not self.gone


class Upload:
    """The pieces of one upload, in the order they came."""

    def __init__(self, *, limit: int) -> None:
        self._spool = Spool(limit=limit)
        self._done: asyncio.Future[Spool] = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    def push(self, data: bytes) -> None:
        if self._done.done():
            return
        try:
            self._spool.write(data)
        except Exception as error:  # too large, or the edge's disk is full: the call's answer says so
            self._done.set_exception(error)

    def finish(self) -> None:
        if not self._done.done():
            self._done.set_result(self._spool)

    def drop(self) -> None:
        if not self._done.done():
            self._done.set_exception(EdgeError("the client hung up before the file had arrived"))

    def close(self) -> None:
        self._spool.__exit__(None, None, None)

    async def arrived(self) -> Spool:
        """All of it. Raises EdgeRefused, EdgeError."""
        return await asyncio.shield(self._done)


async def _deliver(channel: Channel, ident: int, number: int, data: bytes) -> None:
    flow = channel.flows.get(ident)
    for at in range(0, len(data), CHUNK):
        piece = data[at : at + CHUNK]
        if flow is None or not await flow.take(len(piece)):
            return
        await channel.send_bytes(ident, number, piece)


class _Output:
    """Tells a channel of a command: its id first, then its raw output, what was collected since the last time."""

    def __init__(self, channel: Channel, ident: int) -> None:
        self.handle: AsyncCommandHandle | None = None
        self._channel = channel
        self._ident = ident
        self._sent = {1: 0, 2: 0}
        self._begun: asyncio.Task[None] | None = None

    def begin(self, handle: AsyncCommandHandle) -> None:
        """Called once, when the command has started and before any output."""
        self.handle = handle
        started = {"id": handle.id, "seq": handle.seq}
        self._begun = asyncio.create_task(self._channel.send({"id": self._ident, "started": started}))

    async def on_stdout(self, _: str) -> None:
        await self._rest(1)

    async def on_stderr(self, _: str) -> None:
        await self._rest(2)

    async def _rest(self, number: int) -> None:
        if self.handle is None or self._begun is None:
            return  # answered from the log: `end` sends all of it
        await asyncio.shield(self._begun)
        buffer = self.handle._stdout if number == 1 else self.handle._stderr
        data = bytes(buffer[self._sent[number] :])
        self._sent[number] = len(buffer)
        await _deliver(self._channel, self._ident, number, data)

    async def end(self, result: CommandResult) -> dict[str, Any]:
        """Sends what is left; the answer is the result without its texts."""
        if self.handle is None:
            started = {"id": 0, "seq": result.seq}
            await self._channel.send({"id": self._ident, "started": started})
            await _deliver(self._channel, self._ident, 1, result.stdout.encode())
            await _deliver(self._channel, self._ident, 2, result.stderr.encode())
        await self._rest(1)
        await self._rest(2)
        answer: dict[str, Any] = encode(result)
        del answer["stdout"], answer["stderr"]
        return answer


async def _run(channel: Channel, ident: int, document: dict[str, Any]) -> Any:
    sandbox = await channel.sandbox()
    given = dict(document["args"])
    data = given.pop("stdin_data", None)
    checked = arguments(model_of("commands.run", "on_stdout", "on_stderr"), given)
    if data is not None:
        checked["stdin"] = _bytes(data)
    output = _Output(channel, ident)

    def begun(handle: AsyncCommandHandle) -> None:
        output.begin(handle)
        channel.edge.running(channel.sandbox_id, handle)

    STARTED.set(begun)  # in this call's own context
    checked |= {"on_stdout": output.on_stdout, "on_stderr": output.on_stderr}
    outcome = await sandbox.commands.run(**checked)
    if isinstance(outcome, AsyncCommandHandle):
        if output.handle is None:
            begun(outcome)
        return await _follow(channel, output, outcome)
    return await output.end(outcome)


async def _attach(channel: Channel, ident: int, document: dict[str, Any]) -> Any:
    sandbox = await channel.sandbox()
    output = _Output(channel, ident)
    handle = await sandbox.commands.connect(
        _command(document), on_stdout=output.on_stdout, on_stderr=output.on_stderr
    )
    output.begin(handle)
    channel.edge.running(channel.sandbox_id, handle)
    return await _follow(channel, output, handle)


async def _follow(channel: Channel, output: _Output, handle: AsyncCommandHandle) -> Any:
    try:
        return await output.end(await handle.wait())
    except asyncio.CancelledError:
        if channel.open and handle._task is not None:  # its client asked for that, not the end of this edge
            handle._task.cancel()  # kills the command and says so in the log
            await asyncio.wait([handle._task], timeout=6.0)
        raise


async def _stdin(channel: Channel, ident: int, document: dict[str, Any]) -> None:
    sandbox = await channel.sandbox()
    command, data = _command(document), _bytes(document["data"])
    if document.get("pty"):
        await sandbox.pty.send_stdin(command, data)
        return
    handle = channel.edge.handle(channel.sandbox_id, command)
    if handle is None:
        handle = await sandbox.commands.connect(command)
        channel.edge.running(channel.sandbox_id, handle)
    if data:
        await handle.send_stdin(data)
    if document.get("eof"):
        await handle.close_stdin()


async def _pty(channel: Channel, ident: int, document: dict[str, Any]) -> Any:
    sandbox = await channel.sandbox()
    checked = arguments(model_of("pty.create", "on_data"), document["args"])
    return await _terminal(channel, ident, lambda on_data: sandbox.pty.create(**checked, on_data=on_data))


async def _attach_pty(channel: Channel, ident: int, document: dict[str, Any]) -> Any:
    sandbox = await channel.sandbox()
    command = _command(document)
    return await _terminal(channel, ident, lambda on_data: sandbox.pty.connect(command, on_data=on_data))


async def _terminal(channel: Channel, ident: int, begin: Callable[[Any], Awaitable[Any]]) -> Any:
    began = asyncio.Event()

    async def on_data(data: bytes) -> None:
        await began.wait()  # nothing goes out before the terminal's id has
        await _deliver(channel, ident, 1, data)

    handle = await begin(on_data)
    await channel.send({"id": ident, "started": {"id": handle.id, "seq": 0}})
    began.set()
    return {"exit_code": await handle.wait()}


async def _read(channel: Channel, ident: int, document: dict[str, Any]) -> Any:
    sandbox = await channel.sandbox()
    path, most = str(document["path"]), int(document["max_bytes"])
    async with contextlib.aclosing(pieces(sandbox, path, max_bytes=most)) as reading:
        async for piece in reading:
            await _deliver(channel, ident, 1, piece)
    return {"path": sandbox._session.path(path)}


async def _write(channel: Channel, ident: int, document: dict[str, Any]) -> Any:
    sandbox = await channel.sandbox()
    fields = {name: document.get(name) for name in ("path", "mode", "append", "user")}
    checked = arguments(model_of("files.write", "data"), fields)
    sandbox._session.path(checked["path"])  # a path that is none is refused before all has arrived
    spool = await channel.uploads[ident].arrived()
    if spool.size != document.get("size"):
        raise EdgeError(f"{spool.size} bytes of {document.get('size')} arrived")
    return encode(await spool.commit(sandbox, checked.pop("path"), **checked))


def _command(document: dict[str, Any]) -> int:
    command = document["command"]
    if isinstance(command, bool) or not isinstance(command, int):
        raise InvalidRequest(f"id: {command!r} must be a whole number")
    return command


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"stdin: not base64: {error}") from error


STREAMS: dict[str, Callable[[Channel, int, dict[str, Any]], Awaitable[Any]]] = {
    "run": _run,
    "attach": _attach,
    "stdin": _stdin,
    "pty": _pty,
    "attach_pty": _attach_pty,
    "read": _read,
    "write": _write,
}
"""Operations by name. They get a flow; `write` gets an upload."""
