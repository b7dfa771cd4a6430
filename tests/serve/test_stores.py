"""ReplayStore: exact comparison, bounds, holders of keys apart."""

import pytest

from rorqual.chat import ToolCall
from rorqual.serve.replay import Record, ReplayStore, canonical_calls, prompt_digest


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
