"""Sampling: reproducible, independent of the batch, and distributed as asked."""

import numpy as np
import pytest
import torch

from rorqual.engine import SamplingParams
from rorqual.engine.sampler import Allowed, philox_uniform, sample


def test_philox_equals_its_published_vectors():
    """Known answers of Philox 4x32-10 (Salmon et al. 2011, kat_vectors): counter and key all zero, all one bits."""
    zero = philox_uniform(np.array([0]), np.array([0]), np.array([0]))[0]
    words = (0x6627E8D5, 0xE169C58D)
    assert zero == ((words[0] << 21) ^ (words[1] >> 11)) * 2.0**-53
    ones = np.array([2**64 - 1], dtype=np.uint64)
    words = (0x408F276D, 0x41C83B0E)
    assert philox_uniform(ones, ones, ones)[0] == ((words[0] << 21) ^ (words[1] >> 11)) * 2.0**-53


def test_a_draw_depends_on_seed_sequence_and_position_only():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(seed=3, sequence=k) for k in range(4)]
    together, _ = sample(logits, params, [7, 8, 9, 10])
    alone = [int(sample(logits[k : k + 1], [params[k]], [7 + k])[0][0]) for k in range(4)]
    assert together.tolist() == alone


def test_temperature_zero_is_greedy_and_reports_the_untempered_log_probability():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    ids, logprobs = sample(logits, [SamplingParams(temperature=0.0)], [0])
    assert ids.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[:, 1])


def test_frequencies_follow_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(4000, -1)
    params = [SamplingParams(seed=1, sequence=k) for k in range(4000)]
    ids, _ = sample(logits, params, [0] * 4000)
    share = torch.bincount(ids, minlength=3) / 4000
    # three standard deviations of a share of 0.5 over 4000 draws are 0.024
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.024, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(500, -1)
    params = [SamplingParams(top_p=0.6, seed=2, sequence=k) for k in range(500)]
    ids, _ = sample(logits, params, [0] * 500)
    assert set(ids.tolist()) == {1, 2}


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}])
def test_bad_parameters_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def bits_of(tokens, vocab):
    words = np.zeros(-(-vocab // 32), dtype=np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def test_only_allowed_tokens_are_drawn_and_their_probabilities_add_up_to_one():
    logits = torch.randn(1, 70, generator=torch.Generator().manual_seed(1)).expand(300, -1)
    params = [SamplingParams(seed=4, sequence=k) for k in range(300)]
    mask = Allowed(bits=bits_of([3, 31, 32, 69], 70))
    ids, logprobs = sample(logits, params, [0] * 300, allowed=[mask] * 300)
    assert set(ids.tolist()) == {3, 31, 32, 69}
    expected = torch.log_softmax(logits[0, [3, 31, 32, 69]], -1)
    for token, at in ((3, 0), (31, 1), (32, 2), (69, 3)):
        torch.testing.assert_close(logprobs[ids == token][0], expected[at])


def test_a_mask_is_of_its_row_alone_and_may_ask_for_the_likeliest():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(600, -1)
    params = [SamplingParams(seed=5, sequence=k) for k in range(600)]
    free, _ = sample(logits, params, [0] * 600)
    allowed = [None, Allowed(greedy=True), Allowed(bits=bits_of([1, 2], 3), greedy=True)] * 200
    ids, _ = sample(logits, params, [0] * 600, allowed=allowed)
    assert ids[0::3].tolist() == free[0::3].tolist()
    assert set(ids[1::3].tolist()) == {0} and set(ids[2::3].tolist()) == {1}


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (np.zeros(3, dtype=np.uint32), "allows no token"),
        (np.array([0, 0, 1 << 6], dtype=np.uint32), "allows no token"),  # behind the vocabulary
        (np.ones(2, dtype=np.uint32), "3 words of 32 bits, got uint32"),
        (np.ones(3, dtype=np.uint8), "3 words of 32 bits, got uint8"),
    ],
)
def test_bad_masks_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 70), [SamplingParams()], [0], allowed=[Allowed(bits=bits)])
