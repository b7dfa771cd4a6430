"""Runner: what computes over the paged cache, and what it is asked.

A call advances several sequences at once: each brings new tokens, stands at a position, and names its pages and its
slab. Owns the contract alone; torch_runner.py (the reference) and native_runner.py follow it.
Shapes: R rows of logits (in segment order), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine.layout import CacheLayout

__all__ = ["CacheMemory", "LogitsWanted", "Runner", "Segment"]

LogitsWanted = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's part of a call.

    The caller guarantees pages for `position + len(tokens)` tokens, that no page which the call writes is shared,
    and ids inside the vocabulary.
    """

    tokens: NDArray[np.int64]
    """New tokens [T], T >= 1."""
    position: int
    """Of tokens[0]."""
    pages: NDArray[np.int32]
    """Block table: page of tokens 128 i to 128 i + 127."""
    slab: int
    """Index of the sequence's slab."""
    logits: LogitsWanted = "last"
    frozen: bool = False
    """The entries and keys of these tokens already lie in the pages and are right: read them, write rings only.
    So window rows and compressor rows are rebuilt by a replay that starts without them (spec/model.md 3.1, zero
    caching): after `sliding_window - 1` tokens a layer they are exact."""


class CacheMemory(Protocol):
    """Where a runner finds the bytes. Addresses stay valid as long as the object lives."""

    @property
    def layout(self) -> CacheLayout: ...

    def entries_address(self, layer: int) -> int:
        """Of page 0's entries of `layer`; page p is `p * layout.layers[layer].entries_page` further. 0: none."""
        ...

    def keys_address(self, layer: int) -> int:
        """As `entries_address`, of index keys."""
        ...

    def slab_address(self, slab: int) -> int:
        """Of slab `slab`."""
        ...


class Runner(Protocol):
    """Computes segments over one `CacheMemory`."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a token's logits are the same to the bit whatever the batch and the chunks are."""
        ...

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Feeds every segment; writes entries, keys and rings. fp32 logits [R, V], in segment order.

        Raises ValueError for a segment that breaks the contract; nothing has changed then.
        """
        ...
