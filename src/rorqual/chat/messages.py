"""Messages: the conversation as callers see it, OpenAI-shaped dicts or the dataclasses here.

Owns reading of fields: which ones count, what null means, how lists of parts and arguments become text
(spec/encoding.md 2). Never prints a byte of the format: renderer.py does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .errors import RenderError


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Something the parser had to repair, drop or report. `kind` is a name of spec/encoding.md 4.4."""

    kind: str
    detail: str = ""
    """What was seen, in words, for a log."""
    call_index: int | None = None
    """Which call it concerns, counted from 0 in the order of appearance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call the model made. Calls are equal if name and arguments are: ids are not the model's."""

    name: str
    arguments: str = "{}"
    """JSON text of an object."""
    id: str | None = field(default=None, compare=False)

    @property
    def function(self) -> ToolCall:
        """OpenAI's spelling: `call.function.name`, `call.function.arguments`."""
        return self

    def to_openai(self) -> dict[str, Any]:
        """`{id, type, function: {name, arguments}}`; `id` is left out if there is none."""
        head = {} if self.id is None else {"id": self.id}
        return {**head, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(slots=True, kw_only=True)
class Message:
    """One message of a conversation. Fields are those of OpenAI's chat API plus the format's own (spec 2)."""

    role: str = "assistant"
    content: Any = ""
    """Text, None, or a list of parts."""
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    response_format: Any = None
    task: str | None = None
    """Quick instruction: action, query, authority, domain, title or read_url."""
    wo_eos: bool = False
    """True: no EOS after this turn, the model goes on writing it."""
    finish_reason: str | None = field(default=None, compare=False)
    """Set by the parser: stop, tool_calls or length."""
    diagnostics: list[Diagnostic] = field(default_factory=list, compare=False)
    """Set by the parser: what it had to repair or drop."""
    raw: str | None = field(default=None, compare=False, repr=False)
    """Set by the parser: the completion exactly as it came, for replay."""

    def to_openai(self) -> dict[str, Any]:
        """The message as an OpenAI dict; fields that say nothing are left out. Renders to the same bytes."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content:
            out["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            out["tool_calls"] = [call.to_openai() for call in self.tool_calls]
        for name in ("tool_call_id", "tools", "response_format", "task"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        if self.wo_eos:
            out["wo_eos"] = True
        return out


MessageLike: TypeAlias = Message | Mapping[str, Any]


def field_of(message: MessageLike, name: str) -> Any:
    """The field, None when absent. Dicts and `Message` alike."""
    if isinstance(message, Message):
        return getattr(message, name, None)
    return message.get(name)


def to_json(value: Any) -> str:
    """JSON as the format writes it: `", "`, `": "`, non-ASCII kept (spec 3.2). Raises ValueError on NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def content_text(content: Any, *, index: int, json_values: bool = False) -> str:
    """Content of any role as text: null is empty, text parts are joined by a blank line (spec 2, ours).

    json_values: other JSON values are written as JSON (tool results); else they are refused.
    Raises RenderError for a part that is not text, naming its type.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple) and all(isinstance(p, Mapping) and "type" in p for p in content):
        texts = []
        for part in content:
            if part["type"] != "text" or not isinstance(part.get("text"), str):
                raise RenderError(
                    f"content part of type {part['type']!r} cannot be written: only text parts can",
                    message_index=index,
                    field="content",
                )
            texts.append(part["text"])
        return "\n\n".join(texts)
    if json_values:
        try:
            return to_json(content)
        except (TypeError, ValueError) as error:
            raise RenderError(
                f"tool result is not text and not JSON ({error}): pass a string",
                message_index=index,
                field="content",
            ) from None
    raise RenderError(
        f"content is {type(content).__name__}: pass text, null or a list of text parts",
        message_index=index,
        field="content",
    )


def reasoning_text(message: MessageLike, *, index: int) -> str:
    """Reasoning of an assistant message; OpenAI-compatible servers spell the field `reasoning` as well."""
    value = field_of(message, "reasoning_content")
    if value is None:
        value = field_of(message, "reasoning")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RenderError(
            f"reasoning is {type(value).__name__}: pass text", message_index=index, field="reasoning_content"
        )
    return value


@dataclass(frozen=True, slots=True)
class CallText:
    """A call taken apart for printing: `parameters` are (key, value) of its arguments object, in order."""

    name: str
    id: str | None
    parameters: tuple[tuple[str, Any], ...]


def refuse_constant(name: str) -> Any:
    """For json.loads: NaN and Infinity are not JSON."""
    raise ValueError(f"{name} is not JSON")


def read_call(call: ToolCall | Mapping[str, Any], *, index: int) -> CallText:
    """A tool call of the history. Arguments: JSON text or an object; anything else becomes one parameter
    `arguments` holding it (spec/encoding.md 2). Raises RenderError when there is no name."""
    name: str
    arguments: Any
    call_id: str | None
    if isinstance(call, ToolCall):
        name, arguments, call_id = call.name, call.arguments, call.id
    elif isinstance(call, Mapping):
        function = call.get("function")
        function = call if function is None else function
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RenderError("a call needs function.name", message_index=index, field="tool_calls")
        name, arguments = function["name"], function.get("arguments")
        call_id = call.get("id") or function.get("id")
    else:
        raise RenderError(f"a call is {type(call).__name__}", message_index=index, field="tool_calls")
    return CallText(name, call_id, tuple(_read_arguments(arguments, index=index).items()))


def _read_arguments(arguments: Any, *, index: int) -> Mapping[str, Any]:
    if isinstance(arguments, Mapping):
        return arguments
    if not isinstance(arguments, str):
        return {"arguments": arguments}
    try:
        value = json.loads(arguments, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return {"arguments": arguments}
    return value if isinstance(value, dict) else {"arguments": value}
