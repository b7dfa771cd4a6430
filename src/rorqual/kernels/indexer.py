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

from rorqual.kernels.attention import Sight, query_blocks, visible_entries

__all__ = ["index_loss", "index_scores", "select_entries", "select_top_k"]

HIDDEN = -1e9
"""Score of an entry that takes no part in the softmax."""


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """q [B, T, H, D], keys [B, S, D], weights [B, T, H] (already scaled) to fp32 scores [B, T, S]."""
    batch, queries, heads, _ = q.shape
    dots = torch.relu(q.flatten(1, 2) @ keys.transpose(1, 2)).view(batch, queries, heads, -1)  # [B, T, H, S]
    return torch.einsum("bths,bth->bts", dots.float(), weights.float())


def select_top_k(scores: Tensor, visible: Tensor, *, top_k: int) -> Tensor:
    """Indices int64 [B, T, K] of the best visible entries, ascending, then -1 where there are fewer than `top_k`.

    scores fp32 [B, T, S], visible bool [B or 1, T, S]. K = min(top_k, S). Ties go to the lower index.
    """
    size, none = min(top_k, scores.shape[-1]), scores.shape[-1]
    masked = scores.masked_fill(~visible, float("-inf"))
    values, picked = torch.topk(masked, size, dim=-1, sorted=False)
    lowest = values.amin(-1, keepdim=True)
    tied = (masked >= lowest).sum(-1) > size  # topk takes any of those that tie for the last places
    tied &= lowest[..., 0] > float("-inf")
    if bool(tied.any()):
        order = torch.sort(masked[tied], dim=-1, descending=True, stable=True).indices
        picked[tied] = order[..., :size]
    seen = torch.gather(visible.expand_as(masked), -1, picked)
    picked = picked.masked_fill_(~seen, none).sort(-1).values
    return picked.masked_fill_(picked == none, -1)


@torch.no_grad()
def select_entries(q: Tensor, keys: Tensor, weights: Tensor, *, ratio: int, top_k: int) -> Tensor:
    """`select_top_k` of `index_scores` for a whole sequence from position 0: indices int64 [B, T, K], -1 for none.

    q [B, T, H, D], keys [B, S, D], weights [B, T, H]. No gradient: top-k passes none.
    """
    batch, length, heads, _ = q.shape
    size = min(top_k, keys.shape[1])
    picked = torch.full((batch, length, size), -1, dtype=torch.int64, device=q.device)
    elements = batch * heads * keys.shape[1]
    for span in query_blocks(length, elements=elements, ratio=ratio, entries=keys.shape[1]):
        part, seen = slice(*span[:2]), span[2]
        if not seen:
            continue
        visible = visible_entries(span, ratio=ratio, device=q.device)
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
        gathered = Sight.gathers(picked, keys.shape[1])
        most = max(heads, rows.shape[2]) * keys.shape[1]
        if gathered:
            most = picked.shape[2] * max(rows.shape[3], width)
        for span in query_blocks(length, elements=batch * most, ratio=ratio, entries=keys.shape[1]):
            if not span[2]:
                continue
            sight = Sight(span, batch=batch, ratio=ratio, picked=picked, gathered=gathered)
            part, shape = slice(*span[:2]), (batch, sight.queries, -1, sight.count)
            hidden = sight.hidden(q.device)
            flat_rows = scaled[:, part].reshape(sight.flat(rows.shape[2]))
            attention = (flat_rows @ sight.take(entries.to(rows.dtype)).transpose(1, 2)).to(wide)
            attention = attention.view(shape).sub_(log_sum[:, part, :, None]).exp_()
            target = attention.sum(2).masked_fill_(hidden, 0.0)  # [B, C, N]
            total = target.sum(-1, keepdim=True)
            target = target.div_(total.clamp(min=1e-9))
            flat, near = q[:, part].to(wide).reshape(sight.flat(heads)), sight.take(keys_wide)
            dots = torch.relu_(flat @ near.transpose(1, 2)).view(shape)
            weight = weights[:, part].to(wide)
            scores = (weight[:, :, None] @ dots)[:, :, 0].masked_fill_(hidden, HIDDEN)
            log_p, log_q = torch.log(target.clamp(min=1e-9)), torch.log_softmax(scores, dim=-1)
            count = ~hidden.all(-1) & (total[..., 0] > 1e-6)
            loss += (target * (log_p - log_q)).sum(-1)[count].sum()
            counted += int(count.sum())
            if not ctx.needs_input_grad[0]:
                continue
            d_scores = log_q.exp_().mul_(target.sum(-1, keepdim=True)).sub_(target).mul_(count[..., None])
            d_scores = d_scores.masked_fill_(hidden, 0.0)
            d_weights[:, part] = (dots @ d_scores[..., None])[..., 0]
            d_dots = (dots > 0).mul(d_scores[:, :, None]).mul_(weight[..., None]).view(sight.flat(heads))
            d_q[:, part] = (d_dots @ near).view(batch, sight.queries, heads, width)
            sight.accumulate(d_keys, d_dots, flat)
        ctx.scale = 1 / max(counted, 1)
        ctx.save_for_backward(d_q.to(q.dtype), d_keys.to(keys.dtype), d_weights.to(weights.dtype))
        return loss * ctx.scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grads = [part * (grad * ctx.scale) for part in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)
