"""mHC: manifold-constrained hyper-connections, a residual of several streams with learned mixing.

mix = (vec(X) fn^T) / rms(vec(X)); pre = sigmoid(.)+eps, post = 2 sigmoid(.), comb = Sinkhorn(softmax(.));
y = sum_i pre_i X_i;  X'_k = post_k F(y) + sum_j comb[j, k] X_j  (comb is applied transposed).   (spec/model.md 4)
Shapes: B batch, T tokens, N streams, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels import sinkhorn
from rorqual.model.config import Config

__all__ = ["HyperConnection", "HyperHead", "Streams"]

Streams = tuple[Tensor, ...]
"""The residual: N tensors [B, T, D], kept apart so that mixing them copies nothing."""


def _mix(streams: Streams, weight: Tensor, eps: float) -> Tensor:
    """fp32 [B, T, rows of weight]."""
    with torch.autocast(streams[0].device.type, enabled=False):
        wide = [stream.float() for stream in streams]
        parts = weight.float().chunk(len(streams), dim=1)
        mix = sum(nn.functional.linear(stream, part) for stream, part in zip(wide, parts, strict=True))
        square = torch.stack([stream.square().mean(-1, keepdim=True) for stream in wide]).mean(0)
        return mix * torch.rsqrt(square + eps)


def _weighted(streams: Streams, weights: Tensor) -> Tensor:
    """sum_i weights[..., i] * streams[i], in fp32, returned in the streams' dtype."""
    total = weights[..., :1] * streams[0].float()
    for i, stream in enumerate(streams[1:], start=1):
        total = torch.addcmul(total, weights[..., i : i + 1], stream.float())
    return total.to(streams[0].dtype)


class HyperConnection(nn.Module):
    """One site: `fn` [(2+N)*N, N*D], `base` [(2+N)*N], `scale` [3], all fp32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        count = config.hc_mult
        self.streams, self.iters, self.eps = count, config.hc_sinkhorn_iters, config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty((2 + count) * count, count * config.hidden_size))
        self.base = nn.Parameter(torch.zeros((2 + count) * count))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
        """N streams [B, T, D] to the sublayer's input [B, T, D], post fp32 [B, T, N] and comb fp32 [B, T, N, N]."""
        n = self.streams
        mix = _mix(streams, self.fn, self.norm_eps)
        pre = torch.sigmoid(self.scale[0] * mix[..., :n] + self.base[:n]) + self.eps
        post = 2 * torch.sigmoid(self.scale[1] * mix[..., n : 2 * n] + self.base[n : 2 * n])
        logits = (self.scale[2] * mix[..., 2 * n :] + self.base[2 * n :]).flatten(0, 1)
        logits = logits.t().contiguous().view(n, n, -1)  # [row, column, tokens]
        comb = sinkhorn(logits, iters=self.iters, eps=self.eps).permute(2, 0, 1).contiguous()
        return _weighted(streams, pre), post, comb.view(*mix.shape[:2], n, n)

    @staticmethod
    def merge(streams: Streams, output: Tensor, post: Tensor, comb: Tensor) -> Streams:
        """The streams after the sublayer's output [B, T, D]."""
        wide, merged = output.float(), []
        for k in range(len(streams)):
            total = post[..., k : k + 1] * wide
            for j, stream in enumerate(streams):
                total = torch.addcmul(total, comb[:, :, j, k, None], stream.float())
            merged.append(total.to(streams[0].dtype))
        return tuple(merged)


class HyperHead(nn.Module):
    """The last mix, streams to one vector: `fn` [N, N*D], `base` [N], `scale` [1]; no Sinkhorn."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(config.hc_mult))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, streams: Streams) -> Tensor:
        """N streams [B, T, D] to [B, T, D]."""
        pre = torch.sigmoid(self.scale * _mix(streams, self.fn, self.norm_eps) + self.base) + self.eps
        return _weighted(streams, pre)
