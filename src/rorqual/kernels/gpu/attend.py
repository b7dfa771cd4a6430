"""Core attention over packed rows: window, compressed entries and sink in one softmax; keys are the values.

w = exp(q_h . k - max) / (sum exp(.) + exp(sink_h - max)), o_h = sum w k.                      (spec/model.md 2.5, 2.3)
Rows are read as they lie in the cache (584 bytes at 448 + 64) and decoded in registers. Two ways of one sum:
picked entries (CSA, at most 1152 rows a query) in one pass, one program per query and block of heads; all entries that
a query sees (HCA) in parts of 512, which another kernel merges in order. The cut depends on the query's own numbers
only, so no bit of a row depends on what else is in the call.
fp32 queries multiply in fp32; bf16 queries use the tensor cores, and weights are rounded to bf16 before the values.
Bound: CSA memory, 584 B a row and query; HCA at 2^20 tokens 8192 rows, 4.8 MB a layer and sequence, or arithmetic at
128 heads (2.1 GFLOP a query). Memory of the parts: 4 * (D + 2) bytes per query, head and part, in rounds of 256 MB.
Shapes: T queries, H heads, D width, W window, R ring rows, B sequences, K picks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.gpu.checks import Pages, check, check_pages, power_of_two, ready
from rorqual.kernels.gpu.formats import dot_bf16, round_bf16, row_address, unpack_rows

__all__ = ["attend"]

FLOATS, INTEGERS = (torch.float32, torch.bfloat16), (torch.int64, torch.int32)
TILES = {torch.float32: (16, 16), torch.bfloat16: (32, 16)}
"""Heads and keys a program multiplies at once: what the registers of 8 warps hold at width 512."""
PART = 512
ROUND_BYTES = 256 << 20


@triton.jit
def _fold(q, rows, used, top, share, total, EXACT: tl.constexpr):
    """Adds keys `rows` [KEYS, D], those that are `used`, to the running softmax of the heads."""
    if EXACT:
        logits = tl.dot(q, tl.trans(rows), input_precision="ieee")
    else:
        logits = dot_bf16(q, tl.trans(rows), tl.zeros([q.shape[0], rows.shape[0]], tl.float32))
    logits = tl.where(used[None, :], logits, float("-inf"))
    best = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(best == float("-inf"), 0.0, best)
    weight = tl.exp(logits - safe[:, None])
    fade = tl.exp(top - safe)
    share = share * fade + tl.sum(weight, 1)
    if EXACT:
        total = tl.dot(weight, rows, total * fade[:, None], input_precision="ieee")
    else:
        total = dot_bf16(round_bf16(weight), rows, total * fade[:, None])
    return best, share, total


@triton.jit
def _attend(
    q,
    out,
    partial,
    stats,
    sink,
    positions,
    sequences,
    window,
    ring,
    ring_step,
    row_step,
    origin,
    window_size,
    rings,
    pool,
    table,
    seen,
    picks,
    counts,
    top_k,
    heads,
    pages,
    table_step,
    table_pages,
    page_rows,
    page_step,
    parts,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    ROW: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
    FAR: tl.constexpr,
    PICKED: tl.constexpr,
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, PADDED)
    mask = (head < heads)[:, None] & (col < WIDTH)[None, :]
    place = (t * heads + head)[:, None] * WIDTH + col[None, :]
    top = tl.full([HEADS], float("-inf"), tl.float32)
    share = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, PADDED], tl.float32)
    visible, count = 0, 0
    if FAR:
        visible = tl.load(seen + t)
        count = visible
        if PICKED:
            chosen = tl.load(counts + t)
            count = tl.where(chosen < 0, visible, chosen)
    first, last = 0, count
    if SPLIT:
        first = tl.maximum(part - 1, 0) * PART
        last = tl.minimum(first + PART, count)
        last = tl.where(part == 0, 0, last)
    if (part == 0) | (first < last):
        rows_q = tl.load(q + place, mask=mask, other=0.0).to(tl.float32)
        if part == 0:
            position = tl.load(positions + t)
            which = tl.load(sequences + t)
            known = (which >= 0) & (which < rings)
            base = window + tl.where(known, which, 0).to(tl.int64) * ring_step
            nearest = tl.maximum(position - window_size + 1, 0)
            for start in range(0, position - nearest + 1, KEYS):
                at = nearest + start + tl.arange(0, KEYS)
                used = at <= position
                address = base + (tl.where(used, at - origin, 0) % ring).to(tl.int64) * row_step
                rows = unpack_rows(address, used, tl.where(known, used, False), WIDTH, ROPE, PADDED)
                top, share, total = _fold(rows_q, rows, used, top, share, total, EXACT)
        if FAR:
            for start in range(first, last, KEYS):
                number = start + tl.arange(0, KEYS)
                used = number < last
                entry = number
                if PICKED:
                    listed = tl.where(chosen >= 0, used, False)
                    pick = tl.load(picks + t * top_k + number, mask=listed, other=0)
                    entry = tl.where(listed, pick, number)
                address, exists = row_address(
                    *(pool, table + t * table_step, entry, used & (entry < visible), pages),
                    *(table_pages, page_rows, page_step),
                    ROW=ROW,
                )
                rows = unpack_rows(address, used, exists, WIDTH, ROPE, PADDED)
                top, share, total = _fold(rows_q, rows, used, top, share, total, EXACT)
        if SPLIT:
            at = (t * parts + part) * heads + head
            tl.store(stats + at * 2, top, mask=head < heads)
            tl.store(stats + at * 2 + 1, share, mask=head < heads)
            tl.store(partial + at[:, None] * WIDTH + col[None, :], total, mask=mask)
        else:
            drain = tl.load(sink + head, mask=head < heads, other=0.0)
            best = tl.maximum(top, drain)
            fade = tl.exp(top - best)
            value = total * (fade / (share * fade + tl.exp(drain - best)))[:, None]
            tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _merge(
    partial,
    stats,
    sink,
    seen,
    out,
    heads,
    parts,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    FAR: tl.constexpr,
):
    """Adds up a head's parts in order, then the sink."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    col = tl.arange(0, PADDED)
    count = 1
    if FAR:
        count = 1 + (tl.load(seen + t) + PART - 1) // PART
    best = tl.load(sink + head)
    for part in range(0, count):
        best = tl.maximum(best, tl.load(stats + ((t * parts + part) * heads + head) * 2))
    share = tl.exp(tl.load(sink + head) - best)
    total = tl.zeros([PADDED], tl.float32)
    for part in range(0, count):
        at = (t * parts + part) * heads + head
        fade = tl.exp(tl.load(stats + at * 2) - best)
        share += fade * tl.load(stats + at * 2 + 1)
        total += fade * tl.load(partial + at * WIDTH + col, mask=col < WIDTH, other=0.0)
    place = (t * heads + head) * WIDTH + col
    tl.store(out + place, (total / share).to(out.dtype.element_ty), mask=col < WIDTH)


