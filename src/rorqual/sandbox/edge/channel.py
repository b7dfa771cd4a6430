"""The edge's end of a channel: one client's WebSocket for one sandbox (docs/sandbox-edge.md has the messages).

Owns the greeting, the calls under way, and the lease: whatever an owner says renews it. Every call is a task; what
streams waits for the client's credit, so a slow client holds back its own command and nobody else. When the
connection ends, its calls let their commands run on: results go to the log, and a client may attach again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from rorqual.sandbox._async.function import AsyncFunction
from rorqual.sandbox._async.sandbox import AsyncSandbox, AsyncTrajectory
from rorqual.sandbox._remote_channel import HEAD
from rorqual.sandbox._remote_codec import decode, encode, encode_error
from rorqual.sandbox.edge.adopt import settle
from rorqual.sandbox.edge.audit import audit
from rorqual.sandbox.edge.calls import (
    arguments,
    call,
    create_arguments,
    create_model_of_function,
    create_model_of_sandbox,
    model_of,
)
from rorqual.sandbox.edge.edge import Edge
from rorqual.sandbox.edge.streams import STREAMS, Flow, Upload
from rorqual.sandbox.errors import (
    EdgeError,
    EdgeRefused,
    InvalidRequest,
    SandboxEnded,
    SandboxError,
    SandboxNotFound,
)
from rorqual.sandbox.images import images

SEND_S = 60.0
"""A client that takes nothing for so long is cut off."""
MAX_CALLS = 256
"""Calls of one channel at once."""
log = logging.getLogger(__name__)


class Channel:
    """One connection. `serve` it."""

    def __init__(self, edge: Edge, socket: WebSocket, *, who: str) -> None:
        self.edge = edge
        self.sandbox_id = ""
        self.hold: AsyncSandbox | None = None
        """Its own hold on the sandbox, after `attach`."""
        self.function: AsyncFunction | None = None
        """What the channel is about instead of a sandbox."""
        self._room = contextlib.ExitStack()
        self._socket = socket
        self._who = who
        self._holds = False
        """What the client says renews the sandbox's lease."""
        self._sending = asyncio.Lock()
        self._calls: dict[int, asyncio.Task[None]] = {}
        self.flows: dict[int, Flow] = {}
        self.uploads: dict[int, Upload] = {}
        self.open = True

    async def serve(self) -> None:
        """Until the client hangs up."""
        await self._socket.accept()
        self.edge.metrics.channels.inc()
        tenancy = None
        try:
            if not await self._greet(await self._receive()):
                return
            if self.edge.is_live(self.sandbox_id):
                tenancy = self.edge.tenancy(self.sandbox_id)
                tenancy.told.add(self._tell)
            elif (verdict := self.edge.verdict(self.sandbox_id)) is not None:
                self._tell(*verdict)
            while True:
                await self._on_message(await self._receive())
        except WebSocketDisconnect:
            pass
        except (ValueError, KeyError, TypeError) as error:
            log.warning("a message that is none", extra={"who": self._who, "error": f"{error}"})
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self._socket.close(code=1002, reason="not a message of this protocol")
        finally:
            self.open = False
            self.edge.metrics.channels.dec()
            if tenancy is not None:
                tenancy.told.discard(self._tell)
            await self._hang_up()

    async def _hang_up(self) -> None:
        for flow in self.flows.values():
            flow.drop()
        for upload in self.uploads.values():
            upload.drop()
        # Plain calls and commands go on: their effects are in the log, and nobody waits for these tasks.
        for task in self._calls.values():
            self.edge.keep(task)
        if self.function is not None:
            await self.function.close()
        self._room.close()
        if self.hold is not None:
            await self.hold.close()
            if self.edge.is_live(self.sandbox_id):  # what it had begun gets its result by the edge's own hold
                self.edge.keep(asyncio.create_task(self._settle()))

    async def _settle(self) -> None:
        await settle(await self.edge.held(self.sandbox_id))

    # -- messages

    async def _receive(self) -> str | bytes:
        message = await self._socket.receive()
        if message["type"] != "websocket.receive":
            raise WebSocketDisconnect(message.get("code", 1006))
        if self._holds:
            self.edge.hear(self.sandbox_id)
        data: str | bytes | None = message.get("text")
        return data if data is not None else message["bytes"]

    async def _on_message(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            ident, _ = HEAD.unpack_from(message)
            if ident in self.uploads:
                self.uploads[ident].push(message[HEAD.size :])
            return
        document = json.loads(message)
        if "ping" in document:
            await self.send({"pong": True})
            return
        ident = int(document["id"])
        if "credit" in document:
            if ident in self.flows:
                self.flows[ident].grant(int(document["credit"]))
        elif "end" in document:
            if ident in self.uploads:
                self.uploads[ident].finish()
        elif "cancel" in document:
            if ident in self._calls:
                self._calls[ident].cancel()
        else:
            self._begin(ident, document)

    def _begin(self, ident: int, document: dict[str, Any]) -> None:
        if ident in self._calls:
            raise ValueError(f"the number {ident} is in use")
        op = str(document["op"])
        if op == "write":  # its pieces may come before its task's first step
            self.uploads[ident] = Upload(limit=self.edge.config.max_file_bytes)
        if op in STREAMS:
            self.flows[ident] = Flow()
        task = asyncio.get_running_loop().create_task(self._run(ident, op, document))
        self._calls[ident] = task
        task.add_done_callback(lambda _: self._ended(ident))

    def _ended(self, ident: int) -> None:
        self._calls.pop(ident, None)
        self.flows.pop(ident, None)
        upload = self.uploads.pop(ident, None)
        if upload is not None:
            upload.close()

    async def send(self, document: dict[str, Any]) -> None:
        """One JSON message; nothing once the client is gone."""
        await self._send(lambda: self._socket.send_text(json.dumps(document)))

    async def send_bytes(self, ident: int, number: int, data: bytes) -> None:
        """One piece of a stream."""
        await self._send(lambda: self._socket.send_bytes(HEAD.pack(ident, number) + data))

    async def _send(self, sending: Callable[[], Awaitable[None]]) -> None:
        async with self._sending:
            if not self.open:
                return
            try:
                async with asyncio.timeout(SEND_S):
                    await sending()
            except (TimeoutError, RuntimeError, WebSocketDisconnect, OSError):
                self.open = False  # the reader learns of it by itself, or by the missing pings
                with contextlib.suppress(Exception):
                    await self._socket.close(code=1011)

    def _tell(self, cause: str, detail: str) -> None:
        task = asyncio.get_running_loop().create_task(
            self.send({"event": "ended", "cause": cause, "detail": detail})
        )
        self.edge.keep(task)

    # -- calls

    async def _run(self, ident: int, op: str, document: dict[str, Any]) -> None:
        name = str(document.get("method", op))
        began = time.monotonic()
        outcome = "ok"
        answer: dict[str, Any]
        try:
            if len(self._calls) > MAX_CALLS:
                raise EdgeRefused(f"more than {MAX_CALLS} calls at once on one channel", status=429)
            answer = {"id": ident, "value": await self._answer(ident, op, document)}
        except asyncio.CancelledError:
            outcome = "cancelled"
            answer = {"id": ident, "error": {"type": "EdgeError", "message": "it was cancelled"}}
        except Exception as error:
            outcome = type(error).__name__
            if not isinstance(error, SandboxError | ValueError | TypeError | TimeoutError):
                log.exception("a call failed", extra={"call": name, "sandbox": self.sandbox_id})
            answer = {"id": ident, "error": encode_error(error)}
        self.edge.metrics.requests.labels(_label(name), outcome).inc()
        audit(self._who, name, sandbox=self.sandbox_id, outcome=outcome, seconds=time.monotonic() - began)
        await self.send(answer)

    async def _answer(self, ident: int, op: str, document: dict[str, Any]) -> Any:
        if self.function is not None:
            return await self._of_function(self.function, op, document)
        if op in STREAMS:
            return await STREAMS[op](self, ident, document)
        if op == "call":
            given = document.get("args", {})
            return await call(self.edge, self.sandbox_id, document["method"], given, hold=self.hold)
        if op == "kill":
            alive, cause, detail = await self.edge.kill(self.sandbox_id)
            return {"alive": alive, "cause": cause, "detail": detail}
        if op == "replay":
            replayed = await self._trajectory().replay(into=await self.edge.held(str(document["into"])))
            return encode(replayed)
        if op == "fork":
            checked = arguments(model_of("fork"), document.get("args", {}))
            made = await self.edge.fork(self.edge.tenancy(self.sandbox_id), checked)
            return [tenancy.id for tenancy in made]
        raise EdgeRefused(f"this edge knows no operation {op!r}", status=400)

    @staticmethod
    async def _of_function(function: AsyncFunction, op: str, document: dict[str, Any]) -> Any:
        if op == "function_log":
            return encode(await function.trajectory(after=int(document["after"])))
        if op != "invoke":
            raise EdgeRefused(f"a function has no operation {op[:40]!r}", status=400)
        text, name, args = document["text"], document["target"], document["args"]
        if not (isinstance(text, str) and isinstance(name, str) and isinstance(args, list)):
            raise InvalidRequest("code: a call needs a text, a name and a list of arguments")
        stdin = decode(bytes, document["stdin"])
        return encode(await function._call(text, name, args, timeout=document["timeout"], stdin=stdin))

    def _trajectory(self) -> AsyncTrajectory:
        return self.hold.trajectory if self.hold is not None else self.edge.trajectory(self.sandbox_id)

    async def sandbox(self) -> AsyncSandbox:
        """What the calls of this channel are about. Raises SandboxEnded."""
        return self.hold or await self.edge.held(self.sandbox_id)

    # -- greeting

    async def _greet(self, message: str | bytes) -> bool:
        """Binds the channel to a sandbox; False when there is none to bind to."""
        document = json.loads(message)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        ident, op = int(document["id"]), str(document["op"])
        began, outcome = time.monotonic(), "ok"
        try:
            value = await self._bind(op, document)
        except Exception as error:
            outcome = type(error).__name__
            if not isinstance(error, SandboxError | ValueError | TypeError):
                log.exception("a greeting failed", extra={"call": op})
            await self.send({"id": ident, "error": encode_error(error)})
            return False
        else:
            await self.send({"id": ident, "value": value})
            return bool(self.sandbox_id)
        finally:
            self.edge.metrics.requests.labels(_label(op), outcome).inc()
            seconds = time.monotonic() - began
            audit(self._who, op, sandbox=self.sandbox_id, outcome=outcome, seconds=seconds)

    async def _bind(self, op: str, document: dict[str, Any]) -> dict[str, Any]:
        edge = self.edge
        if op == "list":
            return {"sandbox": "", "sandboxes": encode(edge.live())}
        if op == "images":
            return {"sandbox": "", "images": encode(await asyncio.to_thread(images, state=edge.state))}
        if op == "create":
            given = arguments(create_model_of_sandbox(), document["args"])
            checked = create_arguments(given, roots=edge.config.mount_roots)
            lease = None if checked["keep"] else float(document["seconds"])
            # Shielded: a client that hangs up now leaves a sandbox that its lease ends, not a half-made one.
            making = asyncio.ensure_future(edge.create(checked, owner=_owner(document), lease=lease))
            edge.keep(making)
            self.sandbox_id = (await asyncio.shield(making)).id
        elif op == "function":
            wanted = arguments(create_model_of_function(), document["args"])
            wanted = create_arguments(wanted, roots=edge.config.mount_roots)
            self._room.enter_context(edge.room(1, wanted["memory_mb"] * wanted["workers"]))
            self.function = await AsyncSandbox._function(**wanted, edge=edge.config.name)
            self.sandbox_id = self.function.id
        elif op in ("open", "look", "attach"):
            sandbox_id = str(document["sandbox"])
            try:
                if op == "look":
                    edge.tenancy(sandbox_id)  # a look does not wake what is paused
                else:
                    await edge.held(sandbox_id)
            except SandboxEnded as error:
                if op in ("look", "attach"):
                    pass  # the log can be read, and answered from, after the end
                elif document.get("again"):
                    raise
                else:  # as AsyncSandbox.connect says it
                    raise SandboxNotFound(sandbox_id, cause=error.cause) from error
            if op == "attach":
                self.hold = await AsyncSandbox.attach(sandbox_id, edge="local")
            self.sandbox_id = sandbox_id
        else:
            raise EdgeError(
                f"a channel begins with create, open, look, attach, function, list or images, not {op[:40]!r}"
            )
        self._holds = op != "look"
        edge.hear(self.sandbox_id)
        return {"sandbox": self.sandbox_id, "edge": edge.config.name}


def _owner(document: dict[str, Any]) -> str:
    """The client's name, as far as it is one: it goes into logs."""
    return "".join(c for c in str(document.get("owner", ""))[:80] if c.isprintable()) or "somebody"


def _label(name: str) -> str:
    """A call's name as a metric's label: never what a client made up."""
    from rorqual.sandbox._remote_methods import methods

    known = {"create", "open", "look", "attach", "list", "images", "function", "call", *STREAMS}
    return name if name in known or name in methods() else "other"
