"""NativeRunner: a whole call over the paged cache in one native call, whatever mix of prefill and decode it is.

Weights are read where they lie (model/weights.py) and pages where the pool has them; Python fills in pointers.
A token's result depends on the tokens before it alone: not on the batch, the chunks or the threads, to the bit.
Owns the pointers, the scratch buffer and the threads. What cannot run natively is told once, and torch_runner.py takes
over.                                                                        (native/cpu/forward.cpp; docs/kernels.md)
Shapes: R rows of logits, N streams, D hidden width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine.native_weights import NativeWeights, matrix_pointers
from rorqual.engine.runner import CacheMemory, Segment
from rorqual.kernels.cpu import (
    LIBRARY,
    RESOLVE,
    Forward,
    LayerCache,
    NativeLibrary,
    Pool,
    load_library,
)
from rorqual.model.config import PAGE_TOKENS
from rorqual.model.errors import CheckpointError
from rorqual.model.weights import Weights

__all__ = ["NativeRunner", "PooledMemory", "native_runner"]

log = logging.getLogger(__name__)

LOGITS = {"none": 0, "last": 1, "all": 2}
FORMATS = {"exact": 0, "packed": 1}
NONE = torch.empty(0)
SEGMENT = np.dtype(
    [
        *[(name, np.int64) for name in ("tokens", "count", "position", "pages", "slab")],
        *[(name, np.int32) for name in ("logits", "hidden", "frozen", "reserved")],
    ]
)
"""RqSegment (kernels/cpu.py, `SegmentPointers`)."""
SCRATCH_STEP = 4096
"""Positions by which the scratch buffer's size is rounded up: it is not asked for at every token."""
BLOCK_TOKENS = 256
"""Tokens that go through the layers together: bounds the scratch buffer, changes no result."""


class PooledMemory(CacheMemory, Protocol):
    """`CacheMemory` that also tells how many pages and slabs there are."""

    @property
    def page_capacity(self) -> int: ...

    @property
    def slab_capacity(self) -> int: ...


def native_runner(
    weights: Weights, memory: PooledMemory, *, simulate_quant: bool = False, **options: Any
) -> NativeRunner | None:
    """A `NativeRunner`, or None where torch must run; the reason is logged.

    `simulate_quant`: the model rounds in torch; the native path does so in packed pages only.
    """
    try:
        if simulate_quant and memory.layout.cache_format == "exact":
            raise CheckpointError("simulate_quant over exact pages rounds in torch")
        return NativeRunner(weights, memory, **options)
    except (CheckpointError, OSError) as error:
        log.warning("calls use the slower torch path: %s", error)
        return None


