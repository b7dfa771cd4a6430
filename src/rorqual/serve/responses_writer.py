"""ResponsesWriter: one answer as a response object and its items, whole or as numbered events.

Items go out in the order reasoning, message, function_call. A call that was cut never becomes part of the response.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual import chat
from rorqual.serve.answer import ChatAnswer
from rorqual.serve.errors import ServeError
from rorqual.serve.responses import pack_reasoning
from rorqual.serve.responses_schemas import NamedTool, ResponsesRequest
from rorqual.serve.wire import KEEP_ALIVE, Counts, extension, named_sse

__all__ = ["ResponsesWriter"]

Chunks = list[Mapping[str, Any]]


@dataclass
class _Item:
    """The item that is being written."""

    kind: str
    id: str
    at: int
    text: str = ""
    call_id: str = ""
    name: str = ""

    def place(self, part: str = "content") -> dict[str, Any]:
        """Fields of events about it. part: content, summary, or empty for the arguments of a call."""
        return {"item_id": self.id, "output_index": self.at, **({f"{part}_index": 0} if part else {})}


@dataclass(kw_only=True)
class ResponsesWriter:
    """Writes one response."""

    model: str
    request: ResponsesRequest
    on_done: Callable[[Mapping[str, Any]], None]
    """Called with the finished response before it goes out."""
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(16)}")
    created: float = field(default_factory=lambda: float(int(time.time())))
    ending: bytes = b""
    keep_alive: bytes = KEEP_ALIVE
    _sequence: int = -1
    _opened: bool = False
    _item: _Item | None = None
    _items: int = 0
    _ids: dict[str, list[str]] = field(default_factory=dict)
    """Ids of finished items by kind, in order: the response at the end is made of the same ones."""

    def frame(self, chunk: Mapping[str, Any]) -> bytes:
        """See `Writer`."""
        return named_sse(chunk)

    def whole(self, answer: ChatAnswer, counts: Counts) -> dict[str, Any]:
        """See `Writer`."""
        response = self._finished(answer, counts)
        self.on_done(response)
        return response

    def opening(self, counts: Counts) -> Chunks:
        """See `Writer`."""
        self._opened = True
        response = self._response("in_progress", [])
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def chunks(self, events: Sequence[chat.Event]) -> Chunks:
        """See `Writer`."""
        out: Chunks = []
        for event in events:
            match event.kind:
                case "reasoning":
                    self._reasoning(out, event.text)
                case "content":
                    self._content(out, event.text)
                case "call_start":
                    self._end(out)
                    item = self._begin("function_call", call_id=event.call_id, name=event.name)
                    out.append(self._added(item))
                case "args" if self._item is not None:
                    self._item.text += event.text
                    kind = "response.function_call_arguments.delta"
                    out.append(self._event(kind, **self._item.place(""), delta=event.text))
                case "reasoning_end" | "call_end":
                    self._end(out)
                case "call_malformed" | "call_truncated":
                    self._end(out, complete=False)
        return out

    def closing(self, answer: ChatAnswer, counts: Counts) -> Chunks:
        """See `Writer`."""
        out: Chunks = []
        self._end(out)
        response = self._finished(answer, counts)
        self.on_done(response)
        out.append(self._event(f"response.{response['status']}", response=response))
        return out

    def failure(self, error: ServeError) -> Mapping[str, Any]:
        """See `Writer`: a failed response, or before there was one, an error."""
        if not self._opened:
            return self._event("error", code=error.code, message=str(error), param=error.param)
        response = self._response("failed", [])
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        return self._event(
            "response.failed", response={**response, "error": {"code": code, "message": str(error)}}
        )

    def _reasoning(self, out: Chunks, text: str) -> None:
        if self._item is None or self._item.kind != "reasoning":
            self._end(out)
            item = self._begin("reasoning")
            out.append(self._added(item))
            if self._summarized:
                part = {"type": "summary_text", "text": ""}
                out.append(
                    self._event("response.reasoning_summary_part.added", **item.place("summary"), part=part)
                )
            else:
                part = {"type": "reasoning_text", "text": ""}
                out.append(self._event("response.content_part.added", **item.place(), part=part))
        assert self._item is not None
        self._item.text += text
        kind, place = (
            ("reasoning_summary_text", "summary") if self._summarized else ("reasoning_text", "content")
        )
        out.append(self._event(f"response.{kind}.delta", **self._item.place(place), delta=text))

    def _content(self, out: Chunks, text: str) -> None:
        if self._item is None or self._item.kind != "message":
            self._end(out)
            item = self._begin("message")
            out.append(self._added(item))
            out.append(self._event("response.content_part.added", **item.place(), part=_output_text("")))
        assert self._item is not None
        self._item.text += text
        kind = "response.output_text.delta"
        out.append(self._event(kind, **self._item.place(), delta=text, logprobs=[]))

    def _begin(self, kind: str, *, call_id: str = "", name: str = "") -> _Item:
        self._item = _Item(kind, _new_id(kind), self._items, call_id=call_id, name=name)
        self._items += 1
        return self._item

    def _added(self, item: _Item) -> Mapping[str, Any]:
        empty = self._shown(item, status="in_progress")
        empty.update({key: [] for key in ("content", "summary") if key in empty})
        return self._event("response.output_item.added", output_index=item.at, item=empty)

    def _end(self, out: Chunks, *, complete: bool = True) -> None:
        item, self._item = self._item, None
        if item is None:
            return
        text = item.text
        if item.kind == "function_call":
            kind = "response.function_call_arguments.done"
            if complete:
                out.append(self._event(kind, **item.place(""), name=item.name, arguments=text))
        elif item.kind == "message":
            out.append(self._event("response.output_text.done", **item.place(), text=text, logprobs=[]))
            out.append(self._event("response.content_part.done", **item.place(), part=_output_text(text)))
        elif self._summarized:
            place, part = item.place("summary"), {"type": "summary_text", "text": text}
            out.append(self._event("response.reasoning_summary_text.done", **place, text=text))
            out.append(self._event("response.reasoning_summary_part.done", **place, part=part))
        else:
            part = {"type": "reasoning_text", "text": text}
            out.append(self._event("response.reasoning_text.done", **item.place(), text=text))
            out.append(self._event("response.content_part.done", **item.place(), part=part))
        if complete:
            self._ids.setdefault(item.kind, []).append(item.id)
        shown = self._shown(item, status="completed" if complete else "incomplete")
        out.append(self._event("response.output_item.done", output_index=item.at, item=shown))

    @property
    def _summarized(self) -> bool:
        options = self.request.reasoning
        return options is not None and bool(options.summary or options.generate_summary)

    def _shown(self, item: _Item, *, status: str) -> dict[str, Any]:
        """The item as it is so far."""
        head = {"id": item.id, "type": item.kind, "status": status}
        if item.kind == "function_call":
            return {**head, "call_id": item.call_id, "name": item.name, "arguments": item.text}
        if item.kind == "message":
            return {**head, "role": "assistant", "content": [_output_text(item.text)]}
        parts = {"summary": [], "content": [{"type": "reasoning_text", "text": item.text}]}
        if self._summarized:
            parts = {"summary": [{"type": "summary_text", "text": item.text}]}
        if self.request.include and status != "in_progress":
            return {**head, **parts, "encrypted_content": pack_reasoning(item.text)}
        return {**head, **parts}

    def _finished(self, answer: ChatAnswer, counts: Counts) -> dict[str, Any]:
        message = answer.message
        output: list[dict[str, Any]] = []

        def add(kind: str, text: str, *, call_id: str = "", name: str = "") -> None:
            ids = self._ids.get(kind) or [_new_id(kind)]
            item = _Item(kind, ids.pop(0), len(output), text, call_id, name)
            output.append(self._shown(item, status="completed"))

        if message.reasoning_content:
            add("reasoning", message.reasoning_content)
        if message.content:
            add("message", str(message.content))
        for call in message.tool_calls:
            add("function_call", call.arguments, call_id=str(call.id), name=call.name)
        cut = answer.finish_reason == "length"
        if cut and output and output[-1]["type"] != "function_call":
            output[-1]["status"] = "incomplete"
        return {
            **self._response("incomplete" if cut else "completed", output),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else float(int(time.time())),
            "usage": _usage(counts),
            **extension(counts, message.diagnostics),
        }

    def _response(self, status: str, output: Sequence[Any]) -> dict[str, Any]:
        asked = self.request
        choice = asked.tool_choice
        options = asked.reasoning
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {
                "effort": options.effort if options else None,
                "summary": (options.summary or options.generate_summary) if options else None,
            },
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": asked.store is not False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": _format(asked)},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto",
            "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in asked.tools or ()],
            "top_logprobs": 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
            "metadata": asked.metadata or {},
        }

    def _event(self, kind: str, **fields: Any) -> Mapping[str, Any]:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **fields}


def _new_id(kind: str) -> str:
    prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
    return f"{prefix}_{secrets.token_hex(16)}"


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as it is used."""
    return {"description": None, "parameters": None, "strict": False, **tool}


def _format(asked: ResponsesRequest) -> dict[str, Any]:
    form = asked.text.format if asked.text else None
    return {"type": "text"} if form is None else form.model_dump(exclude_none=True, by_alias=True)


def _usage(counts: Counts) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.completion,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning or 0},
        "total_tokens": counts.prompt + counts.completion,
    }
