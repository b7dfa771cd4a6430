"""Scheduler: continuous batching: which sequences a step advances, by how many tokens, and who makes room for whom.

Every decoding row brings its one token; rows with more to feed (prompts, tool results) share a budget of
`prefill_chunk` tokens a step and take turns at it, so that a long prompt delays the others by a chunk, never by
itself. What was fed is kept as a prefix where the caller asked for it, at the end of a turn, and every `unit_tokens`;
what a row will begin at is pinned from the moment it comes in. Precedence at memory is priority, then arrival: when
the pool is full and no unused prefix can go, the row of least precedence is preempted: spilled exactly, and resumed
when there is room; waiting rows (whose caller is busy) go first. Equal prompts that arrive together are fed once.
                                                                                            (spec/engines.md 7)
Owns rows and their order. What a token means is the caller's matter; bytes are the pool's.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from rorqual.engine.errors import CacheFull
from rorqual.engine.prefix import Match
from rorqual.engine.sampler import Allowed, SamplingParams, TokenGuide, sample
from rorqual.engine.sequence import PagedSequence
from rorqual.engine.spill import Spilled

if TYPE_CHECKING:
    from rorqual.engine.engine import Engine, Pinned

__all__ = ["Drawn", "Row", "Scheduler"]

T = TypeVar("T")

RESUME_MARGIN = 4
"""Pages that must be free beside a spilled sequence before it comes back while others run: no ping-pong."""


@dataclass(slots=True, eq=False)
class Row:
    """One sequence in the scheduler."""

    key: int
    params: SamplingParams
    order: int
    """Of arrival."""
    pending: deque[int] = field(default_factory=deque)
    """Tokens to feed before sampling again."""
    priority: int = 0
    """Higher goes first."""
    space: str = ""
    """Whose prefixes it may use."""
    sequence: PagedSequence | None = None
    spilled: Spilled | None = None
    guide: TokenGuide | None = None
    """Says before each draw what may be drawn."""
    allowed: Allowed | None = None
    """What `guide` said of the next draw."""
    keep_at: tuple[int, ...] = ()
    """Positions, ascending, that are worth keeping to the token."""
    pin: Pinned | None = None
    """What it will begin at, kept from eviction until then."""
    found: Match | None = None
    """What it began at."""
    from_disk: int = 0
    """Tokens of that which only the disk had."""
    warm: bool = False
    """At least half of its prompt was cached: a conversation that goes on."""
    turn: int = 0
    """The step in which it was last fed of its prompt."""
    kept: int = -1
    """Its length when it was last kept."""
    leader: Row | None = None
    """Feeds the same prompt: this row waits, and starts as its fork."""
    sampled: int = 0
    """Tokens sampled in this turn."""
    waiting: bool = False

    @property
    def length(self) -> int:
        """Tokens held, in the pool or spilled."""
        if self.sequence is not None:
            return self.sequence.length
        return len(self.spilled.token_ids) if self.spilled is not None else 0

    def bounded(self, count: int, *, slack: int) -> int:
        """At most `count` tokens to feed, so that the head can still reach the next position to be kept."""
        end = self.length + count
        for mark in self.keep_at:
            if self.length < mark and mark + slack < end:
                return mark - self.length
        return count

    @property
    def replaying(self) -> bool:
        """Whether its next call rebuilds windows instead of feeding."""
        return self.sequence is not None and self.sequence.replay_left > 0

    @property
    def precedence(self) -> tuple[int, int]:
        """Smaller goes first."""
        return (-self.priority, self.order)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was sampled for a row."""

    row: Row
    token_id: int
    logprob: float


