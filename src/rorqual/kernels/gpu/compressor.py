"""Compressor step: the rows of a block to one entry: gated pooling, RMSNorm, RoPE, in one pass.

C = sum_r softmax_r(z[r]) * c[r], per channel; entry = rope(norm * C * rsqrt(mean(C^2) + eps)).     (spec/model.md 2.4)
All fp32. A row with score -inf carries nothing (CSA's block before the first); packing is the caller's.
Bound: memory, values and scores read once. One program an entry.
Shapes: N entries, M rows an entry (8 CSA and index keys, 128 HCA), D entry width, R rotated dims.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.gpu.checks import check, power_of_two, ready

__all__ = ["pool_entries"]


@triton.jit
def _pool(values, scores, at, ROWS: tl.constexpr, WIDTH: tl.constexpr, col, mask, TILE: tl.constexpr):
    """fp32 [BLOCK] pooled values of the columns `col`: the running softmax of TILE rows at a time."""
    top = tl.full(col.shape, float("-inf"), tl.float32)
    share = tl.zeros(col.shape, tl.float32)
    total = tl.zeros(col.shape, tl.float32)
    for start in range(0, ROWS, TILE):
        row = start + tl.arange(0, TILE)
        place = (at * ROWS + row)[:, None] * WIDTH + col[None, :]
        used = (row < ROWS)[:, None] & mask[None, :]
        score = tl.load(scores + place, mask=used, other=float("-inf"))
        value = tl.load(values + place, mask=used, other=0.0)
        best = tl.maximum(top, tl.max(score, 0))
        safe = tl.where(best == float("-inf"), 0.0, best)
        weight = tl.exp(score - safe[None, :])
        fade = tl.exp(top - safe)
        share = share * fade + tl.sum(weight, 0)
        total = total * fade + tl.sum(tl.where(weight > 0, weight * value, weight), 0)
        top = best
    return total / tl.where(mask, share, 1.0)


@triton.jit
def _entry(
    values,
    scores,
    weight,
    cos,
    sin,
    out,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    # even and odd columns apart: a rotation then needs no neighbour
    even, odd = 2 * tl.arange(0, HALF), 2 * tl.arange(0, HALF) + 1
    left = _pool(values, scores, at, ROWS, WIDTH, even, even < WIDTH, TILE)
    right = _pool(values, scores, at, ROWS, WIDTH, odd, odd < WIDTH, TILE)
    left, right = tl.where(even < WIDTH, left, 0.0), tl.where(odd < WIDTH, right, 0.0)
    square = tl.sum(left * left, 0) + tl.sum(right * right, 0)
    share = tl.rsqrt(square / WIDTH + eps)
    left *= share * tl.load(weight + even, mask=even < WIDTH, other=0.0)
    right *= share * tl.load(weight + odd, mask=odd < WIDTH, other=0.0)
    turning = (even >= WIDTH - ROPE) & (odd < WIDTH)
    turn = at * ROPE + tl.where(turning, even - (WIDTH - ROPE), 0)
    c = tl.load(cos + turn, mask=turning, other=1.0)
    s = tl.load(sin + turn + 1, mask=turning, other=0.0)  # the table holds -sin, sin
    tl.store(out + at * WIDTH + even, left * c - right * s, mask=even < WIDTH)
    tl.store(out + at * WIDTH + odd, right * c + left * s, mask=odd < WIDTH)


def pool_entries(
    values: Tensor, scores: Tensor, weight: Tensor, *, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """fp32 values, scores [N, M, D] of N entries, norm weight fp32 [D], cos, sin fp32 [N, R] -> entries fp32 [N, D].

    Equal to apply_rope(rms_norm(pool(values, scores)) * weight, cos, sin) of the torch kernels; cos and sin as
    `rope_table` gives them for position w * m of entry w. D and R are even. An entry with no score above -inf is NaN.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    ready(values=values, scores=scores, weight=weight, cos=cos, sin=sin)
    values = check("values", values, (None, None, None), dtypes=(torch.float32,))
    count, rows, width = values.shape
    scores = check("scores", scores, (count, rows, width), dtypes=(torch.float32,))
    weight = check("weight", weight, (width,), dtypes=(torch.float32,))
    cos = check("cos", cos, (count, None), dtypes=(torch.float32,))
    rope = cos.shape[1]
    sin = check("sin", sin, (count, rope), dtypes=(torch.float32,))
    if width % 2 or rope % 2 or not 0 < rope <= width or not rows:
        raise ValueError(
            f"{rows} rows of width {width}, {rope} rotated: expected rows, even widths, R at most D"
        )
    out = torch.empty(count, width, dtype=torch.float32, device=values.device)
    if count:
        half = power_of_two(width // 2)
        with torch.cuda.device_of(values):
            _entry[(count,)](
                *(values, scores, weight, cos, sin, out, eps),
                ROWS=rows,
                WIDTH=width,
                ROPE=rope,
                HALF=half,
                TILE=min(8, power_of_two(rows)),
            )
    return out
