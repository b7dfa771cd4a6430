"""PagedSequence: one sequence's tokens, block table and slab; it grows, forks, rewinds and ends.

Pages are shared until somebody writes: a fork costs a copy of the slab. A rewind by up to the layout's slack moves
the head; further back the rings no longer hold what the next token needs, so the nearest snapshot is restored and
its own tokens are replayed over the entries that lie in the pages already: exact, and the caller is told how many.
Snapshots: at the last page boundary passed, and for good at multiples of `snapshot_tokens`. (spec/engines.md 5)
Owns the block table, the head and which snapshots a sequence keeps. Sampling and limits are engine.py's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine.errors import CacheFull
from rorqual.engine.layout import PAGE_TOKENS, CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.engine.runner import LogitsWanted, Runner, Segment
from rorqual.engine.snapshot import Snapshot

__all__ = ["PagedSequence", "Paging", "replay_tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Paging:
    """What sequences of one engine share."""

    pool: PagePool
    runner: Runner
    prefill_chunk: int = 128
    """Most tokens of one sequence in one call. Chunks end at page boundaries where they can."""
    snapshot_tokens: int = 2048
    """Snapshots at multiples of this stay with the sequence; a multiple of 128."""

    def __post_init__(self) -> None:
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {self.prefill_chunk} tokens, expected 1 or more")
        if self.snapshot_tokens < 1 or self.snapshot_tokens % PAGE_TOKENS:
            raise ValueError(
                f"snapshot_tokens is {self.snapshot_tokens}, expected a multiple of {PAGE_TOKENS}"
            )


def replay_tokens(layout: CacheLayout) -> int:
    """Tokens to replay, over entries that are there, until every ring of every layer is exact again.

    A layer's window rows are right once the layer below has seen a whole window of right rows.
    """
    window = layout.config.sliding_window - 1
    tails = [layer.tail.rows - layout.slack - 1 for layer in layout.layers if layer.tail is not None]
    return max([window, *tails]) + window * max(len(layout.layers) - 1, 0)


class PagedSequence:
    """A sequence in a pool. Close it, or lose it: a finalizer gives its pages back. Not thread-safe."""

    def __init__(self, paging: Paging) -> None:
        self.paging = paging
        self.pool, self.layout = paging.pool, paging.pool.layout
        self.token_ids: list[int] = []
        """Tokens in the cache, in order."""
        self.pages: list[int] = []
        self.slab = self.pool.take_slab()
        self.snapshots: dict[int, Snapshot] = {}
        self.replayed = 0
        """Tokens fed again since the start, because a rewind or a prefix lay beyond what the rings held."""
        self._high = 0  # the furthest position written since the rings were last whole
        self._low = 0  # the head may stand at this position or above without a restore
        self._table = np.empty(0, dtype=np.int32)  # `pages`, as the runner reads them
        self._replay: tuple[int, int, int] | None = (
            None  # of a deferred one: where it is, began, is exact from
        )
        self._finalizer = weakref.finalize(self, self.pool.drop_later, self.pages, self.slab)
        self._finalizer.atexit = False

    def __enter__(self) -> PagedSequence:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.token_ids)

    @property
    def floor(self) -> int:
        """How far back the head moves at no cost."""
        return min(self._low, self.length)

    @property
    def table(self) -> NDArray[np.int32]:
        """`pages`, as a runner reads them."""
        return self._table

    @property
    def closed(self) -> bool:
        """Whether its memory was given back."""
        return not self._finalizer.alive

    # --- growing

    def append(self, ids: Sequence[int], *, logits: LogitsWanted = "last") -> Tensor | None:
        """Feeds `ids` in chunks. fp32 logits [1, V] of the last, [T, V] of all, or None.

        Raises CacheFull before anything is fed when the pages do not suffice.
        """
        self.reserve(len(ids))
        out: list[Tensor] = []
        at = 0
        while at < len(ids):
            size = self.chunk(len(ids) - at)
            last = at + size == len(ids)
            wanted: LogitsWanted = logits if logits == "all" or last else "none"
            got = self.feed(ids[at : at + size], logits=wanted)
            if wanted != "none":
                out.append(got)
            at += size
        if not out:
            return None
        return out[0] if len(out) == 1 else torch.cat(out)

    def feed(self, ids: Sequence[int], *, logits: LogitsWanted = "last") -> Tensor:
        """One call of the runner for this sequence alone."""
        segment = self.segment(ids, logits=logits)
        try:
            rows = self.paging.runner.forward([segment])
        except BaseException:
            self.failed(len(ids))
            raise
        self.advance(ids)
        return rows

    def chunk(self, left: int) -> int:
        """How many of `left` tokens the next call should bring: up to a page boundary if one is in reach."""
        start = self.length
        end = start + min(left, self.paging.prefill_chunk)
        boundary = end // PAGE_TOKENS * PAGE_TOKENS
        return (boundary if boundary > start else end) - start

    def reserve(self, count: int) -> None:
        """Pages for `count` more tokens, the one that is written next being ours alone. Raises CacheFull."""
        assert not self.closed, "the sequence is closed"
        start = self.length
        if count and start < self._low:
            self._restore(start)
        if count and start % PAGE_TOKENS and self.pages:
            self.secure(start)
        more = self.layout.pages(start + count) - len(self.pages)
        if more > 0:
            self.pages.extend(self.pool.take_pages(more))
            self._table = np.asarray(self.pages, dtype=np.int32)

    def secure(self, position: int) -> None:
        """Makes the page of `position` ours alone, by a copy if it is shared. Raises CacheFull."""
        number = position // PAGE_TOKENS
        self.pages[number] = self._table[number] = self.pool.own_page(self.pages[number])

    def segment(self, ids: Sequence[int], *, logits: LogitsWanted = "last") -> Segment:
        """The call that feeds `ids`; afterwards tell `advance` or `failed`. Raises CacheFull."""
        self.reserve(len(ids))
        return Segment(np.asarray(ids, dtype=np.int64), self.length, self._table, self.slab, logits)

    def advance(self, ids: Sequence[int]) -> None:
        """The call went through: moves the head, and takes the snapshot of a page boundary that was passed."""
        before = self.length
        self.token_ids.extend(int(token) for token in ids)
        self._wrote(self.length)
        boundary = self.length // PAGE_TOKENS * PAGE_TOKENS
        if boundary > before and boundary >= self._low:
            self.keep_snapshot(boundary)

    def failed(self, count: int) -> None:
        """The call did not go through and may have written `count` rows: the next call repairs the rings first."""
        self._wrote(self.length + count)

    def _wrote(self, position: int) -> None:
        self._high = max(self._high, position)
        # From here up the rings hold what a next token needs (slack rows more than they must).
        self._low = max(self._low, self._high - self.layout.slack - 1)

    # --- snapshots

    def keep_snapshot(self, position: int) -> None:
        """Takes one at `position`, which the rings must still reach; drops the last one that is not on schedule.

        Without room for it, none is kept: a rewind then replays more.
        """
        for old in [p for p in self.snapshots if p % self.paging.snapshot_tokens and p != position]:
            del self.snapshots[old]
        if position not in self.snapshots:
            taken = Snapshot.take(self.layout, self.pool.slab(self.slab), position)
            try:
                self.pool.charge(taken, len(taken.data))
            except CacheFull:
                return
            self.snapshots[position] = taken

    def snapshot_at(self, position: int) -> Snapshot:
        """A snapshot of a position that the head moves back to at no cost."""
        assert self.floor <= position <= self.length
        if self.length < self._low:
            self._restore(self.length)
        return Snapshot.take(self.layout, self.pool.slab(self.slab), position)

    def freeze(self) -> Snapshot:
        """A snapshot of right here, page boundary or not: what a spill or a file needs beside the pages."""
        if self.length < self._low:
            self._restore(self.length)
        return Snapshot.take(self.layout, self.pool.slab(self.slab), self.length)

    # --- forks, rewinds, restores

    def fork(self) -> PagedSequence:
        """An independent twin that shares every page until one of both writes it. Raises CacheFull."""
        if self.length < self._low:
            self._restore(self.length)
        twin = PagedSequence(self.paging)
        self.pool.slab(twin.slab)[:] = self.pool.slab(self.slab)
        self.pool.share_pages(self.pages)
        twin.pages.extend(self.pages)
        twin.token_ids = list(self.token_ids)
        twin._high, twin._low = self._high, self._low
        twin._table = self._table.copy()
        twin.snapshots = dict(self.snapshots)
        return twin

    def rewind(self, position: int) -> int:
        """Goes back to the first `position` tokens; returns how many were fed again for it (0 within the slack).

        Raises ValueError outside 0..length.
        """
        if not 0 <= position <= self.length:
            raise ValueError(f"cannot rewind to {position}: the sequence holds {self.length} tokens")
        if position == self.length:
            return 0
        keep = self.layout.pages(position)
        self.pool.drop_pages(self.pages[keep:])
        del self.pages[keep:]
        self._table = self._table[:keep]
        del self.token_ids[position:]
        for gone in [p for p in self.snapshots if p > position]:
            del self.snapshots[gone]
        return self._restore(position) if position < self._low else 0

    def adopt(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        *,
        snapshots: Iterable[Snapshot] = (),
        defer: bool = False,
    ) -> int:
        """Makes an empty sequence hold `tokens`, whose entries lie in `pages` (shared from now on).

        From the last of `snapshots` (none beyond the tokens) the rest is replayed; without one, as much as the rings
        need. Returns how many tokens were replayed. defer: none are, whoever asked feeds `replay_segment`s until
        `replay_left` is 0 (anything else done to the sequence before that replays them at once).
        """
        assert not self.token_ids and not self.pages, "only an empty sequence takes over a prefix"
        assert len(pages) == self.layout.pages(len(tokens)), "a page for every 128 tokens"
        self.pool.share_pages(pages)
        self.pages.extend(pages)
        self._table = np.asarray(self.pages, dtype=np.int32)
        self.token_ids = list(tokens)
        self.snapshots = {snapshot.position: snapshot for snapshot in snapshots}
        self._low = self.length + 1
        if not defer:
            return self._restore(self.length)
        at, exact_from = self._prepare(self.length)
        self._replay = (at, at, exact_from)
        self.replay_done(0)
        return 0

    @property
    def replay_left(self) -> int:
        """Tokens of a deferred replay that are still to be fed."""
        return 0 if self._replay is None else self.length - self._replay[0]

    def replay_segment(self, most: int) -> Segment:
        """The next call of a deferred replay, of at most `most` tokens; afterwards tell `replay_done`."""
        assert self._replay is not None and most > 0
        at = self._replay[0]
        end = min(at + min(most, self.paging.prefill_chunk), self.length)
        ids = np.asarray(self.token_ids[at:end], dtype=np.int64)
        return Segment(ids, at, self._table, self.slab, "none", frozen=True)

    def replay_done(self, count: int) -> None:
        """A call of a deferred replay went through."""
        assert self._replay is not None
        at, start, exact_from = self._replay
        self._replay = (at + count, start, exact_from)
        if not self.replay_left:
            self._restored(self.length, start, exact_from)

    def _prepare(self, position: int) -> tuple[int, int]:
        """Puts into the rings what a replay up to `position` starts from: where that is, and from where it is exact."""
        self._replay = None
        slab = self.pool.slab(self.slab)
        at = max((p for p in self.snapshots if p <= position), default=0)
        blind = max(position - replay_tokens(self.layout), 0)
        exact_from = at
        if blind > at:
            slab[:] = 0  # what a replay starts from must be finite
            at, exact_from = blind, position
        elif at in self.snapshots:
            self.snapshots[at].restore(self.layout, slab)
        self._low = position + 1  # until the replay is through
        return at, exact_from

    def _restored(self, position: int, start: int, exact_from: int) -> None:
        """The replay from `start` is through."""
        self._replay = None
        self._high = position
        self._low = max(exact_from, position - self.layout.slack - 1)
        self.replayed += position - start

    def _restore(self, position: int) -> int:
        """Makes the rings right for a head at `position` = length. Returns the tokens replayed."""
        at, exact_from = self._prepare(position)
        start = at
        while at < position:
            end = min(at + self.paging.prefill_chunk, position)
            ids = np.asarray(self.token_ids[at:end], dtype=np.int64)
            self.paging.runner.forward([Segment(ids, at, self._table, self.slab, "none", frozen=True)])
            at = end
        self._restored(position, start, exact_from)
        return position - start

    def close(self) -> None:
        """Gives pages, slab and snapshots back. Idempotent."""
        if self._finalizer.detach() is not None:
            self.pool.drop_pages(self.pages)
            self.pool.drop_slab(self.slab)
            self.pages.clear()
            self.snapshots.clear()
            self.token_ids = []
