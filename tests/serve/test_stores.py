"""PrefixStore and ReplayStore: longest match, exact comparison, bounds, holders of keys apart."""

import pytest

from rorqual.chat import ToolCall
from rorqual.serve.prefixes import PrefixStore, state_bytes
from rorqual.serve.replay import Record, ReplayStore, canonical_calls, prompt_digest

IDS = [5, 6, 7, 8] * 10


def test_the_longest_kept_prefix_is_found(engine):
    store = PrefixStore(1 << 30)
    for length in (10, 20, 30):
        store.put("a", engine.open(IDS[:length]))
    assert store.longest("a", IDS).token_ids == IDS[:30]
    assert store.longest("a", IDS[:30]).token_ids == IDS[:20]  # one token must be left to feed
    assert store.longest("a", [*IDS[:25], 99, 99, 99, 99, 99, 99]).token_ids == IDS[:20]
    assert store.longest("a", [99, *IDS]) is None
    assert store.longest("b", IDS) is None


def test_a_found_state_is_a_copy(engine):
    store = PrefixStore(1 << 30)
    store.put("a", engine.open(IDS[:16]))
    first = store.longest("a", IDS)
    first.append([50, 51, 52])
    second = store.longest("a", IDS)
    assert second.token_ids == IDS[:16]
    second.append(IDS[16:20])
    fresh = engine.open(IDS[:20])
    assert (second.logits - fresh.logits).abs().max() < 1e-4


def test_the_least_recently_used_goes_first(engine):
    one = state_bytes(engine.open([1] * 20))
    store = PrefixStore(int(2.5 * one))
    for first in (1, 2):
        store.put("a", engine.open([first] * 20))
    assert store.longest("a", [1] * 21) is not None
    store.put("a", engine.open([3] * 20))
    assert len(store) == 2 and store.held_bytes <= store.limit_bytes and store.evictions == 1
    assert store.longest("a", [2] * 21) is None and store.longest("a", [1] * 21) is not None
    assert PrefixStore(0).longest("a", IDS) is None


def test_nothing_is_kept_without_room_nor_twice(engine):
    store = PrefixStore(0)
    store.put("a", engine.open(IDS))
    assert len(store) == 0
    store = PrefixStore(1 << 30)
    store.put("a", engine.open(IDS))
    held = store.held_bytes
    store.put("a", engine.open(IDS))
    store.put("a", engine.open(IDS[:3]))  # too short to be worth it
    assert len(store) == 1 and store.held_bytes == held


def record(**fields):
    return Record(
        **{"ids": (3, 4, 1), "thinking": True, "content": "c", "reasoning": "r", "calls": (), **fields}
    )


def test_a_turn_is_found_by_call_and_by_prompt():
    store = ReplayStore(1 << 20)
    calls = canonical_calls([ToolCall(name="f", arguments='{"b": 1, "a": 2}').to_openai()])
    kept = record(calls=calls)
    store.put("a", prompt_digest([1, 2]), record=kept, names=["x", "y"])
    assert store.by_name("a", "y") is kept and store.by_name("b", "y") is None
    again = canonical_calls([{"function": {"name": "f", "arguments": '{"a":2,"b":1}'}}])
    assert store.by_prompt("a", prompt_digest([1, 2]), content=" c\n", calls=again) is kept
    assert store.by_prompt("a", prompt_digest([1, 3]), content="c", calls=again) is None
    assert store.by_prompt("b", prompt_digest([1, 2]), content="c", calls=again) is None


@pytest.mark.parametrize(
    ("said", "agrees"),
    [
        (("c", "r", ()), True),
        ((" c ", "", ()), True),  # lost reasoning is not an edit
        (("c", "other", ()), False),
        (("d", "r", ()), False),
        (("c", "r", (("f", "{}"),)), False),
    ],
)
def test_an_edit_wins(said, agrees):
    assert record().agrees(*said) is agrees


def test_the_replay_store_is_bounded():
    store = ReplayStore(3 * record().size)
    for number in range(10):
        store.put("a", prompt_digest([number]), record=record(), names=[f"c{number}"])
    assert len(store) == 3 and store.held_bytes <= store.limit_bytes
    assert store.by_name("a", "c6") is None and store.by_name("a", "c9") is not None
    store.put("a", prompt_digest([9]), record=record(), names=["again"])
    assert len(store) == 3 and store.by_name("a", "c9") is None and store.by_name("a", "again") is not None
    assert len(ReplayStore(0)) == 0
