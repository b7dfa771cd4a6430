"""Compressor: turns m tokens into one cache entry, by gated pooling per channel.

c_t = x_t wkv, z_t = x_t wgate + ape[t mod m], in fp32; entry w pools block w (HCA) or, per half of the channels,
blocks w-1 and w (CSA); then RMSNorm and RoPE at position w*m.               (V4 report, CSA and HCA; spec/model.md 2.4)
Owns the projections and the block arithmetic; rounding to the cache format is the caller's.
Shapes: B batch, T tokens, S complete blocks, M ratio, D entry width, K = 2 when overlapping, else 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.kernels import apply_rope, overlap_rows, pool
from rorqual.model.layers import Linear, RMSNorm, Rope
from rorqual.model.state import RowHistory

__all__ = ["Compressor"]


class Compressor(nn.Module):
    """Parameters `wkv`, `wgate` [K*D, hidden], `ape` [M, K*D], `norm` [D]; K = 2 iff `overlap`."""

    def __init__(self, hidden: int, width: int, *, ratio: int, overlap: bool, eps: float) -> None:
        super().__init__()
        self.ratio, self.width, self.overlap = ratio, width, overlap
        self.coff = 2 if overlap else 1
        self.wkv = Linear(hidden, self.coff * width)
        self.wgate = Linear(hidden, self.coff * width)
        self.ape = nn.Parameter(torch.zeros(ratio, self.coff * width))
        self.norm = RMSNorm(width, eps=eps)

    def rows(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Per-token values and scores (ape included), fp32 [B, T, K*D] each."""
        # fp32: blocks are pooled before rounding (official code, spec/model.md 9)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            values = F.linear(wide, self.wkv.weight.float())
            scores = F.linear(wide, self.wgate.weight.float())
            return values, scores + self.ape[positions % self.ratio].float()

    def finish(self, pooled: Tensor, blocks: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
        """RMSNorm and RoPE at the first token of block `blocks` [.., S]; pooled fp32 [.., S, D]."""
        entries = self.norm(pooled.to(dtype))
        return apply_rope(entries, *rope(blocks * self.ratio))

    def forward(self, x: Tensor, rope: Rope, positions: Tensor | None = None) -> Tensor:
        """Entries [B, T//M, D] of a whole sequence x [B, T, hidden]; `positions` as in `Model.train_pass`."""
        batch, length, _ = x.shape
        blocks = length // self.ratio
        x = x[:, : blocks * self.ratio]
        places = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        places = places[..., : x.shape[1]]
        values, scores = self.rows(x, places)
        values = values.view(batch, blocks, self.ratio, -1)
        scores = scores.view(batch, blocks, self.ratio, -1)
        if self.overlap:
            values, scores = overlap_rows(values, first=0.0), overlap_rows(scores, first=float("-inf"))
        return self.finish(pool(values, scores), places[..., :: self.ratio] // self.ratio, rope, x.dtype)

    def extend(
        self, x: Tensor, start: Tensor, counts: Tensor | None, rope: Rope, *, tail: RowHistory
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Entries that complete within x [B, T, hidden], whose row b starts at `start[b]` and counts `counts[b]`.

        Returns entry numbers [B, N], entries [B, N, D] and which of them are valid [B, N]; None when none can be.
        """
        length = x.shape[1]
        positions = start[:, None] + torch.arange(length, device=x.device)
        values, scores = self.rows(x, positions)
        joined = tail.extend(torch.cat((values, scores), dim=-1), counts)
        blocks = start[:, None] // self.ratio + torch.arange(
            -(-length // self.ratio), device=x.device
        )  # [B, N]
        end = start + length if counts is None else start + counts
        valid = (blocks + 1) * self.ratio <= end[:, None]
        if not bool(valid.any()):
            return None
        span = self.coff * self.ratio
        first = (
            (blocks + 1) * self.ratio - span - start[:, None] + (span - 1)
        )  # local row of each block's first
        index = (first[..., None] + torch.arange(span, device=x.device)).clamp(max=joined.shape[1] - 1)
        flat = index.flatten(1)[..., None].expand(-1, -1, joined.shape[2])
        rows = joined.gather(1, flat).view(*index.shape, 2, self.coff * self.width)  # [B, N, K*M, 2, K*D]
        values, scores = rows[..., 0, :], rows[..., 1, :]
        if self.overlap:
            half, m = self.width, self.ratio
            values = torch.cat((values[:, :, :m, :half], values[:, :, m:, half:]), dim=2)
            scores = torch.cat((scores[:, :, :m, :half], scores[:, :, m:, half:]), dim=2)
        # A row of only -inf (an invalid block) would pool to NaN and poison nothing, but keep it finite anyway.
        scores = torch.where(valid[..., None, None], scores, 0.0)
        return blocks, self.finish(pool(values, scores), blocks, rope, x.dtype), valid
