"""Sequences over pages against the whole sequence computed at once; each test is a bug somebody shipped.

(spec/engines.md 5.) Tolerances: fp32 sums in two orders over logits of size 1 give 1e-5. With packed pages a value
that lies on a rounding edge may round the other way, which moves logits by up to 1e-3 here.
"""

import gc

import pytest
import torch

from rorqual.engine import CacheFull
from rorqual.engine.sequence import PagedSequence, replay_tokens

BOUND = {"exact": 2e-5, "packed": 2e-3}
EDGES = [1, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257]


def _close(logits, expected, cache_format):
    torch.testing.assert_close(logits, expected, atol=BOUND[cache_format], rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_paged_logits_are_those_of_the_models_own_cache_in_the_same_chunks_to_the_bit(
    make_paging, models, prompt, cache_format, chunk
):
    ids = prompt(40 if chunk == 1 else 150)
    paging, model = make_paging(cache_format, chunk=chunk), models[cache_format]
    sequence, state = PagedSequence(paging), model.new_state(1)
    with torch.no_grad():
        while sequence.length < len(ids):
            start = sequence.length
            part = ids[start : start + sequence.chunk(len(ids) - start)]
            assert torch.equal(sequence.feed(part), model.extend(torch.tensor([part]), state))


@pytest.mark.parametrize("length", EDGES)
def test_logits_of_every_edge_equal_the_whole_sequence(paging, opened, plain, prompt, cache_format, length):
    ids = prompt(length)
    _, logits = opened(paging, ids)
    _close(logits, plain(ids, cache_format), cache_format)


def test_every_row_of_logits_is_had_on_request(paging, models, prompt, cache_format):
    ids = prompt(140)
    with PagedSequence(paging) as sequence:
        logits = sequence.append(ids, logits="all")
        with torch.no_grad():
            _close(logits, models[cache_format](torch.tensor([ids]))[0], cache_format)
        assert sequence.append(ids[:3], logits="none") is None


@pytest.mark.parametrize("position", EDGES)
def test_a_rewind_to_any_edge_then_another_way_on(paging, opened, plain, prompt, cache_format, position):
    sequence, _ = opened(paging, prompt(300))
    replayed = sequence.rewind(position)
    assert replayed <= min(position, replay_tokens(sequence.layout))
    other = prompt(5, seed=3)
    _close(sequence.append(other), plain(prompt(300)[:position] + other, cache_format), cache_format)
    sequence.pool.check_integrity([sequence.pages], slabs=[sequence.slab])


def test_a_rewind_within_the_slack_feeds_nothing_again(paging, opened, plain, prompt, cache_format):
    """Over an emitted CSA entry, an HCA boundary (32) and a page boundary, as a rejected draft does."""
    ids = prompt(290)
    sequence, _ = opened(paging, ids[:130])
    for length, back in ((130, 3), (129, 16), (160, 2), (257, 5), (259, 16)):
        if sequence.length < length:
            sequence.append(ids[sequence.length : length])
        at = sequence.length - back
        assert sequence.rewind(at) == 0
        other = prompt(1, seed=at)
        _close(sequence.append(other), plain(sequence.token_ids, cache_format), cache_format)
        assert sequence.rewind(at) == 0
        sequence.append(ids[at:length])
    assert sequence.replayed == 0
    _close(sequence.append(ids[259:]), plain(ids, cache_format), cache_format)


def test_drafts_that_are_accepted_differently(paging, opened, plain, prompt, cache_format):
    """Two sequences verify drafts across 4, 32 and 128 and take back a different number of them each round."""
    left, right = opened(paging, prompt(121))[0], opened(paging, prompt(121, seed=1))[0]
    for count, keep_left, keep_right in ((16, 3, 16), (7, 0, 4), (16, 1, 0), (5, 5, 2)):
        for sequence, keep in ((left, keep_left), (right, keep_right)):
            before = sequence.length
            sequence.append(prompt(count, seed=before), logits="all")
            assert sequence.rewind(before + keep) == 0
    for sequence in (left, right):
        _close(sequence.append([5]), plain(sequence.token_ids, cache_format), cache_format)


def test_forks_share_pages_until_the_first_write_and_never_see_each_other(
    paging, opened, plain, prompt, cache_format
):
    trunk, _ = opened(paging, prompt(200))
    pool, used = paging.pool, paging.pool.statistics()
    twin = trunk.fork()
    now = pool.statistics()
    assert (now.pages, now.shared_pages, now.slabs) == (used.pages, used.pages, used.slabs + 1)
    left, right = prompt(70, seed=1), prompt(90, seed=2)
    _close(twin.append(left), plain(prompt(200) + left, cache_format), cache_format)
    _close(trunk.append(right), plain(prompt(200) + right, cache_format), cache_format)
    assert twin.pages[0] == trunk.pages[0] and twin.pages[1] != trunk.pages[1]
    pool.check_integrity([trunk.pages, twin.pages], slabs=[trunk.slab, twin.slab])
    trunk.close()
    _close(twin.append([7]), plain([*prompt(200), *left, 7], cache_format), cache_format)


def test_a_slab_that_another_sequence_used_leaks_nothing(paging, opened, plain, prompt, cache_format):
    first, _ = opened(paging, prompt(300))
    slab = first.slab
    first.close()
    second, logits = opened(paging, prompt(6, seed=1))
    assert second.slab == slab
    _close(logits, plain(prompt(6, seed=1), cache_format), cache_format)


def test_a_prefix_is_taken_over_with_a_snapshot_and_without(paging, opened, plain, prompt, cache_format):
    ids, other = prompt(256), prompt(9, seed=4)
    source, _ = opened(paging, prompt(256) + prompt(20, seed=1))
    for snapshots, replayed in (([source.snapshots[256]], 0), ([], replay_tokens(source.layout))):
        with PagedSequence(paging) as taker:
            assert taker.adopt(ids, source.pages[:2], snapshots=snapshots) == replayed
            assert taker.pages == source.pages[:2]
            _close(taker.append(other), plain(ids + other, cache_format), cache_format)
            taker.rewind(200)
            _close(taker.append(other), plain(ids[:200] + other, cache_format), cache_format)
    _close(source.append([1]), plain(source.token_ids, cache_format), cache_format)


def test_snapshots_stay_on_schedule_and_at_the_last_boundary(paging, opened, prompt):
    sequence, _ = opened(paging, prompt(500))
    assert sorted(sequence.snapshots) == [256, 384]
    charged = paging.pool.statistics().charged_bytes
    assert charged == sum(len(s.data) for s in sequence.snapshots.values()) > 0
    twin = sequence.fork()
    assert paging.pool.statistics().charged_bytes == charged  # shared
    twin.close()
    sequence.close()
    gc.collect()
    assert paging.pool.used_bytes == 0


def test_too_little_memory_is_one_clear_error_and_nothing_has_changed(make_paging, opened, plain, prompt):
    paging = make_paging(kv_bytes=400_000)
    layout = paging.pool.layout
    pages = (400_000 - layout.slab_bytes) // layout.page_bytes
    sequence, _ = opened(paging, prompt(pages * 128 - 100))
    held = sequence.length
    with pytest.raises(CacheFull, match="no room for"):
        sequence.append(prompt(300))
    assert sequence.length == held
    _close(sequence.append([3]), plain([*prompt(pages * 128 - 100), 3]), "exact")
    with pytest.raises(CacheFull, match="a slab"):
        sequence.fork()
    paging.pool.check_integrity([sequence.pages], slabs=[sequence.slab])


def test_a_call_that_fails_half_way_is_repaired(paging, opened, plain, prompt, cache_format, monkeypatch):
    sequence, _ = opened(paging, prompt(200))
    real, calls = paging.runner.forward, []

    def torn(segments):
        real(segments)  # writes everything, then dies before anybody hears of it
        calls.append(len(segments[0].tokens))
        raise OSError("the disk with the experts is gone")

    monkeypatch.setattr(paging.runner, "forward", torn)
    with pytest.raises(OSError, match="experts"):
        sequence.append(prompt(60, seed=1))
    monkeypatch.undo()
    assert calls and sequence.length == 200
    other = prompt(30, seed=2)
    _close(sequence.append(other), plain(prompt(200) + other, cache_format), cache_format)


def test_a_lost_sequence_gives_its_memory_back(paging, opened, prompt):
    sequence, _ = opened(paging, prompt(300))
    sequence.close()
    sequence.close()
    assert sequence.closed and paging.pool.used_bytes == 0
    opened(paging, prompt(40))
    gc.collect()
    assert paging.pool.used_bytes == 0
    paging.pool.check_integrity([], slabs=[])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens": [97]}, "vocabulary"),
        ({"tokens": [-1]}, "vocabulary"),
        ({"tokens": []}, "0 tokens"),
        ({"position": -1}, "position -1"),
        ({"position": 200}, "pages do not hold"),
        ({"pages": [1 << 30]}, "page id"),
        ({"slab": 1 << 20}, "slab"),
    ],
)
def test_segments_that_break_the_contract_are_refused(paging, change, match):
    import numpy as np

    from rorqual.engine.runner import Segment

    fields = {"tokens": [1], "position": 0, "pages": [0], "slab": 0, **change}
    segment = Segment(
        np.array(fields["tokens"], dtype=np.int64),
        fields["position"],
        np.array(fields["pages"], dtype=np.int32),
        fields["slab"],
    )
    with pytest.raises(ValueError, match=match):
        paging.runner.forward([segment])
    with pytest.raises(ValueError, match="one slab"):
        good = Segment(np.array([1]), 0, np.array([0], dtype=np.int32), 0)
        paging.runner.forward([good, good])
