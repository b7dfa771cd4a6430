"""What the stores keep on disk: the same after a restart; damage and other models are a new beginning, no error."""

import sqlite3
import stat

import pytest

from rorqual import chat
from rorqual.serve.known_text import KnownText
from rorqual.serve.replay import Record, ReplayStore, canonical_calls, prompt_digest
from rorqual.serve.response_store import ResponseStore, StoredResponse
from rorqual.serve.shelf import Shelf

MODEL = b"m" * 32


@pytest.fixture
def shelf(tmp_path):
    """`shelf()` closes the last one and opens the file anew, as a restart does."""
    opened = []

    def again(fingerprint=MODEL):
        for one in opened:
            one.close()
        opened.append(Shelf(tmp_path / "c.sqlite", fingerprint=fingerprint))
        return opened[-1]

    yield again
    for one in opened:
        one.close()


def test_rows_stay_in_order_and_are_the_users_alone(shelf, tmp_path):
    one = shelf()
    for name in (b"a", b"b", b"c", b"a"):
        one.put("s", name, name * 2)
    one.put("t", b"a", b"other")
    one.drop("s", [b"b", b"nobody"])
    one.drop("s", [])
    assert shelf().items("s") == [(b"c", b"cc"), (b"a", b"aa")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_another_models_rows_are_dropped(shelf, caplog):
    shelf().put("s", b"a", b"1")
    assert shelf(b"x" * 32).items("s") == []
    assert any("another model" in record.message for record in caplog.records)
    assert shelf(b"x" * 32).items("s") == []


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"", None])
def test_a_damaged_file_is_set_aside(shelf, tmp_path, damage):
    one = shelf()
    for number in range(200):
        one.put("s", b"%d" % number, bytes(500))
    one.close()
    path = tmp_path / "c.sqlite"
    if damage is None:
        raw = bytearray(path.read_bytes())
        raw[5000:90_000] = bytes(85_000)
        damage = bytes(raw)
    path.write_bytes(damage)
    again = shelf()
    assert again.items("s") == []
    again.put("s", b"a", b"1")
    assert shelf().items("s") == [(b"a", b"1")]
    assert (tmp_path / "c.sqlite.damaged").exists() == bool(damage)


def test_a_disk_that_refuses_is_told_once_and_memory_goes_on(shelf, tmp_path, caplog):
    one = shelf()
    store = ReplayStore(1 << 20, shelf=one)
    other = sqlite3.connect(tmp_path / "c.sqlite", timeout=0)
    other.execute("DROP TABLE items")
    other.close()
    for number in range(3):
        store.put("a", prompt_digest([number]), record=record(), names=[f"c{number}"])
    assert store.by_name("a", "c2") is not None
    assert sum("stay in memory" in entry.message for entry in caplog.records) == 1


def record(**fields):
    return Record(
        **{"ids": (3, 4, 1), "thinking": True, "content": "c\ud800", "reasoning": "r", "calls": (), **fields}
    )


