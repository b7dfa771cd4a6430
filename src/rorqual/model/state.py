"""Decode state: what attention must remember, as plain tensors of a batch of rows that stand at different positions.

Per layer: the last W-1 window rows, the compressor's last K*M-1 per-token rows, and the compressed entries (CSA:
index keys too). Per-token rows, not the official shift register, so that chunks of any length fit
(spec/model.md 2.8). The engine owns a `CacheState`; attention reads and extends it. Pages, sharing and packed
formats are the engine's matter.
Shapes: B rows (sequences), T new tokens, C row width, R rows kept, D entry width, M ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.model.config import Config

__all__ = ["CacheState", "EntryStore", "LayerState", "RowHistory"]

GROW_ENTRIES = 32


class RowHistory:
    """The last `keep` per-token rows [B, R, C] of each sequence, oldest first."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def extend(self, new: Tensor, counts: Tensor | None) -> Tensor:
        """Appends `new` [B, T, C], of which row b counts `counts[b]` (None: all). Returns old and new, [B, R+T, C]."""
        joined = torch.cat((self.rows, new), dim=1)
        keep = self.rows.shape[1]
        if counts is None:
            self.rows = joined[:, joined.shape[1] - keep :]
        else:
            index = counts[:, None] + torch.arange(keep, device=new.device)
            self.rows = joined.gather(1, index[..., None].expand(-1, -1, joined.shape[2]))
        return joined


class EntryStore:
    """Compressed entries [B, capacity, D]; how many of them hold follows from the position."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries

    def write(self, index: Tensor, values: Tensor, valid: Tensor) -> None:
        """Puts `values` [B, N, D] at entry numbers `index` [B, N] where `valid` [B, N]; grows as needed."""
        batch, row = valid.nonzero(as_tuple=True)
        if not len(batch):
            return
        target = index[batch, row]
        need = int(target.max()) + 1
        have = self.entries.shape[1]
        if need > have:
            grow = max(need, have + have // 2, GROW_ENTRIES) - have
            self.entries = torch.cat(
                (self.entries, self.entries.new_zeros(len(self.entries), grow, values.shape[2])), 1
            )
        self.entries[batch, target] = values[batch, row]


@dataclass(slots=True)
class LayerState:
    """State of one layer; the last four are absent in window-only layers, the index pair in HCA layers."""

    window: RowHistory
    tail: RowHistory | None = None
    entries: EntryStore | None = None
    index_tail: RowHistory | None = None
    index_keys: EntryStore | None = None

    def parts(self) -> list[RowHistory | EntryStore]:
        """Whatever is present, in a fixed order."""
        candidates = (self.window, self.tail, self.entries, self.index_tail, self.index_keys)
        return [part for part in candidates if part is not None]


def _tail(batch: int, ratio: int, width: int, *, overlap: bool, device: torch.device | str) -> RowHistory:
    coff = 2 if overlap else 1
    rows = torch.zeros(batch, coff * ratio - 1, 2 * coff * width, device=device)  # values, then scores, fp32
    rows[..., coff * width :] = float("-inf")  # nothing before position 0 may be pooled
    return RowHistory(rows)


@dataclass(slots=True)
class CacheState:
    """State of a batch of sequences: `position` int64 [B] is how many tokens each has seen."""

    config: Config
    position: Tensor
    layers: list[LayerState] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        config: Config,
        batch: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> CacheState:
        """Empty state for `batch` sequences."""
        layers = []
        for ratio in config.compress_ratios:
            window = RowHistory(
                torch.zeros(batch, config.sliding_window - 1, config.head_dim, dtype=dtype, device=device)
            )
            state = LayerState(window)
            if ratio:
                overlap = ratio == config.csa_ratio
                state.tail = _tail(batch, ratio, config.head_dim, overlap=overlap, device=device)
                state.entries = EntryStore(torch.zeros(batch, 0, config.head_dim, dtype=dtype, device=device))
                if overlap:
                    width = config.index_head_dim
                    state.index_tail = _tail(batch, ratio, width, overlap=True, device=device)
                    state.index_keys = EntryStore(torch.zeros(batch, 0, width, dtype=dtype, device=device))
            layers.append(state)
        return cls(config, torch.zeros(batch, dtype=torch.int64, device=device), layers)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.position)

    def select(self, rows: Tensor) -> CacheState:
        """A copy that holds the sequences `rows` (int64 [N]; repeats make forks)."""
        out = CacheState(self.config, self.position[rows])
        for layer in self.layers:
            fields = [
                None
                if part is None
                else RowHistory(part.rows[rows])
                if isinstance(part, RowHistory)
                else EntryStore(part.entries[rows])
                for part in (layer.window, layer.tail, layer.entries, layer.index_tail, layer.index_keys)
            ]
            out.layers.append(LayerState(*fields))  # type: ignore[arg-type]
        return out

    @classmethod
    def join(cls, states: list[CacheState]) -> CacheState:
        """One batch of all sequences of `states`, in order."""
        out = cls(states[0].config, torch.cat([state.position for state in states]))
        for layers in zip(*(state.layers for state in states), strict=True):
            parts: list[RowHistory | EntryStore] = []
            for group in zip(*(layer.parts() for layer in layers), strict=True):
                if isinstance(group[0], RowHistory):
                    parts.append(RowHistory(torch.cat([part.rows for part in group])))
                else:
                    tensors = [part.entries for part in group]
                    width = max(tensor.shape[1] for tensor in tensors)
                    padded = [torch.nn.functional.pad(t, (0, 0, 0, width - t.shape[1])) for t in tensors]
                    parts.append(EntryStore(torch.cat(padded)))
            out.layers.append(LayerState(*parts))  # type: ignore[arg-type]
        return out

    def held_bytes(self, row: int = 0) -> int:
        """Bytes of sequence `row` that hold content: window rows, tails and the entries written so far."""
        position = int(self.position[row])
        total = 0
        for layer, ratio in zip(self.layers, self.config.compress_ratios, strict=True):
            window = layer.window.rows
            total += min(position, self.config.sliding_window) * window.shape[2] * window.element_size()
            for tail in (layer.tail, layer.index_tail):
                if tail is not None:
                    total += tail.rows[0].numel() * tail.rows.element_size()
            for store in (layer.entries, layer.index_keys):
                if store is not None:
                    total += position // ratio * store.entries.shape[2] * store.entries.element_size()
        return total
