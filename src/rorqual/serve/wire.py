"""Wire: events and answers as OpenAI's JSON objects. Owns every field name that goes out.

Reasoning goes out as `reasoning_content` and as `reasoning`, cached tokens in OpenAI's and in DeepSeek's fields
(spec/agent_and_serving.md 1.3, encoding.md 5.1). What the parser repaired is in `x_v4.parse`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual import chat

__all__ = ["ChatWriter", "RawWriter", "json_bytes", "sse", "usage"]


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8. Lone surrogates, which have no bytes, are escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def sse(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json_bytes(value) + b"\n\n"


def usage(*, prompt: int, completion: int, cached: int, reasoning: int | None = None) -> dict[str, Any]:
    """Token counts. reasoning: None where there can be none."""
    out: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }
    if reasoning is not None:
        out["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return out


def _parse_report(diagnostics: Sequence[chat.Diagnostic]) -> dict[str, Any]:
    if not diagnostics:
        return {}
    return {"x_v4": {"parse": [{"kind": one.kind, "detail": one.detail} for one in diagnostics]}}


@dataclass(kw_only=True)
class ChatWriter:
    """Writes one chat answer, whole or in chunks."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    include_usage: bool = False

    def whole(
        self, message: chat.Message, *, finish_reason: str, counts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The answer in one piece."""
        calls = [call.to_openai() for call in message.tool_calls]
        said: dict[str, Any] = {"role": "assistant", "content": message.content or (None if calls else "")}
        if message.reasoning_content:
            said["reasoning_content"] = said["reasoning"] = message.reasoning_content
        if calls:
            said["tool_calls"] = calls
        choice = {"index": 0, "message": said, "finish_reason": finish_reason, "logprobs": None}
        head = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model}
        return {**head, "choices": [choice], "usage": counts, **_parse_report(message.diagnostics)}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunk."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, events: Sequence[chat.Event]) -> list[dict[str, Any]]:
        """Chunks of events; `end` is written by `closing`."""
        return [self._chunk(delta) for event in events if (delta := self._delta(event)) is not None]

    def closing(
        self, finish_reason: str, counts: Mapping[str, Any], diagnostics: Sequence[chat.Diagnostic]
    ) -> list[dict[str, Any]]:
        """The last chunks."""
        out = [{**self._chunk({}, finish_reason), **_parse_report(diagnostics)}]
        if self.include_usage:
            out.append({**self._chunk({}), "choices": [], "usage": counts})
        return out

    def _delta(self, event: chat.Event) -> dict[str, Any] | None:
        match event.kind:
            case "reasoning":
                return {"reasoning_content": event.text, "reasoning": event.text}
            case "content":
                return {"content": event.text}
            case "call_start":
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": event.call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case "args":
                return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        return None

    def _chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        out = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }
        return {**out, "usage": None} if self.include_usage else out


@dataclass(kw_only=True)
class RawWriter:
    """Writes one answer of /v1/completions, whole or in chunks."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    include_usage: bool = False

    def whole(self, text: str, *, finish_reason: str, counts: Mapping[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""
        return {**self._chunk(text, finish_reason), "usage": counts}

    def opening(self) -> list[dict[str, Any]]:
        """There is no first chunk here."""
        return []

    def chunks(self, events: Sequence[chat.Event]) -> list[dict[str, Any]]:
        """Chunks of events; `end` is written by `closing`."""
        return [self._streamed(event.text, None) for event in events if event.kind == "content"]

    def closing(
        self, finish_reason: str, counts: Mapping[str, Any], diagnostics: Sequence[chat.Diagnostic]
    ) -> list[dict[str, Any]]:
        """The last chunks."""
        out = [self._streamed("", finish_reason)]
        if self.include_usage:
            out.append({**self._streamed("", None), "choices": [], "usage": counts})
        return out

    def _streamed(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        out = self._chunk(text, finish_reason)
        return {**out, "usage": None} if self.include_usage else out

    def _chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }
