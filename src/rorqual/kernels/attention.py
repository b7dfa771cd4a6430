"""Core attention: one softmax over window rows, compressed entries and a sink; keys are the values.

l = q_h . k / sqrt(D); weights = exp(l - max) / (sum exp(l - max) + exp(sink_h - max)).  (spec/model.md 2.5)
Two forms of the same sum: `attend` takes any masks (cached decode, chunked prefill), `attend_blocks` is the
differentiable full-sequence form. It goes through blocks of queries and keeps of the weights only their logarithmic
sum, from which backward makes them again: memory is linear in T, and no tensor has T * T or T * S elements.
Shapes: B batch, T queries, H heads, D head width, J window rows, S compressed entries, W window, K picked entries,
C queries of a block, M ratio.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "attend_blocks", "query_blocks"]

NEGATIVE = float("-inf")
BLOCK_ELEMENTS = 1 << 18
"""Logits that a block of queries may make: 1 MB in fp32, what a core's cache keeps. Measured best of 2^16 to 2^20."""
GATHER_FROM = 6
"""Entries for one that is picked, from which gathering the picks is cheaper than masking the others."""


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


def query_blocks(
    length: int, *, elements: int, ratio: int, entries: int, multiple: int = 1
) -> Iterator[tuple[int, int, int]]:
    """Cuts T = `length` queries into blocks: first query, last + 1, entries that the block's last query sees.

    A query makes `elements` numbers. Blocks are multiples of `multiple`, the last may be short.
    """
    size = max(BLOCK_ELEMENTS // max(elements, 1) // multiple, 1) * multiple
    for first in range(0, length, size):
        last = min(first + size, length)
        yield first, last, min(last // ratio, entries) if entries else 0


def visible_entries(span: tuple[int, int, int], *, ratio: int, device: torch.device) -> Tensor:
    """bool [1, C, seen]: entry s < (t+1)//M, for the queries of a block."""
    first, last, seen = span
    steps = torch.arange(first + 1, last + 1, device=device)
    return (torch.arange(seen, device=device) < (steps // ratio)[:, None])[None]


def picked_mask(picked: Tensor, size: int) -> Tensor:
    """Indices [B, C, K] (-1: none) to a bool mask [B, C, size]."""
    mask = torch.zeros(*picked.shape[:2], size + 1, dtype=torch.bool, device=picked.device)
    return mask.scatter_(2, torch.where(picked < 0, size, picked), True)[..., :size]


class Sight:
    """Which entries the queries of one block see, N of them: all that are complete, or each query its own picks.

    Picks are gathered, [B*C, K, D], where there are many entries for one that is picked; else they are a mask.
    """

    def __init__(
        self, span: tuple[int, int, int], *, batch: int, ratio: int, picked: Tensor | None, gathered: bool
    ) -> None:
        self.span, self.batch, self.ratio = span, batch, ratio
        self.queries = span[1] - span[0]
        self.picked = None if picked is None else picked[:, span[0] : span[1]]
        self.index: Tensor | None = None
        self.count = span[2]
        if gathered and self.picked is not None:
            self.index, self.count = self.picked.clamp(min=0), self.picked.shape[2]

    @staticmethod
    def gathers(picked: Tensor | None, entries: int) -> bool:
        """Whether picks of a whole sequence are better gathered."""
        return picked is not None and entries >= GATHER_FROM * picked.shape[2]

    def flat(self, rows: int) -> tuple[int, int, int]:
        """The shape in which a query's `rows` rows [B, C, rows, D] meet `take`'s entries."""
        many = self.batch * self.queries
        return (self.batch, self.queries * rows, -1) if self.index is None else (many, rows, -1)

    def take(self, entries: Tensor) -> Tensor:
        """Entries [B, S, D] that the block sees: [B, seen, D], or gathered [B*C, K, D]."""
        if self.index is None:
            return entries[:, : self.count]
        return entries.flatten(0, 1)[self._places(entries)].view(-1, self.count, entries.shape[2])

    def hidden(self, device: torch.device) -> Tensor:
        """bool [B or 1, C, N]: True where a query does not see."""
        if self.index is not None and self.picked is not None:
            return self.picked < 0
        if self.picked is not None:
            return ~picked_mask(self.picked, self.count)
        return ~visible_entries(self.span, ratio=self.ratio, device=device)

    def accumulate(self, total: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Adds weights^T rows, both in `flat`'s shape, to the entries' gradients `total` [B, S, D]."""
        if self.index is None:
            total[:, : self.count].baddbmm_(weights.transpose(1, 2), rows)
        else:
            parts = weights.transpose(1, 2) @ rows  # [B*C, K, D]
            total.view(-1, total.shape[2]).index_add_(0, self._places(total), parts.flatten(0, 1))

    def _places(self, entries: Tensor) -> Tensor:
        """Picks as rows of [B * S], flat."""
        assert self.index is not None
        base = torch.arange(self.batch, device=entries.device)[:, None, None] * entries.shape[1]
        return (self.index + base).flatten()


def attend_blocks(
    q: Tensor,
    kv: Tensor,
    *,
    sink: Tensor,
    window: int,
    entries: Tensor | None = None,
    ratio: int = 1,
    picked: Tensor | None = None,
    entries_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a whole sequence from position 0; returns [B, T, H, D] and log-sums fp32 [B, T, H].

    q [B, T, H, D], kv [B, T, D]; each query sees the last `window` rows, itself included, and the entries s < (t+1)//M
    of `entries` [B, S, D]; with `picked` int64 [B, T, K] (-1: none) only those among them. `entries_bias` fp32
    [B or 1, T] is added to a query's logits of entries. The log-sums carry no gradient: exp(l - log-sum) is a weight
    (the indexer's loss uses them).
    """
    batch, length, _, width = q.shape
    pad = -length % window
    kv = F.pad(kv.to(q.dtype), (0, 0, window, pad))  # a block of zeros before the first: [B, W+T, D]
    q = F.pad(q, (0, 0, 0, 0, 0, pad)) if pad else q
    far = q.new_zeros(batch, 0, width) if entries is None else entries.to(q.dtype)
    if pad and entries_bias is not None:
        entries_bias = F.pad(entries_bias, (0, pad))
    if pad and picked is not None:
        picked = F.pad(picked, (0, 0, 0, pad), value=-1)
    with torch.autocast(q.device.type, enabled=False):
        out, log_sum = _BlockAttention.apply(q, kv, far, sink, ratio, picked, entries_bias, window)  # type: ignore[no-untyped-call]
    return out[:, :length], log_sum[:, :length]


class _Block:
    """Logits of one block of queries: `near` [B, C/W, W, H, 2W] on the window, `far` [B, C, H, N] on entries."""

    def __init__(self, rows, kv, entries, bias, near, window, sight) -> None:  # type: ignore[no-untyped-def]
        first, last, _ = sight.span
        self.first, self.last = first, last
        batch, _, heads, _ = rows.shape
        self.rows, self.sight = rows[:, first:last], sight
        wide = torch.promote_types(rows.dtype, torch.float32)
        self.blocks = (batch, (last - first) // window, window * heads, -1)
        keys = kv[:, first : last + window].unfold(1, 2 * window, window).transpose(2, 3)
        self.keys = keys.contiguous()  # [B, C/W, 2W, D]: the windows overlap, and products need copies
        if near is None:
            near = (self.rows.reshape(self.blocks) @ self.keys.transpose(2, 3)).to(wide)
            near = near.view(batch, -1, window, heads, 2 * window).add_(_near_bias(window, near.device))
            if not first:
                near[:, 0, ..., :window] = NEGATIVE
            self.near = near.view(batch, last - first, heads, 2 * window)
        else:
            self.near = near[:, first:last]
        self.flat, self.entries = sight.flat(heads), sight.take(entries)
        far = (self.rows.reshape(self.flat) @ self.entries.transpose(1, 2)).to(wide)
        self.far = far.view(batch, last - first, heads, sight.count)
        if sight.count:
            if bias is not None:
                self.far.add_(bias[:, first:last, None, None])
            self.far.masked_fill_(sight.hidden(far.device)[:, :, None], NEGATIVE)


def _near_bias(window: int, device: torch.device) -> Tensor:
    """fp32 [W, 1, 2W]: 0 where a query sees a row of its own or the previous block, else -inf."""
    query = torch.arange(window, device=device)[:, None]
    key = torch.arange(2 * window, device=device)[None] - window
    seen = (key <= query) & (key > query - window)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, NEGATIVE)[:, None]


class _BlockAttention(torch.autograd.Function):
    """`attend_blocks` with its own backward, so that logits are touched in place and never kept.

    dS = P * (dO K^T - rowsum(dO * O)); the sink's row is the same with value 0.
    """

    @staticmethod
    def forward(ctx, q, kv, entries, sink, ratio, picked, bias, window):  # type: ignore[no-untyped-def]
        batch, length, heads, width = q.shape
        rows = q * width**-0.5
        out = torch.empty_like(q)
        log_sum = q.new_empty(batch, length, heads, dtype=torch.promote_types(q.dtype, torch.float32))
        kept = log_sum.new_empty(batch, length, heads, 2 * window)
        for sight in _sights(q, entries, ratio, picked, window):
            block = _Block(rows, kv, entries, bias, None, window, sight)
            near, far, first, last = block.near, block.far, block.first, block.last
            top = torch.maximum(near.amax(-1), sink.to(near.dtype))
            top = torch.maximum(top, far.amax(-1)) if sight.count else top
            near, far = near.sub_(top[..., None]).exp_(), far.sub_(top[..., None]).exp_()
            total = near.sum(-1) + far.sum(-1) + torch.exp(sink - top)
            part = (near.to(q.dtype).view(block.blocks) @ block.keys).view(*near.shape[:3], width)
            if sight.count:
                part = part + (far.to(q.dtype).view(block.flat) @ block.entries).view(part.shape)
            share = total.reciprocal()[..., None]
            out[:, first:last] = part.mul_(share)
            torch.mul(near, share, out=kept[:, first:last])
            log_sum[:, first:last] = top.add_(total.log_())
        ctx.save_for_backward(rows, kv, entries, sink, picked, bias, out, log_sum, kept)
        ctx.ratio, ctx.window = ratio, window
        ctx.mark_non_differentiable(log_sum)
        return out, log_sum

    @staticmethod
    def backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
        rows, kv, entries, sink, picked, bias, out, log_sum, kept = ctx.saved_tensors
        window, dtype, width = ctx.window, rows.dtype, rows.shape[3]
        d_out = d_out.contiguous().to(dtype)
        delta = (d_out.to(log_sum.dtype) * out).sum(-1, keepdim=True)  # [B, T, H, 1]
        d_rows, d_kv, d_entries = torch.empty_like(rows), torch.zeros_like(kv), torch.zeros_like(entries)
        for sight in _sights(rows, entries, ctx.ratio, picked, window):
            block = _Block(rows, kv, entries, bias, kept, window, sight)
            near, far, first, last = block.near, block.far, block.first, block.last
            at, wider = log_sum[:, first:last, :, None], delta[:, first:last]
            d_part, flat_rows = d_out[:, first:last], block.rows.reshape(block.flat)
            near_rows = near.to(dtype).reshape(block.blocks)
            d_near = (
                (d_part.reshape(block.blocks) @ block.keys.transpose(2, 3)).to(near.dtype).view(near.shape)
            )
            d_near = d_near.sub_(wider).mul_(near).to(dtype).view(block.blocks)
            part = (d_near @ block.keys).view(block.rows.shape)
            d_keys = d_near.transpose(2, 3) @ block.rows.reshape(block.blocks)
            d_keys = d_keys + near_rows.transpose(2, 3) @ d_part.reshape(block.blocks)
            d_kv[:, first:last] += d_keys[:, :, :window].flatten(1, 2)
            d_kv[:, first + window : last + window] += d_keys[:, :, window:].flatten(1, 2)
            if sight.count:
                far, flat_out = far.sub_(at).exp_(), d_part.reshape(block.flat)
                d_far = (flat_out @ block.entries.transpose(1, 2)).to(far.dtype).view(far.shape)
                d_far = d_far.sub_(wider).mul_(far).to(dtype).view(block.flat)
                part = part + (d_far @ block.entries).view(part.shape)
                sight.accumulate(d_entries, d_far, flat_rows)
                sight.accumulate(d_entries, far.to(dtype).view(block.flat), flat_out)
            d_rows[:, first:last] = part
        d_sink = -(torch.exp(sink - log_sum) * delta[..., 0]).sum((0, 1))
        return d_rows * width**-0.5, d_kv, d_entries, d_sink, None, None, None, None


def _sights(q: Tensor, entries: Tensor, ratio: int, picked: Tensor | None, window: int) -> Iterator[Sight]:
    """The blocks of a whole sequence."""
    batch, length, heads, width = q.shape
    count = entries.shape[1]
    gathered = Sight.gathers(picked, count)
    elements = batch * heads * max(count, 2 * window)
    if gathered and picked is not None:
        elements = batch * max(picked.shape[2] * width, heads * 2 * window)
    for span in query_blocks(length, elements=elements, ratio=ratio, entries=count, multiple=window):
        yield Sight(span, batch=batch, ratio=ratio, picked=picked, gathered=gathered)
