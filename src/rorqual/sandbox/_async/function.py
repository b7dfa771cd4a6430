"""`AsyncFunction`: stateless calls. Code or a function goes in, a value comes out, and nothing stays.

Owns the pool: `workers` slots, their connections, the replacement of a zygote that died. What crosses the border is
source text and JSON, never a pickle. The protocol and the launch are substrates/function.py, the inside is zygote.py.
"""

# ruff: noqa: ASYNC109 -- `timeout` is the call's, held by its worker

from __future__ import annotations
import __future__

import ast
import asyncio
import contextlib
import functools
import inspect
import json
import operator
import secrets
import textwrap
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from rorqual.sandbox.errors import (
    Cause,
    GuestError,
    GuestGone,
    GuestProtocolError,
    InvalidRequest,
    LaunchFailed,
    SandboxEnded,
    SandboxError,
)
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.keeper.client import KeeperDied
from rorqual.sandbox.limits import FunctionSpec, call_timeout
from rorqual.sandbox.records import FunctionFailure, FunctionResult
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates import function as substrate
from rorqual.sandbox.trajectory import TrajectoryEntry, open_log

MAX_DEATHS = 3
"""Zygotes that may die in a row, without a call that came back, before the function gives up."""
_LOGGED = ("exit_code", "timed_out", "oom", "truncated", "seconds")
_VALUE_LOGGED = 64 << 10
"""Bytes of a value that the trajectory keeps: the JSON document that holds it, cut."""
_GRACE_S = 10.0
"""How much longer than its timeout a call may take to be answered, before its worker counts as dead."""
_VERDICT_S = 2.0


@dataclass(kw_only=True, eq=False)
class _Running:
    """One zygote's life, as one event loop sees it."""

    zygote: substrate.Zygote
    over: asyncio.Event = field(default_factory=asyncio.Event)
    verdict: tuple[str, str] | None = None
    workers: dict[int, substrate.Worker] = field(default_factory=dict)
    oom: dict[int, cgroups.OomCounter] = field(default_factory=dict)
    ooms: dict[int, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.zygote.launched.sandbox_id

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        def ended(cause: str, detail: str) -> None:
            self.verdict = (cause, detail)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self.over.set)

        self.zygote.launched.keeper.watch(self.id, ended)

    def hang_up(self, slot: int) -> None:
        if slot in self.workers:
            self.workers.pop(slot).close()

    def killed_by_memory(self, slot: int) -> bool:
        """Whether the slot's memory limit has killed a process since the last look."""
        count = self.oom[slot].read()
        before, self.ooms[slot] = self.ooms.get(slot, 0), count
        return count > before

    def end_error(self) -> SandboxEnded:
        cause, detail = self.verdict or ("infra", "the keeper gave no cause")
        return SandboxEnded(self.id, cause=cast(Cause, cause), detail=detail)


