"""Request bodies, as OpenAI has them. What this server does not do is refused by name, never ignored.

A field that only says its default (n = 1, logprobs = false) is accepted, anything else of it is a BadRequest from
`refuse_unsupported`; a field nobody knows is refused by pydantic. Fields that cannot change an answer (`user`,
`metadata`, `safety_identifier`, `prompt_cache_key`) are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rorqual.serve.errors import BadRequest

__all__ = [
    "AssistantMessage",
    "ChatRequest",
    "CompletionRequest",
    "ConversationRequest",
    "DetokenizeRequest",
    "EmptyList",
    "NamedToolChoice",
    "SamplingRequest",
    "StreamOptions",
    "Strict",
    "SystemMessage",
    "TokenizeRequest",
    "ToolMessage",
    "UserMessage",
    "refuse_unsupported",
]

EmptyList = Annotated[list[Any], Field(max_length=0)]


class Strict(BaseModel):
    """Refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """A part of a content; only text can be written in the format."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class SystemMessage(Strict):
    """`developer` is OpenAI's newer name of the same."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content


class CallFunction(Strict):
    """What is called."""

    name: str = Field(min_length=1, max_length=512)
    arguments: str = "{}"
    parsed_arguments: Any = None
    """The openai package's own, which `model_dump` writes."""


class Call(Strict):
    """A call of the history."""

    id: str = Field(min_length=1, max_length=512)
    type: Literal["function"] = "function"
    function: CallFunction
    index: int | None = None
    provider_specific_fields: dict[str, Any] | None = None
    """litellm's own, here and in messages; what counts in it stands elsewhere too."""


class AssistantMessage(Strict):
    """An earlier answer. Reasoning is read from whichever of its four spellings holds it."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[dict[str, Any]] | None = None
    thinking_blocks: list[dict[str, Any]] | None = None
    tool_calls: list[Call] | None = None
    refusal: None = None
    parsed: None = None
    audio: None = None
    function_call: None = None
    annotations: EmptyList | None = None
    provider_specific_fields: dict[str, Any] | None = None


class ToolMessage(Strict):
    """The result of a call."""

    role: Literal["tool"]
    tool_call_id: str = Field(min_length=1, max_length=512)
    content: Content
    name: str | None = None
    """Ignored by the format, which finds a result's call by its id."""


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Strict):
    """A function the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_./:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """True: refused if a part of its schema cannot be kept to; calls are always held to what can."""


class Tool(Strict):
    """A tool."""

    type: Literal["function"] = "function"
    function: Function


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Thinking(Strict):
    """DeepSeek's switch."""

    type: Literal["enabled", "disabled"]


class TemplateOptions(Strict):
    """The same switch as vLLM's and SGLang's clients spell it."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class NamedFunction(Strict):
    """A function by its name."""

    name: str = Field(min_length=1, max_length=128)


class NamedToolChoice(Strict):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoiceField = Literal["auto", "none", "required"] | NamedToolChoice


class ConversationRequest(Strict):
    """What a prompt is made of."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: ToolChoiceField | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none", "medium", "high", "xhigh", "max"] | None = None


class SamplingRequest(Strict):
    """How to sample, and how to answer."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None


class TextFormat(Strict):
    """A free answer."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A schema and its name."""

    name: str = Field(min_length=1, max_length=128)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Accepted: the schema is always kept to."""
    description: str | None = None


class JsonSchemaFormat(Strict):
    """An answer that is valid against a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(ConversationRequest, SamplingRequest):
    """`POST /v1/chat/completions`."""

    model: str
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    store: bool | None = None
    service_tier: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`: a text, or token ids, and what follows. The answer is raw text."""

    model: str
    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class TokenizeRequest(Strict):
    """`POST /tokenize`: a text, or a conversation as in `/v1/chat/completions`."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    """Whether a text gets its BOS."""
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    tool_choice: ToolChoiceField | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none", "medium", "high", "xhigh", "max"] | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


_ACCEPTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "echo": (False,),
    "suffix": ("",),
}
"""Values that ask for nothing; `logprobs` of /v1/completions is a number, there 0 asks for something."""


def refuse_unsupported(request: BaseModel) -> None:
    """Raises BadRequest naming the first field that asks for what this server does not do."""
    for name, accepted in _ACCEPTED.items():
        value = getattr(request, name, None)
        if value is None or any(
            (value == one and type(value) is type(one)) or _same(value, one) for one in accepted
        ):
            continue
        allowed = " or ".join(repr(one) for one in accepted)
        raise BadRequest(
            f"{name} = {value!r} is not supported: leave it out, or pass {allowed}",
            param=name,
            code="unsupported_parameter",
        )


def _same(value: Any, one: Any) -> bool:
    """Equal numbers of different types; a boolean is no number."""
    return isinstance(value, float) and not isinstance(one, bool) and value == one
