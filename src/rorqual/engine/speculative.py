"""Speculative decoding with the MTP head: drafts a few tokens, checks all of them in one call, keeps what is right.

A draft is accepted iff it is the very token that plain decoding would sample there: the sampler's randomness is a
function of (seed, sequence, position) and the native runner's logits do not depend on how tokens are fed, so the
output is plain decoding's to the bit, sampled or greedy (decision 0013: stronger than rejection sampling, which keeps
the distribution only). The draft is drawn with the same randomness, which makes the two agree often. A rejected draft
costs a move of the head (sequence.py). Where drafting does not pay, by the clock, it is switched off for a while; that
changes no token.                                                     (spec/model.md 6.1; spec/engines.md 7)
Owns drafting, checking and the figures. Needs an engine whose layout has a ring for the MTP block.
Shapes: N streams, D hidden width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.errors import CacheFull
from rorqual.engine.layout import PAGE_TOKENS
from rorqual.engine.native_runner import NativeRunner
from rorqual.engine.runner import LogitsWanted, Segment
from rorqual.engine.sampler import SamplingParams, sample
from rorqual.engine.sequence import PagedSequence

if TYPE_CHECKING:
    from rorqual.engine.engine import FinishReason, SequenceState, TokenEvent

__all__ = ["Pace", "Speculation", "speculate"]


class Pace:
    """Decides by measured seconds a token whether drafting pays. `clock` gives seconds."""

    PROBE, REST = 8, 512
    """Calls of each kind that a judgement rests on; tokens without drafts after one against them."""

    def __init__(self) -> None:
        self._spent = {True: 0.0, False: 0.0}
        self._made = {True: 0, False: 0}
        self._calls = {True: 0, False: 0}
        self._resting = 0

    def drafts(self) -> bool:
        """Whether the next call should bring drafts."""
        if self._resting > 0:
            return False
        return self._calls[True] < self.PROBE or self._calls[False] >= self.PROBE

    def note(self, *, drafted: bool, tokens: int, seconds: float) -> None:
        """One call gave `tokens` in `seconds`."""
        self._resting = max(0, self._resting - tokens)
        self._spent[drafted] += seconds
        self._made[drafted] += tokens
        self._calls[drafted] += 1
        if self._calls[True] >= self.PROBE and self._calls[False] >= self.PROBE:
            a_token = {kind: self._spent[kind] / max(self._made[kind], 1) for kind in (True, False)}
            if drafted and a_token[True] > a_token[False]:
                self._resting = self.REST
                self._spent[True] = self._made[True] = self._calls[True] = 0
            elif (
                sum(self._calls.values()) > 64 * self.PROBE
            ):  # depth changes: what was measured long ago fades
                for kind in (True, False):
                    self._spent[kind] /= 2
                    self._made[kind] //= 2
                    self._calls[kind] = max(self._calls[kind] // 2, self.PROBE)


@dataclass(slots=True)
class Speculation:
    """What drafting has done so far, over all generations of an engine."""

    drafted: int = 0
    accepted: int = 0
    calls: int = 0
    """Calls of the model that checked drafts."""
    plain_calls: int = 0
    """Calls without a draft: the first of a generation, and while drafting is off."""
    tokens: int = 0
    """Tokens generated."""
    pace: Pace = field(default_factory=Pace)
    """Whether drafting pays, learnt over all of them."""

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were right; 0 before the first."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_call(self) -> float:
        """Tokens that one call of the model gives; 1 without drafts."""
        calls = self.calls + self.plain_calls
        return self.tokens / calls if calls else 0.0


class _Drafter:
    """The MTP head beside one sequence: what it has not been fed yet, and its drafts.

    Its positions count from where it began (RoPE of a window-only block is relative), so that its ring never shows it
    a row of somebody else; a gap makes it begin anew.
    """

    def __init__(self, runner: NativeRunner, paged: PagedSequence, params: SamplingParams) -> None:
        self._runner, self._paged, self._params = runner, paged, params
        self._window = paged.layout.config.sliding_window
        self._position = 0
        self._following: list[int] = []
        self._streams: list[Tensor] = []

    def note(self, following: list[int], streams: Tensor) -> None:
        """The model has passed more positions: their streams [T, N, D], and the token that follows each."""
        self._following += following
        self._streams.append(streams)
        if len(self._following) > 2 * self._window:
            self._following = self._following[-self._window :]
            self._streams = [torch.cat(self._streams)[-self._window :]]
            self._position = 0

    def draft(self, count: int) -> list[int]:
        """Up to `count` tokens that may follow the last one noted; [] when nothing was noted."""
        if not self._following:
            return []
        tokens, streams, at = self._following, torch.cat(self._streams), self._position
        self._position += len(tokens)  # what comes after rests on drafts, and is written again
        self._following, self._streams = [], []
        drafts: list[int] = []
        for number in range(count):
            table = self._paged.table
            segment = Segment(np.asarray(tokens, dtype=np.int64), at, table, self._paged.slab, "last")
            more = number + 1 < count
            logits, deeper = self._runner.mtp([segment], streams, hidden=[int(more)])
            ids, _ = sample(logits, [self._params], [self._paged.length + 1 + number])
            drafts.append(int(ids[0]))
            at, tokens, streams = at + len(tokens), drafts[-1:], deeper
        return drafts


def speculate(
    sequence: SequenceState, params: SamplingParams, *, drafts: int, figures: Speculation
) -> Iterator[TokenEvent]:
    """`SequenceState.generate` with up to `drafts` drafts a call: the same events, the same sequence afterwards.

    Raises ContextOverflow, CacheFull as that does.
    """
    from rorqual.engine.engine import TokenEvent

    engine, paged = sequence.engine, sequence.paged
    runner = engine.runner
    assert isinstance(runner, NativeRunner), "only the native runner drafts"
    assert 1 <= drafts <= paged.layout.slack, "a rejected draft is undone by a move of the head"
    limit = engine.config.max_position_embeddings
    pace, drafter = figures.pace, _Drafter(runner, paged, params)
    fed, logits, streams = _begin(sequence, runner)
    first_call, proposed = True, list[int]()
    done, spent = 0, 0.0
    shown = sequence.length  # tokens before the last one that the caller has seen
    try:
        while True:
            first = sequence.length - len(proposed)
            positions = list(range(first, sequence.length + 1))
            ids, logprobs = sample(logits, [params] * len(positions), positions)
            right = 0
            while right < len(proposed) and int(ids[right]) == proposed[right]:
                right += 1
            figures.accepted += right
            if not first_call:
                pace.note(drafted=bool(proposed), tokens=right + 1, seconds=spent)
            if right < len(proposed):
                paged.rewind(first + right)
            drawn = ids[: right + 1].tolist()
            for row, token in enumerate(drawn):
                done += 1
                reason: FinishReason | None = None
                if token in params.stop_ids:
                    reason = "stop"
                elif done == params.max_tokens or positions[row] + 1 >= limit:
                    reason = "length"
                shown = positions[row]
                figures.tokens += 1
                if reason is not None and row == right:
                    sequence.logits = logits[row : row + 1]
                yield TokenEvent(token, float(logprobs[row]), positions[row], reason)
                if reason is not None:
                    return
            if fed:
                drafter.note([*fed[1:], *drawn], streams[: len(fed) + right])
            started, first_call = time.perf_counter(), False
            room = min(drafts, limit - sequence.length - 2, params.max_tokens - done - 1)
            proposed = drafter.draft(room) if room > 0 and pace.drafts() else []
            engine.check(drawn[-1:], held=sequence.length)
            sequence.logits = None
            fed = drawn[-1:]
            try:
                logits, streams = _feed(paged, runner, [*fed, *proposed])
            except CacheFull:
                if not proposed:
                    raise
                proposed = []
                logits, streams = _feed(paged, runner, fed)
            spent = time.perf_counter() - started
            figures.drafted += len(proposed)
            figures.calls += bool(proposed)
            figures.plain_calls += not proposed
    finally:  # a caller that leaves early finds no token that it has not seen
        if not sequence.paged.closed and sequence.length > shown:
            paged.rewind(shown)
            sequence.logits = None


def _begin(sequence: SequenceState, runner: NativeRunner) -> tuple[list[int], Tensor, Tensor]:
    """Tokens at the end that were fed once more for their streams, the last one's logits [1, V], the streams.

    As many as the head moves back at no cost within the last page; none of them at its first token.
    """
    paged = sequence.paged
    count = min(paged.length - paged.floor, (paged.length - 1) % PAGE_TOKENS)
    if count < 1:
        logits = sequence.logits
        assert logits is not None, "an empty sequence has nothing to go on from"
        return [], logits, torch.empty(0)
    paged.secure(paged.length - count)
    fed = paged.token_ids[-count:]
    paged.rewind(paged.length - count)
    sequence.logits = None
    logits, streams = _feed(paged, runner, fed, wanted="last")
    return fed, logits, streams


def _feed(
    paged: PagedSequence, runner: NativeRunner, ids: list[int], *, wanted: LogitsWanted = "all"
) -> tuple[Tensor, Tensor]:
    """Logits [T, V], or [1, V] of the last, and streams [T, N, D] of `ids`, which are appended."""
    segment = paged.segment(ids, logits=wanted)
    try:
        logits, streams = runner.forward_hidden([segment], hidden=[len(ids)])
    except BaseException:
        paged.failed(len(ids))
        raise
    paged.advance(ids)
    return logits, streams
