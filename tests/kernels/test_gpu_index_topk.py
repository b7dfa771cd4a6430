"""The index kernel in Triton: scores from packed keys in pages, and the exact top-k, against torch."""

import pytest
import torch

from rorqual import kernels
from rorqual.model.quant import pack_index_key, quant_dequant_fp4, unpack_index_key
from tests.kernels.gpu_device import DEVICE, Rows, paged

from rorqual.kernels.gpu import ops  # isort: skip


def reference(q, weights, rows, seen, top_k):
    """Picks int64 [T, K]; kernels/indexer.py over what quant.py gives back."""
    keys = unpack_index_key(rows, head_dim=q.shape[-1])
    scores = kernels.index_scores(quant_dequant_fp4(kernels.hadamard(q))[None], keys[None], weights[None])
    visible = (torch.arange(len(rows)) < seen[:, None])[None]
    picks = kernels.select_top_k(scores, visible, top_k=top_k)[0]
    return torch.nn.functional.pad(picks, (0, top_k - picks.shape[1]), value=-1)


def run(q, weights, keys, seen, top_k):
    picks, counts = ops.index_topk(q.to(DEVICE), weights.to(DEVICE), keys, seen=seen.to(DEVICE), top_k=top_k)
    return picks.cpu().long(), counts.cpu()


@pytest.mark.parametrize(
    ("width", "heads", "top_k", "page_rows"), [(64, 5, 8, 32), (128, 64, 33, 32), (32, 1, 1, 5)]
)
def test_picks_equal_torch_over_shuffled_and_partial_pages(width, heads, top_k, page_rows):
    torch.manual_seed(5)
    rows = pack_index_key(torch.randn(150, width))
    q, weights = torch.randn(6, heads, width), torch.randn(6, heads)
    seen = torch.tensor([0, 1, top_k, 65, 149, 150])
    picks, counts = run(q, weights, paged(rows, page_rows=page_rows), seen, top_k)
    assert torch.equal(picks, reference(q, weights, rows, seen, top_k))
    assert counts.tolist() == [min(top_k, n) for n in seen.tolist()]


def test_picks_cross_the_blocks_of_a_long_sequence():
    torch.manual_seed(6)
    rows = pack_index_key(torch.randn(2100, 32))
    q, weights = torch.randn(2, 3, 32), torch.rand(2, 3)
    seen = torch.tensor([2100, 1025])
    for top_k in (1100, 40):
        picks, _ = run(q, weights, paged(rows, page_rows=32), seen, top_k)
        assert torch.equal(picks, reference(q, weights, rows, seen, top_k))


def test_ties_go_to_the_lower_key_and_zero_ties_with_minus_zero():
    keys = torch.zeros(90, 32)
    keys[::2, 0] = 1.0  # 45 equal keys; the others score 0, or -0 under a negative weight
    rows = pack_index_key(keys)
    q = torch.zeros(3, 2, 32)
    q[:, :, :] = kernels.hadamard(torch.eye(32)[0] * 4.0)
    weights = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -0.0]])
    picks, _ = run(q, weights, paged(rows, page_rows=32), torch.tensor([90, 90, 90]), 50)
    assert picks[0].tolist() == sorted([*range(0, 90, 2), 1, 3, 5, 7, 9])
    assert picks[1].tolist() == sorted([*range(1, 90, 2), 0, 2, 4, 6, 8])
    assert picks[2].tolist() == list(range(50))


def test_a_table_per_query_serves_sequences_of_different_lengths():
    torch.manual_seed(7)
    rows = [pack_index_key(torch.randn(n, 32)) for n in (70, 20)]
    one, two = (paged(part, page_rows=16, seed=n) for n, part in enumerate(rows))
    table = torch.full((3, len(one.table)), -1, dtype=torch.int32)
    table[0], table[2] = one.table.cpu(), one.table.cpu()
    table[1, : len(two.table)] = two.table.cpu() + len(one.pool)
    pool = torch.zeros(len(one.pool) + len(two.pool), one.pool.shape[1], dtype=torch.uint8)
    pool[: len(one.pool)], pool[len(one.pool) :] = one.pool.cpu(), two.pool.cpu()
    both = Rows(pool=pool.to(DEVICE), table=table.to(DEVICE), page_rows=16)
    q, weights, seen = torch.randn(3, 4, 32), torch.randn(3, 4), torch.tensor([70, 20, 33])
    picks, _ = run(q, weights, both, seen, 9)
    for t, part in enumerate((rows[0], rows[1], rows[0])):
        assert torch.equal(picks[t], reference(q[t : t + 1], weights[t : t + 1], part, seen[t : t + 1], 9)[0])
    alone, _ = run(q[2:], weights[2:], one, seen[2:], 9)
    assert torch.equal(alone[0], picks[2])


def test_keys_that_are_nan_or_in_no_page_come_first():
    rows = pack_index_key(torch.randn(64, 32, generator=torch.Generator().manual_seed(8)))
    rows[10, 16] = 255  # the scale of a NaN block
    keys = paged(rows, page_rows=16)
    keys.table[3] = 10_000
    picks, _ = run(torch.ones(1, 1, 32), torch.ones(1, 1), keys, torch.tensor([64]), 3)
    assert picks.tolist() == [[10, 48, 49]]


def test_index_topk_refuses_what_does_not_fit():
    keys = paged(torch.zeros(8, 17, dtype=torch.uint8), page_rows=4)
    q, weights, seen = torch.zeros(1, 2, 32), torch.zeros(1, 2), torch.tensor([3])
    with pytest.raises(ValueError, match="index heads of width 33"):
        run(torch.zeros(1, 2, 33), weights, keys, seen, 2)
    with pytest.raises(ValueError, match="top_k is 0"):
        run(q, weights, keys, seen, 0)
    with pytest.raises(ValueError, match="9 rows of 17 bytes do not fit a page of 80"):
        run(q, weights, Rows(pool=keys.pool, table=keys.table, page_rows=9), seen, 2)
    with pytest.raises(ValueError, match=r"page table: torch\.int64"):
        run(q, weights, Rows(pool=keys.pool, table=keys.table.long(), page_rows=4), seen, 2)
    with pytest.raises(ValueError, match=r"seen: torch.int64 \[2\]"):
        run(q, weights, keys, torch.tensor([3, 3]), 2)
