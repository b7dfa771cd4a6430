"""Calls that did not arrive as calls: cut or unnamed ones, and DSML markup that a server leaked into text.

Owns the decision what is still a call. Only whole, closed calls are ever run; everything else is named to the
model. Reading of markup is `rorqual.chat`'s (agent_and_serving.md 1.2 no. 1: leaked markup makes agents
loop).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import rorqual.chat as chat

__all__ = ["Recovered", "recover_markup", "split_diagnostics", "split_malformed"]

_LOST = frozenset({"malformed_call", "truncated_call", "bad_invoke_header", "cut_start_tag"})
"""Diagnostics of the parser after which a call the model meant is missing from the message."""
_MARKS = ("｜DSML｜", "|DSML|")


class Recovered(NamedTuple):
    """What was found in leaked markup."""

    content: str
    reasoning: str
    calls: list[dict[str, Any]]
    malformed: list[str]
    note: str


def split_malformed(calls: list[dict[str, Any]], *, cut: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Calls that can be answered, and one line for each that cannot: no name, or `cut` off by the token
    limit."""
    good, lost = [], []
    for position, call in enumerate(calls):
        function = call["function"]
        if not function["name"]:
            lost.append("a call without a name")
        elif cut and position == len(calls) - 1 and not _is_json(function["arguments"]):
            lost.append(f"the call of {function['name']} was cut off by the token limit")
        else:
            if not function["arguments"].strip():
                call = {**call, "function": {**function, "arguments": "{}"}}
            good.append(call)
    return good, lost


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def split_diagnostics(message: chat.Message) -> tuple[list[str], list[str]]:
    """The parser's diagnostics: calls that were lost, and what was merely repaired; one line each.

    Markup that is no call counts as a lost call where the message has no other: the model meant one.
    """
    lost, repaired = [], []
    for item in message.diagnostics:
        line = f"{item.kind}: {item.detail}" if item.detail else item.kind
        meant = item.kind == "markup_in_text" and not message.tool_calls
        if item.kind in _LOST or meant:
            lost.append(line)
        elif item.kind != "empty":
            repaired.append(line)
    return lost, repaired


def recover_markup(content: str, tools: Sequence[Mapping[str, Any]], *, reasoning: str) -> Recovered | None:
    """Read DSML that arrived as text; None if there is none. A call found in reasoning ends the reasoning."""
    if any(mark in content for mark in _MARKS):
        message = chat.parse(content, thinking_mode="chat", tools=tools)
        kept, where = reasoning, "content"
    elif not content.strip() and any(mark in reasoning for mark in _MARKS):
        message = chat.parse(reasoning, thinking_mode="thinking", tools=tools)
        kept, where = message.reasoning_content, "reasoning"
    else:
        return None
    calls = [
        {**call.to_openai(), "id": call.id or f"call_{secrets.token_hex(12)}", "type": "function"}
        for call in message.tool_calls
    ]
    lost, _ = split_diagnostics(message)
    note = f"the server sent DSML markup as {where}: {len(calls)} calls recovered, {len(lost)} lost."
    return Recovered(str(message.content or ""), kept, calls, lost, note)
