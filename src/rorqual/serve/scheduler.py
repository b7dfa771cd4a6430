"""Scheduler: one thread that owns the engine; requests join and leave between steps.

A turn of the loop: let go of cancelled requests, do what others asked of the cache, admit from the queue, one step
of the engine's batch, which feeds prompts by chunks beside the others' decodes. The queue is bounded, and fair
between the holders of keys: they take turns. Owns the queue, the admission and who hears of what; rows, prefixes and
memory are the engine's. What a token means is the `Answer`'s matter.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rorqual import chat
from rorqual.engine import (
    Allowed,
    Batch,
    BatchEvent,
    BatchFound,
    CacheFull,
    Engine,
    EngineError,
    SamplingParams,
    TokenGuide,
)
from rorqual.serve.answer import Answer
from rorqual.serve.cache_report import cache_reason
from rorqual.serve.config import ServeConfig
from rorqual.serve.errors import (
    BadRequest,
    ContextTooLong,
    EngineFailed,
    Overloaded,
    ServeError,
    ShuttingDown,
)
from rorqual.serve.metrics import Metrics

__all__ = ["Job", "Listener", "Scheduler"]

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 30
"""When to come back to a cache that was full."""


class Listener(Protocol):
    """Hears of a job, in the scheduler's thread."""

    def on_events(self, events: Sequence[chat.Event]) -> None:
        """New events; the last of a finished answer is `end`."""
        ...

    def on_error(self, error: ServeError) -> None:
        """The job is lost; nothing follows."""
        ...


@dataclass(kw_only=True, eq=False)
class Job:
    """One request in the scheduler. The fields below `listener` are the scheduler's to write."""

    tenant: str
    prompt: list[int]
    params: SamplingParams
    answer: Answer
    listener: Listener
    keep_at: tuple[int, ...] = ()
    """Lengths of prefixes of the prompt that are worth keeping."""
    guide: TokenGuide | None = None
    """Says before each draw which tokens may be drawn; called in the scheduler's thread. One that raises fails its
    job alone."""
    on_finish: Callable[[], None] | None = None
    """Called before the last event goes out."""
    found: BatchFound | None = None
    """The cached prefix it began at; None before its first step."""
    fault: Exception | None = None
    """What its guide raised."""
    need_bytes: int = 0
    """Cache of prompt and longest possible answer."""
    submitted: float = 0.0
    """Monotonic time, as the ones below."""
    last_token: float = 0.0
    cancelled: bool = False
    key: int = -1
    """Of its row."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that a kept prefix spared."""
        return 0 if self.found is None else self.found.match.tokens


