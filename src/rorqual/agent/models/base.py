"""What the loop asks of a model: messages and tools in, one assistant message out, with deltas on the way.

Owns the types both adapters share. An adapter never runs a tool and never keeps the conversation (the log
does); the embedded one keeps token ids of the run it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

__all__ = ["ChatModel", "Completion", "Delta", "OnDelta", "Usage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of one request, or summed over a run."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that came from a prefix cache."""
    reasoning_tokens: int = 0
    seconds: float = 0.0
    """Wall time of the requests."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """A piece of an answer while it comes. Display only: the message in the `Completion` is the truth."""

    channel: Literal["reasoning", "content", "call", "arguments", "restart", "note"]
    """`call`: `text` is the tool's name; `restart`: forget the deltas so far, the request is being repeated;
    `note`: a line for the user (a retry and its reason)."""
    text: str
    index: int = 0
    """Which call, for `call` and `arguments`."""


OnDelta = Callable[[Delta], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One finished answer."""

    message: Mapping[str, Any]
    """OpenAI-shaped: `role`, `content` (text), `reasoning_content`?, `tool_calls`? with `arguments` as
    sent."""
    usage: Usage
    finish_reason: str
    """`stop`, `tool_calls` or `length`."""
    malformed: Sequence[str] = ()
    """Calls that could not be read, one line each: they are not in `message` and must not be run."""
    notes: Sequence[str] = ()
    """What was recovered on the way (retries, repairs, diagnostics), for the log."""
    prompt_ids: Sequence[int] | None = None
    """Token ids in, where the adapter has them (embedded model)."""
    completion_ids: Sequence[int] | None = None
    """Token ids sampled, exactly; stop token included if it was sampled."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures of the adapter, such as `kv_bytes`."""


class ChatModel(Protocol):
    """A model the agent can talk to. Raises ModelError (errors.py)."""

    name: str
    profile: Literal["embedded", "remote"]
    """Which default tools and system prompt fit."""

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        on_delta: OnDelta | None,
    ) -> Completion:
        """Answer `messages` (a conversation that only ever grows within a run)."""
        ...

    async def aclose(self) -> None:
        """Release connections; idempotent."""
        ...
