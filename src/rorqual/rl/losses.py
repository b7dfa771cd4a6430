"""Policy losses of GRPO over whole episodes: group-relative advantages, clipped ratios, token mean.

A = (r - mean(group)) / (std(group) + eps); L = -sum_t min(rho A, clip(rho, 1-lo, 1+hi) A) / sum_t 1 over the model's
own tokens; rho = pi(t) / pi_old(t).                                 (spec/rl.md 1 and 5.4; DAPO's clip-higher)
Groups whose rewards are all equal teach nothing and leave both sums. Infrastructure failures are left out of the
group before its mean is taken: they are nobody's reward.
Shapes: B episodes, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["group_advantages", "policy_loss", "token_log_probs"]


def group_advantages(
    rewards: Sequence[float | None], groups: Sequence[int], *, eps: float = 1e-6
) -> list[float]:
    """One advantage per episode; 0 for groups without spread. `None` rewards (infrastructure) count nowhere."""
    members: dict[int, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        if reward is not None:
            members.setdefault(group, []).append(reward)
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        values = members.get(group, [])
        mean = math.fsum(values) / len(values) if values else 0.0
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)) if values else 0.0
        out.append(0.0 if reward is None or std < eps else (reward - mean) / (std + eps))
    return out


def token_log_probs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of ids [N] under fp32 logits [N, V], and each place's entropy (no gradient), both [N]."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[Tensor, Tensor]:
    """Sum (not mean) of the clipped objective over N tokens, and which tokens were clipped [N].

    log_probs, old_log_probs, advantages: fp32 [N], one per token of the model's own.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    outside = ((ratio * advantages) > (clipped * advantages)).detach()
    return loss, outside
