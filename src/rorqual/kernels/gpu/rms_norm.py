"""RMSNorm: weight * x * rsqrt(mean(x^2) + eps), in fp32.                                    (spec/model.md 2)

Bound: memory, each value read once and written once. One program a row; a row is added up in blocks, in one order.
Shapes: N rows, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.gpu.checks import check, power_of_two, ready

__all__ = ["rms_norm"]

FLOATS = (torch.float32, torch.bfloat16)


@triton.jit
def _norm(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + col, mask=col < WIDTH, other=0.0).to(tl.float32)
        total += value * value
    share = tl.rsqrt(tl.sum(total, 0) / WIDTH + eps)
    for start in range(0, WIDTH, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + col, mask=col < WIDTH, other=0.0).to(tl.float32) * share
        if WEIGHTED:
            value *= tl.load(weight + col, mask=col < WIDTH, other=0.0).to(tl.float32)
        tl.store(out + row + col, value.to(out.dtype.element_ty), mask=col < WIDTH)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """x fp32 or bf16 [..., D], weight fp32 or bf16 [D] or None; returns x's shape and dtype.

    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    ready(x=x, weight=weight)
    width = x.shape[-1] if x.dim() else 0
    if x.dtype not in FLOATS or width < 1:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected float32 or bfloat16 [..., D]")
    x = x.detach().contiguous()
    if weight is not None:
        weight = check("weight", weight, (width,), dtypes=FLOATS)
    out = torch.empty_like(x)
    if out.numel():
        block = min(power_of_two(width), 4096)
        with torch.cuda.device_of(x):
            _norm[(x.numel() // width,)](
                x, weight, out, eps, WIDTH=width, BLOCK=block, WEIGHTED=weight is not None
            )
    return out
