"""TorchRunner: segments over the paged cache in torch: unpack to a `CacheState`, `Model.extend`, pack the new rows.

The reference of native_runner.py and the path of hosts without the native library: slow, and independent of it.
With packed pages it computes as `Model(simulate_quant=True)`: what is read back from a page is what was written.
Sequences that bring one token go together, others alone: results depend on batch and chunks by fp32 rounding.
Shapes: B segments, T tokens, S entries, R ring rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine.layout import PAGE_TOKENS, LayerLayout, Ring
from rorqual.engine.pool import PagePool
from rorqual.engine.runner import Segment
from rorqual.model import CacheState, Model
from rorqual.model.quant import pack_entry, pack_index_key, unpack_entry, unpack_index_key
from rorqual.model.state import EntryStore, LayerState, RowHistory

__all__ = ["TorchRunner", "check_segments"]


class _Recorded(RowHistory):
    """Remembers the rows of the last `extend`: more of them go into a ring than attention keeps."""

    joined: Tensor

    def extend(self, new: Tensor, counts: Tensor | None) -> Tensor:
        self.joined = super().extend(new, counts)
        return self.joined


class _Frozen(EntryStore):
    """Entries that are right already."""

    def write(self, index: Tensor, values: Tensor, valid: Tensor) -> None:
        return


class TorchRunner:
    """Runs a `Model` over a pool of pages. One call at a time.

    Parameters are shared with the model: updates in place are seen, parameter objects put in later are not.
    """

    batch_invariant = False

    def __init__(self, model: Model, pool: PagePool) -> None:
        self.model, self.pool, self.layout = model, pool, pool.layout
        self._packed = pool.layout.cache_format == "packed"
        self._twin = _torch_twin(model, rounds=self._packed or model.simulate_quant)
        self._dtype = model.embed.weight.dtype
        self._slabs = torch.from_numpy(pool.slabs())

    @torch.no_grad()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """See `Runner.forward`."""
        check_segments(segments, self.pool)
        together = [
            n for n, segment in enumerate(segments) if len(segment.tokens) == 1 and not segment.frozen
        ]
        groups = [together] if together else []
        groups += [[n] for n in range(len(segments)) if n not in set(together)]
        rows: dict[int, Tensor] = {}
        for group in groups:
            for number, logits in zip(group, self._group([segments[n] for n in group]), strict=True):
                rows[number] = logits
        ordered = [rows[n] for n, segment in enumerate(segments) if segment.logits != "none"]
        return torch.cat(ordered) if ordered else torch.empty(0, self.model.config.vocab_size)

    def _group(self, segments: list[Segment]) -> list[Tensor]:
        """Logits [rows, V] of segments of one length."""
        starts = torch.tensor([segment.position for segment in segments])
        count = len(segments[0].tokens)
        state = CacheState(self.model.config, starts)
        for number, (layer, ratio) in enumerate(
            zip(self.layout.layers, self.model.config.compress_ratios, strict=False)
        ):
            state.layers.append(self._unpack(number, layer, segments))
            assert layer.ratio == ratio
        tokens = torch.from_numpy(np.stack([segment.tokens for segment in segments]))
        every = any(segment.logits == "all" for segment in segments)
        logits = self._twin.extend(tokens, state, last_only=not every)
        for number, (layer, layer_state) in enumerate(zip(self.layout.layers, state.layers, strict=False)):
            self._pack(number, layer, layer_state, segments=segments, count=count)
        if not every:
            logits = logits[:, None]
        return [row if s.logits == "all" else row[-1:] for row, s in zip(logits, segments, strict=True)]

    # --- pages to tensors

    def _unpack(self, number: int, layer: LayerLayout, segments: list[Segment]) -> LayerState:
        window = self._ring(layer.window, segments, keep=self.model.config.sliding_window - 1)
        state = LayerState(_Recorded(self._entry_values(window)))
        if not layer.ratio:
            return state
        keep = (2 if layer.overlap else 1) * layer.ratio - 1
        for name, ring in (("tail", layer.tail), ("index_tail", layer.index_tail)):
            if ring is None:
                continue
            rows = self._ring(ring, segments, keep=keep).view(torch.float32)
            before = (
                torch.tensor([[segment.position] for segment in segments]) - keep + torch.arange(keep) < 0
            )
            half = rows.shape[2] // 2
            rows[..., :half].masked_fill_(before[..., None], 0.0)
            rows[..., half:].masked_fill_(before[..., None], float("-inf"))
            setattr(state, name, _Recorded(rows))
        frozen = segments[0].frozen
        store = _Frozen if frozen else EntryStore
        ends = [s.position + (len(s.tokens) if frozen else 0) for s in segments]
        raw = self._paged(self.pool.entries(number), segments, [end // layer.ratio for end in ends])
        state.entries = store(self._entry_values(raw))
        if layer.overlap:
            raw = self._paged(self.pool.keys(number), segments, [end // layer.ratio for end in ends])
            state.index_keys = store(self._key_values(raw))
        return state

    def _ring(self, ring: Ring, segments: list[Segment], *, keep: int) -> Tensor:
        """uint8 [B, keep, row_bytes]: the rows before each segment; places before position 0 hold anything finite."""
        slabs = torch.tensor([segment.slab for segment in segments])
        starts = torch.tensor([[segment.position] for segment in segments])
        positions = starts - keep + torch.arange(keep)
        whole = self._whole(ring)
        rows = whole[slabs[:, None], positions % ring.rows]
        return rows.masked_fill_((positions < 0)[..., None], 0)

    def _paged(self, rows: NDArray[np.uint8], segments: list[Segment], counts: list[int]) -> Tensor:
        """uint8 [B, S, row_bytes]: the first `counts[b]` rows of each segment's pages, the rest zero."""
        out = torch.zeros(len(segments), max(counts), rows.shape[2], dtype=torch.uint8)
        for target, segment, count in zip(out, segments, counts, strict=True):
            if count:
                pages = segment.pages[: -(-count // rows.shape[1])]
                target[:count] = torch.from_numpy(rows[pages].reshape(-1, rows.shape[2])[:count])
        return out

    def _entry_values(self, raw: Tensor) -> Tensor:
        config = self.model.config
        if not self._packed:
            return raw.view(torch.float32).to(self._dtype)
        return unpack_entry(
            raw, head_dim=config.head_dim, rope_dim=config.qk_rope_head_dim, dtype=self._dtype
        )

    def _key_values(self, raw: Tensor) -> Tensor:
        if not self._packed:
            return raw.view(torch.float32).to(self._dtype)
        return unpack_index_key(raw, head_dim=self.model.config.index_head_dim, dtype=self._dtype)

    # --- tensors to pages

    def _pack(
        self, number: int, layer: LayerLayout, state: LayerState, *, segments: list[Segment], count: int
    ) -> None:
        self._put_ring(layer.window, self._new_rows(state.window, count), segments, pack=self._entry_bytes)
        for ring, part in ((layer.tail, state.tail), (layer.index_tail, state.index_tail)):
            if ring is not None and part is not None:
                self._put_ring(ring, self._new_rows(part, count), segments, pack=_fp32_bytes)
        if not layer.ratio or segments[0].frozen:
            return
        for row, segment in enumerate(segments):
            first, last = segment.position // layer.ratio, (segment.position + count) // layer.ratio
            if first == last:
                continue
            numbers = np.arange(first, last)
            pages, places = segment.pages[numbers // layer.page_rows], numbers % layer.page_rows
            assert state.entries is not None
            new = state.entries.entries[row, first:last]
            self.pool.entries(number)[pages, places] = self._entry_bytes(new).numpy()
            if state.index_keys is not None:
                new = state.index_keys.entries[row, first:last]
                self.pool.keys(number)[pages, places] = self._key_bytes(new).numpy()

    @staticmethod
    def _new_rows(history: RowHistory, count: int) -> Tensor:
        assert isinstance(history, _Recorded)
        return history.joined[:, -count:]

    def _put_ring(self, ring: Ring, new: Tensor, segments: list[Segment], *, pack: Any) -> None:
        """Writes the last rows of `new` [B, T, width] that the ring holds."""
        count = new.shape[1]
        kept = min(count, ring.rows)
        raw = pack(new[:, count - kept :])
        slabs = torch.tensor([segment.slab for segment in segments])
        positions = torch.tensor([[s.position + count - kept] for s in segments]) + torch.arange(kept)
        whole = self._whole(ring)
        whole[slabs[:, None], positions % ring.rows] = raw

    def _whole(self, ring: Ring) -> Tensor:
        """uint8 [slabs, rows, row_bytes], a view."""
        part = self._slabs[:, ring.at : ring.at + ring.nbytes]
        return part.view(len(part), ring.rows, ring.row_bytes)

    def _entry_bytes(self, values: Tensor) -> Tensor:
        if not self._packed:
            return _fp32_bytes(values)
        return pack_entry(values, rope_dim=self.model.config.qk_rope_head_dim)

    def _key_bytes(self, values: Tensor) -> Tensor:
        return pack_index_key(values) if self._packed else _fp32_bytes(values)


def _fp32_bytes(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.uint8)


def _torch_twin(model: Model, *, rounds: bool) -> Model:
    """The same parameters (shared, not copied) in modules that run in torch, and round to the cache formats or not."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        if hasattr(module, "simulate_quant"):
            module.simulate_quant = rounds  # type: ignore[assignment]
    return twin


def check_segments(segments: Sequence[Segment], pool: PagePool) -> None:
    """Raises ValueError, naming the segment, for whatever breaks the contract of `Segment`."""
    vocab = pool.layout.config.vocab_size
    slabs = [segment.slab for segment in segments]
    if len(set(slabs)) != len(slabs):
        raise ValueError(f"two segments of a call stand in one slab: {sorted(slabs)}")
    for number, segment in enumerate(segments):
        tokens, end = segment.tokens, segment.position + len(segment.tokens)
        if not len(tokens) or segment.position < 0:
            raise ValueError(f"segment {number}: {len(tokens)} tokens at position {segment.position}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
            raise ValueError(f"segment {number}: a token id is outside the vocabulary (0 to {vocab - 1})")
        pages = segment.pages[: -(-end // PAGE_TOKENS)]
        if len(pages) * PAGE_TOKENS < end:
            raise ValueError(f"segment {number}: {len(pages)} pages do not hold {end} tokens")
        if int(pages.min()) < 0 or int(pages.max()) >= pool.page_capacity:
            raise ValueError(f"segment {number}: a page id is outside the pool")
        if not 0 <= segment.slab < pool.slab_capacity:
            raise ValueError(f"segment {number}: slab {segment.slab} is outside the pool")
