"""Lightning Indexer: its own small queries and compressed keys decide which entries a CSA query attends to.

q^I = q_r wq_b (shared low-rank query), RoPE, Hadamard, FP4; K^I = own overlapping compressor on x, same treatment;
w = x weights_proj / sqrt(D_I H_I); scoring and top-k: kernels/indexer.py.               (spec/model.md 2.6)
Hadamard changes nothing without rounding, so it runs only when the FP4 format is simulated.
Shapes: B batch, T queries, S entries, H index heads, D index width.
"""

from __future__ import annotations

from torch import Tensor, nn

from rorqual.kernels import apply_rope, hadamard, index_scores
from rorqual.model.compressor import Compressor
from rorqual.model.config import Config
from rorqual.model.layers import Linear, Rope
from rorqual.model.quant import quant_dequant_fp4

__all__ = ["Indexer"]


class Indexer(nn.Module):
    """Parameters `wq_b` [H*D, q_lora_rank], `weights_proj` [H, hidden] and a `compressor` of width D."""

    def __init__(self, config: Config, *, simulate_quant: bool) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(
            config.hidden_size, self.width, ratio=config.csa_ratio, overlap=True, eps=config.rms_norm_eps
        )
        self.simulate_quant = simulate_quant

    def round(self, x: Tensor) -> Tensor:
        """The FP4 format of queries and keys, when simulated."""
        return quant_dequant_fp4(hadamard(x), block=32) if self.simulate_quant else x

    def queries(self, x: Tensor, q_r: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Index queries [B, T, H, D], rounded, and head weights [B, T, H], scaled."""
        q = self.wq_b(q_r).unflatten(-1, (self.heads, self.width))
        q = self.round(apply_rope(q, cos_sin[0].unsqueeze(-2), cos_sin[1].unsqueeze(-2)))
        return q, self.weights_proj(x) * (self.width * self.heads) ** -0.5

    def scores(self, x: Tensor, q_r: Tensor, keys: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """fp32 [B, T, S] for keys [B, S, D] (already rounded)."""
        q, weights = self.queries(x, q_r, cos_sin)
        return index_scores(q, keys, weights)

    def keys(self, x: Tensor, rope: Rope, positions: Tensor | None = None) -> Tensor:
        """Keys [B, T//m, D] of a whole sequence; `positions` as in `Model.train_pass`."""
        return self.round(self.compressor(x, rope, positions))
