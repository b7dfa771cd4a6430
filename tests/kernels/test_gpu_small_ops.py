"""RMSNorm, RoPE, the compressor step and mHC in Triton, against the torch kernels."""

from types import SimpleNamespace

import pytest
import torch

from rorqual import kernels
from rorqual.model.hyper_connections import HyperConnection
from rorqual.model.layers import RMSNorm, rms_norm
from tests.kernels.gpu_device import DEVICE

from rorqual.kernels.gpu import ops  # isort: skip  (after gpu_device: it skips without triton)


def close(got, want, *, atol=2e-6):
    torch.testing.assert_close(got.cpu(), want.cpu(), atol=atol, rtol=2e-6)


@pytest.mark.parametrize("shape", [(3, 5, 100), (1, 1), (2, 5000), (0, 64)])
def test_rms_norm_equals_torch(shape):
    torch.manual_seed(0)
    x, norm = torch.randn(shape) * 3, RMSNorm(shape[-1], eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    close(ops.rms_norm(x.to(DEVICE), eps=1e-6), rms_norm(x, 1e-6))
    close(ops.rms_norm(x.to(DEVICE), norm.weight.detach().to(DEVICE), eps=1e-6), norm(x).detach())


def test_rms_norm_keeps_bfloat16_and_shows_nan():
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = ops.rms_norm(x.to(DEVICE), eps=1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.cpu().float(), rms_norm(x, 1e-6).float(), atol=0, rtol=2**-7)
    x[2, 5] = float("nan")
    got = ops.rms_norm(x.to(DEVICE), eps=1e-6).cpu()
    assert got[2].isnan().all() and not got[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("heads", "width", "rope"), [(3, 48, 16), (1, 6, 6), (5, 100, 2)])
def test_rope_equals_torch(heads, width, rope, inverse):
    x = torch.randn(4, heads, width, generator=torch.Generator().manual_seed(2))
    frequencies = kernels.rope_frequencies(rope, base=160000.0, factor=16.0)
    cos, sin = kernels.rope_table(frequencies, torch.tensor([0, 1, 4095, 2**20]))
    shared = (cos[:, None], sin[:, None])  # a row for all heads of a token
    got = ops.apply_rope(x.to(DEVICE), *(part.to(DEVICE) for part in shared), inverse=inverse)
    close(got, kernels.apply_rope(x, *shared, inverse=inverse))
    own = tuple(part[:, None].expand(-1, heads, -1).flip(0) for part in (cos, sin))
    got = ops.apply_rope(x.to(DEVICE), *(part.to(DEVICE) for part in own), inverse=inverse)
    close(got, kernels.apply_rope(x, *own, inverse=inverse))


@pytest.mark.parametrize(("rows", "width", "rope"), [(8, 48, 16), (13, 100, 2), (1, 32, 32), (128, 24, 8)])
def test_pooled_entries_equal_torch(rows, width, rope):
    torch.manual_seed(3)
    values, scores, weight = torch.randn(3, rows, width), torch.randn(3, rows, width) * 4, torch.randn(width)
    if rows > 1:  # the block before the first: no score, and values that must not matter
        scores[0, : rows // 2], values[0, : rows // 2] = float("-inf"), float("nan")
        scores[1, rows // 2 :, 3] = float("-inf")
    cos, sin = kernels.rope_table(kernels.rope_frequencies(rope, base=1e4), torch.tensor([0, 128, 4096]))
    got = ops.pool_entries(
        *(part.to(DEVICE) for part in (values, scores, weight)),
        cos=cos.to(DEVICE),
        sin=sin.to(DEVICE),
        eps=1e-6,
    )
    pooled = kernels.pool(values.nan_to_num(), scores)
    close(got, kernels.apply_rope(rms_norm(pooled, 1e-6) * weight, cos, sin), atol=5e-6)


@pytest.mark.parametrize(("tokens", "count", "hidden"), [(1, 4, 70), (17, 4, 520), (2, 3, 33)])
def test_hyper_connections_equal_torch(tokens, count, hidden):
    torch.manual_seed(4)
    config = SimpleNamespace(
        hc_mult=count, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_size=hidden
    )
    site = HyperConnection(config)
    for parameter, spread in ((site.fn, 0.1), (site.base, 1.0), (site.scale, 1.0)):
        torch.nn.init.normal_(parameter, std=spread)
    streams, output = torch.randn(tokens, count, hidden), torch.randn(tokens, hidden)
    apart = tuple(streams[None, :, i] for i in range(count))
    with torch.no_grad():
        y, post, comb = site(apart)
        merged = torch.stack(site.merge(apart, output[None], post, comb), 2)[0]
    parts = [part.detach().to(DEVICE) for part in (streams, site.fn, site.base)]
    got = ops.hc_pre(*parts, scale=site.scale.detach().to(DEVICE), iters=20, eps=1e-6, norm_eps=1e-6)
    for mine, want in zip(got, (y[0], post[0], comb[0]), strict=True):
        close(mine, want, atol=2e-5)
    close(ops.hc_post(parts[0], output.to(DEVICE), *got[1:]), merged, atol=5e-5)
    alone = ops.hc_pre(
        parts[0][:1], *parts[1:], scale=site.scale.detach().to(DEVICE), iters=20, eps=1e-6, norm_eps=1e-6
    )
    assert all(torch.equal(one[0], many[0]) for one, many in zip(alone, got, strict=True))


def test_small_ops_refuse_what_does_not_fit():
    x = torch.randn(2, 3, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight: torch.float32 \[7\], expected float32 or bfloat16 \[8\]"):
        ops.rms_norm(x, torch.ones(7, device=DEVICE), eps=1e-6)
    with pytest.raises(ValueError, match=r"x: torch.float64"):
        ops.rms_norm(x.double(), eps=1e-6)
    with pytest.raises(ValueError, match="even number"):
        ops.apply_rope(x, torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="does not broadcast"):
        ops.apply_rope(x, torch.ones(5, 1, 4, device=DEVICE), torch.ones(5, 1, 4, device=DEVICE))
    with pytest.raises(ValueError, match=r"scores: .*expected float32 \[2, 3, 8\]"):
        ops.pool_entries(x, x[:1], torch.ones(8, device=DEVICE), cos=x[:, 0, :4], sin=x[:, 0, :4], eps=1e-6)
    with pytest.raises(ValueError, match=r"fn: .*expected float32 \[15, 24\]"):
        ops.hc_pre(x, x[0], x[0, 0], scale=x[0, 0], iters=1, eps=0.0, norm_eps=0.0)
