"""Turns: messages merged, results sorted, and the decision what reasoning is kept.

Order of work of spec/encoding.md 3.1: merge (3.3), sort (3.5), drop (3.7). Owns everything that happens
before the first byte is printed. Keep rule `auto` (spec section 6): nothing is dropped once tools are in
play, so the history only grows; `official` looks at the `tools` field alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import RenderError
from .messages import CallText, MessageLike, content_text, field_of, read_call, reasoning_text

_KEPT_BEFORE_LAST_USER = frozenset({"user", "system", "latest_reminder", "assistant"})
_QUERY_ROLES = frozenset({"user", "developer"})
KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "latest_reminder"})


@dataclass(slots=True)
class Block:
    """A part of a user turn: a text or a tool result."""

    text: str
    message: int
    is_result: bool = False
    call_id: str | None = None


@dataclass(slots=True, kw_only=True)
class Turn:
    """One turn of the output. `message` is the index of the message that starts it."""

    role: str
    message: int
    content: str = ""
    blocks: list[Block] = field(default_factory=list)
    reasoning: str = ""
    calls: tuple[CallText, ...] = ()
    tools: Sequence[Any] = ()
    response_format: Any = None
    task: str | None = None
    wo_eos: bool = False


def merge(messages: Sequence[MessageLike], *, first: int = 0) -> list[Turn]:
    """Messages as turns: neighbouring user and tool messages become one user turn (spec 3.3).

    first: index given to messages[0]. Raises RenderError for content that cannot be written.
    """
    turns: list[Turn] = []
    for index, message in enumerate(messages, first):
        if not (isinstance(message, Mapping) or hasattr(message, "role")):
            raise RenderError(f"is {type(message).__name__}: pass a dict or a Message", message_index=index)
        role = field_of(message, "role")
        if not isinstance(role, str):
            raise RenderError("has no role", message_index=index, field="role")
        last = turns[-1] if turns else None
        if role == "tool":
            text = content_text(field_of(message, "content"), index=index, json_values=True)
            block = Block(text, index, True, field_of(message, "tool_call_id"))
            if last is not None and last.role == "user":
                last.blocks.append(block)
            else:
                turns.append(Turn(role="user", message=index, blocks=[block]))
        elif role == "user":
            block = Block(content_text(field_of(message, "content"), index=index), index)
            if last is not None and last.role == "user" and last.task is None:
                last.blocks.append(block)
            else:
                turns.append(Turn(role="user", message=index, blocks=[block], task=field_of(message, "task")))
        else:
            turns.append(_other_turn(message, role, index))
    return turns


def _other_turn(message: MessageLike, role: str, index: int) -> Turn:
    calls: Any = field_of(message, "tool_calls") if role == "assistant" else None
    if calls is not None and not isinstance(calls, list | tuple):
        raise RenderError("pass a list of calls", message_index=index, field="tool_calls")
    tools = field_of(message, "tools")
    if tools is not None and not isinstance(tools, list | tuple):
        raise RenderError("pass a list of functions", message_index=index, field="tools")
    return Turn(
        role=role,
        message=index,
        content=content_text(field_of(message, "content"), index=index) if role in KNOWN_ROLES else "",
        reasoning=reasoning_text(message, index=index) if role == "assistant" else "",
        calls=tuple(read_call(c, index=index) for c in calls or ()),
        tools=tools or (),
        response_format=field_of(message, "response_format"),
        task=field_of(message, "task"),
        wo_eos=bool(field_of(message, "wo_eos")),
    )


def sort_results(turns: Sequence[Turn], *, calls: Sequence[CallText] = ()) -> None:
    """Puts the results of each user turn into call order, in place (spec 3.5). calls: those made before."""
    positions = _positions(calls)
    for turn in turns:
        if turn.calls:
            positions = _positions(turn.calls)
        elif turn.role == "user" and positions:
            slots = [i for i, b in enumerate(turn.blocks) if b.is_result]
            found = [turn.blocks[i] for i in slots]
            found.sort(key=lambda b: positions.get(b.call_id or "", 0))
            for slot, block in zip(slots, found, strict=True):
                turn.blocks[slot] = block


def _positions(calls: Sequence[CallText]) -> dict[str, int]:
    return {call.id: i for i, call in enumerate(calls) if call.id}


def last_query(turns: Sequence[Turn]) -> int:
    """`k`: index of the last user or developer turn, -1 if there is none (spec 3.1)."""
    return next((i for i in reversed(range(len(turns))) if turns[i].role in _QUERY_ROLES), -1)


def tools_in_play(turns: Sequence[Turn], *, official: bool) -> bool:
    """Whether nothing may be dropped. official: only a `tools` field counts; else calls and results too."""
    if any(t.tools for t in turns):
        return True
    return not official and any(t.calls or any(b.is_result for b in t.blocks) for t in turns)


def drop_turns(turns: Sequence[Turn]) -> list[Turn]:
    """What survives when reasoning is dropped: other roles before the last query vanish (spec 3.7)."""
    k = last_query(turns)
    return [t for i, t in enumerate(turns) if i >= k or t.role in _KEPT_BEFORE_LAST_USER]