def attend(
    q: Tensor,
    window: Tensor,
    *,
    sink: Tensor,
    position: int | Tensor,
    window_size: int,
    rope_dim: int,
    entries: Pages | None = None,
    seen: Tensor | None = None,
    picks: Tensor | None = None,
    pick_counts: Tensor | None = None,
    sequences: Tensor | None = None,
) -> Tensor:
    """Attention of T queries over packed rows; returns q's shape and dtype.

    q fp32 or bf16 [T, H, D], rotated and scaled by D^-1/2; sink fp32 [H]. One sequence: `position` is that of q[0],
    and `window` uint8 [n, row bytes] holds positions max(0, position - W + 1) .. position + T - 1. Several: `position`
    int64 or int32 [T], `window` uint8 [B, R, row bytes] rings, in which position p is row p % R, R at least W, and
    `sequences` int32 [T] the ring of each query. A ring must still hold the window of each of its queries.
    entries: packed rows in pages, one table or one per query; seen int64 or int32 [T]: how many each query sees; picks
    int32 [T, K] with pick_counts int32 [T] choose among them (a count below 0: all). What does not exist (a page, a
    pick beyond `seen`, a ring) makes its query's result NaN.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    pool, table = (None, None) if entries is None else (entries.pool, entries.table)
    tensors = {"q": q, "window": window, "sink": sink, "pool": pool, "page table": table, "seen": seen}
    device = ready(**tensors, picks=picks, pick_counts=pick_counts, sequences=sequences)
    q = check("q", q, (None, None, None), dtypes=FLOATS)
    queries, heads, width = q.shape
    sink = check("sink", sink, (heads,), dtypes=(torch.float32,))
    if not heads or not 0 < width <= 1024 or not 0 <= rope_dim <= width or window_size < 1:
        raise ValueError(
            f"{heads} heads of width {width}, {rope_dim} rotated, window {window_size}: expected heads, width 1..1024"
        )
    row_bytes = entry_bytes(width, rope_dim)
    positions, which, origin = _places(
        window, position, sequences, queries=queries, window_size=window_size, row_bytes=row_bytes
    )
    rings = window if window.dim() == 3 else window[None]
    if rings.stride(2) != 1:
        rings = rings.contiguous()
    far, picked = entries is not None, picks is not None
    step, table_pages, page_rows, page_step, pages, top_k = 0, 0, 1, 0, 0, 0
    if entries is not None:
        if seen is None:
            raise ValueError("entries need `seen`")
        step, table_pages = check_pages(entries, row_bytes=row_bytes, queries=queries)
        page_rows, page_step, pages = entries.page_rows, entries.pool.stride(0), entries.pool.shape[0]
        seen = check("seen", seen, (queries,), dtypes=INTEGERS).clamp(0, table_pages * page_rows)
        seen = seen.to(torch.int32)
        if picks is not None:
            if pick_counts is None:
                raise ValueError("picks need `pick_counts`")
            picks = check("picks", picks, (queries, None), dtypes=(torch.int32,))
            top_k = picks.shape[1]
            pick_counts = check("pick_counts", pick_counts, (queries,), dtypes=(torch.int32,)).clamp(
                max=top_k
            )
    elif picked or seen is not None:
        raise ValueError("`seen` and picks need entries")
    out = torch.empty_like(q)
    if not queries:
        return out
    split = far and not picked
    parts = 1 + -(-table_pages * page_rows // PART) if split else 1
    rounds = max(1, min(queries, ROUND_BYTES // (4 * parts * heads * (width + 2)))) if split else queries
    partial = torch.empty((rounds, parts, heads, width) if split else 1, device=device)
    stats = torch.empty((rounds, parts, heads, 2) if split else 1, device=device)
    most_heads, keys = TILES[q.dtype]
    block = min(most_heads, power_of_two(heads, least=16))
    none = torch.empty(1, dtype=torch.int32, device=device)
    padded = power_of_two(width, least=16)
    with torch.cuda.device_of(q):
        for start in range(0, queries, rounds):
            now = slice(start, min(start + rounds, queries))
            count = now.stop - start
            _attend[(count, -(-heads // block), parts)](
                *(q[now], out[now], partial, stats, sink, positions[now], which[now]),
                *(
                    rings,
                    rings.shape[1],
                    rings.stride(0),
                    rings.stride(1),
                    origin,
                    window_size,
                    rings.shape[0],
                ),
                *(none if pool is None else pool, none if table is None else (table[now] if step else table)),
                *(none if seen is None else seen[now], none if picks is None else picks[now]),
                *(none if pick_counts is None else pick_counts[now], top_k, heads, pages, step, table_pages),
                *(page_rows, page_step, parts),
                WIDTH=width,
                ROPE=rope_dim,
                ROW=row_bytes,
                PADDED=padded,
                HEADS=block,
                KEYS=keys,
                PART=PART,
                FAR=far,
                PICKED=picked,
                SPLIT=split,
                EXACT=q.dtype == torch.float32,
                num_warps=8,
            )
            if split:
                _merge[(count, heads)](
                    *(partial, stats, sink, none if seen is None else seen[now], out[now], heads, parts),
                    WIDTH=width,
                    PADDED=padded,
                    PART=PART,
                    FAR=far,
                )
    return out


def entry_bytes(width: int, rope_dim: int) -> int:
    """Bytes of a packed row: e4m3, bf16, a scale per 64 of the first, padded to a multiple of 8 scales."""
    nope = width - rope_dim
    scales = -(-nope // 64)
    return nope + 2 * rope_dim + -(-scales // 8) * 8


def _places(
    window: Tensor,
    position: int | Tensor,
    sequences: Tensor | None,
    *,
    queries: int,
    window_size: int,
    row_bytes: int,
) -> tuple[Tensor, Tensor, int]:
    """Positions int64 [T], ring numbers int32 [T], and the position at row 0 of the ring."""
    if isinstance(position, int):
        if position < 0 or sequences is not None:
            raise ValueError(f"position {position}: expected 0 or more, and no `sequences` with one position")
        origin = max(0, position - window_size + 1)
        check("window", window, (position + queries - origin, row_bytes), dtypes=(torch.uint8,))
        positions = torch.arange(position, position + queries, device=window.device)
        return positions, torch.zeros(queries, dtype=torch.int32, device=window.device), origin
    ready(position=position, window=window)
    if window.dim() != 3 or window.shape[1] < window_size:
        raise ValueError(f"window: {list(window.shape)}, expected [B, {window_size} or more, {row_bytes}]")
    check("window", window[:0], (0, None, row_bytes), dtypes=(torch.uint8,))
    if sequences is None:
        raise ValueError("positions of several sequences need `sequences`")
    positions = check("position", position, (queries,), dtypes=INTEGERS).long()
    return positions, check("sequences", sequences, (queries,), dtypes=(torch.int32,)), 0
