"""Where tools act: the few calls a tool needs, over an `AsyncSandbox`, a `Sandbox`, or anything of that
shape.

Owns the translation of sandbox errors: a bad path is an OSError (the tool reports it to the model), a dead
sandbox is `EnvironmentGone` (the run ends with `sandbox_error`). Never creates or kills a sandbox, but for
`abandon`.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rorqual.agent.errors import EnvironmentGone, SetupError
from rorqual.sandbox.errors import InvalidRequest, SandboxError

__all__ = ["CommandEnded", "Environment", "SandboxEnvironment", "as_environment"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandEnded:
    """How a command ended. `output` is stdout with stderr where the command merged it, else stdout then
    stderr."""

    output: str
    exit_code: int
    timed_out: bool = False
    truncated: bool = False
    oom: bool = False
    """The kernel killed it for memory."""


@runtime_checkable
class Environment(Protocol):
    """What tools need. Raises OSError for a bad path, `EnvironmentGone` when there is nothing left to act
    in."""

    async def run(
        self,
        command: str,
        *,
        cwd: str | None = None,
        limit: float | None = None,
        on_output: Callable[[str], None] | None = None,
    ) -> CommandEnded:
        """Run `command` in a POSIX shell for at most `limit` seconds; a command's failure is a result, never
        an exception."""
        ...

    async def read(self, path: str) -> bytes:
        """The bytes of a file."""
        ...

    async def write(self, path: str, data: bytes) -> None:
        """Write a file, making its parents."""
        ...

    async def abandon(self) -> None:
        """The run was interrupted while a call was in flight: make sure that it ends."""
        ...

    def info(self) -> dict[str, Any]:
        """For the log: which sandbox this is."""
        ...


class SandboxEnvironment:
    """An `Environment` over `rorqual.sandbox`'s async or sync class (sync calls run in threads)."""

    def __init__(self, sandbox: Any) -> None:
        self._sandbox = sandbox
        self._sync = not inspect.iscoroutinefunction(sandbox.commands.run)

    @property
    def needs_loop(self) -> bool:
        """The sandbox is an `AsyncSandbox`: it belongs to the event loop that made it."""
        return not self._sync

    async def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            if self._sync:
                return await asyncio.to_thread(function, *args, **kwargs)
            return await function(*args, **kwargs)
        except SandboxError as error:
            if isinstance(
                error, InvalidRequest
            ):  # a NUL in a path, a file too large to read: the call's fault
                raise OSError(errno.EINVAL, str(error)) from error
            number = getattr(error, "errno", None)
            if isinstance(number, int):
                raise OSError(number, os.strerror(number)) from error
            raise EnvironmentGone(f"the sandbox failed: {error}") from error

    async def run(
        self,
        command: str,
        *,
        cwd: str | None = None,
        limit: float | None = None,
        on_output: Callable[[str], None] | None = None,
    ) -> CommandEnded:
        """Run `command`; see `Environment.run`."""
        extra = {} if on_output is None else {"on_stdout": on_output}
        ended = await self._call(self._sandbox.commands.run, command, cwd=cwd, timeout=limit, **extra)
        return CommandEnded(
            output=ended.stdout + ended.stderr,
            exit_code=ended.exit_code,
            timed_out=ended.timed_out,
            truncated=ended.truncated,
            oom=ended.oom,
        )

    async def read(self, path: str) -> bytes:
        """The bytes of the file at `path`."""
        return bytes(await self._call(self._sandbox.files.read, path, format="bytes"))

    async def write(self, path: str, data: bytes) -> None:
        """Write `data` to `path`."""
        await self._call(self._sandbox.files.write, path, data)

    async def abandon(self) -> None:
        """A sync sandbox's call sits in a thread that cannot be cancelled: only ending the sandbox ends
        it."""
        if self._sync:
            await self._call(self._sandbox.kill)

    def info(self) -> dict[str, Any]:
        """The sandbox's id."""
        return {"sandbox": self._sandbox.id} if isinstance(getattr(self._sandbox, "id", None), str) else {}


def as_environment(sandbox: Any) -> Environment:
    """`sandbox` itself if it is an `Environment`, else a `SandboxEnvironment` over it."""
    if hasattr(sandbox, "commands") and hasattr(sandbox, "files"):
        return SandboxEnvironment(sandbox)
    if isinstance(sandbox, Environment):
        return sandbox
    raise SetupError(
        f"sandbox is a {type(sandbox).__name__}: "
        "expected rorqual.sandbox.AsyncSandbox or Sandbox, or an Environment"
    )
