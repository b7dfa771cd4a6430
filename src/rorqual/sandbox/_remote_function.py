"""A function whose pool an edge keeps: source text and JSON cross, as they do on their way into a sandbox.

It belongs to its connection: when that ends, by `close` or by a cut, the pool ends with it.
"""

# ruff: noqa: ASYNC109 -- `timeout` is the call's, held by its worker

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rorqual.sandbox._address import EdgePlace
from rorqual.sandbox._async.function import AsyncFunction
from rorqual.sandbox._async.sandbox import AsyncSandbox
from rorqual.sandbox._remote_channel import Channel
from rorqual.sandbox._remote_codec import decode, encode
from rorqual.sandbox.errors import InvalidRequest, Unsupported
from rorqual.sandbox.records import FunctionResult
from rorqual.sandbox.trajectory import TrajectoryEntry


class RemoteFunction(AsyncFunction):
    """Made by AsyncSandbox.function."""

    def __init__(self, channel: Channel, *, workers: int) -> None:
        self._channel = channel
        self._workers = workers
        self._closed = False

    @property
    def id(self) -> str:
        """The sandbox id of its zygote when it was made."""
        return self._channel.sandbox_id

    async def start(self) -> None:
        """It has been started."""

    async def _call(
        self, text: str, name: str, args: Sequence[Any], *, timeout: float | None, stdin: bytes
    ) -> FunctionResult:
        if self._closed:
            raise InvalidRequest("this function is closed: make a new one with Sandbox.function")
        if not isinstance(stdin, bytes):
            raise InvalidRequest("stdin: must be bytes")
        fields = {"text": text, "target": name, "timeout": timeout, "stdin": encode(stdin)}
        value = await self._channel.call("invoke", name="a function's call", args=_json(args), **fields)
        return cast(FunctionResult, decode(FunctionResult, value))

    async def trajectory(self, *, after: int = 0) -> list[TrajectoryEntry]:
        """The log of its zygote's sandbox: `created`, a `command` for each call, and the `ended` of an end."""
        value = await self._channel.call("function_log", name="trajectory", after=after)
        return cast(list[TrajectoryEntry], decode(list[TrajectoryEntry], value))

    async def close(self) -> None:
        """Ends it and every call that runs. Idempotent."""
        self._closed = True
        await self._channel.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"function {self.id} was dropped without close()", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} workers={self._workers}{' closed' * self._closed}>"


def _json(args: Sequence[Any]) -> list[Any]:
    """The arguments, which json.dumps must take as they are (numbers as keys become texts, as in-process)."""
    import json

    try:
        document: list[Any] = json.loads(json.dumps(list(args)))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"args: not JSON: {error}") from error
    return document


async def create(place: EdgePlace, arguments: Mapping[str, Any]) -> AsyncFunction:
    """AsyncSandbox.function at an edge."""
    if arguments["trajectory"] is not None:
        raise Unsupported(
            "trajectory=... with an edge",
            reason="the edge keeps the log",
            available=["function.trajectory()"],
        )
    defaults = inspect.signature(AsyncSandbox.function).parameters
    given = {
        name: encode(value, name=name)
        for name, value in arguments.items()
        if name != "trajectory" and value != defaults[name].default
    }
    channel, _ = await Channel.open(place, "function", args=given)
    return RemoteFunction(channel, workers=int(arguments["workers"]))
