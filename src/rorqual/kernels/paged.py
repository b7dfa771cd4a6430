"""Attention and index scoring over pages in the native library: checked faces for tests, benchmarks, single layers.

attend_cpu: one softmax over window rows, entries and sink (spec/model.md 2.5; reference: kernels/attention.py).
index_topk_cpu: I[t,s] = sum_h w[t,h] relu(q[t,h] . k[s]) and its top-k (2.6; reference: kernels/indexer.py).
No pointer crosses before shapes, dtypes, page tables and picks have been checked.
Letters: T queries, H heads, D width, P pages, K top_k.
"""

from __future__ import annotations

import ctypes
from ctypes import c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rorqual.kernels.cpu import LIBRARY
from rorqual.kernels.packed import (
    AttendJob,
    CacheFormat,
    IndexJob,
    cache_format_number,
    check_width,
    checked_bytes,
    native_core,
)

__all__ = ["Paged", "attend_cpu", "index_topk_cpu"]

_NONE = 2**63 - 1
_MAX_KEY = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Paged:
    """Rows of one sequence in pages: row e is row e % `page_rows` of page `table[e // page_rows]`."""

    pool: Tensor
    """uint8 [P, page bytes]; a page starts with its rows."""
    table: Tensor
    """int32 [pages of the sequence]."""
    page_rows: int

    def check(self, rows: int, row_bytes: int) -> None:
        """Raises ValueError unless `rows` rows of `row_bytes` can be read."""
        pool, table = self.pool, self.table
        if pool.dtype != torch.uint8 or pool.dim() != 2 or not pool.is_contiguous():
            raise ValueError(
                f"pool: {pool.dtype} {list(pool.shape)}, expected contiguous uint8 [pages, bytes]"
            )
        if table.dtype != torch.int32 or table.dim() != 1 or not table.is_contiguous():
            raise ValueError(
                f"page table: {table.dtype} {list(table.shape)}, expected contiguous int32 [pages]"
            )
        if self.page_rows < 1 or self.page_rows * row_bytes > pool.shape[1]:
            raise ValueError(
                f"{self.page_rows} rows of {row_bytes} bytes do not fit a page of {pool.shape[1]}"
            )
        need = -(-rows // self.page_rows)
        if need > len(table):
            raise ValueError(f"{rows} rows need {need} pages, the page table has {len(table)}")
        if need and not (int(table[:need].min()) >= 0 and int(table[:need].max()) < pool.shape[0]):
            raise ValueError(f"the page table names pages outside 0..{pool.shape[0] - 1}")


def attend_cpu(
    q: Tensor,
    window: Tensor,
    *,
    sink: Tensor,
    position: int,
    window_size: int,
    rope_dim: int,
    cache_format: CacheFormat = "exact",
    entries: Paged | None = None,
    seen: Tensor | None = None,
    picks: Tensor | None = None,
    pick_counts: Tensor | None = None,
    level: str | None = None,
    split: Literal["queries", "heads", "parts"] = "queries",
    path: Path = LIBRARY,
) -> Tensor:
    """One softmax over window rows, entries and sink for consecutive queries of one sequence: fp32 [T, H, D].

    q fp32 [T, H, D], rotated and scaled by D^-1/2; the first stands at `position`. window: rows of positions
    max(0, position - window_size + 1) .. position + T - 1, uint8 [n, entry bytes] or fp32 [n, D] (in the packed
    format values that `round_entries` gave). sink fp32 [H]. seen int64 [T]: entries each query may see; picks int32
    [T, K] with pick_counts int32 [T] choose among them, ascending (a count below 0: all seen). `split` is how the
    work is cut and changes no bit. Raises ValueError when shapes, dtypes, pages or picks do not fit.
    """
    kernels, form = native_core(level, path=path), cache_format_number(cache_format)
    if q.dim() != 3 or q.dtype != torch.float32 or not q.numel():
        raise ValueError(f"q: {q.dtype} {list(q.shape)}, expected fp32 [queries, heads, width]")
    queries, heads, width = q.shape
    check_width(width, rope_dim)
    q = q.contiguous()
    size = kernels.call.entry_bytes(form, width, rope_dim)
    rows = _window_rows(window, position=position, window_size=window_size, queries=queries)
    if window.dtype != torch.float32:
        window = checked_bytes(window, size, "window")
    elif window.shape[-1] != width:
        raise ValueError(f"window: rows of {window.shape[-1]} values, q has width {width}")
    window = window.contiguous()
    step = window.stride(0) * window.element_size()
    addresses = (c_void_p * len(rows))(*(None if r < 0 else window.data_ptr() + r * step for r in rows))
    sink = sink.detach().float().contiguous()
    if sink.shape != (heads,):
        raise ValueError(f"sink: {list(sink.shape)}, expected [{heads}]")
    job = AttendJob(heads=heads, width=width, rope=rope_dim, window=window_size, format=form, queries=queries)
    out = torch.empty(queries, heads, width)
    job.q, job.q_step, job.out, job.out_step = q.data_ptr(), heads * width, out.data_ptr(), heads * width
    job.sink, job.window_rows = sink.data_ptr(), ctypes.addressof(addresses)
    job.window_own = 0 if window.dtype == torch.float32 else _NONE
    if entries is not None:
        if seen is None or seen.dtype != torch.int64 or seen.shape != (queries,) or int(seen.min()) < 0:
            raise ValueError(f"seen: expected int64 [{queries}], none negative")
        seen = seen.contiguous()
        entries.check(int(seen.max()), size)
        job.page_rows, job.page_bytes = entries.page_rows, entries.pool.shape[1]
        job.entries, job.pages = entries.pool.data_ptr(), entries.table.data_ptr()
        job.seen = seen.data_ptr()
        if picks is not None:
            if pick_counts is None:
                raise ValueError("picks need pick_counts")
            picks, pick_counts = _check_picks(picks, pick_counts, seen)
            job.picks, job.picks_step, job.pick_counts = (
                picks.data_ptr(),
                picks.shape[1],
                pick_counts.data_ptr(),
            )
    scratch = _scratch(kernels.call.attend_scratch(job))
    if split == "queries":
        kernels.call.attend(job, 0, queries, scratch.data_ptr())
        return out
    for t in range(queries):
        if split == "heads":
            for h in range(0, heads, 8):
                kernels.call.attend_heads(job, t, h, min(8, heads - h), scratch.data_ptr())
            continue
        parts = kernels.call.attend_parts(job, t)
        partials = _scratch(parts * kernels.call.attend_partial_bytes(job))
        for part in reversed(range(parts)):
            kernels.call.attend_part(job, t, part, partials.data_ptr(), scratch.data_ptr())
        kernels.call.attend_merge(job, t, partials.data_ptr(), parts, scratch.data_ptr())
    return out


def index_topk_cpu(
    q: Tensor,
    weights: Tensor,
    keys: Paged,
    *,
    seen: Tensor,
    top_k: int,
    cache_format: CacheFormat = "exact",
    level: str | None = None,
    part_keys: int | None = None,
    path: Path = LIBRARY,
) -> tuple[Tensor, Tensor]:
    """The best `top_k` keys each query may see: int32 [T, K] ascending, -1 above; and their counts int32 [T].

    q fp32 [T, H, D] rotated by RoPE (packed: Hadamard and FP4 happen inside); weights fp32 [T, H], scaled; seen int64
    [T], not descending. Ties go to the lower key, NaN first. `part_keys` (a multiple of 64) cuts the keys into parts of
    that many, as threads would, and changes no pick. Raises ValueError when shapes, dtypes or pages do not fit.
    """
    kernels, form = native_core(level, path=path), cache_format_number(cache_format)
    if q.dim() != 3 or q.dtype != torch.float32 or not q.numel():
        raise ValueError(f"q: {q.dtype} {list(q.shape)}, expected fp32 [queries, heads, width]")
    queries, heads, width = q.shape
    if width > _MAX_KEY or (form and (width % 32 or width & (width - 1))):
        raise ValueError(f"index width {width}: expected at most {_MAX_KEY}; packed: 32, 64, 128, 256 or 512")
    if weights.shape != (queries, heads) or weights.dtype != torch.float32:
        raise ValueError(
            f"weights: {weights.dtype} {list(weights.shape)}, expected fp32 [{queries}, {heads}]"
        )
    if (
        seen.dtype != torch.int64
        or seen.shape != (queries,)
        or bool((seen.diff() < 0).any())
        or int(seen[0]) < 0
    ):
        raise ValueError(f"seen: expected int64 [{queries}], none negative, not descending")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")
    if part_keys is not None and (part_keys < 64 or part_keys % 64):
        raise ValueError(f"part_keys is {part_keys}, expected a multiple of 64")
    keys.check(int(seen.max()), kernels.call.key_bytes(form, width))
    q, weights, seen = q.contiguous(), weights.contiguous(), seen.contiguous()
    picks = torch.full((queries, top_k), -1, dtype=torch.int32)
    counts = torch.zeros(queries, dtype=torch.int32)
    job = IndexJob(
        heads=heads, width=width, format=form, top_k=top_k, page_rows=keys.page_rows, queries=queries
    )
    job.q, job.q_step, job.weights, job.weights_step = q.data_ptr(), heads * width, weights.data_ptr(), heads
    job.keys, job.page_bytes, job.pages = keys.pool.data_ptr(), keys.pool.shape[1], keys.table.data_ptr()
    job.seen, job.picks, job.picks_step = seen.data_ptr(), picks.data_ptr(), top_k
    job.pick_counts = counts.data_ptr()
    scratch = _scratch(kernels.call.index_scratch(job))
    if part_keys is None:
        kernels.call.index_topk(job, 0, queries, scratch.data_ptr())
        return picks, counts
    size = kernels.call.index_partial_bytes(job)
    for t in range(queries):
        starts = range(0, max(1, int(seen[t])), part_keys)
        partials = _scratch(len(starts) * size)
        for number, start in enumerate(starts):
            at = partials.data_ptr() + number * size
            kernels.call.index_part(job, t, start, start + part_keys, at, scratch.data_ptr())
        kernels.call.index_merge(job, t, partials.data_ptr(), len(starts), scratch.data_ptr())
    return picks, counts


def _window_rows(window: Tensor, *, position: int, window_size: int, queries: int) -> list[int]:
    """Row of `window` for each of position - window_size + 1 .. position + queries - 1; -1 before position 0."""
    if position < 0 or window_size < 1:
        raise ValueError(f"position {position}, window {window_size}: expected 0 or more, 1 or more")
    have = min(position, window_size - 1) + queries
    if window.dim() != 2 or window.shape[0] != have:
        raise ValueError(f"window: {list(window.shape)}, expected {have} rows")
    missing = window_size - 1 + queries - have
    return [-1] * missing + list(range(have))


def _check_picks(picks: Tensor, counts: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    if picks.dtype != torch.int32 or counts.dtype != torch.int32 or picks.dim() != 2:
        raise ValueError(
            f"picks: {picks.dtype}, counts: {counts.dtype}, expected int32 [queries, K] and [queries]"
        )
    if picks.shape[0] != len(seen) or counts.shape != seen.shape or int(counts.max()) > picks.shape[1]:
        raise ValueError(f"picks {list(picks.shape)} and counts {list(counts.shape)} for {len(seen)} queries")
    used = torch.arange(picks.shape[1]) < counts[:, None]
    if bool((used & ((picks < 0) | (picks >= seen[:, None]))).any()):
        raise ValueError("picks name entries that their query may not see")
    return picks.contiguous(), counts.contiguous()


def _scratch(size: int) -> Tensor:
    """`size` bytes, aligned to 64 as torch allocates."""
    return torch.empty(max(size, 64), dtype=torch.uint8)
