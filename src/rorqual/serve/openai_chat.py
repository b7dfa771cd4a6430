"""OpenAI chat: a request as a `Conversation` (spec/encoding.md 5.1).

`developer` means system, a later system message becomes text of the user turn, reasoning has four spellings.
"""

from __future__ import annotations

from typing import Any

from rorqual.serve.conversation import Conversation, ToolChoice, effort_level
from rorqual.serve.errors import BadRequest
from rorqual.serve.schemas import (
    AssistantMessage,
    ChatRequest,
    Content,
    ConversationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedToolChoice,
    SystemMessage,
    ToolMessage,
    UserMessage,
)

__all__ = ["chat_conversation"]


def chat_conversation(request: ConversationRequest) -> Conversation:
    """The conversation of a chat request. Raises BadRequest for fields that contradict each other."""
    thinking, effort = _mode(request)
    choice: ToolChoice | None
    if isinstance(request.tool_choice, NamedToolChoice):
        choice, forced = "required", request.tool_choice.function.name
    else:
        choice, forced = request.tool_choice, None
    messages = _messages(request)
    form = request.response_format if isinstance(request, ChatRequest) else None
    schema = None
    if isinstance(form, JsonSchemaFormat):
        schema = form.json_schema.schema_
    elif isinstance(form, JsonObjectFormat):
        schema = {"type": "object"}
    return Conversation(
        messages=messages,
        places=[f"messages.{index}" for index in range(len(messages))],
        tools=[tool.model_dump(exclude_none=True) for tool in request.tools or ()],
        tool_choice=choice or "auto",
        forced_tool=forced,
        parallel=not (isinstance(request, ChatRequest) and request.parallel_tool_calls is False),
        schema=schema,
        thinking=thinking,
        effort=effort,
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
    return next(iter(said.values()), True), effort_level(effort)


def _messages(request: ConversationRequest) -> list[dict[str, Any]]:
    """The messages as `chat` takes them, one for one."""
    out: list[dict[str, Any]] = []
    opening = True
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
            out.append(_assistant(message, index))
    return out


def _content(content: Content | None) -> Any:
    return content if content is None or isinstance(content, str) else [part.model_dump() for part in content]


def _assistant(message: AssistantMessage, index: int) -> dict[str, Any]:
    details = "".join(str(part.get("text") or "") for part in message.reasoning_details or ())
    blocks = "".join(str(part.get("thinking") or "") for part in message.thinking_blocks or ())
    fields = [message.reasoning_content, message.reasoning, details or None, blocks or None]
    said = [text for text in fields if text is not None]
    spellings = {text for text in said if text}
    if len(spellings) > 1:
        raise BadRequest(
            "reasoning_content, reasoning, reasoning_details and thinking_blocks differ: send one of them",
            param=f"messages.{index}.reasoning_content",
        )
    return {
        "role": "assistant",
        "content": _content(message.content),
        "reasoning_content": next(iter(spellings), "" if said else None),
        "tool_calls": [
            call.model_dump(include={"id", "type", "function"}, exclude_none=True)
            for call in message.tool_calls or ()
        ],
    }
