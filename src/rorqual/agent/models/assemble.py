"""Assembles a streamed chat completion: deltas in, one message out.

Owns the reading of OpenAI-shaped chunks, both reasoning names, tool calls in fragments, usage dialects. No
I/O. Chunks are untrusted: a field of an unexpected type is ignored, never trusted.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from rorqual.agent.models.base import Delta, OnDelta, Usage

__all__ = ["Assembler", "read_usage"]


def read_usage(raw: object, *, seconds: float = 0.0) -> Usage:
    """Usage of OpenAI's, DeepSeek's and vLLM's dialects; absent or odd fields count as 0."""
    if not isinstance(raw, Mapping):
        return Usage(seconds=seconds)

    def number(source: object, name: str) -> int:
        value = source.get(name) if isinstance(source, Mapping) else None
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0

    return Usage(
        prompt_tokens=number(raw, "prompt_tokens"),
        completion_tokens=number(raw, "completion_tokens"),
        cached_tokens=number(raw.get("prompt_tokens_details"), "cached_tokens")
        or number(raw, "prompt_cache_hit_tokens"),
        reasoning_tokens=number(raw.get("completion_tokens_details"), "reasoning_tokens"),
        seconds=seconds,
    )


class _Call:
    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []


class Assembler:
    """Feed chunks (or one whole response), then read the fields."""

    def __init__(self, on_delta: OnDelta | None = None) -> None:
        self._on_delta = on_delta
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self.reasoning_names: set[str] = set()
        """Names under which reasoning arrived: it goes back under the same."""
        self.finish_reason: str | None = None
        self.usage: object = None
        self.chunks = 0

    @property
    def reasoning(self) -> str:
        """Reasoning so far."""
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        """Content so far."""
        return "".join(self._content)

    def feed(self, chunk: Mapping[str, Any]) -> None:
        """Take one `chat.completion.chunk`, or a whole `chat.completion` (its `message` is read as one
        delta)."""
        self.chunks += 1
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, Mapping):
            return
        delta = choice.get("delta", choice.get("message"))
        if isinstance(delta, Mapping):
            self._text(delta)
            self._tools(delta.get("tool_calls"))
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = reason

    def _text(self, delta: Mapping[str, Any]) -> None:
        for name in ("reasoning_content", "reasoning"):  # a server may send both: the first with text is read
            text = delta.get(name)
            if isinstance(text, str) and text:
                self.reasoning_names.update(
                    other for other in ("reasoning_content", "reasoning") if isinstance(delta.get(other), str)
                )
                self._reasoning.append(text)
                self._say(Delta(channel="reasoning", text=text))
                break
        text = delta.get("content")
        if isinstance(text, str) and text:
            self._content.append(text)
            self._say(Delta(channel="content", text=text))

    def _tools(self, fragments: object) -> None:
        for fragment in fragments if isinstance(fragments, list) else ():
            if not isinstance(fragment, Mapping):
                continue
            call = self._find(fragment)
            position = self._calls.index(call)
            function = fragment.get("function")
            if not isinstance(function, Mapping):
                continue
            name, arguments = function.get("name"), function.get("arguments")
            if (
                isinstance(name, str) and name and name != call.name
            ):  # some servers repeat the name in every chunk
                call.name += name
                self._say(Delta(channel="call", text=call.name, index=position))
            if isinstance(arguments, Mapping):  # some servers send the object itself
                arguments = json.dumps(arguments, ensure_ascii=False)
            if isinstance(arguments, str) and arguments:
                call.arguments.append(arguments)
                self._say(Delta(channel="arguments", text=arguments, index=position))

    def _find(self, fragment: Mapping[str, Any]) -> _Call:
        index, call_id = fragment.get("index"), fragment.get("id")
        call_id = call_id if isinstance(call_id, str) else ""
        call: _Call | None
        if isinstance(index, int):
            call = self._by_index.get(index)
        else:  # no index: an unknown id opens a call, no id continues the last one
            call = next((known for known in self._calls if call_id and known.id == call_id), None)
            if call is None and not call_id and self._calls:
                call = self._calls[-1]
        if call is None:
            call = _Call()
            self._calls.append(call)
            if isinstance(index, int):
                self._by_index[index] = call
        call.id = call.id or call_id
        return call

    def _say(self, delta: Delta) -> None:
        if self._on_delta is not None:
            self._on_delta(delta)

    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls, in order of appearance; arguments exactly as sent, an id made up where the server gave
        none."""
        taken: set[str] = set()
        calls = []
        for call in self._calls:
            call_id = call.id if call.id and call.id not in taken else f"call_{secrets.token_hex(12)}"
            taken.add(call_id)
            function = {"name": call.name, "arguments": "".join(call.arguments)}
            calls.append({"id": call_id, "type": "function", "function": function})
        return calls
