"""Snapshot: what a sequence needs, besides its pages, to go on from a position: window rows and compressor rows.

At position p: the last W-1 window rows of every layer; the compressor rows of the open block, and for CSA of the
block before it (main and indexer). At multiples of 128 no block is open, so a snapshot is window rows and 4 CSA rows:
4.1 MB at Flash, packed (spec/engines.md 5). Which rows, follows from the position alone.
Owns the choice of rows and their order in `data`. Immutable: sequences, prefix tree and store share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.layout import CacheLayout, Ring

__all__ = ["Snapshot", "snapshot_bytes"]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Snapshot:
    """Rows of a slab at `position`, concatenated (uint8)."""

    position: int
    data: NDArray[np.uint8]

    @classmethod
    def take(cls, layout: CacheLayout, slab: NDArray[np.uint8], position: int) -> Snapshot:
        """Copies the rows that `position` needs out of `slab`, whose rings must still hold them."""
        parts = [
            _rows(slab, ring)[np.arange(low, position) % ring.rows].reshape(-1)
            for ring, low in _needed(layout, position)
        ]
        data = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)
        data.flags.writeable = False
        return cls(position, data)

    def restore(self, layout: CacheLayout, slab: NDArray[np.uint8]) -> None:
        """Puts the rows into `slab`; the rest of its rings keeps whatever it held, which nobody reads.

        Raises ValueError when `data` has not the size that this layout and position ask for.
        """
        expected = snapshot_bytes(layout, self.position)
        if len(self.data) != expected:
            raise ValueError(f"a snapshot at {self.position} is {expected} bytes, got {len(self.data)}")
        at = 0
        for ring, low in _needed(layout, self.position):
            count = self.position - low
            rows = self.data[at : at + count * ring.row_bytes].reshape(count, ring.row_bytes)
            _rows(slab, ring)[np.arange(low, self.position) % ring.rows] = rows
            at += count * ring.row_bytes


def snapshot_bytes(layout: CacheLayout, position: int) -> int:
    """Bytes of a snapshot at `position`."""
    return sum((position - low) * ring.row_bytes for ring, low in _needed(layout, position))


def _needed(layout: CacheLayout, position: int) -> Iterator[tuple[Ring, int]]:
    """Rings and the first position each must hold, up to `position`; empty ones left out."""
    for layer in layout.layers:
        wanted = [(layer.window, position - layout.config.sliding_window + 1)]
        if layer.ratio:
            low = position // layer.ratio * layer.ratio - (layer.ratio if layer.overlap else 0)
            wanted += [(ring, low) for ring in (layer.tail, layer.index_tail) if ring is not None]
        for ring, low in wanted:
            if position > max(low, 0):
                yield ring, max(low, 0)


def _rows(slab: NDArray[np.uint8], ring: Ring) -> NDArray[np.uint8]:
    return slab[ring.at : ring.at + ring.nbytes].reshape(ring.rows, ring.row_bytes)
