"""Conversation: an OpenAI request as the prompt's token ids, and the parser's settings for the answer.

Owns the mapping of spec/encoding.md 5.1 (developer means system, a later system message becomes text of the user
turn, four spellings of reasoning) and the replay of sampled ids (5.3). Renders through `rorqual.chat`, so text never
becomes a special token. Never samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual import chat
from rorqual.serve.errors import BadRequest
from rorqual.serve.replay import Record, ReplayStore, canonical_calls, prompt_digest
from rorqual.serve.schemas import (
    AssistantMessage,
    Content,
    ConversationRequest,
    SystemMessage,
    ToolMessage,
    UserMessage,
)

__all__ = ["Prompt", "build_prompt"]

USER, THINK, THINK_END = "<｜User｜>", "<think>", "</think>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the engine is given, and how its answer is to be read."""

    ids: list[int]
    thinking: bool
    """Whether the answer begins in reasoning, as the last token says."""
    tools: list[dict[str, Any]]
    """Offered tools; empty: a call is dropped."""
    head: int
    """Tokens before the first user turn: system text and tools, shared by many conversations."""
    replayed: int
    """Earlier answers given back as sampled."""
    reasoning_lost: int
    """Earlier answers with calls whose reasoning neither the client nor the replay store had."""


def build_prompt(
    request: ConversationRequest, tokenizer: chat.Tokenizer, *, replay: ReplayStore, tenant: str
) -> Prompt:
    """The prompt of a request. Raises BadRequest naming the message and field."""
    thinking, effort = _mode(request)
    offered = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    _refuse_doubles(offered)
    messages, lost = _messages(request, replay, tenant, thinking=thinking)
    silent = request.tool_choice == "none"
    tools = [] if silent else offered
    try:
        segments = chat.render_segments(
            messages,
            tools=tools or None,
            thinking_mode="thinking" if thinking else "chat",
            reasoning_effort=effort if thinking else None,
            drop_thinking=not (silent and offered),
        )
    except chat.RenderError as error:
        at = None if error.message_index is None else f"messages.{error.message_index}"
        raise BadRequest(str(error), param=f"{at}.{error.field}" if at and error.field else at) from None
    last = segments[-1] if segments else None
    if last is None or not last.special or last.text not in (THINK, THINK_END):
        raise BadRequest(
            "messages must end with one from the user or a tool: the model answers it", param="messages"
        )
    ids, replayed = _ids(segments, messages, tokenizer, replay, tenant)
    user = tokenizer.token_id(USER)
    return Prompt(
        ids=ids,
        thinking=last.text == THINK,
        tools=tools,
        head=ids.index(user) if user in ids else 0,
        replayed=replayed,
        reasoning_lost=lost,
    )


def _mode(request: ConversationRequest) -> tuple[bool, str | None]:
    """Whether to think, and the effort level of the format."""
    effort = request.reasoning_effort
    options = request.chat_template_kwargs
    wishes = {
        "thinking": None if request.thinking is None else request.thinking.type == "enabled",
        "chat_template_kwargs.thinking": options.thinking if options else None,
        "chat_template_kwargs.enable_thinking": options.enable_thinking if options else None,
        "reasoning_effort": None if effort is None else effort != "none",
    }
    said = {name: wish for name, wish in wishes.items() if wish is not None}
    if len(set(said.values())) > 1:
        raise BadRequest(f"{' and '.join(said)} contradict each other", param=next(iter(said)))
    thinking = next(iter(said.values()), True)
    # The hosted API's mapping (spec/agent_and_serving.md 1.1); `low` has no text in this revision of the format.
    level = {None: None, "none": None, "max": "max"}.get(effort, "high")
    return thinking, level


def _refuse_doubles(tools: Sequence[Mapping[str, Any]]) -> None:
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        name = tool["function"]["name"]
        if name in seen:
            raise BadRequest(f"tools offer the name {name!r} twice", param=f"tools.{number}.function.name")
        seen.add(name)