class AsyncFunction:
    """Runs calls, each in a fresh sandbox with Python warm. Make it with `AsyncSandbox.function`."""

    def __init__(self, spec: FunctionSpec, *, state: StateDir, trajectory: Path, edge: str = "local") -> None:
        self._spec = spec
        self._edge = edge
        self._state = state
        self._path = trajectory
        self._log = open_log(trajectory)
        self._free: asyncio.LifoQueue[int] = asyncio.LifoQueue()
        for slot in reversed(range(spec.workers)):
            self._free.put_nowait(slot)
        self._lock = asyncio.Lock()
        self._running: _Running | None = None
        self._deaths = 0
        self._closed = False

    @property
    def id(self) -> str:
        """The sandbox id of its zygote now; a zygote that died gives way to one with another id."""
        return self._running.id if self._running is not None else ""

    async def start(self) -> None:
        """Starts the zygote, and the first worker, where none runs. `Sandbox.function` has done it.

        Raises:
            ImageNotFound, HostUnfit, Unsupported, LaunchFailed: as `Sandbox.function`.
        """
        slot = await self._free.get()
        try:
            await self._worker(await self._zygote(), slot)
        except BaseException:
            self._free.put_nowait(slot)
            await self.close()
            raise
        self._free.put_nowait(slot)

    async def __call__(
        self, code: str | Callable[..., Any], *args: Any, timeout: float | None = None, stdin: bytes = b""
    ) -> FunctionResult:
        """Runs one call and returns how it ended; waits for a free worker first.

        code: Python source, whose value is its last expression, or `result`, and which finds `args` (a list); or a
        function, sent as its source: it may use nothing around it but builtins and what it imports. args, value:
        JSON. timeout: seconds from its start; None is the function's. stdin: at most 1 MiB, as
        code and args together.

        Raises:
            InvalidRequest: an argument is wrong; nothing ran.
            SandboxEnded: its zygote died under it (cause `infra`); the next call gets a new one.
            GuestGone: its worker alone died. TrajectoryError: the log cannot be written; nothing ran.
        """
        text, name = source_of(code)
        return await self._call(text, name, args, timeout=timeout, stdin=stdin)

    async def _call(
        self, text: str, name: str, args: Sequence[Any], *, timeout: float | None, stdin: bytes
    ) -> FunctionResult:
        """`__call__` with the source of the code, and the name of the function in it or ''."""
        limit = self._spec.timeout if timeout is None else call_timeout(timeout)
        payload = _payload(text, name, args)
        if not isinstance(stdin, bytes) or len(stdin) > substrate.MAX_REQUEST:
            raise InvalidRequest(f"stdin: must be bytes, at most {substrate.MAX_REQUEST}")
        head = {
            "payload": len(payload),
            "timeout": limit,
            "max_output": substrate.MAX_OUTPUT,
            "max_value": substrate.MAX_OUTPUT,
        }
        request = {
            "function": name,
            "code": text,
            "args": json.dumps(args),
            "timeout": limit,
            "stdin": len(stdin),
        }
        slot = await self._free.get()
        try:
            running = await self._zygote()
            seq = await self._log.begin(sandbox=running.id, kind="command", request=request)
            result: dict[str, Any] = {"error": "abandoned"}
            streams = (b"", b"")
            try:
                answer, *streams_and_value = await self._ask(running, slot, head, payload + stdin)
                outcome = _result(answer, *streams_and_value, oom=running.killed_by_memory(slot), seq=seq)
                result = {name: getattr(outcome, name) for name in _LOGGED}
                result |= {"value": streams_and_value[2][:_VALUE_LOGGED].decode(errors="replace")}
                result |= {"error": asdict(outcome.error) if outcome.error is not None else None}
                streams = (streams_and_value[0], streams_and_value[1])
            except SandboxError as error:
                result = {"error": f"{type(error).__name__}: {error}"}
                raise
            finally:
                self._log.finish(
                    sandbox=running.id, seq=seq, result=result, stdout=streams[0], stderr=streams[1]
                )
            self._deaths = 0
            return outcome
        finally:
            self._free.put_nowait(slot)

    async def trajectory(self, *, after: int = 0) -> list[TrajectoryEntry]:
        """The log of its zygote's sandbox: `created`, a `command` for each call, and the `ended` of an end."""
        await self._log.flush()
        return await asyncio.to_thread(self._log.read, self.id, after=after)

    async def close(self) -> None:
        """Ends it and every call that runs. Idempotent."""
        self._closed = True
        await asyncio.shield(asyncio.ensure_future(self._end()))

    async def __aenter__(self) -> AsyncFunction:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        running = self._running
        if not self._closed and running is not None and running.verdict is None:
            warnings.warn(f"function {running.id} was dropped without close()", ResourceWarning, stacklevel=2)
            running.zygote.launched.keeper.request(
                "kill", sandbox=running.id, cause="killed", detail="its client dropped it"
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} workers={self._spec.workers}{' closed' * self._closed}>"

    async def _end(self) -> None:
        async with self._lock:
            running = self._running
            if running is not None:
                for worker in running.workers.values():
                    worker.hang_up()
                if running.verdict is None:
                    with contextlib.suppress(KeeperDied):
                        await substrate.end(
                            running.zygote.launched.keeper,
                            running.id,
                            cause="killed",
                            detail="close() was called",
                        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):  # whoever waits for an answer has learnt that none comes
                for _ in range(self._spec.workers):
                    await self._free.get()
        for slot in range(self._spec.workers):
            self._free.put_nowait(slot)
            if running is not None:
                running.hang_up(slot)

    async def _zygote(self) -> _Running:
        """The zygote that lives, started when there is none or it died."""
        if self._closed:
            raise InvalidRequest("this function is closed: make a new one with Sandbox.function")
        async with self._lock:
            running = self._running
            if running is not None and running.verdict is None:
                return running
            if running is not None:
                self._deaths += 1
                if self._deaths >= MAX_DEATHS:
                    raise running.end_error()
            self._running = await self._start()
            return self._running

    async def _start(self) -> _Running:
        sandbox_id = f"sb-{self._edge}-{secrets.token_hex(6)}"
        seq = await self._log.begin(sandbox=sandbox_id, kind="created", request=asdict(self._spec))
        try:
            zygote = await substrate.launch(
                self._spec, sandbox_id=sandbox_id, state=self._state, trajectory=self._path
            )
        except BaseException as error:
            self._log.finish(
                sandbox=sandbox_id, seq=seq, result={"error": f"{type(error).__name__}: {error}"}
            )
            raise
        self._log.finish(sandbox=sandbox_id, seq=seq, result={"runtime": zygote.launched.runtime})
        running = _Running(zygote=zygote)
        running.oom = {slot: cgroups.OomCounter(path) for slot, path in enumerate(zygote.slots)}
        running.watch(asyncio.get_running_loop())
        return running

    async def _worker(self, running: _Running, slot: int) -> substrate.Worker:
        """The slot's connection; a new one where the last was hung up."""
        if slot not in running.workers:
            opening = asyncio.ensure_future(substrate.Worker.open(running.zygote, running.zygote.slots[slot]))
            dying = asyncio.ensure_future(running.over.wait())
            try:
                await asyncio.wait({opening, dying}, return_when=asyncio.FIRST_COMPLETED)
                if not opening.done():
                    verdict = running.end_error()
                    raise LaunchFailed(running.id, stage="zygote", detail=str(verdict)) from verdict
                running.workers[slot] = opening.result()
            finally:
                opening.cancel()
                dying.cancel()
        return running.workers[slot]

    async def _ask(
        self, running: _Running, slot: int, head: Mapping[str, Any], blob: bytes
    ) -> tuple[dict[str, Any], bytes, bytes, bytes]:
        """The answer of the slot's worker. Whatever else happens, its call is dead when this raises."""
        done = False
        try:
            worker = await self._worker(running, slot)
            await worker.send(head, blob)
            async with asyncio.timeout(head["timeout"] + _GRACE_S):
                answer, data = await worker.receive()
            out, err, value = substrate.checked(answer, data)
            if not answer["ready"]:
                detail = err.decode(errors="replace")[:4096] or "no message"
                raise LaunchFailed(running.id, stage="namespaces", detail=detail)
            done = True
            return answer, out, err, value
        except TimeoutError as error:
            raise GuestGone(f"{running.id}: the worker of this call did not answer in time") from error
        except GuestProtocolError:
            raise
        except GuestError as error:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_VERDICT_S if running.verdict is None else 0):
                    await running.over.wait()
            if running.verdict is not None:
                raise running.end_error() from error
            if running.killed_by_memory(slot):
                return _KILLED, b"", b"", b""
            raise GuestGone(f"{running.id}: the worker of this call died: {error}") from error
        finally:
            if not done:
                running.hang_up(slot)


