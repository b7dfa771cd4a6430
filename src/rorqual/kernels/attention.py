"""Core attention: one softmax over window rows, compressed entries and a sink; keys are the values.

l = q_h . k / sqrt(D); weights = exp(l - max) / (sum exp(l - max) + exp(sink_h - max)).  (spec/model.md 2.5)
Two forms of the same sum: `attend` takes any masks (cached decode, chunked prefill), `attend_blocks` is the
differentiable full-sequence form, whose window costs T * 2W, not T * T.
Shapes: B batch, T queries, H heads, D head width, J window rows, S compressed entries, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "attend_blocks"]

NEGATIVE = float("-inf")


def _softmax_with_sink(logits: Tensor, sink: Tensor) -> Tensor:
    """logits fp32 [B, T, H, N], sink [H]: softmax in which the sink takes weight and gives no value."""
    full = torch.cat((logits, sink.float()[:, None].expand(*logits.shape[:-1], 1)), dim=-1)
    return torch.softmax(full, dim=-1)[..., :-1]


def attend(
    q: Tensor,
    window: Tensor,
    window_mask: Tensor,
    *,
    sink: Tensor,
    entries: Tensor | None = None,
    entries_mask: Tensor | None = None,
) -> Tensor:
    """Attention with explicit masks; returns [B, T, H, D].

    q [B, T, H, D]; window [B, J, D] with mask bool [B or 1, T, J]; entries [B, S, D], or gathered per query
    [B, T, S, D], with mask bool [B or 1, T, S]; sink fp32 [H]. True in a mask means visible.
    """
    batch, queries, heads, width = q.shape
    rows = (q * width**-0.5).flatten(1, 2)  # [B, T*H, D]
    logits = (rows @ window.transpose(1, 2)).view(batch, queries, heads, -1)
    logits = logits.float().masked_fill(~window_mask[:, :, None], NEGATIVE)
    parts = [logits]
    gathered = entries is not None and entries.dim() == 4
    if entries is not None and entries_mask is not None:
        if gathered:
            extra = (q * width**-0.5) @ entries.transpose(2, 3)
        else:
            extra = (rows @ entries.transpose(1, 2)).view(batch, queries, heads, -1)
        parts.append(extra.float().masked_fill(~entries_mask[:, :, None], NEGATIVE))
    weights = _softmax_with_sink(torch.cat(parts, dim=-1), sink).to(q.dtype)
    split = window.shape[1]
    out = (weights[..., :split].flatten(1, 2) @ window).view(batch, queries, heads, width)
    if entries is not None:
        rest = weights[..., split:]
        if gathered:
            out = out + rest @ entries
        else:
            out = out + (rest.flatten(1, 2) @ entries).view(batch, queries, heads, width)
    return out


def attend_blocks(
    q: Tensor,
    kv: Tensor,
    *,
    sink: Tensor,
    window: int,
    entries: Tensor | None = None,
    entries_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of a whole sequence from position 0; returns [B, T, H, D] and the entries' weights.

    q [B, T, H, D], kv [B, T, D]; each query sees the last `window` rows, itself included, and the entries
    [B, S, D] that `entries_mask` bool [B or 1, T, S] shows. Weights are fp32 [B, T, H, S], without gradient (for
    the indexer's loss), None without entries.
    """
    batch, length, _, width = q.shape
    pad = -length % window
    kv = kv.to(q.dtype)
    if pad:
        q, kv = F.pad(q, (0, 0, 0, 0, 0, pad)), F.pad(kv, (0, 0, 0, pad))
    if entries is None or entries_mask is None or not entries.shape[1]:
        entries, far_bias = q.new_zeros(batch, 0, width), torch.zeros(1, length + pad, 0, device=q.device)
    else:
        entries = entries.to(q.dtype)
        far_bias = torch.zeros(entries_mask.shape, device=q.device).masked_fill_(~entries_mask, NEGATIVE)
        far_bias = F.pad(far_bias, (0, 0, 0, pad)) if pad else far_bias
    with torch.autocast(q.device.type, enabled=False):
        out, weights = _BlockAttention.apply(q, kv, entries, sink, far_bias, window)  # type: ignore[no-untyped-call]
    return out[:, :length], weights[:, :length] if entries.shape[1] else None