def _messages(
    request: ConversationRequest, replay: ReplayStore, tenant: str, *, thinking: bool
) -> tuple[list[dict[str, Any]], int]:
    """The messages as `chat` takes them, one for one, and how many lost their reasoning."""
    out: list[dict[str, Any]] = []
    lost, opening = 0, True
    for index, message in enumerate(request.messages):
        if isinstance(message, SystemMessage):
            # Later in a conversation the format gives a system turn no cue: it becomes text of the user turn.
            out.append({"role": "system" if opening else "user", "content": _content(message.content)})
            continue
        opening = False
        if isinstance(message, UserMessage):
            out.append({"role": "user", "content": _content(message.content)})
        elif isinstance(message, ToolMessage):
            content = _content(message.content)
            out.append({"role": "tool", "tool_call_id": message.tool_call_id, "content": content})
        else:
            said = _assistant(message, index)
            if said["tool_calls"] and not said["reasoning_content"]:
                record = replay.by_call(tenant, said["tool_calls"][0]["id"])
                said["reasoning_content"] = record.reasoning if record else ""
                lost += thinking and record is None
            out.append(said)
    return out, lost


def _content(content: Content | None) -> Any:
    return content if content is None or isinstance(content, str) else [part.model_dump() for part in content]


def _assistant(message: AssistantMessage, index: int) -> dict[str, Any]:
    details = "".join(str(part.get("text") or "") for part in message.reasoning_details or ())
    blocks = "".join(str(part.get("thinking") or "") for part in message.thinking_blocks or ())
    spellings = [text for text in (message.reasoning_content, message.reasoning, details, blocks) if text]
    if len(set(spellings)) > 1:
        raise BadRequest(
            "reasoning_content, reasoning, reasoning_details and thinking_blocks differ: send one of them",
            param=f"messages.{index}.reasoning_content",
        )
    return {
        "role": "assistant",
        "content": _content(message.content),
        "reasoning_content": spellings[0] if spellings else "",
        "tool_calls": [
            call.model_dump(include={"id", "type", "function"}, exclude_none=True)
            for call in message.tool_calls or ()
        ],
    }


def _ids(
    segments: Sequence[chat.Segment],
    messages: Sequence[Mapping[str, Any]],
    tokenizer: chat.Tokenizer,
    replay: ReplayStore,
    tenant: str,
) -> tuple[list[int], int]:
    """Ids of the segments; an answer that was sampled here is given back as it was sampled."""
    ids: list[int] = []
    replayed = at = start = 0
    while at < len(segments):
        segment = segments[at]
        cue = segments[at - 1] if at else None
        if not (segment.generated and cue is not None and cue.special and not cue.generated):
            at += 1
            continue
        end = at
        while end < len(segments) and segments[end].generated and segments[end].turn == segment.turn:
            end += 1
        ids += tokenizer.encode_segments(segments[start:at])
        record = _sampled(messages[segment.turn], cue.text == THINK, ids, replay, tenant)
        if record is not None:
            ids += record.ids
            replayed += 1
        else:
            ids += tokenizer.encode_segments(segments[at:end])
        at = start = end
    return ids + tokenizer.encode_segments(segments[start:]), replayed


def _sampled(
    message: Mapping[str, Any], thinking: bool, before: list[int], replay: ReplayStore, tenant: str
) -> Record | None:
    content = message["content"]
    if isinstance(content, list):
        content = "\n\n".join(part["text"] for part in content)
    calls = canonical_calls(message["tool_calls"])
    record = replay.by_call(tenant, message["tool_calls"][0]["id"]) if calls else None
    if record is None:
        record = replay.by_prompt(tenant, prompt_digest(before), content=content or "", calls=calls)
    if record is None or record.thinking != thinking:
        return None
    return record if record.agrees(content or "", message["reasoning_content"], calls) else None
