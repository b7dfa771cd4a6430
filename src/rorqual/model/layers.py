"""Small building blocks: bias-free Linear, RMSNorm (vanilla weight, fp32 inside), the RoPE table of a layer.

(spec/model.md 2, 2.1)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels import rope_frequencies, rope_table
from rorqual.model.config import Config

__all__ = ["Linear", "RMSNorm", "Rope", "rms_norm"]


class Linear(nn.Module):
    """y = x weight^T; weight [out, in], no bias anywhere in V4. Initialised by `Model`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dim, computed in fp32, returned in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """weight * x / rms(x); the weight is used as it is (not 1 + w)."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * scaled).to(x.dtype)


class Rope:
    """cos and sin for positions: base `rope_theta` without compression, else `compress_rope_theta` with YaRN."""

    def __init__(self, config: Config, *, compressed: bool) -> None:
        self._frequencies = rope_frequencies(
            config.qk_rope_head_dim,
            base=config.compress_rope_theta if compressed else config.rope_theta,
            factor=config.rope_factor if compressed else 1.0,
            original_length=config.original_seq_len,
            beta_fast=config.beta_fast,
            beta_slow=config.beta_slow,
        )

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(self._frequencies.to(positions.device), positions)
