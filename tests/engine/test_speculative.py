"""Drafts change the number of calls and nothing else: plain decoding is the oracle, token by token and bit by bit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import rorqual
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.speculative import Pace
from rorqual.kernels import cpu_status
from rorqual.model import Config, Model

EMBEDDED = Path(rorqual.__file__).parent / "embedded" / "rl"
PROMPT = [(7 * number) % 300 for number in range(1, 150)]

native = pytest.mark.skipif(not cpu_status().available, reason=cpu_status().reason)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pretrained(EMBEDDED)


@pytest.fixture(autouse=True)
def every_call_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the clock says must not decide what a test covers."""
    monkeypatch.setattr(Pace, "drafts", lambda self: True)


@native
@pytest.mark.parametrize(("drafts", "cache_format"), [(1, "packed"), (3, "exact")])
def test_drafting_gives_the_events_of_plain_decoding(model: Model, drafts: int, cache_format: str) -> None:
    plain = Engine(model, kv_bytes=1 << 25, cache_format=cache_format)
    fast = Engine(model, kv_bytes=1 << 25, cache_format=cache_format, drafts=drafts)
    for length in (1, 17, 112, 128):  # drafts straddle 4, 32 and 128
        for temperature, top_p in ((0.0, 1.0), (0.8, 0.9)):
            params = SamplingParams(temperature=temperature, top_p=top_p, seed=length, max_tokens=30)
            one, two = plain.open(PROMPT[:length]), fast.open(PROMPT[:length])
            assert list(one.generate(params)) == list(two.generate(params))
            assert one.token_ids == two.token_ids
            assert one.logits is not None and two.logits is not None
            assert one.logits.equal(two.logits)
    figures = fast.speculation
    assert figures.drafted and 0 < figures.accepted < figures.drafted
    assert figures.tokens == 4 * 2 * 30 and figures.tokens_per_call > 1
    fast.pool.check_integrity()


@native
def test_a_generation_that_is_left_early_leaves_no_unseen_token(model: Model) -> None:
    plain, fast = Engine(model, kv_bytes=1 << 25), Engine(model, kv_bytes=1 << 25, drafts=4)
    for stop in range(1, 12):
        sequences = []
        for engine in (plain, fast):
            sequence = engine.open(PROMPT[:40])
            events = sequence.generate(SamplingParams(temperature=0, max_tokens=30))
            for _ in range(stop):
                next(events)
            events.close()  # type: ignore[attr-defined]
            sequences.append(sequence)
        one, two = sequences
        assert one.token_ids == two.token_ids
        again = SamplingParams(seed=3, max_tokens=9)
        assert list(one.generate(again)) == list(two.generate(again))


@native
def test_stop_ids_and_the_end_of_the_context_end_a_draft(model: Model) -> None:
    plain, fast = Engine(model, kv_bytes=1 << 25), Engine(model, kv_bytes=1 << 25, drafts=4)
    seen = list(plain.open(PROMPT[:40]).generate(SamplingParams(temperature=0, max_tokens=30)))
    for event in seen[:12]:
        params = SamplingParams(temperature=0, max_tokens=30, stop_ids=(event.token_id,))
        one, two = plain.open(PROMPT[:40]), fast.open(PROMPT[:40])
        assert list(one.generate(params)) == list(two.generate(params))
        assert one.token_ids == two.token_ids
    short = Model(model.config.replace(max_position_embeddings=64)).initialize(0)
    params = SamplingParams(temperature=0, max_tokens=100)
    ends = [
        list(Engine(short, kv_bytes=1 << 25, drafts=drafts).open(PROMPT[:40]).generate(params))
        for drafts in (0, 4)
    ]
    assert ends[0] == ends[1] and ends[0][-1].finish_reason == "length" and len(ends[0]) == 24


@native
def test_forks_of_a_drafting_sequence_go_their_own_ways(model: Model) -> None:
    plain, fast = Engine(model, kv_bytes=1 << 25), Engine(model, kv_bytes=1 << 25, drafts=2)
    one, two = plain.open(PROMPT[:127]), fast.open(PROMPT[:127])
    twins = [sequence.fork() for sequence in (one, two)]
    for seed, pair in ((1, (one, two)), (2, tuple(twins)), (3, (one, two))):
        params = SamplingParams(seed=seed, max_tokens=20)
        assert list(pair[0].generate(params)) == list(pair[1].generate(params))


def test_without_a_head_generation_goes_on_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    bare = Model(Config.preset("tiny"), mtp=False).initialize(0)
    with caplog.at_level(logging.WARNING):
        engine = Engine(bare, kv_bytes=1 << 24, drafts=1)
    assert engine.drafts == 0 and "without drafts" in caplog.text and "no head" in caplog.text
    with pytest.raises(ValueError, match="drafts is -1"):
        Engine(bare, drafts=-1)
    with pytest.raises(ValueError, match="at most 16"):
        Engine(Model(Config.preset("tiny")).initialize(0), drafts=17)


def test_drafting_rests_while_it_costs_more_than_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def run(drafted_seconds: float, accepted: int) -> list[bool]:
        pace, said = Pace(), []
        for _ in range(700):
            drafted = pace.drafts()
            said.append(drafted)
            pace.note(
                drafted=drafted,
                tokens=1 + accepted * drafted,
                seconds=drafted_seconds if drafted else 1.0,
            )
        return said

    paying, losing = run(1.5, accepted=1), run(2.5, accepted=1)
    assert all(paying[20:]), "1.5 s for two tokens beats 1 s for one"
    assert sum(losing) <= 3 * Pace.PROBE and not any(losing[20:500]), "2.5 s for two tokens does not"
    assert any(losing[520:]), "and is tried again later"
