"""Sinkhorn: makes the mHC stream-mixing matrices (nearly) doubly stochastic.

comb = softmax_row(logits) + eps; columns / (sum + eps); then (iters - 1) x (rows, columns), each with eps in
the denominator. Ends on columns, as the released code does.                            (spec/model.md 4)
Shapes: H streams, N tokens; tokens lie innermost, so that every pass is one long vector operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sinkhorn"]


def sinkhorn(logits: Tensor, *, iters: int, eps: float) -> Tensor:
    """logits fp32 [H, H, N] (row, column, token) to mixing matrices of the same shape."""
    comb = torch.softmax(logits, dim=1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb
