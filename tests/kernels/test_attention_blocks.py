"""Attention, selection and index loss in blocks of queries, against whole score matrices and autograd.

float64, so that any difference is a wrong formula: at most 1e-12 is seen, 1e-10 is allowed.
"""

import pytest
import torch

from rorqual.kernels import attend_blocks, attention, index_loss, index_scores, select_entries, select_top_k
from tests.oracles import full_attention as oracle

BATCH, HEADS, WIDTH, WINDOW, INDEX_HEADS, INDEX_WIDTH = 2, 3, 6, 4, 5, 4
CLOSE = {"atol": 1e-10, "rtol": 0}


def _draw(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def _leaves(length, ratio, *, seed=0):
    """q, kv, entries, sink, index q, index keys, index weights."""
    size = length // ratio
    return _draw(
        seed,
        (BATCH, length, HEADS, WIDTH),
        (BATCH, length, WIDTH),
        (BATCH, size, WIDTH),
        (HEADS,),
        (BATCH, length, INDEX_HEADS, INDEX_WIDTH),
        (BATCH, size, INDEX_WIDTH),
        (BATCH, length, INDEX_HEADS),
    )


def _visible(length, ratio):
    return (torch.arange(length // ratio) < (torch.arange(length)[:, None] + 1) // ratio)[None]


def _grads(total, leaves):
    return torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)


@pytest.fixture(params=[1, 40, 1 << 18], ids=["block=window", "few blocks", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", request.param * HEADS * BATCH * 8)


@pytest.mark.parametrize("length, ratio", [(1, 4), (3, 4), (4, 4), (13, 4), (61, 4), (64, 16), (75, 16)])
@pytest.mark.parametrize("biased", [False, True])
def test_blocks_equal_whole_matrices_forward_and_backward(block, length, ratio, biased):
    leaves = q, kv, entries, sink, *_ = _leaves(length, ratio)
    bias = _draw(9, (1, length))[0].detach() if biased else None
    (d_out,) = _draw(7, (BATCH, length, HEADS, WIDTH))
    expected, far = oracle.attention(
        q, kv, entries, sink, window=WINDOW, visible=_visible(length, ratio), bias=bias
    )
    out, log_sum = attend_blocks(
        q, kv, sink=sink, window=WINDOW, entries=entries, ratio=ratio, entries_bias=bias
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    logits = torch.einsum("bthd,bsd->bths", q * WIDTH**-0.5, entries)
    logits = logits if bias is None else logits + bias[:, :, None, None]
    again = torch.exp(logits - log_sum[..., None]).masked_fill(~_visible(length, ratio)[:, :, None], 0.0)
    torch.testing.assert_close(again, far, **CLOSE)  # the log-sums give back the weights
    for ours, theirs in zip(
        _grads((out * d_out).sum(), leaves[:4]), _grads((expected * d_out).sum(), leaves[:4]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("entries", [0, 3])
def test_backward_equals_finite_differences(entries):
    q, kv, far, sink, *_ = _leaves(13, 4)
    given = [far] if entries else []

    def run(q, kv, sink, *far):
        return attend_blocks(q, kv, sink=sink, window=WINDOW, entries=far[0] if far else None, ratio=4)[0]

    assert torch.autograd.gradcheck(run, (q, kv, sink, *given))


@pytest.mark.parametrize("length, top_k", [(61, 5), (61, 1), (9, 5), (57, 2)])
def test_selection_sparse_attention_and_its_loss_equal_whole_matrices(block, length, top_k):
    leaves = q, kv, entries, sink, index_q, keys, weights = _leaves(length, 4, seed=1)
    visible = _visible(length, 4)
    whole = oracle.scores(index_q, keys, weights)
    mask = oracle.picks(whole, visible, top_k)
    expected, far = oracle.attention(q, kv, entries, sink, window=WINDOW, visible=mask)
    picked = select_entries(index_q, keys, weights, ratio=4, top_k=top_k)
    assert picked.shape == (BATCH, length, min(top_k, length // 4))
    assert torch.equal(attention.picked_mask(picked, length // 4), mask)
    out, log_sum = attend_blocks(q, kv, sink=sink, window=WINDOW, entries=entries, ratio=4, picked=picked)
    torch.testing.assert_close(out, expected, **CLOSE)
    shown_all = oracle.attention(q, kv, entries, sink, window=WINDOW, visible=visible)[1]
    _, dense_sum = attend_blocks(q, kv, sink=sink, window=WINDOW, entries=entries, ratio=4)
    cases = [(picked, log_sum, far, mask), (None, dense_sum, shown_all, visible)]  # sparse, dense warm-up
    for some, sums, attended, shown in cases:
        loss = index_loss(index_q, keys, weights, rows=q, entries=entries, log_sum=sums, ratio=4, picked=some)
        reference = oracle.index_loss(whole, attended, shown)
        torch.testing.assert_close(loss, reference, **CLOSE)
        ours, theirs = _grads(3 * loss, leaves), _grads(3 * reference, leaves)
        assert all(part is None for part in ours[:4]), "the loss must not reach the main attention"
        for got, wanted in zip(ours[4:], theirs[4:], strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)


def test_index_loss_of_a_sequence_that_sees_no_entry_is_zero():
    q, kv, entries, sink, index_q, keys, weights = _leaves(3, 4)
    _, log_sum = attend_blocks(q, kv, sink=sink, window=WINDOW, entries=entries, ratio=4)
    loss = index_loss(index_q, keys, weights, rows=q, entries=entries, log_sum=log_sum, ratio=4)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert not index_q.grad.any()


def test_selection_gives_ties_to_the_earlier_entry_in_every_block(block):
    index_q, weights = torch.ones(1, 40, 1, 2), torch.ones(1, 40, 1)
    keys = torch.ones(1, 10, 2)  # all scores equal
    picked = select_entries(index_q, keys, weights, ratio=4, top_k=3)
    for t in range(40):
        seen = min((t + 1) // 4, 3)
        assert sorted(picked[0, t].tolist()) == [-1] * (3 - seen) + list(range(seen))


def test_scores_of_blocks_are_those_of_the_whole():
    q, keys, weights = _draw(2, (1, 9, 5, 4), (1, 7, 4), (1, 9, 5), dtype=torch.float32)
    torch.testing.assert_close(index_scores(q, keys, weights), oracle.scores(q, keys, weights))


def test_top_k_with_many_ties_is_that_of_a_stable_sort():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(-2, 3, (2, 50, 40), generator=generator).float()  # five values: ties everywhere
    visible = torch.rand(2, 50, 40, generator=generator) < 0.7
    for top_k in (1, 7, 39, 40, 64):
        picked = select_top_k(scores, visible, top_k=top_k)
        expected = oracle.picks(scores, visible, top_k)
        assert torch.equal(attention.picked_mask(picked, 40), expected)
        shown = picked.masked_fill(picked < 0, 99)
        assert bool((shown.diff(dim=-1) >= 0).all()), "ascending, -1 last"
