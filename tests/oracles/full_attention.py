"""Attention of a whole sequence and the indexer's loss with whole score matrices, gradients by autograd.

The plain forms that the blocked ones must equal (spec/model.md 2.5, 2.6; spec/rl.md 6). Imports nothing of ours.
Shapes: B batch, T queries, S entries, H heads, D width; masks are bool, True where a query sees.
"""

import torch


def attention(q, kv, entries, sink, *, window, visible, bias=None):
    """q [B, T, H, D], kv [B, T, D], entries [B, S, D], visible [B or 1, T, S] -> out as q, weights [B, T, H, S]."""
    steps = torch.arange(q.shape[1])
    near = (steps[None] <= steps[:, None]) & (steps[None] > steps[:, None] - window)
    scaled = q * q.shape[3] ** -0.5
    local = torch.einsum("bthd,bjd->bthj", scaled, kv).masked_fill(~near[None, :, None], float("-inf"))
    far = torch.einsum("bthd,bsd->bths", scaled, entries)
    far = far if bias is None else far + bias[:, :, None, None]
    far = far.masked_fill(~visible[:, :, None], float("-inf"))
    full = torch.cat((local, far, sink[:, None].expand(*q.shape[:3], 1)), -1).softmax(-1)
    local, far = full[..., : len(steps)], full[..., len(steps) : -1]
    return torch.einsum("bthj,bjd->bthd", local, kv) + torch.einsum("bths,bsd->bthd", far, entries), far


def scores(q, keys, weights):
    """q [B, T, H, D], keys [B, S, D], weights [B, T, H] -> [B, T, S]."""
    return torch.einsum("bths,bth->bts", torch.einsum("bthd,bsd->bths", q, keys).relu(), weights)


def picks(scores, visible, top_k):
    """The `top_k` best visible entries of each query as a mask [B, T, S]; ties to the earlier entry."""
    order = scores.masked_fill(~visible, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter(2, order[..., :top_k], True)
    return mask & visible


def index_loss(scores, attention, visible):
    """KL of the main attention's normalised weights [B, T, H, S] to softmax(scores) over visible entries."""
    target = attention.detach().sum(2)
    total = target.sum(-1, keepdim=True)
    target = target / total.clamp(min=1e-9)
    log_q = torch.log_softmax(scores.masked_fill(~visible, -1e9), dim=-1)
    kl = (target * (target.clamp(min=1e-9).log() - log_q)).masked_fill(~visible, 0.0).sum(-1)
    counted = visible.any(-1).expand_as(kl) & (total[..., 0] > 1e-6)
    return (kl * counted).sum() / counted.sum().clamp(min=1)