_FUTURES = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_KILLED: dict[str, Any] = {"exit": -9, "timed_out": False, "cut": False, "seconds": 0.0, "oom": True}
"""The memory limit took the worker with its call."""


def _payload(text: str, name: str, args: Sequence[Any]) -> bytes:
    try:
        payload = json.dumps({"code": text, "name": name, "args": args}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"args: only JSON goes into a call: {error}") from error
    if len(payload) > substrate.MAX_REQUEST:
        raise InvalidRequest(
            f"code and args are {len(payload)} bytes, more than {substrate.MAX_REQUEST}: send them as stdin"
        )
    return payload


def source_of(code: str | Callable[..., Any]) -> tuple[str, str]:
    """(source text, name of the function in it or ''). Raises InvalidRequest."""
    if isinstance(code, str):
        return code, ""
    if not isinstance(code, types.FunctionType):
        raise InvalidRequest(f"code: {code!r} is neither source text nor a function written in Python")
    if code.__closure__:
        names = ", ".join(code.__code__.co_freevars)
        raise InvalidRequest(f"code: {code.__qualname__} uses {names} from around it: pass them as arguments")
    try:
        text = textwrap.dedent(inspect.getsource(code))
        tree = ast.parse(text)
    except (OSError, SyntaxError) as error:
        raise InvalidRequest(f"code: no source of {code.__qualname__} can be had: {error}") from error
    first = tree.body[0] if tree.body else None
    if len(tree.body) != 1 or not isinstance(first, ast.FunctionDef) or first.name != code.__name__:
        raise InvalidRequest(f"code: {code.__qualname__} must be a plain `def`, not a lambda and not async")
    if not _same(code.__code__, text):
        raise InvalidRequest(
            f"code: {code.__code__.co_filename} no longer holds what {code.__qualname__} was made from: import it anew"
        )
    return text, first.name


