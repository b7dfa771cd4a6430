"""SpillArea: where sequences wait that were preempted: on disk when the engine has a store, else in host memory.

A spill holds everything exactly (pages, open page, rings); its bytes leave the pool. When the disk refuses, memory
takes it, and the log says so; when memory's share is used up too, the tokens alone are kept and fed again.
"""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.errors import SequenceFileError
from rorqual.engine.sequence import PagedSequence, Paging
from rorqual.engine.snapshot import Snapshot
from rorqual.engine.store import PageStore

__all__ = ["SpillArea", "Spilled"]

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Spilled:
    """A sequence outside of the pool."""

    token_ids: list[int]
    name: str = ""
    """Of the record on disk; empty when it is in memory."""
    pages: NDArray[np.uint8] | None = None
    """[pages, page_bytes]; None (without a name): the tokens are fed again."""
    snapshot: Snapshot | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        if self.pages is None or self.snapshot is None:
            return 0
        return self.pages.nbytes + len(self.snapshot.data)


class SpillArea:
    """Spills of one engine. `memory_bytes` bounds those in memory."""

    def __init__(self, *, memory_bytes: int, store: PageStore | None = None) -> None:
        self.memory_bytes, self.store = memory_bytes, store
        self.held_bytes = 0
        self.spilled = self.recomputed = 0
        """How many there were so far, and how many of these kept tokens only."""
        self._names = itertools.count()

    def spill(self, sequence: PagedSequence, *, space: str = "") -> Spilled:
        """Takes everything out of the pool and closes the sequence."""
        self.spilled += 1
        out = Spilled(list(sequence.token_ids))
        if self.store is not None:
            name = f"spill-{os.getpid()}-{next(self._names)}"
            try:
                self.store.spill(name, sequence, space=space)
                out.name = name
            except SequenceFileError as error:
                log.warning("a preempted sequence stays in memory: %s", error)
        if not out.name:
            size = len(sequence.pages) * sequence.layout.page_bytes
            if self.held_bytes + size <= self.memory_bytes:
                out.snapshot = sequence.freeze()
                out.pages = np.empty((len(sequence.pages), sequence.layout.page_bytes), dtype=np.uint8)
                for row, page in zip(out.pages, sequence.pages, strict=True):
                    row[:] = sequence.pool.read_page(page)
                self.held_bytes += out.nbytes
            else:
                self.recomputed += 1
                log.warning("no room to spill: a preempted sequence will be computed again")
        sequence.close()
        return out

    def restore(self, spilled: Spilled, paging: Paging) -> PagedSequence:
        """The sequence, exactly where it was (empty when only its tokens were kept). Raises CacheFull."""
        if spilled.name:
            assert self.store is not None
            try:
                sequence = self.store.unspill(spilled.name, paging)
            except SequenceFileError as error:
                log.warning("a spilled sequence cannot be read and is computed again: %s", error)
                self.recomputed += 1
                sequence = PagedSequence(paging)
        elif spilled.pages is None or spilled.snapshot is None:
            sequence = PagedSequence(paging)
        else:
            pages = paging.pool.take_pages(len(spilled.pages))
            try:
                sequence = PagedSequence(paging)
                for page, row in zip(pages, spilled.pages, strict=True):
                    paging.pool.write_page(page, row)
                sequence.adopt(spilled.token_ids, pages, snapshots=[spilled.snapshot])
                sequence.snapshots.clear()  # it served once, and is no page boundary's
            finally:
                paging.pool.drop_pages(pages)  # the sequence has references of its own
        self.drop(spilled)
        return sequence

    def drop(self, spilled: Spilled) -> None:
        """Forgets a spill. Idempotent."""
        if spilled.name and self.store is not None:
            self.store.forget(spilled.name)
        self.held_bytes -= spilled.nbytes
        spilled.pages, spilled.snapshot, spilled.name = None, None, ""
