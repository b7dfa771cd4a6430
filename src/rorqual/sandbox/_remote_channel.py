"""One client's connection to an edge for one sandbox: a WebSocket with calls, streams and the lease.

Owns numbering, flow control, the pings that renew the lease, and the way back after a broken connection: it dials
again for PATIENCE_S, and calls that may be repeated are; others raise EdgeLost. It never repeats what could run
twice. Messages: docs/sandbox-edge.md; the other end is edge/channel.py.
"""

# ruff: noqa: ASYNC109 -- a timeout here is a patience, kept in this file

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, cast

from rorqual.sandbox._address import EdgePlace
from rorqual.sandbox._remote_codec import decode_error
from rorqual.sandbox.errors import (
    Cause,
    EdgeError,
    EdgeLost,
    EdgeRefused,
    EdgeUnreachable,
    HostUnfit,
    SandboxEnded,
    SandboxError,
)

API = 1
"""Version of the messages; the path of the channel names it, too."""
HEAD = struct.Struct(">IB")
"""Of a binary message: the call's number, the stream's."""
CHUNK = 128 << 10
WINDOW = 512 << 10
"""Bytes of one stream that may be under way or unread."""
MAX_MESSAGE = 64 << 20
DIAL_S = 10.0
PATIENCE_S = 60.0
"""How long a client tries to reach an edge again whose connection broke."""
CANCEL_S = 6.0
"""How long a cancelled call waits for the edge to say that it has stopped."""


class Broken(Exception):
    """The connection broke before the answer came. Never leaves this room."""


class Stream:
    """What one call sends back in pieces. Iterate `pieces`, then await `answer`."""

    def __init__(self, channel: Channel, ident: int) -> None:
        self.ident = ident
        self.started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        for future in (self.started, self.answer):
            future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        self._channel = channel
        self._queue: deque[tuple[int, bytes]] = deque()
        self._wake = asyncio.Event()
        self._owed = 0

    def push(self, number: int, data: bytes) -> None:
        self._queue.append((number, data))
        self._wake.set()

    def settle(self, outcome: Any) -> None:
        """The end, good or bad."""
        for future in (self.started, self.answer):
            if not future.done():
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
        self._wake.set()

    async def pieces(self) -> AsyncIterator[tuple[int, bytes]]:
        """(stream's number, bytes) until the answer is there. Each piece that was taken makes room for another."""
        while True:
            while self._queue:
                number, data = self._queue.popleft()
                yield number, data
                self._owed += len(data)
                if self._owed >= WINDOW // 4:
                    await self._channel.send_quietly({"id": self.ident, "credit": self._owed})
                    self._owed = 0
            if self.answer.done():
                return
            self._wake.clear()
            await self._wake.wait()


