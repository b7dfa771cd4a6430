"""The Triton face and the native CPU face give the same answers to the same call, over the same `Paged` rows."""

import pytest
import torch

from rorqual import kernels
from rorqual.model.quant import pack_entry, pack_index_key
from tests.kernels.gpu_device import DEVICE, paged

from rorqual.kernels.gpu import ops  # isort: skip

if not kernels.cpu_status().available:
    pytest.skip(kernels.cpu_status().reason, allow_module_level=True)


def here_and_there(rows, *, page_rows):
    found = paged(rows, page_rows=page_rows)
    cpu = kernels.Paged(pool=found.pool.cpu(), table=found.table.cpu(), page_rows=page_rows)
    return cpu, kernels.Paged(pool=found.pool, table=found.table, page_rows=page_rows)


def test_index_topk_picks_the_same():
    torch.manual_seed(20)
    cpu, gpu = here_and_there(pack_index_key(torch.randn(100, 128)), page_rows=32)
    q, weights, seen = torch.randn(3, 32, 128), torch.rand(3, 32), torch.tensor([0, 50, 100])
    want = kernels.index_topk_cpu(q, weights, cpu, seen=seen, top_k=20, cache_format="packed")
    got = ops.index_topk(q.to(DEVICE), weights.to(DEVICE), gpu, seen=seen.to(DEVICE), top_k=20)
    assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(got, want, strict=True))


def test_attend_agrees_to_bfloat16():
    """The native kernel rounds queries and weights to bf16; so does this one for bf16 queries."""
    torch.manual_seed(21)
    cpu, gpu = here_and_there(pack_entry(torch.randn(40, 512), rope_dim=64), page_rows=32)
    window = pack_entry(torch.randn(5, 512), rope_dim=64)
    q, sink, seen = (torch.randn(2, 4, 512) / 8).bfloat16(), torch.randn(4), torch.tensor([17, 40])
    picks = torch.arange(0, 40, 2, dtype=torch.int32).repeat(2, 1)
    counts = torch.tensor([8, 20], dtype=torch.int32)
    shared = {"position": 3, "window_size": 8, "rope_dim": 64}
    want = kernels.attend_cpu(
        *(q.float(), window),
        **shared,
        sink=sink,
        cache_format="packed",
        entries=cpu,
        seen=seen,
        picks=picks,
        pick_counts=counts,
    )
    far = {
        "entries": gpu,
        "seen": seen.to(DEVICE),
        "picks": picks.to(DEVICE),
        "pick_counts": counts.to(DEVICE),
    }
    got = ops.attend(q.to(DEVICE), window.to(DEVICE), sink=sink.to(DEVICE), **shared, **far)
    torch.testing.assert_close(got.cpu().float(), want, atol=2**-6, rtol=2**-6)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_matmul_agrees_with_the_reference_of_the_same_signature(kind):
    generator = torch.Generator().manual_seed(22)
    weight = torch.randint(0, 120, (40, 96 if kind == "fp8" else 48), dtype=torch.uint8, generator=generator)
    scale = torch.randint(
        120, 130, (1, 1) if kind == "fp8" else (40, 3), dtype=torch.uint8, generator=generator
    )
    x = torch.randn(3, 96, generator=generator)
    want = kernels.matmul(x, weight, scale, kind=kind)
    got = ops.matmul(x.to(DEVICE), weight.to(DEVICE), scale.to(DEVICE), kind=kind)
    torch.testing.assert_close(got.cpu(), want, atol=1e-6 * want.abs().max().item(), rtol=1e-5)
