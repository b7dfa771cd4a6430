"""The loop guard: which sequence of (call, result) gets which verdict."""

from __future__ import annotations

import pytest

from rorqual.agent import EventLog, GuardConfig, LoopGuard
from rorqual.agent.guards import result_digest
from rorqual.agent.tools import canonical_call


def play(guard: LoopGuard, *steps: tuple[str, str]) -> list[str]:
    """The verdict of each (call, result): from `check` if it refuses, else from `record`."""
    verdicts = []
    for key, result in steps:
        verdict = guard.check(key)
        if verdict.action == "allow":
            verdict = guard.record(key, result_digest(result))
        else:
            guard.record(key, None)
        verdicts.append(verdict.action)
    return verdicts


def test_same_call_same_result_warns_blocks_and_stops() -> None:
    assert play(LoopGuard(), *[("a", "x")] * 6) == ["allow", "allow", "warn", "block", "block", "stop"]


def test_a_changing_result_is_no_loop() -> None:
    steps = [("poll", f"{n} percent") for n in range(20)]
    assert set(play(LoopGuard(), *steps)) == {"allow"}


def test_two_calls_in_turns_are_a_loop() -> None:
    verdicts = play(LoopGuard(), *[("a", "x"), ("b", "y")] * 6)
    assert verdicts[:5] == ["allow"] * 5 and verdicts[5:7] == ["warn", "warn"]  # b's first result was news
    assert verdicts[7:11] == ["block"] * 4 and verdicts[11] == "stop"


def test_editing_and_testing_in_turns_is_no_loop() -> None:
    steps = [step for n in range(10) for step in ((f"edit {n}", "ok"), ("make test", "1 failed"))]
    assert set(play(LoopGuard(), *steps)) == {"allow"}


def test_two_results_in_turns_of_one_call_are_news_only_once() -> None:
    verdicts = play(LoopGuard(), *[("a", "x"), ("a", "y")] * 2, *[("a", "y")] * 4)
    assert verdicts[-4:] == ["allow", "warn", "block", "block"]


def test_key_order_and_spacing_do_not_make_another_call() -> None:
    assert canonical_call("f", {"b": 1, "a": "é"}) == canonical_call("f", {"a": "é", "b": 1})
    assert canonical_call("f", {"a": 1}) != canonical_call("f", {"a": "1"})
    assert result_digest("x\n") == result_digest("x") != result_digest("y")


def test_counters_are_rebuilt_from_the_log_at_every_point() -> None:
    steps = [("a", "x"), ("b", "y"), ("a", "x"), ("a", "x"), ("a", "x"), ("b", "y"), ("a", "x"), ("a", "x")]
    log, live = EventLog(), LoopGuard()
    for number, (key, result) in enumerate(steps):
        rebuilt = LoopGuard.from_events(log.events)
        assert rebuilt.check(key) == live.check(key), number
        blocked = live.check(key).action != "allow"
        digest = result_digest(result)
        assert rebuilt.record(key, None if blocked else digest) == live.record(
            key, None if blocked else digest
        )
        log.append("tool.result", call=str(number), key=key, digest=digest, blocked=blocked, text=result)
    assert live.check("a").action == "stop"


def test_thresholds_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 <= warn <= block <= stop, got 5, 4, 6"):
        GuardConfig(warn=5)
