"""The prefix tree: what it finds, what it keeps, what it lets go, and that a hit computes what a cold start would."""

import gc

import pytest
import torch

from rorqual.engine.prefix import PrefixTree
from rorqual.engine.sequence import PagedSequence, replay_tokens

BOUND = {"exact": 2e-5, "packed": 2e-3}  # see test_sequence.py


@pytest.fixture
def kept(paging, opened, prompt):
    """A tree that holds 300 tokens, whose sequence is gone."""
    tree = PrefixTree(paging.pool)
    paging.pool.reclaim = tree.evict
    sequence, _ = opened(paging, prompt(300))
    assert tree.insert(sequence) == 2
    sequence.close()
    return tree


@pytest.mark.parametrize("length", [128, 129, 130, 255, 256, 257, 258, 300])
def test_a_hit_computes_what_a_cold_start_would(paging, kept, plain, prompt, cache_format, length):
    ids = prompt(300)[:length]
    sequence, match = kept.open(paging, ids)
    assert match.tokens == (length - 1) // 128 * 128 == sequence.length
    logits = sequence.append(ids[match.tokens :])
    torch.testing.assert_close(logits, plain(ids, cache_format), atol=BOUND[cache_format], rtol=0)
    sequence.close()
    kept.check_integrity()
    paging.pool.check_integrity([kept.held_pages()], slabs=[])


def test_a_boundary_with_a_snapshot_costs_nothing_and_one_without_is_replayed(paging, kept, prompt):
    assert kept.match(prompt(300)).replay == 0
    first = kept.match(prompt(300)[:200])  # the snapshot at 128 was given up for the one at 256
    assert (first.tokens, first.replay) == (128, replay_tokens(paging.pool.layout))
    assert kept.match(prompt(300)[:200], max_replay=0).reason == "replay"


def test_a_miss_says_why(paging, kept, prompt):
    assert kept.match(prompt(300)).reason == "hit"
    assert kept.match(prompt(100)).reason == "short"
    assert kept.match(prompt(300, seed=5)).reason == "new"
    assert kept.match(prompt(300), space="another").reason == "empty"
    for ids, space in ((prompt(300), ""), (prompt(100), ""), (prompt(300), "another")):
        kept.open(paging, ids, space=space)[0].close()
    statistics = kept.statistics()
    assert statistics.reasons == {"hit": 1, "short": 1, "empty": 1}
    assert (statistics.asked_tokens, statistics.hit_tokens) == (700, 256)


def test_branches_share_their_trunk(paging, kept, opened, plain, prompt):
    ids = prompt(300)[:256] + prompt(200, seed=8)
    sequence, match = kept.open(paging, ids)
    sequence.append(ids[match.tokens :])
    assert kept.insert(sequence) == 1  # 456 tokens: one whole page more
    assert kept.insert(sequence) == 0
    assert kept.statistics().pages == 3
    sequence.close()
    paging.pool.check_integrity([kept.held_pages()])


def test_the_least_recently_used_leaf_goes_first_and_the_trunk_last(paging, kept, opened, prompt):
    other, _ = opened(paging, prompt(300)[:128] + prompt(172, seed=3))
    kept.insert(other)
    other.close()
    kept.open(paging, prompt(300))[0].close()  # the first branch is the younger now
    assert kept.evict(1)
    assert kept.match(prompt(300)).tokens == 256
    assert kept.match(prompt(300)[:128] + prompt(172, seed=3)).tokens == 128
    kept.check_integrity()


def test_pinned_and_used_prefixes_are_never_evicted(paging, kept, opened, prompt):
    live, _ = opened(paging, prompt(300, seed=1))
    kept.insert(live)
    assert kept.pin(prompt(300)) == 256
    kept.evict(1 << 40)
    assert kept.match(prompt(300)).tokens == 256 and kept.match(prompt(300, seed=1)).tokens == 256
    kept.unpin(prompt(300))
    live.close()
    kept.evict(1 << 40)
    assert kept.statistics().pages == 0
    gc.collect()
    paging.pool.check_integrity([], slabs=[])
    assert paging.pool.used_bytes == 0


def test_memory_that_prefixes_hold_is_given_to_whoever_needs_it(make_paging, opened, plain, prompt):
    paging = make_paging(kv_bytes=350_000)
    tree = PrefixTree(paging.pool)
    paging.pool.reclaim = tree.evict
    for seed in range(8):
        sequence, logits = opened(paging, prompt(260, seed=seed))
        torch.testing.assert_close(logits, plain(prompt(260, seed=seed)), atol=2e-5, rtol=0)
        tree.insert(sequence)
        sequence.close()
        assert paging.pool.used_bytes <= 350_000
        tree.check_integrity()
    assert tree.statistics().evicted_pages > 0
    assert tree.match(prompt(260, seed=7)).tokens == 256


def test_snapshots_have_a_limit_of_their_own(paging, opened, prompt):
    sequence, _ = opened(paging, prompt(500))
    size = len(sequence.snapshots[256].data)
    tree = PrefixTree(paging.pool, snapshot_bytes=size)
    tree.insert(sequence)
    assert (tree.statistics().snapshots, tree.statistics().snapshot_bytes) == (1, size)
    assert tree.match(prompt(500)).replay == 0  # the deeper one stayed
    sequence.close()


def test_clearing_leaves_live_sequences_alone(paging, kept, plain, prompt, cache_format):
    sequence, match = kept.open(paging, prompt(300))
    kept.clear()
    logits = sequence.append(prompt(300)[match.tokens :])
    torch.testing.assert_close(logits, plain(prompt(300), cache_format), atol=BOUND[cache_format], rtol=0)
    paging.pool.check_integrity([sequence.pages], slabs=[sequence.slab])


def test_a_prefix_that_fails_to_open_leaves_nothing_behind(paging, kept, prompt, monkeypatch):
    def broken(segments):
        raise OSError("no experts")

    with monkeypatch.context() as patch:
        patch.setattr(paging.runner, "forward", broken)
        with pytest.raises(OSError, match="experts"):
            kept.open(paging, prompt(300)[:200])
    paging.pool.check_integrity([kept.held_pages()], slabs=[])
    assert isinstance(kept.open(paging, prompt(300))[0], PagedSequence)
