"""Mixture of experts: sqrt-softplus scores, bias for selection only, hash-routed first layers, a shared expert.

s = sqrt(softplus(x gate^T)); experts = top-k of s + bias, or tid2eid[token]; weights = s / sum(s) * route_scale;
expert(x) = w2 (silu(min(w1 x, c)) * clip(w3 x, -c, c)); the shared expert is clamped too.        (spec/model.md 5)
Shapes: N tokens, E experts, K experts per token, D hidden width, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.model.config import Config
from rorqual.model.layers import Linear

__all__ = ["MoE"]

DENSE_TOKENS = 256
"""Up to this many tokens all experts run as one batched product: fewer, larger operations."""
DENSE_EXPERTS = 16


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up with V4's clamps; `limit` 0 switches them off."""
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class Gate(nn.Module):
    """Router: `weight` [E, D], and `bias` [E] (score layers) or `tid2eid` int64 [vocab, K] (hash layers)."""

    tid2eid: Tensor

    def __init__(self, config: Config, *, hashed: bool) -> None:
        super().__init__()
        self.top_k, self.route_scale, self.hashed = (
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            hashed,
        )
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if hashed:
            table = torch.arange(config.vocab_size)[:, None] * self.top_k + torch.arange(self.top_k)
            self.register_buffer("tid2eid", table % config.n_routed_experts)
        else:
            self.bias = nn.Parameter(torch.zeros(config.n_routed_experts), requires_grad=False)

    def forward(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D], token_ids [N] to experts int64 [N, K] and weights fp32 [N, K]."""
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sqrt(F.softplus(F.linear(x.float(), self.weight.float())))
        picked = self.tid2eid[token_ids] if self.hashed else self._best(scores)
        weights = scores.gather(1, picked)
        return picked, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.route_scale

    def _best(self, scores: Tensor) -> Tensor:
        return torch.topk(scores + self.bias, self.top_k, dim=-1).indices


class Experts(nn.Module):
    """Stacked routed experts: `w1`, `w3` [E, F, D], `w2` [E, D, F]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        count, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.empty(count, width, hidden))
        self.w3 = nn.Parameter(torch.empty(count, width, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, width))

    def forward(self, x: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], picked [N, K], weights [N, K] to fp32 [N, D]."""
        count = len(self.w1)
        if len(x) <= DENSE_TOKENS and count <= DENSE_EXPERTS and not torch.is_grad_enabled():
            inner = swiglu(x @ self.w1.transpose(1, 2), x @ self.w3.transpose(1, 2), self.limit)  # [E, N, F]
            dense = torch.zeros(len(x), count, dtype=weights.dtype, device=x.device).scatter_add_(
                1, picked, weights
            )
            return (dense.t()[..., None] * (inner @ self.w2.transpose(1, 2)).float()).sum(0)
        order = torch.argsort(picked.flatten(), stable=True)
        tokens = order // picked.shape[1]
        gathered = x[tokens]
        sizes = torch.bincount(picked.flatten(), minlength=count).tolist()
        outs = []
        for expert, rows in enumerate(torch.split(gathered, sizes)):
            if len(rows):
                inner = swiglu(F.linear(rows, self.w1[expert]), F.linear(rows, self.w3[expert]), self.limit)
                outs.append(F.linear(inner, self.w2[expert]))
        out = torch.cat(outs).float() * weights.flatten()[order][:, None]
        return torch.zeros(len(x), x.shape[1], device=x.device).index_add_(0, tokens, out)


class SharedExperts(nn.Module):
    """The expert every token visits: `w1`, `w3` [n*F, D], `w2` [D, n*F]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.moe_intermediate_size * config.n_shared_experts
        self.limit = config.swiglu_limit
        self.w1 = Linear(config.hidden_size, width)
        self.w3 = Linear(config.hidden_size, width)
        self.w2 = Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(swiglu(self.w1(x), self.w3(x), self.limit))
        return out


class MoE(nn.Module):
    """Router, routed experts and shared expert of one block."""

    def __init__(self, config: Config, *, hashed: bool) -> None:
        super().__init__()
        self.gate = Gate(config, hashed=hashed)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config)
        self.load: Tensor | None = None
        """Tokens per expert of the last full pass with gradients, int64 [E]: feeds the balancing bias."""

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x [B, T, D], token_ids int64 [B, T] to [B, T, D]."""
        flat = x.flatten(0, 1)
        picked, weights = self.gate(flat, token_ids.flatten())
        if torch.is_grad_enabled():
            self.load = torch.bincount(picked.flatten(), minlength=len(self.experts.w1))
        routed = self.experts(flat, picked, weights)
        out: Tensor = routed + self.shared_experts(flat).float()
        return out.to(x.dtype).view_as(x)
