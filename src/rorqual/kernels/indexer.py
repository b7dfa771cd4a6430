"""Lightning Indexer core: scores compressed keys and picks the top-k a query may see.

I[t,s] = sum_h w[t,h] * relu(q[t,h] . k[s]), visible iff s < (t+1)//m                   (spec/model.md 2.6)
Ties go to the earlier entry, whatever the batch or the chunk (docs/decisions/0005-top-k-ties.md).
Shapes: B batch, T queries, S entries, H index heads, D index width, K = top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["index_scores", "select_top_k"]


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """q [B, T, H, D], keys [B, S, D], weights [B, T, H] (already scaled) to fp32 scores [B, T, S]."""
    batch, queries, heads, _ = q.shape
    dots = torch.relu(q.flatten(1, 2) @ keys.transpose(1, 2)).view(batch, queries, heads, -1)  # [B, T, H, S]
    return torch.einsum("bths,bth->bts", dots.float(), weights.float())


def select_top_k(scores: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    """Indices int64 [B, T, K] of the best visible entries, -1 where there are fewer than `top_k`.

    scores fp32 [B, T, S], visible bool [B or 1, T, S]. K = min(top_k, S). Stable: ties go to the lower index.
    """
    masked = scores.masked_fill(~visible, float("-inf"))
    picked = torch.sort(masked, dim=-1, descending=True, stable=True).indices[..., :top_k]
    seen = torch.gather(visible.expand_as(masked), -1, picked)
    return torch.where(seen, picked, -1)
