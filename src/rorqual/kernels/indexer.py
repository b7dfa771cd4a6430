"""Lightning Indexer core: scores compressed keys, picks the top-k a query may see, and the loss that teaches it.

I[t,s] = sum_h w[t,h] * relu(q[t,h] . k[s]), visible iff s < (t+1)//m                   (spec/model.md 2.6)
Ties go to the earlier entry, whatever the batch or the chunk (docs/decisions/0005-top-k-ties.md).
`select_entries` and `index_loss` go through blocks of queries: no tensor has T * S elements.
Shapes: B batch, T queries, S entries, H index heads, D index width, K = top_k, C queries of a block, M ratio;
N heads and W width of the main attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.attention import picked_mask, query_blocks

__all__ = ["index_loss", "index_scores", "select_entries", "select_top_k"]

HIDDEN = -1e9
"""Score of an entry that takes no part in the softmax."""


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


def _visible(first: int, last: int, seen: int, *, ratio: int, device: torch.device) -> Tensor:
    """bool [1, C, seen]: entry s < (t+1)//M, for queries `first` to `last`."""
    steps = torch.arange(first + 1, last + 1, device=device)
    return (torch.arange(seen, device=device) < (steps // ratio)[:, None])[None]


@torch.no_grad()
def select_entries(q: Tensor, keys: Tensor, weights: Tensor, *, ratio: int, top_k: int) -> Tensor:
    """`select_top_k` of `index_scores` for a whole sequence from position 0: indices int64 [B, T, K], -1 for none.

    q [B, T, H, D], keys [B, S, D], weights [B, T, H]. No gradient: top-k passes none.
    """
    batch, length, heads, _ = q.shape
    size = min(top_k, keys.shape[1])
    picked = torch.full((batch, length, size), -1, dtype=torch.int64, device=q.device)
    for first, last, seen in query_blocks(length, rows=batch * heads, ratio=ratio, entries=keys.shape[1]):
        part = slice(first, last)
        if not seen:
            continue
        visible = _visible(first, last, seen, ratio=ratio, device=q.device)
        if seen <= size:  # everything visible is picked: no need to score
            numbers = torch.arange(seen, device=q.device)
            picked[:, part, :seen] = torch.where(visible, numbers, -1)
        else:
            scores = index_scores(q[:, part], keys[:, :seen], weights[:, part])
            picked[:, part] = select_top_k(scores, visible, top_k=top_k)
    return picked


def index_loss(
    q: Tensor,
    keys: Tensor,
    weights: Tensor,
    *,
    rows: Tensor,
    entries: Tensor,
    log_sum: Tensor,
    ratio: int,
    picked: Tensor | None = None,
) -> Tensor:
    """KL(attention || softmax(scores)) over visible entries, mean over queries that see any; a scalar.

    Scores come from q [B, T, H, D], keys [B, S, D], weights [B, T, H], which get the gradient. The main attention's
    weights on the entries are made again from its queries `rows` [B, T, N, W], `entries` [B, S, W] and log-sums
    [B, T, N] (`attend_blocks`; no gradient), summed over heads and normalised. `picked` [B, T, K]: only entries
    among these count.                                                        (V3.2 warm-up; spec/rl.md 6)
    """
    with torch.autocast(q.device.type, enabled=False):
        loss: Tensor = _IndexLoss.apply(  # type: ignore[no-untyped-call]
            q, keys, weights, rows.detach(), entries.detach(), log_sum.detach(), ratio, picked
        )
    return loss


class _IndexLoss(torch.autograd.Function):
    """`index_loss`; a scalar, so the gradient is made in the same pass over the scores: dI = softmax(I) - target."""

    @staticmethod
    def forward(ctx, q, keys, weights, rows, entries, log_sum, ratio, picked):  # type: ignore[no-untyped-def]
        batch, length, heads, width = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        keys_wide, scaled = keys.to(wide), rows * rows.shape[3] ** -0.5
        loss, counted = q.new_zeros((), dtype=wide), 0
        d_q, d_weights = torch.zeros_like(q, dtype=wide), torch.zeros_like(weights, dtype=wide)
        d_keys = torch.zeros_like(keys_wide)
        most = max(heads, rows.shape[2])
        for first, last, seen in query_blocks(length, rows=batch * most, ratio=ratio, entries=keys.shape[1]):
            if not seen:
                continue
            part, size = slice(first, last), last - first
            visible = _visible(first, last, seen, ratio=ratio, device=q.device)
            if picked is not None:
                visible = picked_mask(picked[:, part], seen)
            attention = (scaled[:, part].flatten(1, 2) @ entries[:, :seen].to(rows.dtype).transpose(1, 2)).to(
                wide
            )
            attention = attention.view(batch, size, -1, seen).sub_(log_sum[:, part, :, None]).exp_()
            target = attention.sum(2).masked_fill_(~visible, 0.0)  # [B, C, seen]
            total = target.sum(-1, keepdim=True)
            target = target.div_(total.clamp(min=1e-9))
            flat, near = q[:, part].to(wide).flatten(1, 2), keys_wide[:, :seen]
            dots = torch.relu_(flat @ near.transpose(1, 2)).view(batch, size, heads, seen)
            weight = weights[:, part].to(wide)
            scores = (weight[:, :, None] @ dots)[:, :, 0].masked_fill_(~visible, HIDDEN)
            log_p, log_q = torch.log(target.clamp(min=1e-9)), torch.log_softmax(scores, dim=-1)
            count = visible.any(-1) & (total[..., 0] > 1e-6)
            loss += (target * (log_p - log_q)).sum(-1)[count].sum()
            counted += int(count.sum())
            if not ctx.needs_input_grad[0]:
                continue
            d_scores = log_q.exp_().mul_(target.sum(-1, keepdim=True)).sub_(target).mul_(count[..., None])
            d_scores = d_scores.masked_fill_(~visible, 0.0)
            d_weights[:, part] = (dots @ d_scores[..., None])[..., 0]
            d_dots = (dots > 0).mul(d_scores[:, :, None]).mul_(weight[..., None]).flatten(1, 2)
            d_q[:, part] = (d_dots @ near).view(batch, size, heads, width)
            d_keys[:, :seen].baddbmm_(d_dots.transpose(1, 2), flat)
        ctx.scale = 1 / max(counted, 1)
        ctx.save_for_backward(d_q.to(q.dtype), d_keys.to(keys.dtype), d_weights.to(weights.dtype))
        return loss * ctx.scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grads = [part * (grad * ctx.scale) for part in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)