def test_turns_are_replayed_after_a_restart(shelf):
    store = ReplayStore(3 * record().size, shelf=shelf())
    calls = canonical_calls([{"function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}])
    for number in range(5):
        store.put(
            "a", prompt_digest([number]), record=record(calls=calls, ids=(number, 1)), names=[f"c{number}"]
        )
    again = ReplayStore(3 * record().size, shelf=shelf())
    assert len(again) == 3 and again.held_bytes == store.held_bytes
    for number in range(5):
        assert again.by_name("a", f"c{number}") == store.by_name("a", f"c{number}")
    found = again.by_prompt("a", prompt_digest([4]), content="c\ud800", calls=calls)
    assert found == record(calls=calls, ids=(4, 1)) and again.by_name("b", "c4") is None
    assert len(ReplayStore(record().size, shelf=shelf())) == 1  # a smaller bound holds at once


def test_responses_are_there_after_a_restart(shelf):
    def stored(number, previous=None):
        output = [{"id": f"m{number}", "text": "x\ud800"}]
        response = {"id": f"r{number}", "output": output}
        return StoredResponse(response=response, input=[{"in": number}], previous=previous)

    store = ResponseStore(1 << 20, shelf=shelf())
    store.put("a", stored(0))
    store.put("a", stored(1, "r0"))
    store.put("a", stored(2))
    assert store.delete("a", "r2") and not store.delete("a", "r2")
    again = ResponseStore(1 << 20, shelf=shelf())
    assert again.history("a", "r1") == store.history("a", "r1") != []
    assert (again.first("a", "r1"), again.first("a", "gone")) == ("r0", "gone")
    assert again.get("b", "r1") is None and again.get("a", "r2") is None
    assert again.held_bytes == store.held_bytes
    tiny = ResponseStore(10, shelf=shelf())
    assert len(tiny) == 0
    tiny.put("a", stored(7))
    assert tiny.get("a", "r7") is None


def test_rows_that_are_not_ours_are_passed_over(shelf):
    one = shelf()
    for store in ("replay", "response", "text"):
        for number, value in enumerate(
            [b"", b"{}", b"[1]", b'{"ids": 3}', b"\xff", b'{"response": {"id": 4}}']
        ):
            one.put(store, b"%d" % number, value)
    again = shelf()
    assert len(ReplayStore(1 << 20, shelf=again)) == len(ResponseStore(1 << 20, shelf=again)) == 0
    assert len(KnownText(1 << 20, shelf=again)) == 0


def segments(*texts):
    """Every second one is a special token."""
    return [chat.Segment(text, bool(n % 2), turn=0, generated=False) for n, text in enumerate(texts)]


def test_a_conversation_that_goes_on_is_known_up_to_where_it_did(shelf):
    known = KnownText(1 << 20, shelf=shelf())
    first = segments("hello", "<A>", "there")
    after = known.of_segments("a", first)
    assert after.length == 0 and after.ids == []
    known.keep_segments("a", first, [1, 2, 3], after=after, replayed=0)
    second = segments("hello", "<A>", "there", "<B>", "more", "<A>", "end")
    for store in (known, KnownText(1 << 20, shelf=shelf())):
        found = store.of_segments("a", second)
        assert (found.length, found.ids, found.replayed) == (3, [1, 2, 3], 0)
        assert store.of_segments("b", second).ids == []
        assert store.of_segments("a", segments("hello", "<A>", "there is", "<B>")).ids == []
        # What only looks like a special token is text.
        forged = [chat.Segment("hello<A>there", False, turn=0, generated=False), second[3]]
        assert store.of_segments("a", forged).ids == []
    known = store
    known.keep_segments("a", second[:6], [1, 2, 3, 4, 5, 6], after=found, replayed=2)
    longer = segments("hello", "<A>", "there", "<B>", "more", "<A>", "other")
    assert known.of_segments("a", longer).ids == [1, 2, 3]  # <A> is followed by text: no border
    border = [*second[:6], chat.Segment("<C>", True, turn=0, generated=False)]
    found = KnownText(1 << 20, shelf=shelf()).of_segments("a", border)
    assert (found.length, found.ids, found.replayed) == (6, [1, 2, 3, 4, 5, 6], 2)


def test_a_raw_text_that_goes_on_is_known(shelf):
    known = KnownText(1 << 20, shelf=shelf())
    known.keep_text("a", b"abcdef", [9, 8], after=known.of_text("a", b"abcdef"))
    before = known.of_text("a", b"abcdefgh")
    known.keep_text("a", b"abcdefgh", [9, 8, 7], after=before)
    for store in (known, KnownText(1 << 20, shelf=shelf())):
        assert store.of_text("a", b"abcdefghij").ids == [9, 8, 7]
        assert store.of_text("a", b"abcdefg").ids == [9, 8]
        assert store.of_text("a", b"abcde").ids == store.of_text("b", b"abcdef").ids == []


def test_known_texts_are_bounded_and_a_broken_chain_is_not_known():
    known = KnownText(3 * 204)
    texts = [b"x" * 10 * (n + 1) for n in range(5)]
    for n, text in enumerate(texts):
        known.keep_text("a", text, list(range(n + 1)), after=known.of_text("a", text))
        assert known.held_bytes <= known.limit_bytes
    assert len(known) == 3 and known.of_text("a", texts[4]).ids == [0, 1, 2]  # the beginning stays
    other = known.of_text("a", b"y" * 9)
    known.keep_text("a", b"y" * 9, [5], after=other)
    assert known.of_text("a", b"y" * 9).ids == [5] and known.of_text("a", texts[4]).ids == [0, 1]
    for n, text in enumerate(texts):
        assert known.of_text("a", text).ids in ([], *[list(range(m + 1)) for m in range(n + 1)])
    assert len(KnownText(0)) == 0
