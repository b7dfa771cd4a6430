"""The edge: the sandboxes of this daemon, who they belong to, how much room is left, and when a lease is over.

Owns tenancies and admission; the sandboxes themselves belong to keepers, which outlive this process: after a kill -9
the next edge of the same name finds them by the book (book.py) and goes on. HTTP is app.py's and channel.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rorqual.sandbox._async.commands import AsyncCommandHandle
from rorqual.sandbox._async.sandbox import AsyncSandbox, AsyncTrajectory, _live, _record
from rorqual.sandbox.edge.adopt import settle
from rorqual.sandbox.edge.book import Book, Row
from rorqual.sandbox.edge.config import EdgeConfig
from rorqual.sandbox.edge.metrics import Metrics
from rorqual.sandbox.errors import (
    Cause,
    EdgeFull,
    EdgeRefused,
    SandboxEnded,
    SandboxError,
    SandboxNotFound,
)
from rorqual.sandbox.keeper.client import KeeperDied, keeper_at
from rorqual.sandbox.prune import reap
from rorqual.sandbox.records import SandboxInfo
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.trajectory import open_log

SWEEP_S = 0.25
OVER_KEPT = 4096
END_S = 30.0
log = logging.getLogger(__name__)

Told = Callable[[str, str], None]
"""Called with (cause, detail) when a sandbox is over."""


@dataclass(kw_only=True, eq=False)
class Tenancy:
    """One live sandbox and whose it is."""

    row: Row
    sandbox: AsyncSandbox | None
    """None after a restart, until somebody calls."""
    heard: float = field(default_factory=time.monotonic)
    """When a client that holds it was last heard."""
    told: set[Told] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ending: bool = False

    @property
    def id(self) -> str:
        return self.row.id


class Edge:
    """The daemon without its HTTP. `start` it, `stop` it."""

    def __init__(self, config: EdgeConfig, *, state: StateDir | None = None) -> None:
        self.config = config
        self.state = state or StateDir.from_environment()
        self.metrics = Metrics(config.name)
        self.draining = False
        self._tenancies: dict[str, Tenancy] = {}
        self._over: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._pending = [0, 0]
        """Sandboxes and MiB that are being made."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._book: Book | None = None
        self._handles: dict[tuple[str, int], AsyncCommandHandle] = {}

    # -- life

    @property
    def home(self) -> Path:
        """Where its book, its lock and its default socket lie."""
        return home_of(self.state, self.config.name)

    async def start(self) -> None:
        """Takes up what an earlier edge of this name left. Raises SandboxError."""
        self.state.prepare()
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._book = Book(self.home / "book.db")
        await asyncio.to_thread(reap, self.state)
        await self._adopt()
        self._spawn(self._sweep())

    async def stop(self) -> None:
        """Lets go of every sandbox, or ends them all (`end_on_stop`). Idempotent."""
        self.draining = True
        if self.config.end_on_stop:
            ends = [
                self.end(tenancy, "killed", "its edge was stopped") for tenancy in self._tenancies.values()
            ]
            await asyncio.gather(*ends, return_exceptions=True)
        for tenancy in self._tenancies.values():
            if tenancy.sandbox is not None:
                tenancy.sandbox._session.closing = True  # what is cancelled now runs on in the sandbox
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=3.0)
        for tenancy in self._tenancies.values():
            if tenancy.sandbox is not None:
                await tenancy.sandbox.close()
        self._tenancies.clear()
        if self._book is not None:
            self._book.close()
            self._book = None

    async def _adopt(self) -> None:
        rows = {row.id: row for row in self.book.rows()}
        prefix = f"sb-{self.config.name}-"
        alive: set[str] = set()
        for place in self.state.sandboxes.iterdir():
            record = _record(self.state, place.name)
            if record is None or not place.name.startswith(prefix) or len(place.name) != len(prefix) + 12:
                continue
            if record["substrate"] == "function":
                continue
            alive.add(place.name)
            if place.name in rows:
                self._tenancies[place.name] = Tenancy(row=rows[place.name], sandbox=None)
            else:
                log.warning("a sandbox that was never handed over", extra={"sandbox": place.name})
                await self._kill(record, "infra", "the edge died before it had told its client")
        for name in rows.keys() - alive:
            self.book.strike(name)
        for tenancy in self._tenancies.values():
            record = _record(self.state, tenancy.id)
            if record is not None and not record.get("paused"):
                self._spawn(self._take_up(tenancy))
        if self._tenancies:
            log.info("took up sandboxes", extra={"count": len(self._tenancies)})

    async def _take_up(self, tenancy: Tenancy) -> None:
        with contextlib.suppress(SandboxError):
            await self._held(tenancy)

    # -- rooms

    @property
    def book(self) -> Book:
        assert self._book is not None, "the edge has not started"
        return self._book

    @property
    def used(self) -> tuple[int, int]:
        """Sandboxes, and MiB of their memory limits, those included that are being made."""
        memory = sum(tenancy.row.memory_mb for tenancy in self._tenancies.values())
        return len(self._tenancies) + self._pending[0], memory + self._pending[1]

    @contextlib.contextmanager
    def room(self, count: int, memory_mb: int) -> Iterator[None]:
        """Holds room for `count` sandboxes of `memory_mb` while they are made. Raises EdgeFull, EdgeRefused."""
        config = self.config
        if self.draining:
            raise EdgeRefused(f"the edge {config.name!r} is stopping and makes no more sandboxes", status=503)
        sandboxes, memory = self.used
        for what, used, asked, limit in (
            ("sandboxes", sandboxes, count, config.max_sandboxes),
            ("MiB of memory limits", memory, count * memory_mb, config.max_memory_mb),
        ):
            if used + asked > limit:
                self.metrics.refused.labels(what.partition(" ")[0]).inc()
                raise EdgeFull(
                    config.name, what=what, used=used, asked=asked, limit=limit, retry_after=self._soon()
                )
        self._pending[0] += count
        self._pending[1] += count * memory_mb
        try:
            yield
        finally:
            self._pending[0] -= count
            self._pending[1] -= count * memory_mb

    def _soon(self) -> int:
        """Seconds until the next sandbox's lifetime is over: 1 to 60."""
        ends = [info.expires for info in _live(self.state) if info.id in self._tenancies]
        return max(1, min(60, round(min(ends, default=time.time()) - time.time())))

    # -- sandboxes

    async def create(self, arguments: Mapping[str, Any], *, owner: str, lease: float | None) -> Tenancy:
        """Makes one. arguments: all of AsyncSandbox.create's but the edge's. lease: None keeps it.

        Raises what AsyncSandbox.create raises, EdgeFull.
        """
        memory_mb = int(arguments["memory_mb"]) if isinstance(arguments["memory_mb"], int | float) else 0
        with self.room(1, memory_mb):
            began = time.monotonic()
            made = await AsyncSandbox._create(
                {**arguments, "keep": True, "trajectory": None}, edge=self.config.name
            )
            row = Row(id=made.id, owner=owner, lease=lease, memory_mb=memory_mb)
            tenancy = self._enter([row], [made])[0]
        self.metrics.created.inc()
        self.metrics.create_seconds.observe(time.monotonic() - began)
        return tenancy

    async def fork(self, tenancy: Tenancy, arguments: Mapping[str, Any]) -> list[Tenancy]:
        """AsyncSandbox.fork; the children are the same client's. Raises what it raises, EdgeFull."""
        parent = await self.held(tenancy.id)
        row = tenancy.row
        count = arguments.get("count", 1)
        with self.room(max(1, count) if isinstance(count, int) else 1, row.memory_mb):
            children = await parent.fork(**arguments)
            lease = None if arguments.get("keep") else row.lease
            rows = [
                Row(id=child.id, owner=row.owner, lease=lease, memory_mb=row.memory_mb) for child in children
            ]
            made = self._enter(rows, children)
        self.metrics.created.inc(len(made))
        return made

    def _enter(self, rows: list[Row], sandboxes: list[AsyncSandbox]) -> list[Tenancy]:
        self.book.enter(rows)
        made = []
        for row, sandbox in zip(rows, sandboxes, strict=True):
            sandbox._keeps_forks = True
            tenancy = Tenancy(row=row, sandbox=sandbox)
            self._tenancies[row.id] = tenancy
            self._spawn(self._watch(tenancy, sandbox))
            made.append(tenancy)
        return made

    def tenancy(self, sandbox_id: str) -> Tenancy:
        """A live one. Raises SandboxEnded when it was here and is over, SandboxNotFound else, InvalidRequest."""
        _record(self.state, sandbox_id)  # refuses what is no id
        found = self._tenancies.get(sandbox_id)
        if found is not None:
            return found
        verdict = self.verdict(sandbox_id)
        if verdict is not None:
            raise SandboxEnded(sandbox_id, cause=cast(Cause, verdict[0]), detail=verdict[1])
        raise SandboxNotFound(sandbox_id)

    def verdict(self, sandbox_id: str) -> tuple[str, str] | None:
        """(cause, detail) of one that is over, as remembered or as the log says; None: it never ended here."""
        if sandbox_id in self._over:
            return self._over[sandbox_id]
        if not sandbox_id.startswith(f"sb-{self.config.name}-") or not self.state.trajectory.is_file():
            return None
        entries = open_log(self.state.trajectory).read(sandbox_id)
        if entries and entries[-1].kind == "ended":
            result = entries[-1].result or {}
            return str(result.get("cause", "infra")), str(result.get("detail", ""))
        return None

    async def held(self, sandbox_id: str) -> AsyncSandbox:
        """The sandbox itself, connected to anew after a restart. Raises as `tenancy`."""
        return await self._held(self.tenancy(sandbox_id))

    async def _held(self, tenancy: Tenancy) -> AsyncSandbox:
        async with tenancy.lock:
            if tenancy.sandbox is None:
                try:
                    sandbox = await AsyncSandbox.connect(tenancy.id, edge="local")
                except SandboxNotFound:
                    await self.end(tenancy, "infra", "it did not answer when its edge came back")
                    raise
                sandbox._keeps_forks = True
                tenancy.sandbox = sandbox
                self._spawn(self._watch(tenancy, sandbox))
                await settle(sandbox)
            return tenancy.sandbox

    def trajectory(self, sandbox_id: str) -> AsyncTrajectory:
        """The log of one, readable after its end."""
        return AsyncTrajectory(open_log(self.state.trajectory), sandbox_id)

    def is_live(self, sandbox_id: str) -> bool:
        return sandbox_id in self._tenancies

    def running(self, sandbox_id: str, handle: AsyncCommandHandle) -> None:
        """Remembers the handle of a command while the command runs, so that any client can feed it."""
        key = (sandbox_id, handle.id)
        self._handles.setdefault(key, handle)
        task = handle._task or asyncio.current_task()  # of a foreground command: the call itself
        assert task is not None
        task.add_done_callback(lambda _: self._handles.pop(key, None))

    def handle(self, sandbox_id: str, command: int) -> AsyncCommandHandle | None:
        """The handle of a command that runs."""
        return self._handles.get((sandbox_id, command))

    async def kill(self, sandbox_id: str) -> tuple[bool, str, str]:
        """AsyncSandbox.kill: (it was alive, cause, detail). Raises SandboxNotFound, InvalidRequest."""
        try:
            tenancy = self.tenancy(sandbox_id)
        except SandboxEnded as error:
            return False, error.cause, error.detail
        return await self.end(tenancy, "killed", "kill() was called")

    def live(self) -> list[SandboxInfo]:
        """Every live sandbox of this edge, oldest first."""
        return [info for info in _live(self.state) if info.id in self._tenancies]

    def hear(self, sandbox_id: str) -> None:
        """Renews the lease of a sandbox."""
        tenancy = self._tenancies.get(sandbox_id)
        if tenancy is not None:
            tenancy.heard = time.monotonic()

    async def end(self, tenancy: Tenancy, cause: str, detail: str) -> tuple[bool, str, str]:
        """Ends one and removes everything of it: (it was alive, cause, detail)."""
        record = _record(self.state, tenancy.id)
        alive, verdict = False, None
        if record is not None:
            alive, verdict = await self._kill(record, cause, detail)
        verdict = verdict or await asyncio.to_thread(self.verdict, tenancy.id) or (cause, detail)
        self._forget(tenancy, *verdict)
        return alive, *verdict

    async def _kill(
        self, record: Mapping[str, Any], cause: str, detail: str
    ) -> tuple[bool, tuple[str, str] | None]:
        try:
            keeper = await asyncio.to_thread(keeper_at, Path(record["keeper"]))
            request = keeper.request("kill", sandbox=record["id"], cause=cause, detail=detail)
            answer = await asyncio.wait_for(asyncio.wrap_future(request), timeout=END_S)
        except KeeperDied:
            await asyncio.to_thread(reap, self.state)
            return False, None
        if "gone" in answer:
            return False, None
        return True, (str(answer.get("cause", cause)), str(answer.get("detail", detail)))

    def _forget(self, tenancy: Tenancy, cause: str, detail: str) -> None:
        if self._tenancies.pop(tenancy.id, None) is None:
            return
        self._over[tenancy.id] = (cause, detail)
        while len(self._over) > OVER_KEPT:
            self._over.popitem(last=False)
        self.book.strike(tenancy.id)
        self.metrics.ended.labels(cause).inc()
        log.info("a sandbox ended", extra={"sandbox": tenancy.id, "cause": cause, "detail": detail})
        for tell in list(tenancy.told):
            tell(cause, detail)

    async def _watch(self, tenancy: Tenancy, sandbox: AsyncSandbox) -> None:
        session = sandbox._session
        await session.over.wait()
        cause, detail = session.ended or ("infra", "the keeper gave no cause")
        self._forget(tenancy, cause, detail)
        if session.tasks:  # commands that were running: each learns the cause before its connection goes
            await asyncio.wait(list(session.tasks), timeout=5.0)
        await sandbox.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for tenancy in list(self._tenancies.values()):
                lease = tenancy.row.lease
                if lease is not None and now - tenancy.heard > lease and not tenancy.ending:
                    tenancy.ending = True
                    text = f"its client {tenancy.row.owner} was not heard for {lease:g} s (its lease)"
                    self.metrics.leases_expired.inc()
                    self._spawn(self._expire(tenancy, text))
                elif tenancy.sandbox is None and _record(self.state, tenancy.id) is None:
                    verdict = await asyncio.to_thread(self.verdict, tenancy.id)
                    self._forget(tenancy, *(verdict or ("infra", "its record is gone")))

    async def _expire(self, tenancy: Tenancy, detail: str) -> None:
        try:
            await self.end(tenancy, "killed", detail)
        finally:
            tenancy.ending = False  # tried again at the next sweep when that failed

    def _spawn(self, work: Any) -> None:
        self.keep(asyncio.get_running_loop().create_task(work))

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Holds a task until it is done; `stop` cancels it."""
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, SandboxError):
            log.error("a task of the edge failed", exc_info=error)


def home_of(state: StateDir, name: str) -> Path:
    """The directory of the edge `name`."""
    return state.run / "edges" / name
