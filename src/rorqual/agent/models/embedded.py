"""A model in this process: token ids in, token ids out, never re-tokenized.

Owns the ids of one conversation. Each turn appends: previous prompt + sampled ids (+ EOS if the answer was
cut) + the bridge to the next cue (spec/encoding.md 6, rule 5). So the KV prefix always hits, and prompt and
completion ids are the RL sample as they are. The engine comes in by injection (`TokenEngine`): this room
imports no torch and no engine. Text from users and tools can forge no special token: segments say which
pieces are special (spec/encoding.md 1).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import rorqual.chat as chat
from rorqual.agent.errors import ContextFull, ModelError
from rorqual.agent.models.base import Completion, Delta, OnDelta, Usage
from rorqual.agent.models.repair import split_diagnostics
from rorqual.agent.models.sampler import Sampler

__all__ = ["EmbeddedConfig", "EmbeddedModel", "Sampling", "TokenEngine", "TokenEvent"]


class TokenEvent(Protocol):
    """One sampled token; the last one of a generation has a `finish_reason`."""

    @property
    def token_id(self) -> int:
        """The sampled id."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """None, `stop` (a stop id was sampled) or `length`."""
        ...


class TokenEngine(Protocol):
    """What this adapter needs of an engine; `rorqual.engine.Engine` is one. It keeps its own prefix cache."""

    def generate(self, prompt_ids: Sequence[int], params: Any, /) -> Iterator[TokenEvent]:
        """Sample until a stop id or `params.max_tokens`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampling parameters under the names of `rorqual.engine.SamplingParams`, for engines that take any
    object."""

    temperature: float
    top_p: float
    seed: int
    sequence: int
    max_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedConfig:
    """How the embedded model is sampled."""

    name: str = "rorqual-embedded"
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """The engine's randomness is a function of (seed, sequence, position): one seed serves a whole run."""
    sequence: int = 0
    """Number of the conversation: another one gives other draws under the same seed."""
    max_tokens: int = 512
    """Tokens per answer at most."""
    context_tokens: int = 4096
    """Prompt and answer together."""
    thinking_mode: Literal["thinking", "chat"] = "thinking"


@dataclass(kw_only=True)
class _Session:
    """The conversation so far, as messages (to recognise it) and as ids (to continue it)."""

    messages: list[Mapping[str, Any]] = field(default_factory=list)
    calls: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    ids: list[int] = field(default_factory=list)


