"""V4 attention of one layer: window, CSA or HCA, by the layer's compression ratio.

One shared K=V head; low-rank queries, each head divided by its own RMS; RoPE on the last dims of q and kv and its
inverse on the output; grouped low-rank output projection.                       (V4 report 2.3; spec/model.md 2)
Two cores over the same parameters: the whole sequence (differentiable) and cached (any chunk, any batch).
Shapes: B batch, T tokens, H heads, D head width, S entries, W window, G output groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rorqual.kernels import apply_rope, attend, attend_blocks, index_loss, select_entries, select_top_k
from rorqual.kernels.attention import picked_mask
from rorqual.model.compressor import Compressor
from rorqual.model.config import Config
from rorqual.model.indexer import Indexer
from rorqual.model.layers import Linear, RMSNorm, Rope, rms_norm
from rorqual.model.quant import quant_dequant_entry
from rorqual.model.state import LayerState

__all__ = ["Attention", "AttentionMode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMode:
    """How a full-sequence pass attends; cached passes are always sparse, as deployed."""

    sparse: bool = True
    """CSA attends to the indexer's top-k only. False: to every visible entry (dense warm-up)."""
    index_loss: bool = False
    """Also compute the indexer's own loss (KL to the main attention's weights)."""
    without: frozenset[str] = frozenset()
    """Ablation: kinds (`csa`, `hca`) whose compressed entries are hidden."""
    fill_skips: bool = False
    """With `positions`: HCA entries also weigh for those that were skipped, so that attention is as diluted as in the
    context that the positions stand for."""


