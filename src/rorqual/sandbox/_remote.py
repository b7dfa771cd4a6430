"""A sandbox that an edge keeps: the classes of the SDK, with an edge behind them instead of this process.

`create`, `connect` and `live` are what AsyncSandbox calls when an edge is named. Owns nothing of the sandbox: its
keeper, its log and its result live at the edge. Calls that are data both ways are forwarded as
_remote_methods.py finds them; commands and terminals are _remote_commands.py's.
"""

# ruff: noqa: ASYNC109 -- `timeout` is a lifetime, as in AsyncSandbox

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import os
import socket
import warnings
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, cast, overload

from rorqual.sandbox._address import EdgePlace
from rorqual.sandbox._async.files import MAX_READ, AsyncFiles
from rorqual.sandbox._async.sandbox import _BOUNDS, AsyncSandbox, AsyncTrajectory
from rorqual.sandbox._remote_channel import Broken, Channel, chunks
from rorqual.sandbox._remote_codec import decode, encode
from rorqual.sandbox._remote_commands import RemoteCommands, RemotePty
from rorqual.sandbox._remote_methods import REPEATABLE, Method, methods, nouns
from rorqual.sandbox._replay import Replay
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import EdgeError, EdgeLost, InvalidRequest, Unsupported
from rorqual.sandbox.images import Bounds, ImageInfo
from rorqual.sandbox.records import FileEntry, SandboxInfo
from rorqual.sandbox.trajectory import TrajectoryEntry

MAX_LEASE_S = 86400.0


def _forward(method: Method) -> Callable[..., Awaitable[Any]]:
    """The method of a remote noun that asks the edge for it."""

    @functools.wraps(method.function)
    async def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = method.signature.bind(*args, **kwargs).arguments
        if not method.crosses:
            raise Unsupported(
                f"{method.path} through an edge",
                reason="its arguments or its result are objects of the process that has the sandbox",
                available=sorted(path for path, one in methods().items() if one.crosses),
            )
        channel: Channel = self._channel
        if channel.ended is not None and method.path != "trajectory.list":
            raise channel.end_error()
        value = await channel.call(
            "call",
            name=method.path,
            repeat=REPEATABLE.fullmatch(method.path) is not None,
            method=method.path,
            args={name: encode(value, name=name) for name, value in bound.items()},
        )
        return decode(method.hints.get("return", Any), value)

    return ask


def _forwarding(noun: str, kind: type) -> type:
    """`kind` with every public coroutine method forwarded that it does not define itself."""
    own = vars(kind)
    for method in methods().values():
        at, _, name = method.path.rpartition(".")
        if at == noun and name not in own and method.path != "files.write_files":
            setattr(kind, name, _forward(method))
    return kind