class EmbeddedModel:
    """A `ChatModel` over a `TokenEngine`. It continues one conversation at a time; a different one starts
    anew."""

    profile: Literal["embedded", "remote"] = "embedded"

    def __init__(
        self,
        engine: TokenEngine,
        tokenizer: chat.Tokenizer,
        config: EmbeddedConfig | None = None,
        *,
        make_params: Callable[..., Any] = Sampling,
        read_metrics: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """`make_params` builds the engine's parameters (`rorqual.engine.SamplingParams`).

        `read_metrics` is asked after each answer for figures such as `kv_bytes`."""
        self.config = config or EmbeddedConfig()
        self.name = self.config.name
        self._engine = engine
        self._tokenizer = tokenizer
        self._make_params = make_params
        self._read_metrics = read_metrics
        self._session = _Session()

    def for_sequence(self, sequence: int) -> EmbeddedModel:
        """The same engine for another conversation, with its own draws; not at the same time as this one."""
        return EmbeddedModel(
            self._engine,
            self._tokenizer,
            replace(self.config, sequence=sequence),
            make_params=self._make_params,
            read_metrics=self._read_metrics,
        )

    async def aclose(self) -> None:
        """Forget the conversation."""
        self._session = _Session()

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        on_delta: OnDelta | None = None,
    ) -> Completion:
        """Sample the next answer. Raises ContextFull when it no longer fits, ModelError when the engine
        fails."""
        prompt, cached, notes = self._prompt(messages, tools)
        room = self.config.context_tokens - len(prompt)
        if room < 1:
            raise ContextFull(
                f"the conversation has {len(prompt)} tokens, the model's context {self.config.context_tokens}"
            )
        params = self._make_params(
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            seed=self.config.seed,
            sequence=self.config.sequence,
            max_tokens=min(self.config.max_tokens, room),
            stop_ids=(self._tokenizer.eos_id,),
        )
        sampler = await self._sample(prompt, params, tools, on_delta)
        message = _message(sampler.message)
        malformed, repairs = split_diagnostics(sampler.message)
        self._remember(messages, tools, message, prompt, sampler.ids)
        usage = Usage(
            prompt_tokens=len(prompt),
            completion_tokens=len(sampler.ids),
            cached_tokens=cached,
            reasoning_tokens=sampler.reasoning_tokens,
            seconds=sampler.seconds,
        )
        length = sampler.finish_reason == "length"
        return Completion(
            message=message,
            usage=usage,
            finish_reason="length" if length else "tool_calls" if message.get("tool_calls") else "stop",
            malformed=tuple(malformed),
            notes=tuple(notes + [f"parser: {repair}" for repair in repairs]),
            prompt_ids=tuple(prompt),
            completion_ids=tuple(sampler.ids),
            metrics=dict(sampler.metrics),
        )

    def _prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], int, list[str]]:
        """Ids of the prompt (the session's with a bridge, or a fresh rendering), how many of them the session
        had, and notes for the log."""
        session, mode = self._session, self.config.thinking_mode
        known = len(session.messages)
        new = messages[known:]
        if known and new and list(tools) == list(session.tools) and _same(messages[:known], session.messages):
            bridge = chat.render_bridge(
                new, previous_calls=session.calls, thinking_mode=mode, first_turn=known
            )
            return session.ids + self._tokenizer.encode_segments(bridge), len(session.ids), []
        segments = chat.render_segments(messages, tools=tools or None, thinking_mode=mode)
        fresh = not any(message.get("role") == "assistant" for message in messages)
        notes = (
            [] if fresh else ["the conversation is not the one sampled here: its ids were made from text."]
        )
        return self._tokenizer.encode_segments(segments), 0, notes

    def _remember(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        message: Mapping[str, Any],
        prompt: list[int],
        sampled: list[int],
    ) -> None:
        eos = self._tokenizer.eos_id
        ids = prompt + sampled
        if not sampled or sampled[-1] != eos:
            ids.append(
                eos
            )  # the answer was cut: the format ends every turn, the loss mask leaves this one out
        self._session = _Session(
            messages=[*messages, message], calls=message.get("tool_calls") or (), tools=list(tools), ids=ids
        )

    async def _sample(
        self, prompt: list[int], params: Any, tools: Sequence[Mapping[str, Any]], on_delta: OnDelta | None
    ) -> Sampler:
        loop = asyncio.get_running_loop()

        def forward(delta: Delta) -> None:
            if on_delta is not None:
                loop.call_soon_threadsafe(on_delta, delta)

        sampler = Sampler(
            self._tokenizer, tools=tools, thinking_mode=self.config.thinking_mode, on_delta=forward
        )
        work = asyncio.ensure_future(asyncio.to_thread(sampler.run, self._engine, prompt, params))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            sampler.stop.set()  # ends at its next token; left behind, it would keep the engine in use
            await asyncio.wait([work])
            raise
        except Exception as error:  # the engine is a stranger here: whatever it raises is the model's failure
            if {"tokens", "limit"} <= vars(
                error
            ).keys():  # rorqual.engine.ContextOverflow, which may not be imported
                raise ContextFull(str(error)) from error
            raise ModelError(f"the engine failed: {type(error).__name__}: {error}") from error
        if self._read_metrics is not None:
            sampler.metrics.update(self._read_metrics())
        return sampler


def _message(parsed: chat.Message) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": str(parsed.content or "")}
    if parsed.reasoning_content:
        message["reasoning_content"] = parsed.reasoning_content
    if parsed.tool_calls:
        message["tool_calls"] = [
            {**call.to_openai(), "id": call.id or f"call_{secrets.token_hex(12)}"}
            for call in parsed.tool_calls
        ]
    return message


def _same(messages: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two conversations say the same; empty and absent fields are equal."""
    names = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
    return all(
        all((one.get(name) or None) == (other.get(name) or None) for name in names)
        for one, other in zip(messages, known, strict=True)
    )