class NativeRunner:
    """Runs weights over a pool of pages. One call at a time: a second thread waits.

    `level` (None: the best here), `threads` (None: torch's at each call). Raises OSError without the native library,
    CheckpointError for weights it cannot read in place, ValueError for an unknown level.
    """

    batch_invariant = True

    def __init__(
        self,
        weights: Weights,
        memory: PooledMemory,
        *,
        level: str | None = None,
        threads: int | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        library = load_library(LIBRARY)
        if library is None:
            raise OSError("the native library is not available (rorqual doctor says why)")
        if level is not None and level not in library.levels:
            raise ValueError(f"level {level!r} does not run here: choose one of {list(library.levels)}")
        if block_tokens < 1:
            raise ValueError(f"block_tokens is {block_tokens}, expected 1 or more")
        self._library: NativeLibrary = library
        self.memory, self.layout, self.config = memory, memory.layout, weights.config
        self.level = level or library.level
        self.threads = threads
        self._weights, self._native = weights, NativeWeights(weights)
        self._pool: Pool | None = None
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_key: tuple[int, ...] = ()
        self._scratch_need = 0
        self._failure: BaseException | None = None
        self._loaded: list[Any] = []
        self._resolve = RESOLVE(self._load_experts)
        self._caches = (LayerCache * len(self.layout.layers))()
        for number, (cache, layer) in enumerate(zip(self._caches, self.layout.layers, strict=True)):
            cache.entries, cache.entries_page = memory.entries_address(number), layer.entries_page
            cache.keys, cache.keys_page = memory.keys_address(number), layer.keys_page
            cache.window_at, cache.window_rows = layer.window.at, layer.window.rows
            if layer.tail is not None:
                cache.tail_at, cache.tail_rows = layer.tail.at, layer.tail.rows
            if layer.index_tail is not None:
                cache.index_tail_at = layer.index_tail.at
        self._call = Forward(
            caches=ctypes.addressof(self._caches),
            pages=memory.page_capacity,
            resolve=self._resolve if not weights.experts_resident else RESOLVE(),
            cache_format=FORMATS[self.layout.cache_format],
            block_tokens=block_tokens,
            level=library.levels[self.level],
        )
        self._point()

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """See `Runner.forward`."""
        return self.forward_hidden(segments)[0]

    def forward_hidden(
        self, segments: Sequence[Segment], *, hidden: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and the residual streams before the head of each segment's last `hidden[i]` tokens.

        Logits fp32 [R, V] and streams fp32 [sum of `hidden`, N, D], in segment order.
        """
        return self._run(segments, hidden=hidden, streams=None)

    def mtp(
        self, segments: Sequence[Segment], streams: Tensor, *, hidden: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The MTP head: `tokens` are those that follow the positions, `streams` fp32 [tokens of all segments, N, D].

        Writes the window ring of the MTP block only. Returns as `forward_hidden`. Raises ValueError without a head.
        """
        if self._native.mtp is None or len(self.layout.layers) <= self.config.num_hidden_layers:
            raise ValueError("these weights, or this cache layout, have no MTP head")
        expected = (sum(len(s.tokens) for s in segments), self.config.hc_mult, self.config.hidden_size)
        if tuple(streams.shape) != expected or streams.dtype != torch.float32:
            raise ValueError(
                f"streams are {streams.dtype} {list(streams.shape)}, expected fp32 {list(expected)}"
            )
        return self._run(segments, hidden=hidden, streams=streams.contiguous())

    def _run(
        self, segments: Sequence[Segment], *, hidden: Sequence[int] | None, streams: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self._pid != os.getpid():  # a fork leaves the threads behind, and maybe the lock held
            self._pool, self._lock, self._pid = None, threading.Lock(), os.getpid()
        with self._lock:
            return self._locked(segments, hidden, streams)

    def _locked(
        self, segments: Sequence[Segment], hidden: Sequence[int] | None, streams: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self._native.current():
            self._native = NativeWeights(self._weights)
            self._point()
        wanted = [0] * len(segments) if hidden is None else list(hidden)
        records, _kept, sizes, rows = self._segments(segments, wanted)
        call = self._call
        logits = torch.empty(rows, self.config.vocab_size)
        states = torch.empty(sum(wanted), self.config.hc_mult, self.config.hidden_size) if hidden else NONE
        threads = max(1, self.threads or torch.get_num_threads())
        if threads > 1 and (self._pool is None or self._pool.threads < threads):
            self._pool = Pool(self._library, threads)
        call.segments, call.segment_count = records.ctypes.data, len(segments)
        call.logits, call.hidden, call.threads = logits.data_ptr(), states.data_ptr(), threads
        need = self._scratch_for(sizes)
        call.scratch = (self._scratch.data_ptr() + 63) // 64 * 64
        call.scratch_bytes = need
        self._failure = None
        pool = self._pool if threads > 1 else None
        if streams is None:
            if not self._weights.experts_resident:
                self._weights.prefetch([int(token) for segment in segments for token in segment.tokens])
            failed = self._library.forward(call, pool)
        else:
            assert self._native.mtp is not None
            self._native.mtp.cache = ctypes.addressof(self._caches[self.config.num_hidden_layers])
            failed = self._library.mtp(call, self._native.mtp, streams=streams.data_ptr(), pool=pool)
        if failed > 0 and self._failure is not None:
            raise self._failure
        if failed:
            number = -1 - failed
            if not 0 <= number < len(segments):
                raise ValueError("the native forward refuses this call: sizes or weights do not fit together")
            raise ValueError(self._what_is_wrong(segments[number], number))
        return logits, states

    def _segments(
        self, segments: Sequence[Segment], hidden: list[int]
    ) -> tuple[NDArray[np.void], Any, tuple[int, int], int]:
        """RqSegments, what keeps their pointers alive, tokens and furthest position, rows of logits."""
        count = len(segments)
        if len(hidden) != count:
            raise ValueError(f"hidden has {len(hidden)} entries for {count} segments")
        if len({segment.slab for segment in segments}) != count:
            raise ValueError(f"two segments of a call stand in one slab: {sorted(s.slab for s in segments)}")
        records = np.empty(count, dtype=SEGMENT)
        if not count:
            return records, records, (0, 0), 0
        paged, slabs = bool(self.layout.page_bytes), self.memory.slab_capacity
        values, at, page_at, end, rows = [], 0, 0, 0, 0
        for number, (segment, last) in enumerate(zip(segments, hidden, strict=True)):
            tokens, pages = len(segment.tokens), len(segment.pages)
            end = max(end, segment.position + tokens)
            short = paged and pages * PAGE_TOKENS < segment.position + tokens
            if short or segment.tokens.ndim != 1 or not 0 <= segment.slab < slabs or not 0 <= last <= tokens:
                raise ValueError(self._what_is_wrong(segment, number))
            wanted = LOGITS[segment.logits]
            slab = self.memory.slab_address(segment.slab)
            values.append((at, tokens, segment.position, page_at, slab, wanted, last, segment.frozen, 0))
            at, page_at = at + 8 * tokens, page_at + 4 * pages
            rows += wanted if wanted < 2 else tokens
        records[:] = values
        every = np.concatenate([segment.tokens for segment in segments]).astype(np.int64, copy=False)
        table = np.concatenate([segment.pages for segment in segments]).astype(np.int32, copy=False)
        records["tokens"] += every.__array_interface__["data"][0]
        records["pages"] += table.__array_interface__["data"][0]
        return records, (every, table), (at // 8, end), rows

    def _scratch_for(self, sizes: tuple[int, int]) -> int:
        """Bytes of scratch for so many tokens and positions; there is at least as much then."""
        tokens, positions = sizes
        key = (tokens, self._call.segment_count, self._call.threads, positions // SCRATCH_STEP)
        if key != self._scratch_key:
            top = (positions // SCRATCH_STEP + 1) * SCRATCH_STEP
            need = self._library.forward_scratch(self._call, tokens=tokens, positions=top)
            if len(self._scratch) < need + 64:
                self._scratch = torch.empty(need + need // 4 + 64, dtype=torch.uint8)
            self._scratch_key, self._scratch_need = key, need
        return self._scratch_need

    def _what_is_wrong(self, segment: Segment, number: int) -> str:
        """One line about a segment that was refused."""
        tokens, end, vocab = (
            np.asarray(segment.tokens),
            segment.position + len(segment.tokens),
            self.config.vocab_size,
        )
        if tokens.ndim != 1 or not len(tokens) or segment.position < 0:
            return f"segment {number}: {tokens.shape} tokens at position {segment.position}"
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
            return f"segment {number}: a token id is outside the vocabulary (0 to {vocab - 1})"
        pages = np.asarray(segment.pages)[: -(-end // PAGE_TOKENS)]
        if len(pages) * PAGE_TOKENS < end:
            return f"segment {number}: {len(pages)} pages do not hold {end} tokens"
        if int(pages.min()) < 0 or int(pages.max()) >= self.memory.page_capacity:
            return f"segment {number}: a page id is outside the pool (0 to {self.memory.page_capacity - 1})"
        if not 0 <= segment.slab < self.memory.slab_capacity:
            return f"segment {number}: slab {segment.slab} is outside the pool"
        return f"segment {number}: its position, hidden rows or hash table entries are out of range"

    def _point(self) -> None:
        """The call's pointers to the weights."""
        self._call.model = ctypes.addressof(self._native.model)
        self._call.layers = ctypes.addressof(self._native.layers)

    def _load_experts(self, context: Any, layer: int, ids: Any, count: int, out: Any) -> int:
        """RqResolve: experts that are not resident."""
        try:
            experts = self._weights.load_experts(layer, ids[:count])
            self._loaded = experts
            for place, matrix in enumerate(m for expert in experts for m in expert):
                out[place] = matrix_pointers(matrix)
            return 0
        except (
            BaseException
        ) as error:  # raised again when the call has returned: nothing may unwind through C
            self._failure = error
            return 1
