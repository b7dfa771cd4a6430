"""Request bodies of OpenAI's Responses API. What this server does not do is refused by name, never ignored.

`strict` of a function is accepted, because clients of this API always send it, and answered as OpenAI answers when it
cannot hold a schema: the response lists the tool with `strict: false`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from rorqual.serve.schemas import EmptyList, JsonObjectFormat, Strict, TextFormat

__all__ = [
    "FunctionCallItem",
    "FunctionOutputItem",
    "InputText",
    "Item",
    "ItemReference",
    "MessageItem",
    "ReasoningItem",
    "ResponsesRequest",
    "ResponsesTool",
]

Status = Literal["in_progress", "completed", "incomplete"]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class InputText(Strict):
    """Text of a message or of a result."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    parsed: Any = None
    logprobs: EmptyList | None = None


class MessageItem(Strict):
    """A message; `type` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Strict):
    """A call of the history."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None
    parsed_arguments: Any = None
    """The openai package's own, which `model_dump` writes."""


class FunctionOutputItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Name
    output: str | list[InputText]
    id: str | None = None
    status: Status | None = None
    name: str | None = None
    caller: None = None


class SummaryPart(Strict):
    """A part of a summary."""

    type: Literal["summary_text"]
    text: str


class ReasoningPart(Strict):
    """A part of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """Earlier reasoning: in content, in summary, or in what we called encrypted."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[SummaryPart] = Field(default_factory=list)
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


class ItemReference(Strict):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: Name


def _kind(value: Any) -> str:
    if not isinstance(value, dict):
        return str(getattr(value, "type", "message"))
    return str(value.get("type") or "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind),
]


class ResponsesTool(Strict):
    """A function the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_./:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class NamedTool(Strict):
    """The one tool to call."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128)


class ReasoningOptions(Strict):
    """How much to think, and whether reasoning goes out as a summary (then it is all of it) or as content."""

    effort: Literal["none", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "detailed"] | None = None
    generate_summary: Literal["auto", "detailed"] | None = None


class SchemaFormat(Strict):
    """JSON valid against a schema."""

    type: Literal["json_schema"]
    name: str = Field(min_length=1, max_length=128)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Accepted: the schema is always kept to."""
    description: str | None = None


class TextOptions(Strict):
    """How the answer is written."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesStreamOptions(Strict):
    """Of a stream."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Strict):
    """`POST /v1/responses`."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: Name | None = None
    store: bool | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = (
        Field(default=None, max_length=16)
    )
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