class RemoteTrajectory(AsyncTrajectory):
    """The log that the edge keeps; readable after the sandbox's end and after `close`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def list(self, *, after: int = 0) -> builtins.list[TrajectoryEntry]:
        """Every entry with a number above `after`, in order, those included that were just finished."""
        fields = {"method": "trajectory.list", "args": {"after": after}}
        channel = self._channel
        if channel.lost:
            place, sandbox_id = channel.place, channel.sandbox_id
            channel, _ = await Channel.open(place, "look", sandbox=sandbox_id)
            try:
                value = await channel.call("call", name="trajectory.list", repeat=True, **fields)
            finally:
                await channel.close()
        else:
            value = await channel.call("call", name="trajectory.list", repeat=True, **fields)
        return cast(list[TrajectoryEntry], decode(list[TrajectoryEntry], value))

    async def replay(self, *, into: AsyncSandbox) -> Replay:
        """As AsyncTrajectory.replay; both sandboxes are of one edge."""
        if not isinstance(into, RemoteSandbox) or into._channel.place.url != self._channel.place.url:
            raise InvalidRequest(f"into: {into!r} is not a sandbox of the same edge")
        return cast(Replay, decode(Replay, await self._channel.call("replay", into=into.id)))


class RemoteFiles(AsyncFiles):
    """Files of one sandbox of an edge. Contents stream; the edge writes a file when all of it is there."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @overload
    async def read(
        self, path: str, *, format: Literal["text"] = "text", max_bytes: int = MAX_READ
    ) -> str: ...

    @overload
    async def read(self, path: str, *, format: Literal["bytes"], max_bytes: int = MAX_READ) -> bytes: ...

    @overload
    async def read(
        self, path: str, *, format: Literal["text", "bytes"], max_bytes: int = MAX_READ
    ) -> str | bytes: ...

    async def read(
        self, path: str, *, format: Literal["text", "bytes"] = "text", max_bytes: int = MAX_READ
    ) -> str | bytes:
        """As AsyncFiles.read."""
        if format not in ("text", "bytes"):
            raise InvalidRequest(f"format: {format!r} must be 'text' or 'bytes'")
        while True:
            data = bytearray()
            async with self._channel.streaming("read", path=path, max_bytes=max_bytes) as stream:
                try:
                    async for _, piece in stream.pieces():
                        data += piece
                    where = (await stream.answer)["path"]
                    break
                except Broken:
                    continue
        if format == "bytes":
            return bytes(data)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"{where}: not UTF-8 at byte {error.start}; read it with format='bytes'"
            ) from error

    async def write(
        self,
        path: str,
        data: str | bytes,
        *,
        mode: int | None = None,
        append: bool = False,
        user: str | None = None,
    ) -> FileEntry:
        """As AsyncFiles.write."""
        content = data.encode() if isinstance(data, str) else bytes(data)
        channel = self._channel
        fields = {"path": path, "mode": mode, "append": append, "user": user, "size": len(content)}
        async with channel.streaming("write", **fields) as stream:
            try:
                for piece in chunks(content):
                    if stream.answer.done():
                        break  # refused: the rest need not cross
                    await channel.send_bytes(stream.ident, piece)
                await channel.send({"id": stream.ident, "end": True})
                value = await stream.answer
            except Broken as broken:
                raise EdgeLost("files.write", channel.sandbox_id) from broken
        return cast(FileEntry, decode(FileEntry, value))


class RemoteSandbox(AsyncSandbox):
    """One sandbox of an edge. Made by AsyncSandbox.create, connect and fork."""

    def __init__(self, channel: Channel, *, owned: bool, lease: float) -> None:
        self._channel = channel
        self._owned = owned
        self._lease = lease
        self._closed = False
        for name, kind in _twins().items():
            noun: Any = object.__new__(kind)
            setattr(self, name, noun)
            noun._channel = channel

    @property
    def id(self) -> str:
        """'sb-<edge>-<12 hex digits>'."""
        return self._channel.sandbox_id

    @property
    def _session(self) -> Session:  # type: ignore[override]
        raise Unsupported(
            "this call through an edge",
            reason="it needs the process that has the sandbox",
            available=sorted(path for path, one in methods().items() if one.crosses),
        )

    @property
    def cause(self) -> str | None:
        """Why it ended, one of errors.Cause; None while it lives, as far as the edge has told."""
        return self._channel.ended[0] if self._channel.ended is not None else None

    async def kill(self) -> bool:
        """Ends it with cause `killed` and removes everything of it; False when it was over. Idempotent."""
        channel = self._channel
        alive = False
        self._closed = True
        try:
            if channel.ended is None and not channel.closed:
                answer = await channel.call("kill", name="kill", repeat=True)
                alive = answer["alive"]
                channel.ended = channel.ended or (answer["cause"], answer["detail"])
        finally:
            await channel.close()
        return alive

    async def close(self) -> None:
        """Lets go without ending it. Idempotent. One that is not kept ends when its lease is over."""
        self._closed = True
        await self._channel.close()

    async def fork(
        self, *, count: int = 1, timeout: float | None = None, keep: bool = False, bounds: Bounds = _BOUNDS
    ) -> builtins.list[AsyncSandbox]:
        """As AsyncSandbox.fork; the children are of the same edge and, unless kept, have this one's lease."""
        arguments = {"count": count, "timeout": timeout, "keep": keep, "bounds": encode(bounds)}
        ids = await self._channel.call("fork", name="fork", args=arguments)
        children: builtins.list[AsyncSandbox] = []
        try:
            for sandbox_id in ids:
                channel, _ = await Channel.open(
                    self._channel.place,
                    "open",
                    lease=self._lease,
                    sandbox=sandbox_id,
                )
                children.append(RemoteSandbox(channel, owned=not keep, lease=self._lease))
        except BaseException:
            for child in children:
                with contextlib.suppress(EdgeError):
                    await child.kill()
            raise
        return children

    def __del__(self) -> None:
        if self._owned and not self._closed and self._channel.ended is None:
            warnings.warn(
                f"{self.id} was dropped without kill(): the edge ends it when its lease is over",
                ResourceWarning,
                stacklevel=2,
            )


