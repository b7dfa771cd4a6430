"""Wire: what a protocol's writer is, and the one of OpenAI's chat and completions. Owns their fields that go out.

Reasoning goes out as `reasoning_content` and as `reasoning`, cached tokens in OpenAI's and in DeepSeek's fields
(spec/agent_and_serving.md 1.3, encoding.md 5.1). What is ours alone is in `x_v4`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rorqual import chat
from rorqual.serve.answer import ChatAnswer, RawAnswer
from rorqual.serve.errors import ServeError

__all__ = [
    "KEEP_ALIVE",
    "ChatWriter",
    "Counts",
    "RawWriter",
    "Writer",
    "extension",
    "json_bytes",
    "named_sse",
    "sse",
    "usage",
]

KEEP_ALIVE = b": keep-alive\n\n"


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8. Lone surrogates, which have no bytes, are escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def sse(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json_bytes(value) + b"\n\n"


def named_sse(value: Mapping[str, Any]) -> bytes:
    """One event of a stream whose events are named by their `type`."""
    return f"event: {value['type']}\n".encode() + sse(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Tokens of one answer."""

    prompt: int
    completion: int
    cached: int
    reasoning: int | None = None
    """None where there can be none."""
    cache: Mapping[str, Any] | None = None
    """`x_v4.cache`: what was found of the prompt. None until that is known."""


class Writer(Protocol):
    """How a protocol writes one answer of type `A`. Chunks are JSON objects; `frame` makes bytes of one."""

    ending: bytes
    """What a stream that was not broken off ends with."""
    keep_alive: bytes
    """What an open stream says when it has nothing to say."""

    def frame(self, chunk: Mapping[str, Any]) -> bytes:
        """One event of a stream."""
        ...

    def opening(self, counts: Counts) -> Sequence[Mapping[str, Any]]:
        """The first chunks, before anything was said."""
        ...

    def chunks(self, events: Sequence[chat.Event]) -> Sequence[Mapping[str, Any]]:
        """Chunks of events; `end` is written by `closing`."""
        ...

    def closing(self, answer: Any, counts: Counts) -> Sequence[Mapping[str, Any]]:
        """The last chunks. answer: the finished `ChatAnswer` or `RawAnswer`."""
        ...

    def failure(self, error: ServeError) -> Mapping[str, Any]:
        """The chunk that ends a broken stream."""
        ...

    def whole(self, answer: Any, counts: Counts) -> dict[str, Any]:
        """The answer in one piece."""
        ...


def usage(counts: Counts) -> dict[str, Any]:
    """Token counts in OpenAI's and DeepSeek's fields."""
    out: dict[str, Any] = {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
        "prompt_cache_hit_tokens": counts.cached,
        "prompt_cache_miss_tokens": counts.prompt - counts.cached,
    }
    if counts.reasoning is not None:
        out["completion_tokens_details"] = {"reasoning_tokens": counts.reasoning}
    return out


def extension(counts: Counts, diagnostics: Sequence[chat.Diagnostic] = ()) -> dict[str, Any]:
    """`x_v4`: `parse`, what the parser repaired, if it did; `cache`, what was found of the prompt and why not more."""
    out: dict[str, Any] = {}
    if diagnostics:
        out["parse"] = [{"kind": one.kind, "detail": one.detail} for one in diagnostics]
    if counts.cache is not None:
        out["cache"] = dict(counts.cache)
    return {"x_v4": out} if out else {}


class _OpenAIStream:
    """What both of OpenAI's older streams share."""

    ending = b"data: [DONE]\n\n"
    keep_alive = KEEP_ALIVE

    def frame(self, chunk: Mapping[str, Any]) -> bytes:
        """See `Writer`."""
        return sse(chunk)

    def failure(self, error: ServeError) -> Mapping[str, Any]:
        """See `Writer`."""
        return error.envelope()


@dataclass(kw_only=True)
class ChatWriter(_OpenAIStream):
    """Writes one chat answer, whole or in chunks."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    include_usage: bool = False

    def whole(self, answer: ChatAnswer, counts: Counts) -> dict[str, Any]:
        """See `Writer`."""
        message = answer.message
        calls = [call.to_openai() for call in message.tool_calls]
        said: dict[str, Any] = {"role": "assistant", "content": message.content or (None if calls else "")}
        if message.reasoning_content:
            said["reasoning_content"] = said["reasoning"] = message.reasoning_content
        if calls:
            said["tool_calls"] = calls
        choice = {"index": 0, "message": said, "finish_reason": answer.finish_reason, "logprobs": None}
        head = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model}
        return {**head, "choices": [choice], "usage": usage(counts), **extension(counts, message.diagnostics)}

    def opening(self, counts: Counts) -> list[dict[str, Any]]:
        """See `Writer`."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, events: Sequence[chat.Event]) -> list[dict[str, Any]]:
        """See `Writer`."""
        return [self._chunk(delta) for event in events if (delta := self._delta(event)) is not None]

    def closing(self, answer: ChatAnswer, counts: Counts) -> list[dict[str, Any]]:
        """See `Writer`."""
        out = [{**self._chunk({}, answer.finish_reason), **extension(counts, answer.message.diagnostics)}]
        if self.include_usage:
            out.append({**self._chunk({}), "choices": [], "usage": usage(counts)})
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
class RawWriter(_OpenAIStream):
    """Writes one answer of /v1/completions, whole or in chunks."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    include_usage: bool = False

    def whole(self, answer: RawAnswer, counts: Counts) -> dict[str, Any]:
        """See `Writer`."""
        whole = self._chunk(answer.text, answer.finish_reason)
        return {**whole, "usage": usage(counts), **extension(counts)}

    def opening(self, counts: Counts) -> list[dict[str, Any]]:
        """There is no first chunk here."""
        return []

    def chunks(self, events: Sequence[chat.Event]) -> list[dict[str, Any]]:
        """See `Writer`."""
        return [self._streamed(event.text, None) for event in events if event.kind == "content"]

    def closing(self, answer: RawAnswer, counts: Counts) -> list[dict[str, Any]]:
        """See `Writer`."""
        out = [{**self._streamed("", answer.finish_reason), **extension(counts)}]
        if self.include_usage:
            out.append({**self._streamed("", None), "choices": [], "usage": usage(counts)})
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
