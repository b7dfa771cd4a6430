"""Routed experts on packed weights: SwiGLU of w1 and w3, then w2, for the experts that each token picked.

expert(x) = w2 (silu(min(w1 x, c)) * clip(w3 x, -c, c)); out = sum of picks, in the order of a token's picks, weight *
expert(x).                                                                                         (spec/model.md 5)
Tokens are grouped by expert (a stable sort on the device, no wait for the host); a program takes 32 rows of one expert.
Inner values are rounded to bf16 at w2's input, as everywhere. A row's bits do not depend on its company: every tile
has one shape and the sum over picks one order.
Bound: memory at few tokens: each picked expert's bytes once (Pro: 6 x 3 x 7168 x 3072 x 0.53 B = 210 MB a layer).
Shapes: N tokens, E experts, K picks a token, D hidden width, F expert width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.gpu.checks import check, ready
from rorqual.kernels.gpu.formats import sigmoid
from rorqual.kernels.gpu.matmul import INNER, OUTPUTS, ROWS, Kind, check_weight, dot_weights

__all__ = ["expert_mlp"]


@triton.jit
def _rows_of(order, tile_expert, tile_first, ends, ROWS: tl.constexpr):
    """Expert of this tile (-1: none) and its rows in sorted order [ROWS], -1 where there are no more."""
    tile = tl.program_id(1)
    expert = tl.load(tile_expert + tile)
    at = tl.load(tile_first + tile) + tl.arange(0, ROWS)
    used = tl.where(expert >= 0, at < tl.load(ends + tl.maximum(expert, 0)), False)
    return expert, tl.load(order + tl.where(used, at, 0), mask=used, other=-1)


@triton.jit
def _gate_up(
    x,
    w1,
    s1,
    w3,
    s3,
    order,
    tile_expert,
    tile_first,
    ends,
    inner,
    outputs,
    top_k,
    data_step,
    scale_step,
    limit,
    CLAMP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    expert, slot = _rows_of(order, tile_expert, tile_first, ends, ROWS)
    if expert >= 0:
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        token = tl.where(slot >= 0, slot // top_k, -1)
        d, s = expert.to(tl.int64) * data_step, expert.to(tl.int64) * scale_step
        gate = dot_weights(
            *(x, token, w1 + d, s1 + s, output, outputs), KIND, BLOCK, WIDTH, ROWS, OUTPUTS, INNER
        )
        up = dot_weights(
            *(x, token, w3 + d, s3 + s, output, outputs), KIND, BLOCK, WIDTH, ROWS, OUTPUTS, INNER
        )
        if CLAMP:
            gate = tl.where(gate > limit, limit, gate)  # keeps NaN
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        value = gate * sigmoid(gate) * up
        place = slot.to(tl.int64)[:, None] * outputs + output[None, :]
        tl.store(inner + place, value, mask=(slot >= 0)[:, None] & (output < outputs)[None, :])


@triton.jit
def _down(
    inner,
    w2,
    s2,
    order,
    tile_expert,
    tile_first,
    ends,
    out,
    outputs,
    data_step,
    scale_step,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    expert, slot = _rows_of(order, tile_expert, tile_first, ends, ROWS)
    if expert >= 0:
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        d, s = expert.to(tl.int64) * data_step, expert.to(tl.int64) * scale_step
        total = dot_weights(
            *(inner, slot, w2 + d, s2 + s, output, outputs), KIND, BLOCK, WIDTH, ROWS, OUTPUTS, INNER
        )
        place = slot.to(tl.int64)[:, None] * outputs + output[None, :]
        tl.store(out + place, total, mask=(slot >= 0)[:, None] & (output < outputs)[None, :])


@triton.jit
def _sum_picks(parts, weights, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        value = tl.load(parts + slot * width + col, mask=col < width, other=0.0)
        total += tl.load(weights + slot) * value
    tl.store(out + token * width + col, total, mask=col < width)


def expert_mlp(
    x: Tensor,
    picked: Tensor,
    weights: Tensor,
    *,
    w1: tuple[Tensor, Tensor | None],
    w3: tuple[Tensor, Tensor | None],
    w2: tuple[Tensor, Tensor | None],
    kind: Kind,
    limit: float,
    block: int | None = None,
) -> Tensor:
    """x fp32 or bf16 [N, D], picked int64 or int32 [N, K], weights fp32 [N, K] -> fp32 [N, D].

    w1, w3 (data [E, F, D], scale), w2 (data [E, D, F], scale): stacks of matmul.py's weights of one kind. `limit` 0: no
    clamp. A pick that names no expert makes its token NaN. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    device = ready(x=x, picked=picked, weights=weights, w1=w1[0], w3=w3[0], w2=w2[0])
    ready(w1_scale=w1[1], w3_scale=w3[1], w2_scale=w2[1], x=x)
    x = check("x", x, (None, None), dtypes=(torch.float32, torch.bfloat16))
    tokens, hidden = x.shape
    picked = check("picked", picked, (tokens, None), dtypes=(torch.int64, torch.int32)).long()
    top_k = picked.shape[1]
    weights = check("weights", weights, (tokens, top_k), dtypes=(torch.float32,))
    lead = (w1[0].shape[0],) if w1[0].dim() else (0,)
    data1, scale1, block1, width, into1 = check_weight("w1", *w1, kind=kind, block=block, lead=lead)
    data3, scale3, _, width3, into3 = check_weight("w3", *w3, kind=kind, block=block, lead=lead)
    data2, scale2, _, out2, into2 = check_weight("w2", *w2, kind=kind, block=block, lead=lead)
    if (into1, into3, out2) != (hidden, hidden, hidden) or (width3, into2) != (width, width):
        raise ValueError(
            f"w1 [{width}, {into1}], w3 [{width3}, {into3}], w2 [{out2}, {into2}] do not fit x [.., {hidden}]"
        )
    out = torch.zeros(tokens, hidden, device=device)
    slots, count = tokens * top_k, lead[0]
    if not slots:
        return out
    order, tile_expert, tile_first, ends = _group(picked.flatten(), count)
    inner = torch.empty(slots, width, device=device)
    parts = torch.full((slots, hidden), float("nan"), device=device)
    shared = {"KIND": kind, "BLOCK": block1, "ROWS": ROWS, "OUTPUTS": OUTPUTS, "INNER": INNER}
    steps1 = (data1.stride(0), scale1.stride(0))
    tiles = len(tile_expert)
    with torch.cuda.device_of(x):
        _gate_up[(-(-width // OUTPUTS), tiles)](
            *(x, data1, scale1, data3, scale3, order, tile_expert, tile_first, ends, inner, width, top_k),
            *(*steps1, float(limit)),
            CLAMP=bool(limit),
            WIDTH=hidden,
            **shared,
        )
        _down[(-(-hidden // OUTPUTS), tiles)](
            *(inner, data2, scale2, order, tile_expert, tile_first, ends, parts, hidden),
            *(data2.stride(0), scale2.stride(0)),
            WIDTH=width,
            **shared,
        )
        _sum_picks[(tokens, -(-hidden // 256))](parts, weights, out, hidden, TOP_K=top_k, BLOCK=256)
    return out


def _group(picked: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots int32 sorted by expert; per tile its expert (-1: none) and first place; per expert its end. No host sync.

    Slots whose expert does not exist come last, in no tile.
    """
    bad = (picked < 0) | (picked >= experts)
    group = torch.where(bad, experts, picked)
    order = torch.argsort(group, stable=True)
    sizes = torch.zeros(experts + 1, dtype=torch.int64, device=picked.device)
    sizes.scatter_add_(0, group, torch.ones_like(group))
    sizes = sizes[:experts]
    ends = sizes.cumsum(0)
    tiles = (sizes + ROWS - 1) // ROWS
    tile_ends = tiles.cumsum(0)
    most = -(-len(picked) // ROWS) + min(experts, len(picked))  # every expert may have one short tile
    number = torch.arange(most, device=picked.device)
    expert = torch.searchsorted(tile_ends, number, right=True)
    inside = expert < experts
    expert = expert.clamp(max=experts - 1)
    first = ends[expert] - sizes[expert] + (number - (tile_ends[expert] - tiles[expert])) * ROWS
    chosen = torch.where(inside, expert, -1)
    return order.int(), chosen.int(), first.int(), ends.int()
