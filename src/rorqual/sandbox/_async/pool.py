"""`WarmPool`: sandboxes made ahead, adopted in a few milliseconds. Made anew in the background, never more than `size`.

A waiting sandbox is a whole one: its guest agent has answered, its shell is known, nothing has run in it. `take` gives
it what belongs to its user: variables, metadata, a lifetime, and a row `adopted` in its log. It is not used twice: what
was taken ends like any other, and the pool makes another. The waiting ones end with the pool, or with this process.
"""

# ruff: noqa: ASYNC109 -- `timeout` is a lifetime, not a wait

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from rorqual.sandbox._async.sandbox import AsyncSandbox
from rorqual.sandbox.errors import InvalidRequest, SandboxEnded, SandboxError, Unsupported
from rorqual.sandbox.limits import SandboxSpec, parse_mounts
from rorqual.sandbox.records import PoolStatistics

MAX_SIZE = 512
AT_ONCE = 2
"""Sandboxes made at the same time: more would only slow those down that are in use."""
GRACE_S = 0.025
"""After one is taken, this long before the next is made, unless none is left: its taker goes first."""
WAIT_S = 30 * 86400.0
"""How long a sandbox may wait. It ends with its pool anyway."""
KEY = "rorqual.pool"
"""Metadata of a waiting sandbox: `Sandbox.list()` shows whose it is."""
_OWN = ("envs", "metadata", "timeout", "keep")


