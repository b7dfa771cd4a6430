"""One transformer block: an attention site and an MoE site, each read from and merged into the mHC streams.

Shapes: B batch, T tokens, N streams, D hidden width.                                       (spec/model.md 4)
"""

from __future__ import annotations

from torch import Tensor, nn

from rorqual.model.attention import Attention, AttentionMode
from rorqual.model.config import Config
from rorqual.model.hyper_connections import HyperConnection, Streams
from rorqual.model.layers import RMSNorm
from rorqual.model.moe import MoE
from rorqual.model.state import LayerState

__all__ = ["Block"]


class Block(nn.Module):
    """attn_norm, attn, ffn_norm, ffn and the two hyper-connections."""

    def __init__(self, config: Config, *, ratio: int, hashed: bool, simulate_quant: bool = False) -> None:
        super().__init__()
        self.hc_attn = HyperConnection(config)
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, ratio=ratio, simulate_quant=simulate_quant)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn = MoE(config, hashed=hashed)

    def forward(
        self,
        streams: Streams,
        token_ids: Tensor,
        *,
        mode: AttentionMode,
        state: LayerState | None = None,
        start: Tensor | None = None,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Streams, Tensor | None]:
        """N streams [B, T, D] to streams, and the indexer's loss or None. See `Attention.forward` for the rest."""
        x, post, comb = self.hc_attn(streams)
        normed = self.attn_norm(x)
        out, loss = self.attn(normed, mode=mode, state=state, start=start, counts=counts, positions=positions)
        streams = HyperConnection.merge(streams, out, post, comb)
        x, post, comb = self.hc_ffn(streams)
        return HyperConnection.merge(streams, self.ffn(self.ffn_norm(x), token_ids), post, comb), loss
