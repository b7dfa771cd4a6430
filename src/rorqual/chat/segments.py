"""Segments: rendered text in pieces that say what may become a special token and who wrote it.

A special segment is one token by its string; a text segment is encoded without added tokens, so no user text,
tool result or schema can forge one (spec/encoding.md 1). `generated` is the loss mask of SFT and RL.
Owns the data type and its building; what is written is renderer.py's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation."""

    text: str
    special: bool
    """True: exactly one special token, by its string."""
    turn: int
    """Index of the message it came from; a cue belongs to the last message before it. -1: BOS, effort, or a
    system turn that the renderer inserted for request-level tools."""
    generated: bool
    """True: the model itself writes this (an assistant turn's reasoning, `</think>`, content, calls, EOS)."""


class SegmentWriter:
    """Collects segments; `turn` and `generated` are set once and hold until changed."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.turn = -1
        self.generated = False

    def text(self, text: str) -> None:
        """Adds text; empty text adds nothing."""
        if text:
            self.segments.append(Segment(text, False, self.turn, self.generated))

    def special(self, text: str) -> None:
        """Adds one special token."""
        self.segments.append(Segment(text, True, self.turn, self.generated))

    def pieces(self, pieces: Iterable[tuple[str, bool]]) -> None:
        """Adds (text, is_special) pairs."""
        for text, special in pieces:
            self.segments.append(Segment(text, special, self.turn, self.generated))


def join(segments: Iterable[Segment]) -> str:
    """The rendered text."""
    return "".join(s.text for s in segments)
