"""Anthropic Messages: a request as a `Conversation`, an answer as content blocks (spec/encoding.md 5.2).

Blocks go out in the order thinking, text, tool_use. A signature is the name of the reasoning in the replay store, so
that reasoning whose text a client drops still comes back.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual import chat
from rorqual.serve.answer import ChatAnswer
from rorqual.serve.anthropic_schemas import (
    AnthropicAssistant,
    AnthropicSystem,
    AnthropicTool,
    AnthropicUser,
    CountTokensRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from rorqual.serve.conversation import Conversation, ToolChoice, effort_level
from rorqual.serve.errors import BadRequest, ServeError
from rorqual.serve.replay import ReplayStore, reasoning_signature
from rorqual.serve.wire import Counts, extension, named_sse

__all__ = ["MessagesWriter", "anthropic_error", "messages_conversation"]

ERROR_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(error: ServeError, status: int | None = None) -> dict[str, Any]:
    """Anthropic's error object. The code is ours: it tells errors of one type apart."""
    code = status or error.status
    kind = ERROR_TYPES.get(code, "api_error" if code >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error), "code": error.code}}


def messages_conversation(request: CountTokensRequest, replay: ReplayStore, tenant: str) -> Conversation:
    """The conversation of a request. Raises BadRequest for what cannot go together."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system)})
        places.append("system")
    opening = True
    for index, message in enumerate(request.messages):
        if isinstance(message, AnthropicUser):
            made = _user(message)
        elif isinstance(message, AnthropicSystem):
            # Later in a conversation the format gives a system turn no cue: it becomes text of the user turn.
            made = [{"role": "system" if opening else "user", "content": _text(message.content)}]
        else:
            made = [_assistant(message, replay, tenant)]
        opening = opening and isinstance(message, AnthropicSystem)
        messages += made
        places += [f"messages.{index}"] * len(made)
    choice, forced = _choice(request)
    config = request.output_config
    return Conversation(
        messages=messages,
        places=places,
        tools=[_tool(tool) for tool in request.tools or ()],
        tool_choice=choice,
        forced_tool=forced,
        parallel=not getattr(request.tool_choice, "disable_parallel_tool_use", False),
        thinking=request.thinking is None or request.thinking.type != "disabled",
        effort=effort_level(config.effort if config else None),
        schema=config.format.schema_ if config and config.format else None,
        schema_place="output_config.format",
    )


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


def _user(message: AnthropicUser) -> list[dict[str, Any]]:
    """One message a block: in the format they are one user turn again, in this order."""
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    out = []
    for block in message.content:
        if isinstance(block, TextBlock):
            out.append({"role": "user", "content": block.text})
        else:
            content = _text(block.content or "")
            out.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    return out


def _assistant(message: AnthropicAssistant, replay: ReplayStore, tenant: str) -> dict[str, Any]:
    blocks = (
        [TextBlock(type="text", text=message.content)]
        if isinstance(message.content, str)
        else message.content
    )
    thoughts: list[str] = []
    for block in blocks:
        if isinstance(block, ThinkingBlock) and block.thinking:
            thoughts.append(block.thinking)
        elif isinstance(block, ThinkingBlock | RedactedThinkingBlock):
            name = block.signature if isinstance(block, ThinkingBlock) else block.data
            record = replay.by_name(tenant, name)
            thoughts += [record.reasoning] if record is not None else []
    return {
        "role": "assistant",
        "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
        "reasoning_content": "".join(thoughts) if thoughts else None,
        "tool_calls": [_call(block) for block in blocks if isinstance(block, ToolUseBlock)],
    }


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _choice(request: CountTokensRequest) -> tuple[ToolChoice, str | None]:
    choice = request.tool_choice
    if choice is None or choice.type == "auto":
        return "auto", None
    if choice.type == "none":
        return "none", None
    if not request.tools:
        raise BadRequest("tool_choice demands a call, but no tools are offered", param="tool_choice")
    return "required", choice.name if choice.type == "tool" else None


@dataclass(kw_only=True)
class MessagesWriter:
    """Writes one message, whole or in events."""

    model: str
    omit_thinking: bool = False
    """Send signatures alone."""
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    ending: bytes = b""
    keep_alive: bytes = named_sse({"type": "ping"})
    _open: str = ""
    """Type of the block that is being written."""
    _index: int = -1
    _thoughts: list[str] = field(default_factory=list)

    def frame(self, chunk: Mapping[str, Any]) -> bytes:
        """See `Writer`."""
        return named_sse(chunk)

    def failure(self, error: ServeError) -> Mapping[str, Any]:
        """See `Writer`."""
        return anthropic_error(error)

    def whole(self, answer: ChatAnswer, counts: Counts) -> dict[str, Any]:
        """See `Writer`."""
        message = answer.message
        content: list[dict[str, Any]] = []
        if message.reasoning_content:
            content.append(self._thinking(message.reasoning_content))
        if message.content:
            content.append({"type": "text", "text": message.content})
        for call in message.tool_calls:
            arguments = json.loads(call.arguments)
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
        return {
            **self._message(content, _usage(counts)),
            **_stop(answer),
            **extension(counts, message.diagnostics),
        }

    def opening(self, counts: Counts) -> Sequence[Mapping[str, Any]]:
        """See `Writer`."""
        message = {**self._message([], {**_usage(counts), "output_tokens": 0}), "stop_reason": None}
        return [{"type": "message_start", "message": {**message, "stop_sequence": None}}, {"type": "ping"}]

    def chunks(self, events: Sequence[chat.Event]) -> Sequence[Mapping[str, Any]]:
        """See `Writer`."""
        out: list[Mapping[str, Any]] = []
        for event in events:
            match event.kind:
                case "reasoning":
                    self._thoughts.append(event.text)
                    self._begin(out, {"type": "thinking", "thinking": "", "signature": ""})
                    if not self.omit_thinking:
                        self._delta(out, {"type": "thinking_delta", "thinking": event.text})
                case "content":
                    self._begin(out, {"type": "text", "text": ""})
                    self._delta(out, {"type": "text_delta", "text": event.text})
                case "call_start":
                    self._end(out)
                    block = {"type": "tool_use", "id": event.call_id, "name": event.name, "input": {}}
                    self._begin(out, block)
                case "args":
                    self._delta(out, {"type": "input_json_delta", "partial_json": event.text})
                case "reasoning_end" | "call_end" | "call_malformed" | "call_truncated":
                    self._end(out)
        return out

    def closing(self, answer: ChatAnswer, counts: Counts) -> Sequence[Mapping[str, Any]]:
        """See `Writer`."""
        out: list[Mapping[str, Any]] = []
        self._end(out)
        report = extension(counts, answer.message.diagnostics)
        out.append({"type": "message_delta", "delta": _stop(answer), "usage": _usage(counts), **report})
        out.append({"type": "message_stop"})
        return out

    def _begin(self, out: list[Mapping[str, Any]], block: Mapping[str, Any]) -> None:
        if self._open == block["type"]:
            return
        self._end(out)
        self._open = str(block["type"])
        self._index += 1
        out.append({"type": "content_block_start", "index": self._index, "content_block": block})

    def _delta(self, out: list[Mapping[str, Any]], delta: Mapping[str, Any]) -> None:
        out.append({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _end(self, out: list[Mapping[str, Any]]) -> None:
        if not self._open:
            return
        if self._open == "thinking":
            signature = reasoning_signature("".join(self._thoughts))
            self._delta(out, {"type": "signature_delta", "signature": signature})
        self._open = ""
        out.append({"type": "content_block_stop", "index": self._index})

    def _thinking(self, text: str) -> dict[str, Any]:
        shown = "" if self.omit_thinking else text
        return {"type": "thinking", "thinking": shown, "signature": reasoning_signature(text)}

    def _message(self, content: Sequence[Any], usage: Mapping[str, Any]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": content, "usage": usage}


def _stop(answer: ChatAnswer) -> dict[str, Any]:
    if answer.stopped:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_string}
    reason = {"tool_calls": "tool_use", "length": "max_tokens"}.get(answer.finish_reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(counts: Counts) -> dict[str, Any]:
    """The three kinds of input add up to the prompt. Nothing is charged for keeping, so nothing is 'creation'."""
    return {
        "input_tokens": counts.prompt - counts.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.completion,
        "output_tokens_details": {"thinking_tokens": counts.reasoning or 0},
    }
