"""Matrix product with weights as checkpoints hold them: fp32, bf16, FP8 in 128 or 32 squares, FP4 by 32 along K.

y[r, o] = sum_k round(x[r, k]) * code * 2^(scale - 127); round() is to bf16 for every kind but f32.   (spec/model.md 5)
Weights are decoded in registers, tile by tile; products are exact, sums fp32. One tile shape for every number of
rows, K in one order: a row's bits do not depend on the other rows. That costs speed at many rows; it is not tuned.
Bound: memory at few rows (weight bytes: 1 a value FP8, 0.53 FP4), tensor cores at many.
Shapes: R rows, O outputs, K.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.gpu.checks import ready
from rorqual.kernels.gpu.formats import dot_bf16, e2m1, e4m3, e8m0, round_bf16

__all__ = ["matmul"]

Kind = Literal["f32", "bf16", "fp8", "fp4"]
DTYPES = {
    "f32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "fp8": (torch.float8_e4m3fn, torch.uint8),
    "fp4": (torch.uint8, torch.int8),
}
BLOCKS = {"f32": (0,), "bf16": (0,), "fp8": (128, 32), "fp4": (32,)}
ROWS, OUTPUTS, INNER = 32, 32, 128


@triton.jit
def dot_weights(
    x,
    rows,
    data,
    scale,
    output,
    outputs,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    """fp32 [ROWS, OUTPUTS]: rows of x at addresses x + rows [ROWS] (-1: zeros), weight rows `output` [OUTPUTS]."""
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    used, known = (rows >= 0)[:, None], (output < outputs)[:, None]
    base = x + tl.where(rows >= 0, rows, 0).to(tl.int64)[:, None] * WIDTH
    wide = output.to(tl.int64)[:, None]
    for start in range(0, WIDTH, INNER):
        if KIND == "fp4":
            pair = start // 2 + tl.arange(0, INNER // 2)[None, :]
            inside = 2 * pair < WIDTH  # K is even
            byte = tl.load(data + wide * (WIDTH // 2) + pair, mask=known & inside, other=0).to(tl.int32)
            at = wide * ((WIDTH + 31) // 32) + pair // 16
            factor = e8m0(tl.load(scale + at, mask=known & inside, other=127).to(tl.int32))
            left = tl.load(base + 2 * pair, mask=used & inside, other=0.0).to(tl.float32)
            right = tl.load(base + 2 * pair + 1, mask=used & inside, other=0.0).to(tl.float32)
            total = dot_bf16(round_bf16(left), tl.trans(e2m1(byte & 15) * factor), total)
            total = dot_bf16(round_bf16(right), tl.trans(e2m1((byte >> 4) & 15) * factor), total)
        else:
            col = start + tl.arange(0, INNER)[None, :]
            inside = col < WIDTH
            value = tl.load(base + col, mask=used & inside, other=0.0).to(tl.float32)
            code = tl.load(data + wide * WIDTH + col, mask=known & inside, other=0)
            if KIND == "f32":
                total = tl.dot(value, tl.trans(code), total, input_precision="ieee")
            elif KIND == "bf16":
                total = dot_bf16(round_bf16(value), tl.trans(code.to(tl.float32)), total)
            else:
                at = (wide // BLOCK) * ((WIDTH + BLOCK - 1) // BLOCK) + col // BLOCK
                factor = e8m0(tl.load(scale + at, mask=known & inside, other=127).to(tl.int32))
                total = dot_bf16(round_bf16(value), tl.trans(e4m3(code.to(tl.int32)) * factor), total)
    return total


@triton.jit
def _matmul(
    x,
    data,
    scale,
    y,
    rows,
    outputs,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    listed = tl.where(row < rows, row, -1)
    total = dot_weights(*(x, listed, data, scale, output, outputs), KIND, BLOCK, WIDTH, ROWS, OUTPUTS, INNER)
    place = row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(y + place, total, mask=(row < rows)[:, None] & (output < outputs)[None, :])


def check_weight(
    name: str,
    weight: Tensor,
    scale: Tensor | None,
    *,
    kind: Kind,
    block: int | None,
    lead: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, int, int, int]:
    """Data and scale as the kernels read them (any tensor for no scale), the block, outputs and K.

    weight [*lead, O, K or K / 2]. Raises ValueError when dtypes, shapes or the block do not fit the kind.
    """
    if kind not in DTYPES:
        raise ValueError(f"{name}: kind {kind!r}, expected one of {', '.join(DTYPES)}")
    if weight.dtype not in DTYPES[kind] or weight.dim() != 2 + len(lead) or not weight.is_contiguous():
        raise ValueError(
            f"{name}, {kind}: {weight.dtype} {list(weight.shape)}, strides {list(weight.stride())}; "
            f"expected contiguous {DTYPES[kind][0]}, {2 + len(lead)} dims"
        )
    outputs, width = weight.shape[-2], weight.shape[-1] * (2 if kind == "fp4" else 1)
    if tuple(weight.shape[:-2]) != lead or not outputs or not width:
        raise ValueError(f"{name}: {list(weight.shape)}, expected {[*lead, 'O', 'K']}, none of them 0")
    if block is not None and block not in BLOCKS[kind]:
        raise ValueError(f"{name}: {kind} with blocks of {block}, expected one of {BLOCKS[kind]}")
    block = block or BLOCKS[kind][0]
    if not block:
        if scale is not None:
            raise ValueError(f"{name}: a {kind} weight has no scale")
        return weight.detach(), weight.detach(), 0, outputs, width
    if scale is None:
        raise ValueError(f"{name}: a {kind} weight needs its scale")
    along = -(-outputs // block) if kind == "fp8" else outputs
    shape = (*lead, along, -(-width // block))
    if tuple(scale.shape) != shape or scale.element_size() != 1 or not scale.is_contiguous():
        raise ValueError(
            f"{name}: scale {scale.dtype} {list(scale.shape)}, expected contiguous ue8m0 {list(shape)}"
        )
    return weight.detach().view(torch.uint8), scale.detach().view(torch.uint8), block, outputs, width


def matmul(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, kind: Kind, block: int | None = None
) -> Tensor:
    """fp32 or bf16 [..., K] times a weight [O, K] -> fp32 [..., O]; the signature of `kernels.matmul.matmul`.

    `block`: None means 128 for fp8. Raises ValueError when dtypes, shapes, devices or the block do not fit.
    """
    device = ready(x=x, weight=weight, scale=scale)
    data, scales, block, outputs, width = check_weight("weight", weight, scale, kind=kind, block=block)
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, this {kind} weight expects float32 [..., {width}]")
    x = x.detach().contiguous()
    rows = x.numel() // width
    y = torch.empty(*x.shape[:-1], outputs, dtype=torch.float32, device=device)
    if rows:
        with torch.cuda.device_of(x):
            _matmul[(-(-outputs // OUTPUTS), -(-rows // ROWS))](
                *(x, data, scales, y, rows, outputs),
                KIND=kind,
                BLOCK=block,
                WIDTH=width,
                ROWS=ROWS,
                OUTPUTS=OUTPUTS,
                INNER=INNER,
            )
    return y
