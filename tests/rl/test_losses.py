"""GRPO's pieces against short references."""

import math

import pytest
import torch

from rorqual.rl.losses import group_advantages, policy_loss, token_log_probs
from rorqual.rl.optim import orthogonalize


def test_advantages_are_standardised_within_the_group():
    got = group_advantages([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 1, 1])
    assert got[:4] == pytest.approx([1, -1, -1, 1], abs=1e-4)
    assert got[4:] == [0.0, 0.0]  # no spread: nothing to learn


def test_infrastructure_failures_count_nowhere():
    with_failure = group_advantages([1.0, 0.0, None], [0, 0, 0])
    assert with_failure == [*group_advantages([1.0, 0.0], [0, 0]), 0.0]
    assert group_advantages([None], [3]) == [0.0]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 2.0])
def test_policy_loss_equals_the_clipped_objective(ratio, advantage):
    old = torch.tensor([-1.0])
    new = (old + math.log(ratio)).requires_grad_()
    loss, clipped = policy_loss(new, old, torch.tensor([advantage]))
    expected = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
    assert float(loss.detach()) == pytest.approx(-expected, rel=1e-5)
    loss.backward()
    outside = (ratio > 1.28 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert bool(clipped) == outside
    assert float(new.grad) == pytest.approx(0.0 if outside else -ratio * advantage, rel=1e-5)


def test_on_policy_gradient_is_the_plain_policy_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    ids, advantages = torch.randint(0, 7, (5,)), torch.randn(5)
    log_probs, _ = token_log_probs(logits, ids)
    loss, clipped = policy_loss(log_probs, log_probs.detach(), advantages)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(log_probs * advantages).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert not clipped.any()


def test_entropy_is_that_of_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    _, entropy = token_log_probs(logits, torch.tensor([0]))
    assert float(entropy) == pytest.approx(1.5 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (3, 12, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    # Newton-Schulz with these coefficients lands in [0.68, 1.13], not on 1
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    cosine = (orthogonalize(matrix) * (u @ vh)).sum() / (u @ vh).norm() / orthogonalize(matrix).norm()
    assert float(cosine) > 0.97
