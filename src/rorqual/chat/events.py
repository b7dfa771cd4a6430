"""Events of a parsed stream, in the order of spec/encoding.md 4.3.

reasoning  reasoning_end  content  call_start  args  call_end | call_malformed | call_truncated  block_end
diagnostic  end. The concatenated `args` of a call that got its `call_end` are a JSON object, always;
those of a call that did not are the beginning of one, and it must not be executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

EventKind: TypeAlias = Literal[
    "reasoning",
    "reasoning_end",
    "content",
    "call_start",
    "args",
    "call_end",
    "call_malformed",
    "call_truncated",
    "block_end",
    "diagnostic",
    "end",
]


@dataclass(slots=True, unsafe_hash=True)  # not frozen: that costs a microsecond an event
class Event:
    """One event, never changed. Fields that a kind does not use keep their defaults."""

    kind: EventKind
    text: str = ""
    """reasoning, content, args: the new text. diagnostic: its kind. end: stop, tool_calls or length."""
    index: int | None = None
    """Which call (call_*, args, diagnostics about a call), from 0."""
    name: str = ""
    """call_start: the tool's name."""
    call_id: str = ""
    """call_start: the id we gave the call."""
    detail: str = ""
    """diagnostic: what was seen, in words."""
