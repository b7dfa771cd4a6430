"""Partial interleaved RoPE on the last R dims: pairs (2i, 2i+1).                           (spec/model.md 2.1)

The table comes from kernels/rope.py, so that angles at position 2^20 are the same numbers on every face.
Bound: memory, each value read once and written once. One program a vector.
Shapes: D width, R rotated dims.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.gpu.checks import power_of_two, ready

__all__ = ["apply_rope"]


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    share,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    table = at // share * ROPE
    plain: tl.constexpr = WIDTH - ROPE
    col = tl.arange(0, BLOCK)
    inside, turning = col < WIDTH, (col >= plain) & (col < WIDTH)
    value = tl.load(x + at * WIDTH + col, mask=inside, other=0.0).to(tl.float32)
    turn = tl.where(turning, col - plain, 0)
    other = tl.load(x + at * WIDTH + plain + (turn ^ 1), mask=turning, other=0.0).to(tl.float32)
    c = tl.load(cos + table + turn, mask=turning, other=1.0)
    s = tl.load(sin + table + turn, mask=turning, other=0.0)
    if INVERSE:
        s = -s
    turned = tl.where(turning, value * c + other * s, value)
    tl.store(out + at * WIDTH + col, turned.to(out.dtype.element_ty), mask=inside)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """`kernels.apply_rope`: x fp32 or bf16 [..., D]; cos and sin fp32 [..., R] broadcast against its last dims.

    Returns x's shape and dtype. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    ready(x=x, cos=cos, sin=sin)
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() < 1 or not x.shape[-1]:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected float32 or bfloat16 [..., D]")
    width, rope = x.shape[-1], cos.shape[-1] if cos.dim() else 0
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.shape != sin.shape:
        raise ValueError(f"cos {cos.dtype} {list(cos.shape)} and sin {sin.dtype} {list(sin.shape)} differ")
    if not 0 < rope <= width or rope % 2:
        raise ValueError(f"{rope} rotated dims of {width}: expected an even number of them, at most all")
    try:
        wide = (*x.shape[:-1], rope)
        cos, sin = cos.expand(wide), sin.expand(wide)
    except RuntimeError as error:
        raise ValueError(f"cos {list(cos.shape)} does not broadcast against x {list(x.shape)}") from error
    share = 1
    if x.dim() > 1 and cos.stride(-2) == 0 and sin.stride(-2) == 0 and x.shape[-2]:  # the heads of a token
        share, cos, sin = x.shape[-2], cos[..., 0, :], sin[..., 0, :]
    x, cos, sin = x.detach().contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        with torch.cuda.device_of(x):
            block = power_of_two(width, least=2)
            _rotate[(x.numel() // width,)](
                x, cos, sin, out, share, WIDTH=width, ROPE=rope, BLOCK=block, INVERSE=inverse
            )
    return out
