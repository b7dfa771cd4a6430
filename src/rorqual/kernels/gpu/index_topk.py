"""Lightning Indexer over packed keys: scores, and the exact top-k, with no score row in one program.

I[t,s] = sum_h w[t,h] * relu(q[t,h] . k[s]), s < seen[t]; q is rotated by Hadamard and rounded to FP4 as the keys are.
Ties go to the lower key, NaN first (docs/decisions/0005-top-k-ties.md).                            (spec/model.md 2.6)

Passes: round q; score blocks of 64 keys into an int32 per key that orders as the score does; find the K-th largest by
four histograms of 8 bits (one program per 1024 keys, integer atomics, so no order matters); write what is above it, and
of its equals the lowest, ascending.
Memory: 4 bytes per query and key of scores (1 MB a query at 2^20 tokens), 1 KB of histogram a query; queries go in
rounds of at most 256 MB. Bound: each key read once, 17.8 MB a layer at 2^20 tokens; the scores are read 6 times, from
L2 while they fit.
Shapes: T queries, H index heads, D index width, S keys, K = top_k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.gpu.checks import Pages, check, check_pages, power_of_two, ready
from rorqual.kernels.gpu.formats import dot_bf16, e2m1, e2m1_code, e8m0, row_address

__all__ = ["index_topk"]

KEYS, BLOCK, SHARED = 64, 1024, 4
"""Keys a scoring program reads; scores a selecting program reads; queries of one sequence that share decoded keys."""
ROUND_BYTES = 256 << 20


@triton.jit
def _round_queries(q, out, rows, rescale, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """fp32 [rows, D] times Hadamard, then FP4 by 32: bf16, which holds every FP4 value."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    place = row.to(tl.int64)[:, None] * WIDTH + col[None, :]
    x = tl.load(q + place, mask=(row < rows)[:, None], other=0.0)
    both = col[:, None] & col[None, :]
    both ^= both >> 8
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    matrix = tl.where((both & 1) == 1, -1.0, 1.0)
    y = tl.dot(x, matrix, input_precision="ieee") * rescale
    blocks = tl.reshape(y, (ROWS, WIDTH // 32, 32))
    size = tl.where(blocks == blocks, tl.abs(blocks), float("inf"))
    top = tl.maximum(tl.max(size, 2), 7.052966104933725e-38)  # 6 * 2^-126
    bits = top.to(tl.int32, bitcast=True)
    byte = tl.where(bits >= 0x7F800000, 255, ((bits + 0x3FFFFF) >> 23) - 2)[:, :, None]
    magnitude = size * e8m0(tl.where(byte == 255, 255, 254 - byte))
    value = e2m1(e2m1_code(magnitude)) * e8m0(byte)
    value = tl.where(blocks < 0, -value, value)
    tl.store(out + place, tl.reshape(value, (ROWS, WIDTH)).to(tl.bfloat16), mask=(row < rows)[:, None])


@triton.jit
def _score(
    q,
    weights,
    pool,
    table,
    seen,
    order,
    queries,
    heads,
    pages,
    table_step,
    table_pages,
    page_rows,
    page_step,
    keys,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARED: tl.constexpr,
):
    HALF: tl.constexpr = WIDTH // 2
    first = tl.program_id(1) * SHARED
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    who = first + tl.arange(0, SHARED)
    most = tl.max(tl.load(seen + who, mask=who < queries, other=0), 0)
    if tl.program_id(0) * KEYS < most:
        used = key < most
        base, exists = row_address(
            *(
                pool,
                table + first.to(tl.int64) * table_step,
                key,
                used,
                pages,
                table_pages,
                page_rows,
                page_step,
            ),
            ROW=HALF + WIDTH // 32,
        )
        pair = tl.arange(0, HALF)
        mask = (used & exists)[:, None]
        byte = tl.load(base[:, None] + pair[None, :], mask=mask, other=0).to(tl.int32)
        scale = tl.load(base[:, None] + (HALF + pair // 16)[None, :], mask=mask, other=255).to(tl.int32)
        factor = e8m0(scale)  # [KEYS, HALF]; NaN where the row does not exist
        even = e2m1(byte & 15) * factor
        odd = e2m1(byte >> 4) * factor
        head = tl.arange(0, HEADS)
        for i in range(SHARED):
            t = (first + i).to(tl.int64)
            if t < queries:
                at = (t * heads + head)[:, None] * WIDTH + 2 * pair[None, :]
                some = (head < heads)[:, None]
                q_even = tl.load(q + at, mask=some, other=0.0).to(tl.float32)
                q_odd = tl.load(q + at + 1, mask=some, other=0.0).to(tl.float32)
                dots = tl.zeros([HEADS, KEYS], tl.float32)
                dots = dot_bf16(q_even, tl.trans(even), dots)
                dots = dot_bf16(q_odd, tl.trans(odd), dots)
                dots = tl.where(dots < 0, 0.0, dots)  # keeps NaN
                w = tl.load(weights + t * heads + head, mask=head < heads, other=0.0)
                score = tl.sum(tl.where(some, dots * w[:, None], 0.0), 0)
                score = tl.where(score == 0, 0.0, score)  # -0 ties with 0
                bits = score.to(tl.int32, bitcast=True)
                bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
                bits = tl.where(score == score, bits, 0x7FFFFFFF)
                tl.store(order + t * keys + key, bits, mask=key < tl.load(seen + t))


@triton.jit
def _count(order, seen, prefix, counts, keys, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the digits at SHIFT of the keys that agree with `prefix` above it to counts [T, 256]."""
    t = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    limit = tl.load(seen + t)
    if tl.program_id(1) * BLOCK < limit:
        bits = tl.load(order + t * keys + key, mask=key < limit, other=0)
        bits = bits ^ -2147483648  # unsigned order
        match = key < limit
        if SHIFT < 24:
            above: tl.constexpr = SHIFT + 8
            match = match & (((bits ^ tl.load(prefix + t)) >> above) == 0)
        histogram = tl.histogram((bits >> SHIFT) & 255, 256, mask=match)
        digit = tl.arange(0, 256)
        tl.atomic_add(counts + t * 256 + digit, histogram, mask=histogram > 0, sem="relaxed")


@triton.jit
def _narrow(counts, prefix, need, SHIFT: tl.constexpr):
    """Fixes the next digit of the K-th largest, and how many of that digit are still needed; clears the histogram."""
    t = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, 256)
    count = tl.load(counts + t * 256 + digit)
    wanted = tl.load(need + t)
    above = tl.sum(count, 0) - tl.cumsum(count, 0)
    here = (above < wanted) & (above + count >= wanted)
    found = tl.sum(tl.where(here, digit, 0), 0)
    tl.store(need + t, wanted - tl.sum(tl.where(here, above, 0), 0))
    tl.store(prefix + t, tl.load(prefix + t) | (found << SHIFT))
    tl.store(counts + t * 256 + digit, tl.zeros([256], tl.int32))


@triton.jit
def _tally(order, seen, prefix, tallies, keys, blocks, BLOCK: tl.constexpr):
    """Per block of keys: how many lie above the K-th largest, how many equal it."""
    t = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = key < tl.load(seen + t)
    bits = tl.load(order + t * keys + key, mask=mask, other=0)
    edge = tl.load(prefix + t) ^ -2147483648
    at = tallies + (t * blocks + tl.program_id(1)) * 2
    tl.store(at, tl.sum((mask & (bits > edge)).to(tl.int32), 0))
    tl.store(at + 1, tl.sum((mask & (bits == edge)).to(tl.int32), 0))


@triton.jit
def _place(
    order,
    seen,
    prefix,
    need,
    tallies,
    picks,
    keys,
    blocks,
    top_k,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Writes the picks of a block of keys behind those of the blocks before it."""
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    limit = tl.load(seen + t)
    if block * BLOCK < limit:
        before = tl.arange(0, BLOCKS)
        at = tallies + (t * blocks + before) * 2
        above = tl.sum(tl.load(at, mask=before < block, other=0), 0)
        equal = tl.sum(tl.load(at + 1, mask=before < block, other=0), 0)
        wanted = tl.load(need + t)
        key = block * BLOCK + tl.arange(0, BLOCK)
        mask = key < limit
        bits = tl.load(order + t * keys + key, mask=mask, other=0)
        edge = tl.load(prefix + t) ^ -2147483648
        ties = (mask & (bits == edge)).to(tl.int32)
        rank = equal + tl.cumsum(ties, 0) - ties
        taken = (mask & (bits > edge)) | ((ties == 1) & (rank < wanted))
        one = taken.to(tl.int32)
        place = above + tl.minimum(equal, wanted) + tl.cumsum(one, 0) - one
        tl.store(picks + t * top_k + place, key, mask=taken & (place < top_k))


def index_topk(q: Tensor, weights: Tensor, keys: Pages, *, seen: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best `top_k` keys each query may see: int32 [T, K] ascending, then -1; and their counts int32 [T].

    q fp32 [T, H, D] after RoPE (Hadamard and FP4 happen inside), D a power of two from 32 to 512; weights fp32 [T, H],
    scaled; keys: packed index keys of D/2 + D/32 bytes in pages, one table or one per query; seen int64 or int32 [T].
    A key in a page that does not exist scores NaN. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    device = ready(q=q, weights=weights, seen=seen, pool=keys.pool, table=keys.table)
    q = check("q", q, (None, None, None), dtypes=(torch.float32,))
    queries, heads, width = q.shape
    if width not in (32, 64, 128, 256, 512) or not heads:
        raise ValueError(f"{heads} index heads of width {width}: expected width 32, 64, 128, 256 or 512")
    weights = check("weights", weights, (queries, heads), dtypes=(torch.float32,))
    seen = check("seen", seen, (queries,), dtypes=(torch.int64, torch.int32))
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")
    step, table_pages = check_pages(keys, row_bytes=width // 2 + width // 32, queries=queries)
    size = table_pages * keys.page_rows
    picks = torch.full((queries, top_k), -1, dtype=torch.int32, device=device)
    seen = seen.clamp(0, size).to(torch.int32)
    need = seen.clamp(max=top_k)
    if not queries or not size:
        return picks, need
    counts = need.clone()
    rounded = torch.empty(queries, heads, width, dtype=torch.bfloat16, device=device)
    most = max(1, min(queries, ROUND_BYTES // (4 * size)))
    order = torch.empty(most, size, dtype=torch.int32, device=device)
    prefix = torch.zeros(queries, dtype=torch.int32, device=device)
    histogram = torch.zeros(most, 256, dtype=torch.int32, device=device)
    blocks = -(-size // BLOCK)
    tallies = torch.empty(most, blocks, 2, dtype=torch.int32, device=device)
    with torch.cuda.device_of(q):
        rows = queries * heads
        _round_queries[(-(-rows // 16),)](q, rounded, rows, width**-0.5, WIDTH=width, ROWS=16)
        for first in range(0, queries, most):
            count = min(most, queries - first)
            now = slice(first, first + count)
            shared = 1 if step else min(SHARED, power_of_two(count))
            table = keys.table[now] if step else keys.table
            _score[(-(-size // KEYS), -(-count // shared))](
                *(rounded[now], weights[now], keys.pool, table, seen[now], order, count, heads),
                *(keys.pool.shape[0], step, table_pages, keys.page_rows, keys.pool.stride(0), size),
                WIDTH=width,
                HEADS=power_of_two(heads, least=16),
                KEYS=KEYS,
                SHARED=shared,
            )
            grid = (count, blocks)
            for shift in (24, 16, 8, 0):
                _count[grid](order, seen[now], prefix[now], histogram, size, SHIFT=shift, BLOCK=BLOCK)
                _narrow[(count,)](histogram, prefix[now], need[now], SHIFT=shift)
            _tally[grid](order, seen[now], prefix[now], tallies, size, blocks, BLOCK=BLOCK)
            _place[grid](
                *(order, seen[now], prefix[now], need[now], tallies, picks[now], size, blocks, top_k),
                BLOCK=BLOCK,
                BLOCKS=power_of_two(blocks),
            )
    return picks, counts