class Scheduler:
    """Rows over one engine's pool. Not thread-safe.

    `prefixes`: whether rows begin at cached prefixes and leave theirs behind. `frontiers`: to the token, also where a
    turn ends inside a page.
    """

    def __init__(self, engine: Engine, *, prefixes: bool, frontiers: bool = False) -> None:
        self.engine, self.prefixes, self.frontiers = engine, prefixes, frontiers
        self.rows: dict[int, Row] = {}
        self.preemptions = 0
        self._orders = self._steps = 0

    # --- rows come and go

    def add(self, row: Row) -> None:
        """Takes a row in. Its order of arrival is set here."""
        assert row.key not in self.rows
        row.order, self._orders = self._orders, self._orders + 1
        row.turn = self._steps
        if self.prefixes and row.sequence is None:
            row.pin = self.engine.pin(list(row.pending), space=row.space)
        self.rows[row.key] = row

    def remove(self, key: int) -> None:
        """Lets a row go, whatever it is doing; its memory is free at once, its prefix stays cached."""
        row = self.rows.pop(key)
        self._disband(row)
        self._unpin(row)
        if row.sequence is not None:
            self._keep(row)
            row.sequence.close()
        if row.spilled is not None:
            self.engine.spills.drop(row.spilled)

    def abandon(self) -> None:
        """Lets every row go and keeps nothing of them."""
        for row in self.rows.values():
            self._unpin(row)
            if row.sequence is not None:
                row.sequence.close()
            if row.spilled is not None:
                self.engine.spills.drop(row.spilled)
        self.rows.clear()

    def take(self, key: int) -> PagedSequence:
        """Lets a row go and returns its sequence, brought back if it was spilled. Raises CacheFull."""
        row = self.rows[key]
        self._in_pool(row, chosen=frozenset())
        self._disband(self.rows.pop(key))
        assert row.sequence is not None
        return row.sequence

    def _disband(self, row: Row) -> None:
        """Rows that waited for this one's prompt begin on their own: the first of them leads."""
        followers = [other for other in self.rows.values() if other.leader is row]
        for other in followers:
            other.leader = followers[0] if other is not followers[0] else None

    def _keep(self, row: Row) -> None:
        if not self.prefixes or row.sequence is None or row.kept == row.length:
            return
        row.kept = row.length
        frontiers = (row.length,) if self.frontiers else ()
        self.engine.keep(row.sequence, space=row.space, frontiers=frontiers, warm=row.warm)

    def _keep_on_the_way(self, row: Row, before: int) -> None:
        """After a call: positions that the row has passed, and the end of a unit."""
        assert row.sequence is not None
        unit = self.engine.unit_tokens
        marks = [mark for mark in row.keep_at if before < mark <= row.length]
        if self.prefixes and (marks or row.length // unit > before // unit):
            self.engine.keep(row.sequence, space=row.space, frontiers=marks, warm=row.warm)

    def _unpin(self, row: Row) -> None:
        if row.pin is not None:
            self.engine.unpin(row.pin)
        row.pin = None

    # --- a step

    def step(self) -> list[Drawn]:
        """Advances the rows by one call of the runner; returns what was sampled, in order of arrival.

        Raises CacheFull when one row alone does not fit the pool (it then waits, for `remove`); whatever the runner
        raises, with no token counted as fed.
        """
        calls = self._plan()
        if not calls:
            return []
        segments = []
        for row, ids in calls:
            assert row.sequence is not None
            if row.replaying:
                segments.append(row.sequence.replay_segment(len(ids)))
                continue
            wanted = "last" if len(ids) == len(row.pending) else "none"
            segments.append(row.sequence.segment(ids, logits=wanted))  # type: ignore[arg-type]
        try:
            logits = self.engine.runner.forward(segments)
        except BaseException:
            for row, ids in calls:
                if row.sequence is not None and not row.replaying:
                    row.sequence.failed(len(ids))
            raise
        drawing, picks = list[Row](), list[int]()
        number = 0
        for row, ids in calls:
            assert row.sequence is not None
            if row.replaying:
                row.sequence.replay_done(len(ids))
                continue
            before = row.length
            row.sequence.advance(ids)
            for _ in ids:
                row.pending.popleft()
            self._keep_on_the_way(row, before)
            if not row.pending:
                for other in (row, *self._start_followers(row)):
                    drawing.append(other)
                    picks.append(number)
                number += 1
        return self._draw(logits, drawing, picks)

    def _draw(self, logits: Tensor, drawing: list[Row], picks: list[int]) -> list[Drawn]:
        if not drawing:
            return []
        order = sorted(range(len(drawing)), key=lambda n: drawing[n].order)
        rows = [drawing[n] for n in order]
        chosen = logits if picks == order == list(range(len(logits))) else logits[[picks[n] for n in order]]
        allowed = [row.allowed for row in rows] if any(row.guide for row in rows) else None
        ids, logprobs = sample(
            chosen, [row.params for row in rows], [row.length for row in rows], allowed=allowed
        )
        out = []
        for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            row.sampled += 1
            row.pending.append(token)
            if row.guide is not None:
                row.allowed = row.guide(token)
            out.append(Drawn(row, token, logprob))
        return out

    def _start_followers(self, leader: Row) -> list[Row]:
        """Forks for the rows that waited for `leader`'s prompt; those without room go on by themselves."""
        started = []
        for row in [other for other in self.rows.values() if other.leader is leader]:
            row.leader = None
            assert leader.sequence is not None
            try:
                row.sequence = leader.sequence.fork()
            except CacheFull:
                continue
            self._unpin(row)
            row.found, row.from_disk, row.warm = leader.found, leader.from_disk, leader.warm
            row.pending.clear()
            started.append(row)
        return started

    def _plan(self) -> list[tuple[Row, list[int]]]:
        """Rows of this step, in the pool and with pages for the tokens they bring (or replay)."""
        ready = [row for row in self.rows.values() if not row.waiting and row.pending and row.leader is None]
        ready.sort(key=lambda row: row.precedence)
        self._steps += 1
        budget = self.engine.prefill_chunk
        calls: list[tuple[Row, list[int]]] = []
        chosen: set[Row] = set()
        refused: Row | None = None
        for row in _in_turn(ready[: self.engine.max_running]):
            if budget <= 0 and len(row.pending) > 1:
                continue
            if refused is not None and row.precedence > refused.precedence:
                continue  # it has less right to the memory than one that found none
            try:
                ids = self._admit(row, budget, chosen)
            except CacheFull as error:
                if not calls and row is ready[0]:
                    row.waiting = True
                    raise CacheFull(
                        f"sequence {row.key}: {error}", need=error.need, limit=error.limit, key=row.key
                    ) from error
                refused = row
                continue
            if ids:
                calls.append((row, ids))
                chosen.add(row)
                if len(ids) > 1 or row.replaying:
                    budget -= len(ids)
                    row.turn = self._steps
        return calls

    def _admit(self, row: Row, budget: int, chosen: set[Row]) -> list[int]:
        """Brings `row` into the pool with pages for its next tokens, which are returned. Raises CacheFull."""
        if row.spilled is not None and row.sequence is None and chosen and not self._fits_again(row):
            return []
        self._in_pool(row, chosen)
        sequence = row.sequence
        assert sequence is not None
        if (
            sequence.replay_left
        ):  # what was found without its windows is made whole in turns, as a prompt is fed
            return [] if budget <= 0 else sequence.replay_segment(budget).tokens.tolist()
        count = sequence.chunk(min(len(row.pending), budget)) if len(row.pending) > 1 else 1
        count = row.bounded(count, slack=sequence.layout.slack)
        self._with_room(row, chosen, lambda: sequence.reserve(count))
        return list(itertools.islice(row.pending, count))

    def _in_pool(self, row: Row, chosen: set[Row] | frozenset[Row]) -> None:
        if row.sequence is not None:
            return
        engine, spilled = self.engine, row.spilled
        if spilled is not None:
            row.sequence = self._with_room(row, chosen, lambda: engine.spills.restore(spilled, engine.paging))
            row.spilled = None
            if not row.sequence.length:  # its tokens alone were kept
                row.pending.extendleft(reversed(spilled.token_ids))
        elif self.prefixes:
            ids = list(row.pending)
            found = self._with_room(row, chosen, lambda: engine.find(ids, space=row.space, defer=True))
            self._unpin(row)
            row.sequence, row.found, row.from_disk = found.sequence, found.match, found.from_disk
            row.warm, row.kept = 2 * row.sequence.length >= len(ids), row.sequence.length
            for _ in range(row.sequence.length):
                row.pending.popleft()
        else:
            row.sequence = self._with_room(row, chosen, lambda: PagedSequence(engine.paging))

    def _fits_again(self, row: Row) -> bool:
        layout, pool = self.engine.paging.pool.layout, self.engine.paging.pool
        need = layout.held_bytes(row.length) + RESUME_MARGIN * layout.page_bytes
        return pool.used_bytes + need <= pool.kv_bytes

    def _with_room(self, row: Row, chosen: set[Row] | frozenset[Row], act: Callable[[], T]) -> T:
        """`act()`, preempting rows of less precedence until it has its memory. Raises CacheFull when none is left."""
        while True:
            try:
                return act()
            except CacheFull:
                victim = self._victim(row, chosen)
                if victim is None:
                    raise
                self._preempt(victim)

    def _victim(self, row: Row, chosen: set[Row] | frozenset[Row]) -> Row | None:
        others = [
            other
            for other in self.rows.values()
            if other is not row
            and other not in chosen
            and other.sequence is not None
            and (other.waiting or other.precedence > row.precedence)
        ]
        return max(others, key=lambda other: (other.waiting, other.precedence), default=None)

    def _preempt(self, row: Row) -> None:
        assert row.sequence is not None
        self.preemptions += 1
        row.spilled = self.engine.spills.spill(row.sequence, space=row.space)
        row.sequence = None

    def finish_turn(self, rows: Sequence[Row]) -> None:
        """These rows wait for their callers from now on: what they hold becomes a prefix for others."""
        for row in rows:
            row.waiting = True
            self._keep(row)


def _in_turn(ready: Sequence[Row]) -> list[Row]:
    """Decoding rows by precedence, then those with more to feed, by priority and who was fed longest ago."""
    decoding = [row for row in ready if len(row.pending) == 1 and not row.replaying]
    feeding = [row for row in ready if len(row.pending) > 1 or row.replaying]
    return decoding + sorted(feeding, key=lambda row: (-row.priority, row.turn, row.order))