def _same(code: types.CodeType, text: str) -> bool:
    """Whether this source gives this code: a file that was changed since its import would run as something else."""
    flags = code.co_flags & _FUTURES
    made = next(
        (
            item
            for item in compile(text, "<call>", "exec", flags=flags, dont_inherit=True).co_consts
            if isinstance(item, types.CodeType) and item.co_name == code.co_name
        ),
        None,
    )
    names = ("co_code", "co_names", "co_varnames", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount")
    return made is not None and all(getattr(made, name) == getattr(code, name) for name in names)


def _result(
    answer: Mapping[str, Any], stdout: bytes, stderr: bytes, value: bytes, *, oom: bool, seq: int
) -> FunctionResult:
    """What a call's bytes amount to. The child wrote `value`, so it may be anything."""
    status = answer["exit"]
    code = status if status >= 0 else 128 - status
    document: Any = None
    error: FunctionFailure | None = None
    oom = oom or answer.get("oom", False)
    if len(value) > substrate.MAX_OUTPUT:
        error = _no_value(f"it is larger than {substrate.MAX_OUTPUT} bytes of JSON")
    elif value:
        try:
            document = json.loads(value)
        except (ValueError, RecursionError) as failure:
            error = _no_value(f"it is not JSON: {failure}")
    elif not answer["timed_out"]:
        error = _no_value(
            "the memory limit killed it" if oom else f"it ended before it gave one (status {code})"
        )
    if document is not None and not isinstance(document, dict):
        error = _no_value("it is not what our side of the call writes")
    got = document if isinstance(document, dict) else {}
    failed = got.get("error")
    if isinstance(failed, dict):
        texts = {name: failed.get(name) for name in ("type", "message", "traceback")}
        error = FunctionFailure(
            **{name: text if isinstance(text, str) else "" for name, text in texts.items()}
        )
    return FunctionResult(
        value=got.get("value") if error is None else None,
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        exit_code=137 if answer["timed_out"] else code or (1 if error is not None else 0),
        timed_out=answer["timed_out"],
        oom=oom,
        truncated=answer["cut"],
        error=error,
        seconds=answer["seconds"],
        seq=seq,
    )


def _no_value(reason: str) -> FunctionFailure:
    return FunctionFailure(type="NoValue", message=f"the call gave no value: {reason}", traceback="")
