"""MTP head: one more block that predicts the token after next from the residual streams and the next token.

x = e_proj(enorm(embed(next ids))) + h_proj(hnorm(X)) per stream; one window-only block; own HC head and norm;
embedding and LM head are the model's.                                                   (spec/model.md 6.1)
Shapes: B batch, T tokens, N streams, D hidden width.
"""

from __future__ import annotations

from torch import Tensor

from rorqual.model.attention import AttentionMode
from rorqual.model.block import Block
from rorqual.model.config import Config
from rorqual.model.hyper_connections import HyperHead, Streams
from rorqual.model.layers import Linear, RMSNorm

__all__ = ["MTPBlock"]


class MTPBlock(Block):
    """A ratio-0 block with the projections that join the streams and the next token."""

    def __init__(self, config: Config, *, simulate_quant: bool = False) -> None:
        super().__init__(config, ratio=0, hashed=False, simulate_quant=simulate_quant)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps=eps)
        self.hnorm = RMSNorm(hidden, eps=eps)
        self.e_proj = Linear(hidden, hidden)
        self.h_proj = Linear(hidden, hidden)
        self.norm = RMSNorm(hidden, eps=eps)
        self.hc_head = HyperHead(config)

    def hidden(
        self, streams: Streams, embedded: Tensor, token_ids: Tensor, *, positions: Tensor | None = None
    ) -> Tensor:
        """N streams [B, T, D] at t, embedding [B, T, D] and ids [B, T] of token t+1, to normed hidden [B, T, D].

        `positions` [T] or [B, T] are those of the streams (None: from 0).
        """
        token = self.e_proj(self.enorm(embedded))
        joined = tuple(token + self.h_proj(self.hnorm(stream)) for stream in streams)
        streams, _ = self(joined, token_ids, mode=AttentionMode(), positions=positions)
        out: Tensor = self.norm(self.hc_head(streams))
        return out
