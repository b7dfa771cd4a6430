"""CacheLayout: where every byte of a sequence's cache lies, for one model and one cache format.

Pages of 128 tokens hold compressed entries (and index keys), layer by layer; a slab of a sequence holds what is not
per page: the window rows of every layer and the compressors' per-token rows, as rings addressed by position modulo
capacity, so that a rewind moves a head and clears nothing.          (spec/engines.md 5; spec/model.md 2.8, 3.1)
Owns byte counts and offsets, equal to model/cost.py's to the byte; holds no memory (pool.py does) and no torch.

Formats: `packed`: entries and window rows as `quant.pack_entry` (584 bytes at 448 + 64), keys as
`quant.pack_index_key` (68 at 128). `exact`: fp32 rows, nothing rounded. Compressor rows are fp32 in both:
[values coff*D | scores, ape included, coff*D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rorqual.model.config import PAGE_TOKENS, Config
from rorqual.model.cost import entry_bytes, index_key_bytes

__all__ = ["PAGE_TOKENS", "CacheFormat", "CacheLayout", "LayerLayout", "Ring"]

CacheFormat = Literal["exact", "packed"]

ALIGN = 64
"""Rings start at multiples of a cache line inside a slab; slabs follow each other at multiples of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """Rows of the last positions: the row of position p is at `at + (p % rows) * row_bytes` of the slab."""

    at: int
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole ring."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLayout:
    """One layer's part. `tail` is absent in window-only layers, `index_tail` and keys in all but CSA layers."""

    ratio: int
    """Tokens per compressed entry; 0: none."""
    overlap: bool
    """CSA: entries pool two blocks, and there are index keys."""
    entries_page: int
    """Bytes of this layer's entries in a page."""
    keys_page: int
    window: Ring
    tail: Ring | None
    index_tail: Ring | None

    @property
    def page_rows(self) -> int:
        """Entries (and keys) per page: entry w is row w % page_rows of page w // page_rows."""
        return PAGE_TOKENS // self.ratio if self.ratio else 0


class CacheLayout:
    """Byte counts and offsets. `slack`: how many tokens a sequence may be rewound by moving its head.

    `mtp_layers` > 0 adds a window ring for each MTP block (its layers come last in `layers`; they have no pages).
    Raises ValueError for an unknown format or a negative slack.
    """

    def __init__(
        self, config: Config, cache_format: CacheFormat = "exact", *, slack: int = 16, mtp_layers: int = 0
    ) -> None:
        if cache_format not in ("exact", "packed"):
            raise ValueError(f"cache_format is {cache_format!r}, expected 'exact' or 'packed'")
        if slack < 0:
            raise ValueError(f"slack is {slack} tokens, expected 0 or more")
        self.config, self.cache_format, self.slack = config, cache_format, slack
        packed = cache_format == "packed"
        width, index_width = config.head_dim, config.index_head_dim
        self.entry_bytes = entry_bytes(width, config.qk_rope_head_dim) if packed else 4 * width
        """Of one compressed entry or window row."""
        self.key_bytes = index_key_bytes(index_width) if packed else 4 * index_width
        """Of one index key."""
        self._end = 0
        layers = []
        for ratio in (*config.compress_ratios, *[0] * mtp_layers):
            overlap = bool(ratio) and ratio == config.csa_ratio
            coff, rows = (2 if overlap else 1), (PAGE_TOKENS // ratio if ratio else 0)
            tail_rows = coff * ratio + slack
            layers.append(
                LayerLayout(
                    ratio=ratio,
                    overlap=overlap,
                    entries_page=rows * self.entry_bytes,
                    keys_page=rows * self.key_bytes if overlap else 0,
                    window=self._ring(config.sliding_window + slack, self.entry_bytes),
                    tail=self._ring(tail_rows, 2 * coff * width * 4) if ratio else None,
                    index_tail=self._ring(tail_rows, 2 * coff * index_width * 4) if overlap else None,
                )
            )
        self.layers: tuple[LayerLayout, ...] = tuple(layers)
        self.slab_bytes = -(-self._end // ALIGN) * ALIGN
        """Bytes of a sequence's rings."""
        self.page_bytes = sum(layer.entries_page + layer.keys_page for layer in layers)
        """Bytes of a page over all layers."""

    def _ring(self, rows: int, row_bytes: int) -> Ring:
        at = -(-self._end // ALIGN) * ALIGN
        self._end = at + rows * row_bytes
        return Ring(at=at, rows=rows, row_bytes=row_bytes)

    def pages(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // PAGE_TOKENS)

    def held_bytes(self, tokens: int) -> int:
        """Bytes that a sequence of `tokens` tokens takes from a pool: whole pages, and its slab."""
        return self.pages(tokens) * self.page_bytes + self.slab_bytes

    def content_bytes(self, tokens: int) -> int:
        """Bytes of entries, keys and window rows that `tokens` tokens fill: `cost.kv_bytes` when packed.

        Compressor rows are not in it (`cost.state_bytes`); window rows of MTP blocks are.
        """
        total = 0
        for layer in self.layers:
            total += min(tokens, self.config.sliding_window) * self.entry_bytes
            if layer.ratio:
                per_entry = self.entry_bytes + (self.key_bytes if layer.overlap else 0)
                total += tokens // layer.ratio * per_entry
        return total