class AsyncWarmPool:
    """Sandboxes that are ready before they are asked for. Make it with `create`; use it as a context manager."""

    def __init__(self, size: int, options: Mapping[str, Any]) -> None:
        self._id = f"pool-{secrets.token_hex(4)}"
        self._size = size
        self._options = dict(options)
        self._ready: deque[tuple[AsyncSandbox, float]] = deque()
        self._making: set[asyncio.Task[None]] = set()
        self._watching: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._filling: asyncio.Task[None] | None = None
        self._closed = False
        self._warm = self._cold = self._failed = self._in_a_row = 0
        self._error: BaseException | None = None

    @classmethod
    async def create(cls, *, size: int, **options: Any) -> AsyncWarmPool:
        """Makes `size` sandboxes and returns when all are ready.

        options: as `Sandbox.create`, without what is given when one is taken (envs, metadata, timeout, keep) and
        without an edge.

        Raises:
            InvalidRequest, Unsupported, HostUnfit, LaunchFailed: as `Sandbox.create`; nothing is left.
        """
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
            raise InvalidRequest(f"size: {size!r} must be a whole number from 1 to {MAX_SIZE}")
        if given := [name for name in _OWN if name in options]:
            raise InvalidRequest(f"{given[0]}: give it to take(): it belongs to one sandbox, not to the pool")
        pool = cls(size, options)
        pool._filling = asyncio.create_task(pool._fill())
        try:
            while len(pool._ready) < size:
                pool._changed.clear()
                if pool._error is not None:
                    raise pool._error
                await pool._changed.wait()
        except BaseException:
            await pool.close()
            raise
        return pool

    @property
    def id(self) -> str:
        """'pool-<8 hex digits>': in the log of each of its sandboxes."""
        return self._id

    async def take(
        self,
        *,
        timeout: float = 300.0,
        envs: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        keep: bool = False,
    ) -> AsyncSandbox:
        """A sandbox of one's own: a waiting one, or, when none waits, one that is made now (`statistics().cold`).

        timeout: its lifetime from now. envs, metadata, keep: as `Sandbox.create`. Raises what that raises.
        """
        own: dict[str, Any] = {
            "timeout": timeout,
            "envs": dict(envs or {}),
            "metadata": dict(metadata or {}),
            "keep": keep,
        }
        SandboxSpec(**own)  # refused before one is spent on it
        if self._closed:
            raise InvalidRequest(f"{self._id}: the pool is closed")
        while self._ready:
            sandbox, since = self._ready.popleft()
            self._changed.set()
            try:
                await _adopt(sandbox, own, pool=self._id, waited=time.monotonic() - since)
            except SandboxEnded:
                continue  # it ended while it waited: its own log says why
            except BaseException:
                await sandbox.kill()
                raise
            self._warm += 1
            return sandbox
        self._cold += 1
        return await AsyncSandbox.create(**self._options, **own)

    async def statistics(self) -> PoolStatistics:
        """How many wait, and what has come of the requests so far."""
        return PoolStatistics(
            size=self._size,
            ready=len(self._ready),
            making=len(self._making),
            warm=self._warm,
            cold=self._cold,
            failed=self._failed,
            last_error=str(self._error or ""),
        )

    async def close(self) -> None:
        """Ends the waiting ones; those that were taken are their takers'. Idempotent, shielded from cancellation."""
        await asyncio.shield(asyncio.ensure_future(self._close()))

    async def __aenter__(self) -> AsyncWarmPool:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _close(self) -> None:
        self._closed = True
        tasks = [*([self._filling] if self._filling else []), *self._making, *self._watching]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        waiting, self._ready = list(self._ready), deque()
        await asyncio.gather(*[sandbox.kill() for sandbox, _ in waiting])

    async def _fill(self) -> None:
        """Keeps `size` ready. A failure is tried again, after a wait that doubles up to half a minute."""
        while True:
            if self._in_a_row:
                await asyncio.sleep(min(30.0, 0.1 * 2**self._in_a_row))
            elif self._ready:
                await asyncio.sleep(GRACE_S)
            while len(self._ready) + len(self._making) < self._size and len(self._making) < AT_ONCE:
                task = asyncio.create_task(self._make())
                self._making.add(task)
                task.add_done_callback(self._made)
            self._changed.clear()
            await self._changed.wait()

    def _made(self, task: asyncio.Task[None]) -> None:
        self._making.discard(task)
        self._changed.set()

    async def _make(self) -> None:
        """One more. An error is kept for `statistics` and for who waits for the first filling."""
        try:
            sandbox = await AsyncSandbox.create(**self._options, timeout=WAIT_S, metadata={KEY: self._id})
        except (SandboxError, OSError, TypeError) as error:
            self._failed += 1
            self._in_a_row += 1
            self._error = error
            return
        try:
            if type(sandbox) is not AsyncSandbox:
                raise Unsupported(
                    "a pool on an edge",
                    reason="its sandboxes are of this process",
                    available=["edge='local'"],
                )
            await sandbox.commands._shell()
        except BaseException as error:
            await sandbox.kill()
            if not isinstance(error, SandboxError):
                raise
            self._failed += 1
            self._in_a_row += 1
            self._error = error
            return
        self._in_a_row, self._error = 0, None
        self._ready.append((sandbox, time.monotonic()))
        watch = asyncio.create_task(self._watch(sandbox))
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)

    async def _watch(self, sandbox: AsyncSandbox) -> None:
        """One that ends while it waits is replaced."""
        await sandbox._session.over.wait()
        for entry in list(self._ready):
            if entry[0] is sandbox:
                self._ready.remove(entry)
                await sandbox.close()
        self._changed.set()


async def _adopt(sandbox: AsyncSandbox, own: Mapping[str, Any], *, pool: str, waited: float) -> None:
    """Makes a waiting sandbox its taker's: in its log, then in its record and in force. Raises SandboxEnded."""
    session = sandbox._session
    record = await sandbox._record()
    with session.alive():
        spec = SandboxSpec(**record["spec"] | {"mounts": parse_mounts(record["spec"]["mounts"])})
        spec = replace(spec, **own)
        request = {"pool": pool, "waited": round(waited, 3), **own}
        seq = await session.log.begin(sandbox=session.id, kind="adopted", request=request)
        envs = {**session.envs, **spec.envs}
        fields = {"envs": envs, "metadata": dict(spec.metadata), "spec": asdict(spec)}
        answer = await session.keeper_call("adopt", record=fields, seconds=spec.timeout, keep=spec.keep)
        session.envs = envs
        sandbox._owned = not spec.keep
        if spec.keep:
            session.launched.keeper.keeps = True
        session.log.finish(sandbox=session.id, seq=seq, result={"expires": answer["expires"]})
