"""Request bodies of Anthropic's Messages API. What this server does not do is refused by name, never ignored.

`cache_control` is accepted everywhere and changes nothing: prefixes are always kept. So are `metadata` and the
`budget_tokens` of thinking, which this model has no notion of (`max_tokens` bounds reasoning and answer together).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rorqual.serve.schemas import EmptyList, Strict

__all__ = [
    "AnthropicAssistant",
    "AnthropicSystem",
    "AnthropicTool",
    "AnthropicUser",
    "CountTokensRequest",
    "MessagesRequest",
    "RedactedThinkingBlock",
    "TextBlock",
    "ThinkingBlock",
    "ToolResultBlock",
    "ToolUseBlock",
]


class CacheControl(Strict):
    """A breakpoint of Anthropic's cache."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Cached(Strict):
    """What may carry a breakpoint."""

    cache_control: CacheControl | None = None


class TextBlock(Cached):
    """Text."""

    type: Literal["text"]
    text: str
    citations: EmptyList | None = None


class ToolUseBlock(Cached):
    """A call of the history."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=512)
    name: str = Field(min_length=1, max_length=512)
    input: dict[str, Any]
    caller: None = None
    toolset_name: None = None


class ToolResultBlock(Cached):
    """The result of a call. The format has no field for `is_error`: the content speaks for itself."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=512)
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class ThinkingBlock(Strict):
    """Earlier reasoning. Without its text, it is found by its signature."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Strict):
    """Earlier reasoning, found by its data."""

    type: Literal["redacted_thinking"]
    data: str


class AnthropicSystem(Strict):
    """A system message inside the conversation."""

    role: Literal["system"]
    content: str | list[TextBlock]


class AnthropicUser(Strict):
    """What the user says, and results of calls."""

    role: Literal["user"]
    content: str | list[Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]]


class AnthropicAssistant(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: (
        str
        | list[
            Annotated[
                TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")
            ]
        ]
    )


AnthropicMessage = Annotated[
    AnthropicUser | AnthropicAssistant | AnthropicSystem, Field(discriminator="role")
]


class AnthropicTool(Cached):
    """A function the model may call. Anthropic's own tools, which have a `type`, are not here."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_./:-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class ChoiceAuto(Strict):
    """The model is free."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class ChoiceAny(Strict):
    """Some tool must be called."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ChoiceTool(Strict):
    """This tool must be called."""

    type: Literal["tool"]
    name: str = Field(min_length=1, max_length=128)
    disable_parallel_tool_use: bool | None = None


class ChoiceNone(Strict):
    """No tool may be called."""

    type: Literal["none"]


class ThinkingEnabled(Strict):
    """Think. The budget is accepted and not enforced."""

    type: Literal["enabled"]
    budget_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(Strict):
    """Think as much as the model wants: what it always does."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(Strict):
    """Do not think."""

    type: Literal["disabled"]


class OutputFormat(Strict):
    """JSON valid against a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How much to think, and what the answer must be."""

    effort: Literal["medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Strict):
    """`POST /v1/messages/count_tokens`."""

    model: str
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: (
        Annotated[ChoiceAuto | ChoiceAny | ChoiceTool | ChoiceNone, Field(discriminator="type")] | None
    ) = None
    thinking: (
        Annotated[ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")] | None
    ) = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1, lt=2**31)
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop_sequences: list[str] | None = Field(default=None, max_length=16)
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
