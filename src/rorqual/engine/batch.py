"""Batch: many sequences at once, each sampling, being fed, or waiting for its caller.

A step feeds every busy row what it has to feed (one token when it samples, a chunk of what `add` and `feed` gave it)
and returns the tokens that were sampled. Scheduling, preemption and memory are scheduler.py's; what a token means is
the caller's matter.                                                                  (spec/rl.md 5.5, 7)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rorqual.engine.engine import Engine, FinishReason, SequenceState
from rorqual.engine.errors import EngineError
from rorqual.engine.prefix import Match
from rorqual.engine.sampler import SamplingParams, TokenGuide
from rorqual.engine.scheduler import Row, Scheduler

__all__ = ["Batch", "BatchEvent", "BatchFound"]


@dataclass(frozen=True, slots=True)
class BatchEvent:
    """A token sampled for sequence `key`."""

    key: int
    token_id: int
    logprob: float
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class BatchFound:
    """The cached prefix that a row began at."""

    match: Match
    from_disk: int
    """Tokens of it that only the disk had."""


class Batch:
    """Sequences by caller-chosen integer keys. Not thread-safe.

    `prefixes`: begin at prefixes the engine has cached, and leave new ones behind. None: where the runner's results
    do not depend on it to the bit. `frontiers`: keep prefixes to the token, also where a turn ends inside a page, so
    that the next turn feeds what is new alone (else at most 127 tokens more).
    """

    def __init__(self, engine: Engine, *, prefixes: bool | None = None, frontiers: bool = False) -> None:
        self.engine = engine
        wanted = engine.runner.batch_invariant if prefixes is None else prefixes
        wanted = wanted and engine.prefixes is not None
        self._scheduler = Scheduler(engine, prefixes=wanted, frontiers=frontiers)
        self._rows = self._scheduler.rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def busy(self) -> int:
        """Rows that the next steps would advance."""
        return sum(not row.waiting for row in self._rows.values())

    @property
    def preemptions(self) -> int:
        """How often a row had to make room."""
        return self._scheduler.preemptions

    def add(
        self,
        prompts: Mapping[int, Sequence[int]],
        params: Mapping[int, SamplingParams],
        *,
        priority: int = 0,
        space: str = "",
        guides: Mapping[int, TokenGuide] | None = None,
        keep_at: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Adds sequences; the next steps feed their prompts (equal ones once), then sample.

        priority: higher goes first. space: whose cached prefixes they may use. guides: by key, what says before each
        draw which tokens may be drawn; it must allow one, and not raise. keep_at: by key, lengths of the prompt's
        prefixes that are worth keeping to the token. Raises PromptError, ContextOverflow; then none was added.
        """
        self.engine.refresh()
        for key, prompt in prompts.items():
            if key in self._rows:
                raise EngineError(f"sequence {key} is already in the batch")
            self.engine.check(prompt)
        leaders: dict[tuple[int, ...], Row] = {}
        for key, prompt in prompts.items():
            row = Row(key, params[key], 0, deque(int(i) for i in prompt), priority=priority, space=space)
            row.keep_at = tuple(sorted(keep_at.get(key, ()))) if keep_at is not None else ()
            row.guide = guides.get(key) if guides is not None else None
            if row.guide is not None:
                row.allowed = row.guide(None)
            row.leader = leaders.get(tuple(prompt))
            if row.leader is None:
                leaders[tuple(prompt)] = row
            self._scheduler.add(row)

    def adopt(
        self,
        key: int,
        sequence: SequenceState,
        *,
        next_id: int,
        params: SamplingParams,
        priority: int = 0,
        space: str = "",
    ) -> None:
        """Takes over a sequence of the same engine; the next step feeds it `next_id`, then samples.

        The sequence is the batch's from now on. Raises EngineError for a key in use or another engine's sequence,
        PromptError, ContextOverflow.
        """
        if key in self._rows:
            raise EngineError(f"sequence {key} is already in the batch")
        if sequence.engine is not self.engine:
            raise EngineError("a batch takes over sequences of its own engine only")
        self.engine.check([next_id], held=sequence.length)
        row = Row(key, params, 0, deque([int(next_id)]), priority=priority, space=space)
        row.sequence = sequence.paged
        self._scheduler.add(row)

    def release(self, key: int) -> SequenceState:
        """Removes a row and returns its sequence: the tokens fed so far. Raises CacheFull when it was spilled and
        there is no room to bring it back (it stays in the batch)."""
        return SequenceState(self.engine, self._scheduler.take(key))

    def found(self, key: int) -> BatchFound | None:
        """What a row began at; None before its first step."""
        row = self._rows[key]
        return None if row.found is None else BatchFound(row.found, row.from_disk)

    def feed(self, key: int, ids: Sequence[int], params: SamplingParams) -> None:
        """Continues a waiting sequence: feeds `ids`, then samples anew. Raises PromptError, ContextOverflow."""
        row = self._rows[key]
        if not row.waiting:
            raise EngineError(f"sequence {key} is still generating")
        self.engine.check(ids, held=row.length + len(row.pending))
        row.pending.extend(int(token) for token in ids)
        row.params, row.sampled, row.waiting = params, 0, False

    def remove(self, key: int) -> None:
        """Forgets a sequence, in the middle of whatever it does; its memory is free at once."""
        self._scheduler.remove(key)

    def abandon(self) -> None:
        """Forgets every sequence, keeping nothing of what a failed step may have left half done."""
        self._scheduler.abandon()

    def step(self) -> list[BatchEvent]:
        """One call of the runner; returns what was sampled (nothing while prompts are fed). Rows that finish wait for
        `feed` or `remove`. Raises CacheFull when one sequence alone does not fit the cache (it waits then; the error's
        `key` names it)."""
        limit = self.engine.config.max_position_embeddings
        events, ended = [], []
        for drawn in self._scheduler.step():
            row = drawn.row
            reason: FinishReason | None = None
            if drawn.token_id in row.params.stop_ids:
                reason = "stop"
            elif row.sampled >= row.params.max_tokens or row.length + 1 >= limit:
                reason = "length"
            if reason is not None:
                ended.append(row)
            events.append(BatchEvent(row.key, drawn.token_id, drawn.logprob, reason))
        self._scheduler.finish_turn(ended)
        return events
