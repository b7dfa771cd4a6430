"""The small ops: RoPE, Hadamard, Sinkhorn, pooling, index scores and top-k."""

import math

import pytest
import torch

import rorqual.kernels as kernels


def test_all_names_are_exported():
    assert sorted(kernels.__all__) == kernels.__all__
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_rope_rotates_interleaved_pairs_of_the_last_dims():
    x = torch.randn(3, 10, dtype=torch.float64).float()
    theta = kernels.rope_frequencies(4, base=10000.0)
    positions = torch.tensor([0, 1, 7])
    turned = kernels.apply_rope(x, *kernels.rope_table(theta, positions))
    pairs = torch.view_as_complex(x[:, 6:].double().view(3, 2, 2).contiguous())
    angle = positions[:, None].double() * (10000.0 ** (-torch.arange(0, 4, 2).double() / 4))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)
    torch.testing.assert_close(turned[:, 6:], expected.float(), atol=1e-6, rtol=0)
    assert torch.equal(turned[:, :6], x[:, :6])
    back = kernels.apply_rope(turned, *kernels.rope_table(theta, positions), inverse=True)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)


def test_yarn_ramp_of_the_released_models():
    """spec/model.md 2.1: 64 dims, base 160000, factor 16: the ramp runs from 15 to 25."""
    plain = kernels.rope_frequencies(64, base=160000.0)
    yarn = kernels.rope_frequencies(64, base=160000.0, factor=16.0)
    ratio = plain / yarn
    torch.testing.assert_close(ratio[:16], torch.ones(16))
    torch.testing.assert_close(ratio[25:], torch.full((7,), 16.0))
    assert bool((ratio[16:25] > 1).all()) and bool((ratio[16:25] < 16).all())


def test_hadamard_is_orthonormal_and_refuses_odd_sizes():
    matrix = kernels.hadamard(torch.eye(8))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8))
    with pytest.raises(ValueError, match="power of two"):
        kernels.hadamard(torch.ones(6))


def test_sinkhorn_ends_on_columns_and_is_nearly_doubly_stochastic():
    logits = torch.randn(4, 4, 50)
    comb = kernels.sinkhorn(logits, iters=20, eps=1e-6)
    torch.testing.assert_close(comb.sum(0), torch.ones(4, 50), atol=1e-5, rtol=0)
    torch.testing.assert_close(comb.sum(1), torch.ones(4, 50), atol=1e-2, rtol=0)
    one = torch.softmax(logits[..., 0].double(), dim=1) + 1e-6
    one = one / (one.sum(0, keepdim=True) + 1e-6)
    for _ in range(19):
        one = one / (one.sum(1, keepdim=True) + 1e-6)
        one = one / (one.sum(0, keepdim=True) + 1e-6)
    torch.testing.assert_close(comb[..., 0], one.float(), atol=1e-6, rtol=0)


def test_pool_is_a_softmax_mean_and_skips_rows_without_score():
    values = torch.tensor([[1.0, 10.0], [3.0, 30.0], [100.0, 100.0]])
    scores = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [-math.inf, -math.inf]])
    torch.testing.assert_close(kernels.pool(values, scores), torch.tensor([2.0, 25.0]))


def test_overlap_takes_the_first_half_of_the_block_before():
    blocks = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32).view(2, 3, 2, 4)
    rows = kernels.overlap_rows(blocks, first=-1.0)
    assert rows.shape == (2, 3, 4, 2)
    assert bool((rows[:, 0, :2] == -1).all())
    assert torch.equal(rows[:, 1, :2], blocks[:, 0, :, :2])
    assert torch.equal(rows[:, 1, 2:], blocks[:, 1, :, 2:])


def test_index_scores_are_weighted_rectified_dots():
    q, keys, weights = torch.randn(1, 2, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 2, 3)
    got = kernels.index_scores(q, keys, weights)
    for t in range(2):
        for s in range(5):
            expected = sum(
                float(weights[0, t, h]) * max(float(q[0, t, h] @ keys[0, s]), 0.0) for h in range(3)
            )
            assert math.isclose(float(got[0, t, s]), expected, abs_tol=1e-5)


def test_top_k_ties_go_to_the_earlier_entry_and_invisible_ones_are_minus_one():
    scores = torch.tensor([[[0.0, 2.0, 0.0, 0.0, 9.0]]])
    visible = torch.tensor([[[True, True, True, True, False]]])
    assert kernels.select_top_k(scores, visible, top_k=3).tolist() == [[[0, 1, 2]]]
    few = torch.tensor([[[True, False, False, False, False]]])
    assert kernels.select_top_k(scores, few, top_k=3).tolist() == [[[0, -1, -1]]]
