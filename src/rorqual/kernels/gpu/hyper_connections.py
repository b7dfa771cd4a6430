"""mHC: the mix of the residual streams, Sinkhorn and the sublayer's input in one op; the merge in another.

mix = (vec(X) fn^T) * rsqrt(mean(X^2) + eps); pre = sigmoid(.) + eps, post = 2 sigmoid(.), comb = Sinkhorn(softmax(.));
y = sum_i pre_i X_i;  X'_k = post_k F + sum_j comb[j, k] X_j  (comb is applied transposed).          (spec/model.md 4)
All arithmetic is fp32. The product with fn is cut into slices of 2048 columns, for enough programs at one token; their
sums are added in order, so a token's bits depend on no other token.
Bound: memory: streams read twice (once for the merge) and written once; fn read once for 16 tokens.
Shapes: T tokens, N streams, D hidden width, S slices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.gpu.checks import check, power_of_two, ready
from rorqual.kernels.gpu.formats import sigmoid

__all__ = ["hc_post", "hc_pre"]

FLOATS = (torch.float32, torch.bfloat16)
SLICE, TOKENS, COLUMNS = 2048, 16, 64


@triton.jit
def _project(
    streams,
    fn,
    partial,
    tokens,
    WIDTH: tl.constexpr,
    MIXES: tl.constexpr,
    PADDED: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1)
    mix = tl.arange(0, PADDED)
    total = tl.zeros([TOKENS, PADDED], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    for start in range(0, SLICE, COLUMNS):
        col = part * SLICE + start + tl.arange(0, COLUMNS)
        used = (token < tokens)[:, None] & (col < WIDTH)[None, :]
        x = tl.load(streams + token.to(tl.int64)[:, None] * WIDTH + col[None, :], mask=used, other=0.0)
        x = x.to(tl.float32)
        w = tl.load(
            fn + mix[:, None] * WIDTH + col[None, :],
            mask=(mix < MIXES)[:, None] & (col < WIDTH)[None, :],
            other=0.0,
        )
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        square += tl.sum(x * x, 1)
    at = (token.to(tl.int64) * SLICES + part) * (MIXES + 1)
    known = (token < tokens)[:, None] & (mix < MIXES)[None, :]
    tl.store(partial + at[:, None] + mix[None, :], total, mask=known)
    tl.store(partial + at + MIXES, square, mask=token < tokens)


@triton.jit
def _sinkhorn(logits, used, eps, ITERS: tl.constexpr):
    """logits fp32 [P, P] (row, column), `used` [P, P]: kernels.sinkhorn of one token; 0 outside."""
    top = tl.max(tl.where(used, logits, float("-inf")), 1)
    top = tl.where(top == float("-inf"), 0.0, top)  # padding rows
    comb = tl.where(used, tl.exp(logits - top[:, None]), 0.0)
    total = tl.sum(comb, 1)
    comb = comb / tl.where(total == 0.0, 1.0, total)[:, None]
    comb = tl.where(used, comb + eps, 0.0)
    comb = comb / (tl.sum(comb, 0) + eps)[None, :]
    for _ in range(ITERS - 1):
        comb = comb / (tl.sum(comb, 1) + eps)[:, None]
        comb = comb / (tl.sum(comb, 0) + eps)[None, :]
    return comb


@triton.jit
def _mix(
    streams,
    partial,
    base,
    scale,
    y,
    post,
    comb,
    eps,
    norm_eps,
    HIDDEN: tl.constexpr,
    STREAMS: tl.constexpr,
    PADDED: tl.constexpr,
    SLICES: tl.constexpr,
    ITERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    MIXES: tl.constexpr = (2 + STREAMS) * STREAMS
    one, n = tl.arange(0, PADDED), STREAMS
    known = one < n
    square_cell = one[:, None] * n + one[None, :]
    used = known[:, None] & known[None, :]
    first = tl.zeros([PADDED], tl.float32)
    second = tl.zeros([PADDED], tl.float32)
    third = tl.zeros([PADDED, PADDED], tl.float32)
    square = 0.0
    for part in range(SLICES):
        at = partial + (token * SLICES + part) * (MIXES + 1)
        first += tl.load(at + one, mask=known, other=0.0)
        second += tl.load(at + n + one, mask=known, other=0.0)
        third += tl.load(at + 2 * n + square_cell, mask=used, other=0.0)
        square += tl.load(at + MIXES)
    share = tl.rsqrt(square / (STREAMS * HIDDEN) + norm_eps)
    pre = tl.load(scale) * (first * share) + tl.load(base + one, mask=known, other=0.0)
    pre = tl.where(known, sigmoid(pre) + eps, 0.0)
    if tl.program_id(1) == 0:
        late = tl.load(scale + 1) * (second * share) + tl.load(base + n + one, mask=known, other=0.0)
        tl.store(post + token * n + one, 2.0 * sigmoid(late), mask=known)
        logits = tl.load(base + 2 * n + square_cell, mask=used, other=0.0)
        logits += tl.load(scale + 2) * (third * share)
        mixed = _sinkhorn(logits, used, eps, ITERS)
        tl.store(comb + token * n * n + square_cell, mixed, mask=used)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = (token * n + one)[:, None] * HIDDEN + col[None, :]
    x = tl.load(streams + place, mask=known[:, None] & (col < HIDDEN)[None, :], other=0.0).to(tl.float32)
    out = tl.sum(pre[:, None] * x, 0)
    tl.store(y + token * HIDDEN + col, out.to(y.dtype.element_ty), mask=col < HIDDEN)


@triton.jit
def _merge(
    streams,
    output,
    post,
    comb,
    out,
    HIDDEN: tl.constexpr,
    STREAMS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = STREAMS
    to = tl.arange(0, PADDED)
    here = col < HIDDEN
    f = tl.load(output + token * HIDDEN + col, mask=here, other=0.0).to(tl.float32)
    total = tl.load(post + token * n + to, mask=to < n, other=0.0)[:, None] * f[None, :]
    for j in tl.static_range(STREAMS):
        x = tl.load(streams + (token * n + j) * HIDDEN + col, mask=here, other=0.0).to(tl.float32)
        share = tl.load(comb + (token * n + j) * n + to, mask=to < n, other=0.0)
        total += share[:, None] * x[None, :]
    place = (token * n + to)[:, None] * HIDDEN + col[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(to < n)[:, None] & here[None, :])


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, *, scale: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input [T, D] in the streams' dtype, post fp32 [T, N] and comb fp32 [T, N, N].

    streams fp32 or bf16 [T, N, D]; fn fp32 [(2 + N) * N, N * D], base fp32 [(2 + N) * N], scale fp32 [3].
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    device = ready(streams=streams, fn=fn, base=base, scale=scale)
    streams = check("streams", streams, (None, None, None), dtypes=FLOATS)
    tokens, count, hidden = streams.shape
    mixes, width = (2 + count) * count, count * hidden
    fn = check("fn", fn, (mixes, width), dtypes=(torch.float32,))
    base = check("base", base, (mixes,), dtypes=(torch.float32,))
    scale = check("scale", scale, (3,), dtypes=(torch.float32,))
    if not 1 <= count <= 8 or iters < 1 or hidden < 1:
        raise ValueError(
            f"{count} streams, {iters} iterations, width {hidden}: expected 1 to 8, and at least 1"
        )
    y = torch.empty(tokens, hidden, dtype=streams.dtype, device=device)
    post = torch.empty(tokens, count, device=device)
    comb = torch.empty(tokens, count, count, device=device)
    slices = -(-width // SLICE)
    partial = torch.empty(tokens, slices, mixes + 1, device=device)
    block = min(power_of_two(hidden), 1024)
    if tokens:
        with torch.cuda.device_of(streams):
            _project[(-(-tokens // TOKENS), slices)](
                *(streams, fn, partial, tokens),
                WIDTH=width,
                MIXES=mixes,
                PADDED=power_of_two(mixes, least=16),
                SLICES=slices,
                SLICE=SLICE,
                TOKENS=TOKENS,
                COLUMNS=COLUMNS,
            )
            _mix[(tokens, -(-hidden // block))](
                *(streams, partial, base, scale, y, post, comb, eps, norm_eps),
                HIDDEN=hidden,
                STREAMS=count,
                PADDED=power_of_two(count),
                SLICES=slices,
                ITERS=iters,
                BLOCK=block,
            )
    return y, post, comb


def hc_post(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams [T, N, D] after the sublayer's output [T, D], with `hc_pre`'s post [T, N] and comb [T, N, N].

    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    ready(streams=streams, output=output, post=post, comb=comb)
    streams = check("streams", streams, (None, None, None), dtypes=FLOATS)
    tokens, count, hidden = streams.shape
    output = check("output", output, (tokens, hidden), dtypes=FLOATS)
    post = check("post", post, (tokens, count), dtypes=(torch.float32,))
    comb = check("comb", comb, (tokens, count, count), dtypes=(torch.float32,))
    out = torch.empty_like(streams)
    block = min(power_of_two(hidden), 1024)
    if out.numel():
        with torch.cuda.device_of(streams):
            _merge[(tokens, -(-hidden // block))](
                *(streams, output, post, comb, out),
                HIDDEN=hidden,
                STREAMS=count,
                PADDED=power_of_two(count),
                BLOCK=block,
            )
    return out
