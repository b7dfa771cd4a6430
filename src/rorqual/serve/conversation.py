"""Conversation: what every protocol's request becomes, and the prompt's token ids made of it.

The protocols' adapters (openai_chat.py, anthropic.py, responses.py) build a `Conversation`; nothing behind it knows
which one it was. Owns lost reasoning (found in the replay store, or a 400 in strict mode; spec/encoding.md 5.3) and
the replay of sampled ids. Renders through `rorqual.chat`, so text never becomes a special token. Never samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rorqual import chat
from rorqual.serve.errors import BadRequest
from rorqual.serve.known_text import NOTHING, Known, KnownText
from rorqual.serve.replay import Record, ReplayStore, canonical_calls, prompt_digest

__all__ = ["Conversation", "Prompt", "ToolChoice", "build_prompt", "effort_level"]

USER, THINK, THINK_END = "<｜User｜>", "<think>", "</think>"

ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A request for an answer, whatever protocol it came in."""

    messages: list[dict[str, Any]]
    """OpenAI-shaped, as `rorqual.chat.render` takes them. `reasoning_content` is None where the client sent none."""
    places: list[str]
    """Where each message stands in the request, for errors: `messages.3`."""
    tools: list[dict[str, Any]]
    tool_choice: ToolChoice = "auto"
    forced_tool: str | None = None
    """With `required`: the tool to call; None: any."""
    parallel: bool = True
    """Whether one turn may hold several calls."""
    schema: dict[str, Any] | None = None
    """JSON schema of an answer that calls nothing; {}: any JSON."""
    schema_place: str = "response_format"
    """Where it stands in the request, for errors."""
    thinking: bool = True
    effort: str | None = None
    """Level of the format: None, high, max."""


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


def effort_level(effort: str | None) -> str | None:
    """The hosted API's mapping (spec/agent_and_serving.md 1.1); `low` has no text in this revision of the format."""
    return {None: None, "none": None, "max": "max"}.get(effort, "high")


def build_prompt(
    conversation: Conversation,
    tokenizer: chat.Tokenizer,
    *,
    replay: ReplayStore,
    tenant: str,
    strict_reasoning: bool = False,
    known: KnownText | None = None,
) -> Prompt:
    """The prompt of a conversation. Raises BadRequest naming the message and field.

    strict_reasoning: missing reasoning is refused as DeepSeek's API does, even if it is known here. known: texts
    whose ids need not be made again.
    """
    offered, thinking = conversation.tools, conversation.thinking
    _check_tools(conversation)
    if strict_reasoning and thinking:
        _refuse_lost_reasoning(conversation)
    messages, lost = _with_reasoning(conversation, replay, tenant)
    places = conversation.places
    if conversation.schema:
        messages, places = _with_schema(messages, places, conversation)
    silent = conversation.tool_choice == "none"
    tools = [] if silent else [_as_rendered(tool) for tool in offered]
    try:
        segments = chat.render_segments(
            messages,
            tools=tools or None,
            thinking_mode="thinking" if thinking else "chat",
            reasoning_effort=conversation.effort if thinking else None,
            drop_thinking=not (silent and offered),
        )
    except chat.RenderError as error:
        index = error.message_index
        at = places[index] if index is not None and index < len(messages) else None
        raise BadRequest(str(error), param=f"{at}.{error.field}" if at and error.field else at) from None
    last = segments[-1] if segments else None
    if last is None or not last.special or last.text not in (THINK, THINK_END):
        raise BadRequest(
            "messages must end with one from the user or a tool: the model answers it", param="messages"
        )
    before = known.of_segments(tenant, segments) if known is not None else NOTHING
    ids, replayed = _ids(segments, messages, tokenizer, replay, tenant, before)
    if known is not None:
        # Without its cue: there the next turn branches off if this answer's reasoning is dropped.
        known.keep_segments(tenant, segments[:-1], ids[:-1], after=before, replayed=replayed)
    user = tokenizer.token_id(USER)
    return Prompt(
        ids=ids,
        thinking=last.text == THINK,
        tools=tools,
        head=ids.index(user) if user in ids else 0,
        replayed=replayed,
        reasoning_lost=lost,
    )


def _check_tools(conversation: Conversation) -> None:
    names: set[str] = set()
    for number, tool in enumerate(conversation.tools):
        name = tool["function"]["name"]
        if name in names:
            raise BadRequest(f"tools offer the name {name!r} twice", param=f"tools.{number}.function.name")
        names.add(name)
    if conversation.tool_choice == "required" and not names:
        raise BadRequest("tool_choice demands a call, but no tools are offered", param="tool_choice")
    if conversation.forced_tool is not None and conversation.forced_tool not in names:
        raise BadRequest(
            f"tool_choice names {conversation.forced_tool!r}, which tools do not offer", param="tool_choice"
        )


def _refuse_lost_reasoning(conversation: Conversation) -> None:
    """Between two user messages with a call, every answer must carry its reasoning; the empty text counts."""
    stretch: list[int] = []
    called = False
    for index, message in enumerate([*conversation.messages, {"role": "user"}]):
        if message["role"] == "assistant":
            called = called or bool(message["tool_calls"])
            if message["reasoning_content"] is None:
                stretch.append(index)
        elif message["role"] == "user":
            if called and stretch:
                raise BadRequest(
                    "The `reasoning_content` in the thinking mode must be passed back to the API.",
                    param=f"{conversation.places[stretch[0]]}.reasoning_content",
                    code="invalid_request_error",
                )
            stretch, called = [], False


def _with_reasoning(
    conversation: Conversation, replay: ReplayStore, tenant: str
) -> tuple[list[dict[str, Any]], int]:
    """The messages with the reasoning that is known of them, and how many lost theirs."""
    out: list[dict[str, Any]] = []
    lost = 0
    for message in conversation.messages:
        if message["role"] == "assistant":
            message = {**message, "reasoning_content": message["reasoning_content"] or ""}
            if message["tool_calls"] and not message["reasoning_content"]:
                record = replay.by_name(tenant, message["tool_calls"][0]["id"])
                message["reasoning_content"] = record.reasoning if record else ""
                lost += conversation.thinking and record is None
        out.append(message)
    return out, lost


def _as_rendered(tool: dict[str, Any]) -> dict[str, Any]:
    """Without `strict`, which is a word to the server."""
    function = {key: value for key, value in tool["function"].items() if key != "strict"}
    return {**tool, "function": function}


def _with_schema(
    messages: list[dict[str, Any]], places: list[str], conversation: Conversation
) -> tuple[list[dict[str, Any]], list[str]]:
    """The schema in the system turn, where the format tells the model of it (spec/encoding.md 3.6)."""
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "response_format": conversation.schema}, *messages[1:]], places
    head = {"role": "system", "content": "", "response_format": conversation.schema}
    return [head, *messages], [conversation.schema_place, *places]


def _ids(
    segments: Sequence[chat.Segment],
    messages: Sequence[Mapping[str, Any]],
    tokenizer: chat.Tokenizer,
    replay: ReplayStore,
    tenant: str,
    before: Known,
) -> tuple[list[int], int]:
    """Ids of the segments; an answer that was sampled here is given back as it was sampled."""
    ids = list(before.ids)
    replayed, at, start = before.replayed, before.length, before.length
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
    record = replay.by_name(tenant, message["tool_calls"][0]["id"]) if calls else None
    if record is None:
        record = replay.by_prompt(tenant, prompt_digest(before), content=content or "", calls=calls)
    if record is None or record.thinking != thinking:
        return None
    return record if record.agrees(content or "", message["reasoning_content"], calls) else None
