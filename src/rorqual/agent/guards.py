"""First loop guard: the same call with the same result tells the model nothing new.

The third such result carries a warning, the fourth and fifth attempt are not executed, the sixth ends the
run. Owns counting only; the loop acts on the verdict. Counters live outside the conversation and are rebuilt
from the event log, so nothing done to the prompt resets them. Two calls are the same if `canonical_call`
spells them the same.

A call with a result not seen before in this run is news, and resets every counter: editing and testing in
turns may fail with the same text many times and is no loop, while A B A B is one. (agent_and_serving.md 2.1:
key on the result, keep counters out-of-band, blocking alone is not enough.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rorqual.agent.events import Event

__all__ = ["GuardConfig", "LoopGuard", "Verdict", "result_digest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Attempts of one call with one result."""

    warn: int = 3
    """The result of this attempt carries a warning."""
    block: int = 4
    """From this attempt on the call is not executed."""
    stop: int = 6
    """This attempt ends the run."""

    def __post_init__(self) -> None:
        if not 1 <= self.warn <= self.block <= self.stop:
            raise ValueError(
                f"guard: expected 1 <= warn <= block <= stop, got {self.warn}, {self.block}, {self.stop}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What to do with a call or its result."""

    action: Literal["allow", "warn", "block", "stop"]
    count: int
    """Attempts of this call with this result, this one included."""
    text: str = ""
    """What the model is told."""


def result_digest(text: str) -> str:
    """Identity of a result: trailing white space does not make it news."""
    return hashlib.sha256(text.rstrip().encode("utf-8", "replace")).hexdigest()[:16]


class LoopGuard:
    """Counts attempts; `check` before a call, `record` after it (with the result, or None if it was
    blocked)."""

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        self._count: dict[str, int] = {}
        self._last: dict[str, str] = {}
        self._seen: set[tuple[str, str]] = set()

    @classmethod
    def from_events(cls, events: Iterable[Event], config: GuardConfig | None = None) -> LoopGuard:
        """A guard with the counters that the log implies."""
        guard = cls(config)
        for event in events:
            if event.kind == "tool.result":
                guard.record(event.data["key"], None if event.data.get("blocked") else event.data["digest"])
        return guard

    def check(self, key: str) -> Verdict:
        """Before the call `key` (a `canonical_call`): may it run?"""
        attempt = self._count.get(key, 0) + 1
        if attempt >= self.config.stop:
            return Verdict(action="stop", count=attempt)
        if attempt >= self.config.block:
            text = (
                f"[blocked: this exact call gave the same result {self.config.block - 1} times and was "
                "not run again. Do something different, or submit what you have.]"
            )
            return Verdict(action="block", count=attempt, text=text)
        return Verdict(action="allow", count=attempt)

    def record(self, key: str, digest: str | None) -> Verdict:
        """After the call `key`: `digest` of its result, or None if it was blocked."""
        if digest is None:
            self._count[key] = self._count.get(key, 0) + 1
            return Verdict(action="block", count=self._count[key])
        if (key, digest) not in self._seen:
            self._seen.add((key, digest))
            self._count.clear()
        elif self._last.get(key) != digest:
            self._count[key] = 0
        self._last[key] = digest
        self._count[key] = self._count.get(key, 0) + 1
        if self._count[key] == self.config.warn:
            text = (
                f"[warning: the same call gave the same result {self._count[key]} times. Repeating it "
                "will not help: try something else.]"
            )
            return Verdict(action="warn", count=self._count[key], text=text)
        return Verdict(action="allow", count=self._count[key])