class Channel:
    """Calls to one sandbox of one edge. Make it with `open`; always `close` it."""

    def __init__(self, place: EdgePlace, *, lease: float) -> None:
        self.place = place
        self.sandbox_id = ""
        self.ended: tuple[str, str] | None = None
        """(cause, detail) once the sandbox is over."""
        self.over = asyncio.Event()
        self.closed = False
        self._comes_back = True
        self._what = ""
        self._beat = max(0.1, min(15.0, lease / 4))
        self._socket: Any = None
        self._numbers = 0
        self._streams: dict[int, Stream] = {}
        self._up = asyncio.Event()
        self._failed: EdgeError | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._heard = 0.0

    @classmethod
    async def open(
        cls, place: EdgePlace, op: str, *, lease: float = 60.0, **fields: Any
    ) -> tuple[Channel, Any]:
        """Dials, makes or finds a sandbox by `op` ('create', 'open', 'attach', 'look'); is bound to it from then on.

        Returns the channel and the edge's answer. Raises what the edge raises, EdgeUnreachable, EdgeRefused.
        """
        channel = cls(place, lease=lease)
        channel._comes_back = op not in ("attach", "function")  # what these are is lost with the connection
        channel._what = op
        socket = await channel._dial()
        try:
            answer = await channel._greet(socket, op, timeout=None, **fields)
        except BaseException:
            await socket.close()
            raise
        channel.sandbox_id = answer["sandbox"]
        channel._start(socket)
        channel._spawn(channel._keep_alive())
        return channel, answer

    # -- calls

    async def call(self, op: str, *, name: str = "", repeat: bool = False, **fields: Any) -> Any:
        """One answer. Raises what the edge raises; EdgeLost when the connection broke and it may not be repeated."""
        while True:
            async with self.streaming(op, **fields) as stream:
                try:
                    async for _ in stream.pieces():
                        pass
                    return await stream.answer
                except Broken as broken:
                    if not repeat:
                        raise EdgeLost(name or op, self.sandbox_id) from broken

    @contextlib.asynccontextmanager
    async def streaming(self, op: str, **fields: Any) -> AsyncIterator[Stream]:
        """Starts a call whose pieces the caller takes; leaving the block early cancels it at the edge.

        `Stream.answer` raises Broken when the connection broke meanwhile.
        """
        await self._wait_up(op)
        self._numbers += 1
        stream = Stream(self, self._numbers)
        self._streams[stream.ident] = stream
        try:
            try:
                await self.send({"id": stream.ident, "op": op, **fields})
            except Broken as broken:
                stream.settle(broken)
            yield stream
        except BaseException:
            if not stream.answer.done() and not self.closed:  # hanging up ends nothing
                await self._cancel(stream)
            raise
        finally:
            self._streams.pop(stream.ident, None)

    async def send(self, document: Mapping[str, Any]) -> None:
        """One JSON message. Raises Broken."""
        await self._write(json.dumps(document))

    async def send_quietly(self, document: Mapping[str, Any]) -> None:
        with contextlib.suppress(Broken):
            await self.send(document)

    async def send_bytes(self, ident: int, data: bytes | memoryview) -> None:
        """One binary message of a call that uploads. Raises Broken."""
        await self._write(HEAD.pack(ident, 0) + bytes(data))

    async def _write(self, message: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        socket = self._socket
        if socket is None:
            raise Broken
        try:
            await socket.send(message)
        except ConnectionClosed as error:
            if self._socket is socket and not self.lost:
                self._up.clear()  # the reader is about to see it: nobody tries again before
            raise Broken from error

    async def _cancel(self, stream: Stream) -> None:
        """Asks the edge to stop it and waits for its word: nothing runs on unseen."""

        async def stop() -> None:
            with contextlib.suppress(Exception):
                await self.send({"id": stream.ident, "cancel": True})
                async for _ in stream.pieces():  # what is under way still needs room
                    pass

        task = asyncio.ensure_future(stop())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait([task], timeout=CANCEL_S)

    # -- the end

    @property
    def lost(self) -> bool:
        """It was closed, or the way back was given up: no call goes through it any more."""
        return self._failed is not None

    def end_error(self) -> SandboxEnded:
        cause, detail = self.ended or ("infra", "the edge gave no cause")
        return SandboxEnded(self.sandbox_id, cause=cast(Cause, cause), detail=detail)

    async def close(self) -> None:
        """Hangs up. Idempotent."""
        self.closed = True
        self._failed = self._failed or EdgeError(f"{self.sandbox_id}: this hold on it was closed")
        socket, self._socket = self._socket, None
        for task in list(self._tasks):
            task.cancel()
        if socket is not None:
            await socket.close()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=5.0)
        self._break()
        self._up.set()

    # -- the connection

    async def _dial(self) -> Any:
        try:
            from websockets.asyncio.client import connect, unix_connect
            from websockets.exceptions import InvalidHandshake, InvalidStatus
        except ImportError as error:
            raise HostUnfit(
                "talking to an edge needs websockets.", fix="pip install 'rorqual[edge]'"
            ) from error
        place = self.place
        headers = {"Authorization": f"Bearer {place.token}"} if place.token else {}
        uri = f"ws{place.url.removeprefix('http')}/v{API}/channel"
        options: dict[str, Any] = {
            "additional_headers": headers,
            "compression": None,
            "max_size": MAX_MESSAGE,
            "ping_interval": None,  # ours renew the lease as well
            "open_timeout": DIAL_S,
            "close_timeout": 2.0,
            "user_agent_header": None,
        }
        try:
            if place.socket:
                return await unix_connect(place.socket, uri, **options)
            return await connect(uri, proxy=None, **options)
        except InvalidStatus as error:
            raise _refusal(error.response.status_code, error.response.body, place) from error
        except (OSError, TimeoutError, InvalidHandshake, EOFError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise EdgeUnreachable(place.address, why) from error

    async def _greet(self, socket: Any, op: str, *, timeout: float | None, **fields: Any) -> Any:
        """The first call of a connection, before anybody else reads."""
        from websockets.exceptions import ConnectionClosed

        try:
            async with asyncio.timeout(timeout):
                await socket.send(json.dumps({"id": 0, "op": op, **fields}))
                while True:
                    answer = json.loads(await socket.recv())
                    if answer.get("id") == 0:
                        break
        except (ConnectionClosed, ValueError, TimeoutError) as error:
            raise EdgeUnreachable(self.place.address, "it hung up before it answered") from error
        if "error" in answer:
            raise decode_error(answer["error"])
        return answer["value"]

    def _start(self, socket: Any) -> None:
        self._socket = socket
        self._heard = asyncio.get_running_loop().time()
        self._spawn(self._read(socket))
        self._up.set()

    async def _read(self, socket: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            async for message in socket:
                self._heard = asyncio.get_running_loop().time()
                self._on_message(message)
        except (ConnectionClosed, ValueError, KeyError, struct.error):
            pass
        if self._socket is socket and not self.closed:
            self._socket = None
            self._up.clear()
            self._break()
            await socket.close()
            if self.ended is None and self._comes_back:
                self._spawn(self._come_back())
            elif self.ended is None:
                self._give_up(EdgeLost(self._what, self.sandbox_id))
            else:
                self._give_up(EdgeUnreachable(self.place.address, "it hung up"))

    def _on_message(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            ident, number = HEAD.unpack_from(message)
            if ident in self._streams:
                self._streams[ident].push(number, message[HEAD.size :])
            return
        document = json.loads(message)
        if document.get("event") == "ended":
            self._end(document["cause"], document["detail"])
            return
        stream = self._streams.get(document.get("id"))
        if stream is None:
            return
        if "started" in document:
            if not stream.started.done():
                stream.started.set_result(document["started"])
        elif "error" in document:
            error = decode_error(document["error"])
            if isinstance(error, SandboxEnded) and error.sandbox_id == self.sandbox_id:
                self._end(error.cause, error.detail)  # the news of its end may be behind the answer
            stream.settle(error)
        else:
            stream.settle(document.get("value"))

    def _end(self, cause: str, detail: str) -> None:
        self.ended = self.ended or (cause, detail)
        self.over.set()

    def _break(self) -> None:
        for stream in list(self._streams.values()):
            stream.settle(Broken())

    def _give_up(self, error: EdgeError) -> None:
        self._failed = error
        self._up.set()

    async def _come_back(self) -> None:
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + PATIENCE_S, 0.05
        while True:
            socket = None
            try:
                socket = await self._dial()
                await self._greet(socket, "open", timeout=DIAL_S, sandbox=self.sandbox_id, again=True)
            except EdgeUnreachable as error:
                if socket is not None:
                    await socket.close()
                if loop.time() + pause > deadline:
                    self._give_up(error)
                    return
                await asyncio.sleep(pause)
                pause = min(1.0, pause * 1.5)
            except SandboxError as error:
                if socket is not None:
                    await socket.close()
                if isinstance(error, SandboxEnded):
                    self._end(error.cause, error.detail)
                    error_or_unreachable: EdgeError = EdgeUnreachable(self.place.address, str(error))
                else:
                    error_or_unreachable = error if isinstance(error, EdgeError) else EdgeError(str(error))
                self._give_up(error_or_unreachable)
                return
            else:
                self._start(socket)
                return

    async def _wait_up(self, op: str) -> None:
        await self._up.wait()
        if self.ended is not None and op not in ("call", "kill"):
            raise self.end_error()
        if self._failed is not None:
            raise self.end_error() if self.ended is not None else self._failed

    async def _keep_alive(self) -> None:
        """A ping every beat; an edge that is silent for three of them, and 10 s, is dialled anew."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._beat)
            socket = self._socket
            if socket is None:
                continue
            if loop.time() - self._heard > 3 * self._beat + 10.0:
                socket.transport.abort()
                continue
            await self.send_quietly({"ping": True})

    def _spawn(self, work: Any) -> None:
        self.keep(asyncio.get_running_loop().create_task(work))

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Holds a background task until it is done; `close` cancels it."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _refusal(status: int, body: bytes | bytearray | None, place: EdgePlace) -> Exception:
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        return decode_error(json.loads(body or b"")["error"])
    if status in (502, 503, 504):
        return EdgeUnreachable(place.address, f"HTTP {status}")
    return EdgeRefused(f"the server at {place.address} answered HTTP {status}: is it an edge?", status=status)


def chunks(data: bytes) -> Iterator[memoryview]:
    """Pieces of at most CHUNK bytes."""
    view = memoryview(data)
    for at in range(0, len(view), CHUNK):
        yield view[at : at + CHUNK]
