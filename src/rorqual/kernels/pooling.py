"""Compressor step: gated pooling of per-token rows into one entry per block.

C[w] = sum_t softmax_t(z[t]) * c[t], per channel. HCA pools the m rows of block w; CSA pools 2m rows: the
first half of the channels of block w-1 and the second half of block w.                (spec/model.md 2.4)
Shapes: B batch, S blocks, M tokens a block, D entry width, K = 1 (HCA) or 2 (CSA, overlapping).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["overlap_rows", "pool"]


def pool(values: Tensor, scores: Tensor) -> Tensor:
    """values, scores fp32 [..., rows, D] to [..., D]. A row with score -inf carries nothing."""
    return (torch.softmax(scores, dim=-2) * values).sum(-2)


def overlap_rows(blocks: Tensor, *, first: float) -> Tensor:
    """[B, S, M, 2D] to [B, S, 2M, D]: previous block's first half, then this block's second half.

    `first` fills what stands before block 0: 0 for values, -inf for scores.
    """
    width = blocks.shape[-1] // 2
    previous = torch.full_like(blocks[:, :1, :, :width], first)
    if blocks.shape[1] > 1:
        previous = torch.cat((previous, blocks[:, :-1, :, :width]), dim=1)
    return torch.cat((previous, blocks[..., width:]), dim=2)
