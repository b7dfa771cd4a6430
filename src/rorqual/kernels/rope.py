"""Partial interleaved RoPE with YaRN: rotates pairs (2i, 2i+1) of the LAST dims of a vector.

theta_i = base^(-2i/R); YaRN ramps between theta and theta/factor; no mscale.      (spec/model.md 2.1)
Shapes: B batch, T tokens, R rotated dims, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["apply_rope", "rope_frequencies", "rope_table"]


def rope_frequencies(
    dims: int,
    *,
    base: float,
    factor: float = 1.0,
    original_length: int = 65536,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Angles per position, fp32 [dims/2]. `factor` 1 is plain RoPE, above 1 YaRN."""
    # 1 / base^x, not base^-x: they differ by an ulp, which at position 2^20 turns cos by up to 0.01.
    theta = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if factor == 1.0:
        return theta

    def dim_of(rotations: float) -> float:
        return dims * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_of(beta_fast)), 0)
    high = min(math.ceil(dim_of(beta_slow)), dims - 1)
    ramp = ((torch.arange(dims // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    smooth = 1 - ramp
    return theta / factor * (1 - smooth) + theta * smooth


def rope_table(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin, each fp32 [..., R], for integer `positions` [...].

    Both are laid out per dim, so that a rotation is `x * cos + swap_pairs(x) * sin`.
    """
    angles = positions.to(torch.float32)[..., None] * frequencies  # [..., R/2]
    cos = angles.cos().repeat_interleave(2, dim=-1)
    sin = angles.sin()
    return cos, torch.stack((-sin, sin), dim=-1).flatten(-2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotates the last R dims of `x` [..., D]; `cos`, `sin` broadcast against [..., R]. Keeps x's dtype.

    `inverse` rotates back (the de-rotation of attention outputs).
    """
    rotated = cos.shape[-1]
    plain, pairs = x[..., :-rotated], x[..., -rotated:].float()
    swapped = pairs.view(*pairs.shape[:-1], -1, 2).flip(-1).flatten(-2)
    turned = pairs * cos - swapped * sin if inverse else pairs * cos + swapped * sin
    return torch.cat((plain, turned.to(x.dtype)), dim=-1)