class Attention(nn.Module):
    """Parameters are named as in the official checkpoint (spec/model.md 7.1)."""

    def __init__(self, config: Config, *, ratio: int, simulate_quant: bool = False) -> None:
        super().__init__()
        hidden, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
        self.heads, self.width, self.ratio = heads, width, ratio
        self.window, self.top_k, self.eps = config.sliding_window, config.index_topk, config.rms_norm_eps
        self.rope_dim = config.qk_rope_head_dim
        self.groups, self.rank = config.o_groups, config.o_lora_rank
        self.simulate_quant = simulate_quant
        self.wq_a = Linear(hidden, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, eps=self.eps)
        self.wq_b = Linear(config.q_lora_rank, heads * width)
        self.wkv = Linear(hidden, width)
        self.kv_norm = RMSNorm(width, eps=self.eps)
        self.wo_a = Linear(heads // self.groups * width, self.groups * self.rank)
        self.wo_b = Linear(self.groups * self.rank, hidden)
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.rope = Rope(config, compressed=ratio > 0)
        self.kind = "window" if not ratio else "csa" if ratio == config.csa_ratio else "hca"
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        if ratio:
            csa = self.kind == "csa"
            self.compressor = Compressor(hidden, width, ratio=ratio, overlap=csa, eps=self.eps)
            self.indexer = Indexer(config, simulate_quant=simulate_quant) if csa else None

    def round(self, kv: Tensor) -> Tensor:
        """The cache format of window rows and entries, when simulated: FP8, the rotated dims BF16."""
        return quant_dequant_entry(kv, rope_dim=self.rope_dim) if self.simulate_quant else kv

    def forward(
        self,
        x: Tensor,
        *,
        mode: AttentionMode,
        state: LayerState | None = None,
        start: Tensor | None = None,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, hidden] (already normed) to the layer's output [B, T, hidden], and the indexer's loss or None.

        Without `state` the sequence stands at `positions` (None: from 0, see `Model.train_pass`); with it row b stands
        at `start[b]` and brings `counts[b]` tokens.
        """
        length = x.shape[1]
        steps = torch.arange(length, device=x.device)
        if positions is None:
            positions = steps if start is None else start[:, None] + steps
        cos, sin = self.rope(positions)
        q_r = self.q_norm(self.wq_a(x))
        q = rms_norm(self.wq_b(q_r).unflatten(-1, (self.heads, self.width)), self.eps)
        q = apply_rope(q, cos.unsqueeze(-2), sin.unsqueeze(-2))
        kv = self.round(apply_rope(self.kv_norm(self.wkv(x)), cos, sin))
        if state is None or start is None:
            out, loss = self._full(x, q, q_r, kv, positions=positions, cos_sin=(cos, sin), mode=mode)
        else:
            out = self._cached(x, q, q_r, kv, state=state, start=start, counts=counts, cos_sin=(cos, sin))
            loss = None
        out = apply_rope(out, cos.unsqueeze(-2), sin.unsqueeze(-2), inverse=True)
        grouped = out.reshape(*out.shape[:2], self.groups, -1)  # [B, T, G, H/G*D]
        inner = torch.einsum(
            "btgi,gri->btgr",
            grouped,
            self.wo_a.weight.to(grouped.dtype).view(self.groups, self.rank, -1),
        )
        projected: Tensor = self.wo_b(inner.flatten(2))
        return projected, loss

    def _full(
        self,
        x: Tensor,
        q: Tensor,
        q_r: Tensor,
        kv: Tensor,
        *,
        positions: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mode: AttentionMode,
    ) -> tuple[Tensor, Tensor | None]:
        """The differentiable core: [B, T, H, D] and the indexer's loss. Memory is linear in T."""
        length = x.shape[1]
        if self.compressor is None or length < self.ratio or self.kind in mode.without:
            return attend_blocks(q, kv, sink=self.attn_sink, window=self.window)[0], None
        entries = self.round(self.compressor(x, self.rope, positions))
        picked = bias = scored = None
        selects = mode.sparse and entries.shape[1] > self.top_k
        if self.indexer is not None and (selects or mode.index_loss):
            # The indexer learns from its own loss only: top-k passes no gradient (spec/rl.md 6).
            inputs, low_rank = x.detach(), q_r.detach()
            index_q, weights = self.indexer.queries(inputs, low_rank, cos_sin)
            scored = index_q, self.indexer.keys(inputs, self.rope, positions), weights
            if selects:
                picked = select_entries(*scored, ratio=self.ratio, top_k=self.top_k)
        if mode.fill_skips and self.kind == "hca":
            there = (torch.arange(length, device=x.device) + 1) // self.ratio
            bias = torch.log(((positions + 1) // self.ratio).clamp(min=1) / there.clamp(min=1))
            bias = bias.expand(len(x), -1)
        out, log_sum = attend_blocks(
            q,
            kv,
            sink=self.attn_sink,
            window=self.window,
            entries=entries,
            ratio=self.ratio,
            picked=picked,
            entries_bias=bias,
        )
        if scored is None or not mode.index_loss:
            return out, None
        return out, index_loss(
            *scored, rows=q, entries=entries, log_sum=log_sum, ratio=self.ratio, picked=picked
        )

    def _cached(
        self,
        x: Tensor,
        q: Tensor,
        q_r: Tensor,
        kv: Tensor,
        *,
        state: LayerState,
        start: Tensor,
        counts: Tensor | None,
        cos_sin: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The cached core: extends `state`, then attends. An entry completed by a token is visible to it."""
        length = x.shape[1]
        steps = torch.arange(length, device=x.device)
        keys = state.window.extend(kv, counts)  # [B, W-1+T, D]
        local = torch.arange(keys.shape[1], device=x.device)
        band = (local >= steps[:, None]) & (local < steps[:, None] + self.window)  # [T, W-1+T]
        window_mask = band & (local >= self.window - 1 - start[:, None, None])
        if self.compressor is None or state.tail is None or state.entries is None:
            return attend(q, keys, window_mask, sink=self.attn_sink)
        extended = self.compressor.extend(x, start, counts, self.rope, tail=state.tail)
        if extended is not None:
            state.entries.write(extended[0], self.round(extended[1]), extended[2])
        if self.indexer is not None and state.index_tail is not None and state.index_keys is not None:
            new_keys = self.indexer.compressor.extend(x, start, counts, self.rope, tail=state.index_tail)
            if new_keys is not None:
                state.index_keys.write(new_keys[0], self.indexer.round(new_keys[1]), new_keys[2])
        seen = (start[:, None] + steps + 1) // self.ratio  # [B, T] entries each query may see
        most = min(int(seen.max()), state.entries.entries.shape[1])
        if not most:
            return attend(q, keys, window_mask, sink=self.attn_sink)
        entries = state.entries.entries[:, :most]
        mask = torch.arange(most, device=x.device) < seen[..., None]  # [B, T, S]
        if self.indexer is not None and state.index_keys is not None and most > self.top_k:
            scores = self.indexer.scores(x, q_r, state.index_keys.entries[:, :most], cos_sin)
            picked = select_top_k(scores, mask, top_k=self.top_k)  # [B, T, K]
            if length == 1:  # gather: the cost of a step does not grow with the context
                index = picked.clamp(min=0)[:, 0, :, None].expand(-1, -1, self.width)
                entries, mask = entries.gather(1, index), picked >= 0
            else:
                mask = picked_mask(picked, most)
        return attend(q, keys, window_mask, sink=self.attn_sink, entries=entries, entries_mask=mask)