@functools.cache
def _twins() -> dict[str, type]:
    """The remote class of each noun. One without special calls is made from the SDK's class alone."""
    by_hand = {
        "commands": RemoteCommands,
        "files": RemoteFiles,
        "pty": RemotePty,
        "trajectory": RemoteTrajectory,
    }
    found = {}
    for name, kind in nouns().items():
        if name:
            found[name] = _forwarding(
                name, by_hand.get(name) or type(f"Remote{kind.__name__[5:]}", (kind,), {})
            )
    _forwarding("", RemoteSandbox)
    return found


async def create(place: EdgePlace, arguments: Mapping[str, Any], *, lease: float) -> AsyncSandbox:
    """AsyncSandbox.create at an edge: arguments as they were given, checked there."""
    if isinstance(lease, bool) or not isinstance(lease, int | float) or not 0.5 <= lease <= MAX_LEASE_S:
        raise InvalidRequest(f"lease: {lease!r} must be a number from 0.5 to {MAX_LEASE_S:g} (seconds)")
    if arguments["trajectory"] is not None:
        raise Unsupported(
            "trajectory=... with an edge",
            reason="the edge keeps the log, durable before each command",
            available=["trajectory.list()"],
        )
    _twins()
    defaults = inspect.signature(AsyncSandbox.create).parameters
    given = {
        name: encode(value, name=name)
        for name, value in arguments.items()
        if name != "trajectory" and value != defaults[name].default
    }
    owner = f"{socket.gethostname()}:{os.getpid()}"
    channel, _ = await Channel.open(place, "create", lease=lease, args=given, seconds=lease, owner=owner)
    return RemoteSandbox(channel, owned=not arguments["keep"], lease=lease)


async def connect(place: EdgePlace, sandbox_id: str) -> AsyncSandbox:
    """AsyncSandbox.connect at an edge."""
    _twins()
    channel, _ = await Channel.open(place, "open", sandbox=sandbox_id)
    return RemoteSandbox(channel, owned=False, lease=60.0)


async def attach(place: EdgePlace, sandbox_id: str) -> AsyncSandbox:
    """AsyncSandbox.attach at an edge: answered from the log that it keeps. A broken connection ends the hold."""
    _twins()
    channel, _ = await Channel.open(place, "attach", sandbox=sandbox_id)
    return RemoteSandbox(channel, owned=False, lease=60.0)


async def logged(place: EdgePlace, sandbox_id: str, *, after: int) -> list[TrajectoryEntry]:
    """AsyncSandbox.logged at an edge."""
    channel, _ = await Channel.open(place, "look", sandbox=sandbox_id)
    try:
        arguments = {"after": after}
        value = await channel.call("call", repeat=True, method="trajectory.list", args=arguments)
    finally:
        await channel.close()
    return cast(list[TrajectoryEntry], decode(list[TrajectoryEntry], value))


async def images(place: EdgePlace) -> list[ImageInfo]:
    """The images of the edge's host."""
    channel, answer = await Channel.open(place, "images")
    await channel.close()
    return cast(list[ImageInfo], decode(list[ImageInfo], answer["images"]))


async def live(place: EdgePlace) -> list[SandboxInfo]:
    """AsyncSandbox.list at an edge."""
    channel, answer = await Channel.open(place, "list")
    await channel.close()
    return cast(list[SandboxInfo], decode(list[SandboxInfo], answer["sandboxes"]))