class Scheduler:
    """Runs jobs on an engine. `start` it, `close` it."""

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig,
        metrics: Metrics,
        *,
        make_rows: Callable[[Engine], Batch] | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self._kv_bytes = min(config.kv_bytes, engine.kv_bytes)
        self._metrics = metrics
        self._make_rows = make_rows or _rows
        self._rows = self._make_rows(engine)
        self._condition = threading.Condition()
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._waiting = 0
        self._running: dict[int, Job] = {}
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._next_key = 0
        self._reserved = self._preemptions = 0
        self._mean_seconds = 1.0
        self._draining = self._closing = False
        self._abort: ServeError | None = None
        self._thread = threading.Thread(target=self._run, name="rorqual-engine", daemon=True)

    # --- any thread

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def held(self) -> int:
        """Requests in queue and engine."""
        return self._waiting + len(self._running)

    def check_room(self) -> None:
        """Raises Overloaded or ShuttingDown if a request would be refused now."""
        if self._draining:
            raise ShuttingDown("the server is shutting down: it accepts no more requests")
        if self._waiting >= self.config.max_waiting:
            wait = self._mean_seconds * self._waiting / self.config.max_running
            raise Overloaded(
                f"{self._waiting} requests are waiting, as many as the queue holds: try again later",
                retry_after=min(max(math.ceil(wait), 1), 60),
            )

    def check_fit(self, prompt: Sequence[int], max_tokens: int | None, *, param: str) -> int:
        """Tokens the answer may have. Raises ContextTooLong with the numbers, BadRequest for an invalid id."""
        limit = self.engine.config.max_position_embeddings
        room = limit - len(prompt)
        if room < 1 or (max_tokens is not None and max_tokens > room):
            asked = f" and {max_tokens} for the answer" if max_tokens is not None else ""
            error = ContextTooLong(
                f"this model's context is {limit} tokens; the request has {len(prompt)} in the prompt{asked}",
                prompt_tokens=len(prompt),
                max_tokens=max_tokens or 0,
                limit=limit,
            )
            error.param = param
            raise error
        vocab = self.engine.config.vocab_size
        bad = next((token for token in prompt if not 0 <= token < vocab), None)
        if bad is not None:
            raise BadRequest(f"token id {bad} is outside the vocabulary (0 to {vocab - 1})", param=param)
        allowed = max_tokens or room
        need = self.engine.predicted_bytes(len(prompt) + allowed)
        if need > self._kv_bytes:
            raise ContextTooLong(
                f"{len(prompt)} prompt tokens and {allowed} for the answer need {need} bytes of cache, "
                f"the server has {self._kv_bytes}: ask for fewer tokens",
                prompt_tokens=len(prompt),
                max_tokens=allowed,
                limit=limit,
            )
        return allowed

    def submit(self, job: Job) -> None:
        """Queues a job. Raises Overloaded, ShuttingDown."""
        with self._condition:
            self.check_room()
            tokens = len(job.prompt) + job.params.max_tokens
            job.need_bytes = self.engine.predicted_bytes(tokens)
            job.submitted = time.monotonic()
            self._queues.setdefault(job.tenant, deque()).append(job)
            self._waiting += 1
            self._gauges()
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer any more: the row is free before the next step. Idempotent."""
        with self._condition:
            job.cancelled = True
            self._condition.notify()

    def call(self, act: Callable[[], T]) -> Future[T]:
        """Runs `act` between two steps, in the thread that owns the engine. Raises ShuttingDown when it has ended."""
        future: Future[T] = Future()
        with self._condition:
            if self._closing or not self.alive:
                raise ShuttingDown("the server is shutting down")
            self._calls.append((act, future))
            self._condition.notify()
        return future

    def drain(self) -> None:
        """Refuses new requests from now on; held ones go on."""
        with self._condition:
            self._draining = True

    def abort_all(self, error: ServeError) -> None:
        """Gives up every held request with `error`."""
        with self._condition:
            self._abort = error
            self._condition.notify()

    def close(self) -> None:
        """Gives up what is left and ends the thread. Idempotent."""
        with self._condition:
            self._draining = self._closing = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # --- the thread

    def _run(self) -> None:
        error: ServeError = ShuttingDown("the server is shutting down")
        try:
            while self._turn():
                pass
        except BaseException as caught:
            error = EngineFailed(f"the scheduler failed: {type(caught).__name__}: {caught}")
            raise
        finally:
            with self._condition:
                self._draining = True
                self._fail_all(error)

    def _turn(self) -> bool:
        with self._condition:
            while not (self._closing or self._abort or self.held or self._calls):
                self._condition.wait()
            if self._closing:
                return False
            if self._abort is not None:
                self._fail_all(self._abort)
                self._abort = None
            self._drop_cancelled()
            calls, self._calls = self._calls, deque()
            self._admit()
        for act, future in calls:
            _answer(act, future)
        self._step()
        self._gauges()
        return True

    def _drop_cancelled(self) -> None:
        for queue in self._queues.values():
            gone = [job for job in queue if job.cancelled]
            for job in gone:
                queue.remove(job)
                self._waiting -= 1
                self._metrics.aborted()
        for job in [job for job in self._running.values() if job.cancelled]:
            self._release(job)  # what was computed stays a prefix: a retry goes on from there
            self._metrics.aborted()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.config.max_running:
            tenant = next(name for name, queue in self._queues.items() if queue)
            queue = self._queues[tenant]
            job = queue[0]
            if self._reserved and self._reserved + job.need_bytes > self._kv_bytes:
                return  # it is its turn: nobody overtakes it, so that it cannot starve
            queue.popleft()
            del self._queues[tenant]
            if queue:
                self._queues[tenant] = queue  # behind the others
            self._waiting -= 1
            self._reserved += job.need_bytes
            self._metrics.queue_time.observe(time.monotonic() - job.submitted)
            self._metrics.prompt_tokens.inc(len(job.prompt))
            self._metrics.prefix_queries.inc(len(job.prompt))
            try:
                self._begin(job)
            except EngineError as error:
                self._reserved -= job.need_bytes
                self._fail(job, _failure(error))

    def _begin(self, job: Job) -> None:
        key, self._next_key = self._next_key, self._next_key + 1
        guides = {} if job.guide is None else {key: _guarded(job, job.guide)}
        self._rows.add(
            {key: job.prompt},
            {key: job.params},
            space=job.tenant,
            guides=guides,
            keep_at={key: job.keep_at},
        )
        job.key = key
        self._running[key] = job

    def _step(self) -> None:
        if not self._running:
            return
        try:
            events = self._rows.step()
        except CacheFull as error:
            if error.key is None:
                self._lose_all(error)
                return
            job = self._running[error.key]  # it alone does not fit; the others can go on
            self._release(job)
            self._fail(job, _failure(error))
            return
        except Exception as error:  # the boundary: a step that raised leaves no row usable
            self._lose_all(error)
            return
        self._note_found()
        now = time.monotonic()
        self._metrics.generation_tokens.inc(len(events))
        for event in events:
            self._hear(self._running[event.key], event, now)

    def _note_found(self) -> None:
        for job in self._running.values():
            if job.found is None and (found := self._rows.found(job.key)) is not None:
                job.found = found
                self._metrics.found(found, cache_reason(found))

    def _hear(self, job: Job, event: BatchEvent, now: float) -> None:
        if job.fault is not None:
            self._release(job)
            self._fail(job, _failure(job.fault))
            return
        if job.last_token:
            self._metrics.inter_token.observe(now - job.last_token)
        else:
            self._metrics.first_token.observe(now - job.submitted)
        job.last_token = now
        said = job.answer.push(event.token_id, event.finish_reason)
        if job.answer.finished:
            self._finish(job, said)
        elif said:
            job.listener.on_events(said)

    def _lose_all(self, error: Exception) -> None:
        jobs, self._running = list(self._running.values()), {}
        self._rows.abandon()
        self._rows, self._preemptions = self._make_rows(self.engine), 0
        for job in jobs:
            self._reserved -= job.need_bytes
            self._fail(job, _failure(error))

    def _finish(self, job: Job, said: Sequence[chat.Event]) -> None:
        self._release(job)
        seconds = time.monotonic() - job.submitted
        self._mean_seconds = 0.9 * self._mean_seconds + 0.1 * seconds
        self._metrics.latency.observe(seconds)
        self._metrics.finished(said[-1].text)
        if job.on_finish is not None:
            job.on_finish()
        job.listener.on_events(said)

    def _release(self, job: Job) -> None:
        """Takes the job's row out; what it holds is a prefix now: whoever continues or retries goes on from it."""
        del self._running[job.key]
        self._rows.remove(job.key)
        self._reserved -= job.need_bytes

    def _fail_all(self, error: ServeError) -> None:
        jobs = [*self._running.values(), *(j for q in self._queues.values() for j in q)]
        self._running = {}
        self._rows.abandon()
        self._queues.clear()
        for _, future in self._calls:
            future.set_exception(error)
        self._calls.clear()
        self._waiting = self._reserved = 0
        for job in jobs:
            self._fail(job, error)
        self._gauges()

    def _fail(self, job: Job, error: ServeError) -> None:
        self._metrics.rejected(error.code or "error")
        job.listener.on_error(error)

    def _gauges(self) -> None:
        self._metrics.waiting.set(self._waiting)
        self._metrics.running.set(len(self._running))
        self._metrics.preemptions.inc(self._rows.preemptions - self._preemptions)
        self._preemptions = self._rows.preemptions
        self._metrics.kv_usage.set(self._reserved / self._kv_bytes)
        if self.engine.prefixes is not None:
            self._metrics.kept_bytes.set(self.engine.prefixes.held_bytes)
            self._metrics.kept_pages.set(self.engine.prefixes.pages)


def _rows(engine: Engine) -> Batch:
    return Batch(engine, prefixes=True, frontiers=True)


def _answer(act: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(act())
    except Exception as error:  # the boundary: whoever asked hears of it
        future.set_exception(error)


def _guarded(job: Job, guide: TokenGuide) -> TokenGuide:
    """The guide, whose failure is its job's alone."""

    def asked(token: int | None) -> Allowed | None:
        if job.fault is not None:
            return None
        try:
            allowed = guide(token)
            if allowed is not None and allowed.bits is not None and not allowed.bits.any():
                raise ValueError("the guide allows no token")
        except Exception as error:  # the boundary: a guide is the request's own
            job.fault = error
            return None
        return allowed

    return asked


def _failure(error: Exception) -> ServeError:
    if isinstance(error, CacheFull):  # admission reckons with what requests need, not with what is pinned
        log.warning("a request found no room: %s", error)
        full = Overloaded(f"the cache has no room for this request now: {error}", retry_after=RETRY_SECONDS)
        full.code = "cache_full"
        return full
    log.error("the engine failed", exc_info=error)
    kind = "refused the request" if isinstance(error, EngineError) else f"failed: {type(error).__name__}"
    return EngineFailed(f"the engine {kind}: {error}")
