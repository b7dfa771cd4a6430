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
    pin = kept.pin(prompt(300))
    assert pin.tokens == 256
    kept.evict(1 << 40)
    assert kept.match(prompt(300)).tokens == 256 and kept.match(prompt(300, seed=1)).tokens == 256
    kept.unpin(pin)
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


@pytest.mark.parametrize("length", [9, 100, 127, 129, 200, 255, 300])
def test_a_frontier_goes_on_to_the_token_and_computes_what_a_cold_start_would(
    paging, opened, plain, prompt, cache_format, length
):
    tree, ids = PrefixTree(paging.pool), prompt(300)
    sequence, _ = opened(paging, ids[:length])
    tree.insert(sequence)
    assert tree.insert_frontier(sequence, at=length) and tree.insert_frontier(sequence, at=length)
    sequence.append(prompt(20, seed=4))  # the one that it came from goes elsewhere, in the same page
    sequence.close()
    longer = [*ids[:length], *prompt(40, seed=9)]
    again, match = tree.open(paging, longer)
    assert (match.tokens, match.replay, again.replayed) == (length, 0, 0)
    logits = again.append(longer[length:])
    torch.testing.assert_close(logits, plain(longer, cache_format), atol=BOUND[cache_format], rtol=0)
    same, match = tree.open(paging, ids[:length])  # one token must be left to feed
    assert match.tokens == (length - 1) // 128 * 128
    for one in (again, same):
        one.close()
    tree.check_integrity()
    paging.pool.check_integrity([tree.held_pages()], slabs=[])


def test_a_frontier_may_lie_a_little_behind_the_head(paging, opened, plain, prompt, cache_format):
    tree, ids = PrefixTree(paging.pool), prompt(210)
    sequence, _ = opened(paging, ids)
    tree.insert(sequence)
    assert tree.insert_frontier(sequence, at=200)
    assert not tree.insert_frontier(sequence, at=190)  # further than the slack
    assert not tree.insert_frontier(sequence, at=5)
    sequence.close()
    longer = [*ids[:200], 3, 5, 7]
    again, match = tree.open(paging, longer)
    assert match.tokens == 200
    logits = again.append(longer[200:])
    torch.testing.assert_close(logits, plain(longer, cache_format), atol=BOUND[cache_format], rtol=0)


def test_frontiers_go_with_their_snapshots_and_without_room_there_is_none(make_paging, opened, prompt):
    paging = make_paging()
    sequence, _ = opened(paging, prompt(200))
    size = len(sequence.snapshot_at(200).data)
    tree = PrefixTree(paging.pool, snapshot_bytes=2 * size)
    for seed in range(4):
        other, _ = opened(paging, prompt(60, seed=seed))
        tree.insert(other)
        tree.insert_frontier(other, at=60)
        other.close()
    statistics = tree.statistics()
    assert 0 < statistics.frontiers < 4 and statistics.snapshot_bytes <= 2 * size
    tree.check_integrity()
    full = make_paging(kv_bytes=paging.pool.layout.held_bytes(200) + 100)
    held, _ = opened(full, prompt(200))
    alone = PrefixTree(full.pool)
    alone.insert(held)
    assert not alone.insert_frontier(held, at=200)
    alone.check_integrity()


def test_a_miss_names_the_first_token_that_differs(kept, paging, opened, prompt):
    ids = prompt(300)
    assert kept.match([*ids, 5, 6]).diverged is None  # it goes beyond all that is kept
    assert kept.match(ids[:200]).diverged is None
    for at in (5, 127, 128, 200, 255):
        changed = list(ids)
        changed[at] = (changed[at] + 1) % 97
        assert kept.match(changed).diverged == at
    changed = [(ids[0] + 1) % 97, *ids[1:]]
    assert kept.match(changed).diverged is None and kept.match(changed).reason == "new"
    sequence, _ = opened(paging, [*ids[:128], *prompt(72, seed=2)])
    kept.insert_frontier(sequence, at=200)
    assert kept.match([*sequence.token_ids, 1, 2]).diverged is None
    assert kept.match([*sequence.token_ids[:190], 96, 95, 94]).diverged in (190, 191)


def test_what_was_evicted_is_remembered_as_such(kept, prompt):
    kept.evict(1 << 40)
    match = kept.match(prompt(300))
    assert (match.reason, match.evicted, match.tokens) == ("evicted", True, 0)
    assert kept.match(prompt(300, seed=5)).reason == "empty"


def test_a_one_off_goes_before_the_conversation_that_came_back(make_paging, opened, prompt):
    paging, now = make_paging(), [0.0]
    tree = PrefixTree(paging.pool, warm_seconds=100, clock=lambda: now[0])

    def keep(seed, *, warm=False):
        sequence, _ = opened(paging, prompt(260, seed=seed))
        tree.insert(sequence, warm=warm)
        sequence.close()

    def known(seed):
        return tree.match(prompt(260, seed=seed)).known

    keep(1, warm=True)
    for seed in (2, 3):  # younger, but nobody came back for them
        keep(seed)
    for _ in range(4):
        tree.evict(1)
    assert (known(1), known(2), known(3)) == (256, 0, 0)
    assert tree.statistics().evicted_warm == 0
    assert tree.evict(1) and known(1) == 128  # nothing else is left
    assert tree.statistics().evicted_warm == 1
    keep(4)
    now[0] = 101.0  # cold by now: the older one goes
    tree.evict(1)
    assert (known(1), known(4)) == (0, 256)
    tree.check_integrity()


def test_forgetting_takes_what_nobody_else_goes_through(kept, paging, opened, prompt):
    trunk = prompt(300)
    other, _ = opened(paging, [*trunk[:128], *prompt(150, seed=6)])
    kept.insert(other)
    kept.insert_frontier(other, at=278)
    ids = list(other.token_ids)
    other.close()
    assert kept.forget([*ids, 1]) == 128
    assert kept.match(ids).known == 128 and kept.match(trunk).known == 256
    pin = kept.pin(trunk)
    assert kept.forget(trunk) == 0
    kept.unpin(pin)
    assert kept.forget(trunk) == 256
    kept.check_integrity()
    paging.pool.check_integrity([kept.held_pages()], slabs=[])