def _near_bias(blocks: int, window: int, device: torch.device) -> Tensor:
    """fp32 [blocks, W, 1, 2W]: 0 where a query sees a row of its own or the previous block, else -inf."""
    query = torch.arange(window, device=device)[:, None]
    key = torch.arange(2 * window, device=device)[None] - window
    band = (key <= query) & (key > query - window)
    seen = band.expand(blocks, -1, -1).clone()
    seen[0, :, :window] = False
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, NEGATIVE)[:, :, None]


class _BlockAttention(torch.autograd.Function):
    """`attend_blocks` with its own backward, so that logits are touched in place and stored once.

    dS = P * (dO K^T - rowsum(dO * O)); the sink's row is the same with value 0.
    """

    @staticmethod
    def forward(ctx, q, kv, entries, sink, far_bias, window):  # type: ignore[no-untyped-def]
        batch, length, heads, width = q.shape
        blocks = length // window
        current = kv.view(batch, blocks, window, width)
        keys = torch.cat((F.pad(current[:, :-1], (0, 0, 0, 0, 1, 0)), current), dim=2)  # [B, blocks, 2W, D]
        wide = torch.promote_types(q.dtype, torch.float32)
        rows = q * width**-0.5
        near = (rows.view(batch, blocks, window * heads, width) @ keys.transpose(2, 3)).to(wide)
        near = near.view(batch, blocks, window, heads, 2 * window).add_(_near_bias(blocks, window, q.device))
        near = near.view(batch, length, heads, 2 * window)
        far = (rows.view(batch, length * heads, width) @ entries.transpose(1, 2)).to(wide)
        far = far.view(batch, length, heads, -1).add_(far_bias[:, :, None])
        top = torch.maximum(near.amax(-1), sink.to(wide))
        if far.shape[-1]:
            top = torch.maximum(top, far.amax(-1))
        near = near.sub_(top[..., None]).exp_()
        far = far.sub_(top[..., None]).exp_()
        at_sink = torch.exp(sink - top)
        scale = (near.sum(-1) + far.sum(-1) + at_sink).reciprocal_()
        near, far, at_sink = near.mul_(scale[..., None]), far.mul_(scale[..., None]), at_sink.mul_(scale)
        out = (near.to(q.dtype).view(batch, blocks, window * heads, -1) @ keys).view(q.shape)
        if far.shape[-1]:
            out = out + (far.to(q.dtype).view(batch, length * heads, -1) @ entries).view(q.shape)
        ctx.save_for_backward(rows, keys, entries, near, far, at_sink, out)
        ctx.window = window
        ctx.mark_non_differentiable(far)
        return out, far

    @staticmethod
    def backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
        rows, keys, entries, near, far, at_sink, out = ctx.saved_tensors
        batch, length, heads, width = rows.shape
        window, dtype = ctx.window, rows.dtype
        blocks = length // window
        d_out = d_out.contiguous().to(dtype)
        delta = (d_out.to(near.dtype) * out).sum(-1, keepdim=True)  # [B, T, H, 1]
        block_shape, flat_shape = (batch, blocks, window * heads, -1), (batch, length * heads, -1)
        d_near = (d_out.view(block_shape) @ keys.transpose(2, 3)).to(near.dtype).view(near.shape)
        d_near = d_near.sub_(delta).mul_(near).to(dtype).view(block_shape)
        d_rows = (d_near @ keys).view(rows.shape)
        d_keys = d_near.transpose(2, 3) @ rows.view(block_shape)
        d_keys = d_keys + near.to(dtype).view(block_shape).transpose(2, 3) @ d_out.view(block_shape)
        d_kv = d_keys[:, :, window:] + F.pad(d_keys[:, 1:, :window], (0, 0, 0, 0, 0, 1))
        d_entries = None
        if far.shape[-1]:
            d_far = (d_out.view(flat_shape) @ entries.transpose(1, 2)).to(far.dtype).view(far.shape)
            d_far = d_far.sub_(delta).mul_(far).to(dtype).view(flat_shape)
            d_rows = d_rows + (d_far @ entries).view(rows.shape)
            d_entries = d_far.transpose(1, 2) @ rows.view(flat_shape)
            d_entries = d_entries + far.to(dtype).view(flat_shape).transpose(1, 2) @ d_out.view(flat_shape)
        d_sink = -(at_sink * delta[..., 0]).sum((0, 1))
        return d_rows * width**-0.5, d_kv.reshape(batch, length, width), d_entries, d_sink, None, None
