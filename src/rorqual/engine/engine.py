"""Engine: cached generation for one model; sequences that grow, fork, rewind and are saved.

Owns chunked prefill, sampling, stop conditions and limits. A sequence's tokens are fed once: a `generate` whose
prompt continues the last one re-uses its state. Many sequences at once: batch.py. Pages, sharing and the packed
cache formats are a later issue's; today's state is the model's `CacheState`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rorqual.engine.errors import ContextOverflow, PromptError
from rorqual.engine.sampler import SamplingParams, sample
from rorqual.model import CacheState, Config, Model

__all__ = ["Engine", "FinishReason", "KVUsage", "SequenceState", "TokenEvent"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token; the last of a generation carries why it ended."""

    token_id: int
    logprob: float
    """Natural log, of the tempered distribution before top-p."""
    position: int
    """Index of this token in its sequence."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What a sequence's cache holds, beside what plain attention would hold for the same layers."""

    tokens: int
    held_bytes: int
    gqa8_bytes: int
    """8 KV heads of the model's head width in BF16, K and V, every layer, every token."""


class Engine:
    """Generates with a model. `kv_bytes` bounds the cache of one sequence.

    Raises ConfigError or CheckpointError when `model` is a directory that cannot be loaded.
    """

    def __init__(
        self, model: Model | str | Path, *, kv_bytes: int = 2 << 30, prefill_chunk: int = 128
    ) -> None:
        self.model = model.eval() if isinstance(model, Model) else Model.from_pretrained(model)
        self.kv_bytes, self.prefill_chunk = kv_bytes, prefill_chunk
        self._last: SequenceState | None = None

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.model.config

    def open(self, prompt_ids: Sequence[int]) -> SequenceState:
        """A new sequence that holds `prompt_ids` (prefilled in chunks). Raises PromptError, ContextOverflow."""
        sequence = SequenceState(self)
        sequence.append(prompt_ids)
        return sequence

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[TokenEvent]:
        """Streams the tokens that follow `prompt_ids`.

        Continues the last generation's state when `prompt_ids` extends it. Raises PromptError, ContextOverflow
        before anything is computed.
        """
        ids, last = list(prompt_ids), self._last
        self.check(ids)
        self._last = None  # a generation that is dropped half-way leaves no half-fed state behind
        if last is not None and 0 < last.length <= len(ids) and last.token_ids == ids[: last.length]:
            sequence = last
            sequence.append(ids[last.length :])
        else:
            sequence = self.open(ids)
        self._last = sequence
        return sequence.generate(params or SamplingParams())

    def usage(self) -> KVUsage | None:
        """The cache of the last `generate`, or None before the first."""
        return None if self._last is None else self._last.usage()

    def load(self, path: str | Path) -> SequenceState:
        """A sequence written by `SequenceState.save`. Raises SequenceFileError."""
        from rorqual.engine.saved import load_sequence

        return load_sequence(self, path)

    def check(self, ids: Sequence[int], *, held: int = 0) -> None:
        """Raises unless `ids` are valid and fit beside `held` tokens."""
        limit = self.config.max_position_embeddings
        if not ids and not held:
            raise PromptError("the prompt is empty: give at least one token")
        vocab = self.config.vocab_size
        bad = next((token for token in ids if not 0 <= token < vocab), None)
        if bad is not None:
            raise PromptError(f"token id {bad} is outside the vocabulary (0 to {vocab - 1})")
        total = held + len(ids)
        if total > limit:
            raise ContextOverflow(
                f"{total} tokens do not fit the context of {limit}", tokens=total, limit=limit
            )
        need = predicted_bytes(self.config, total, self.model.embed.weight.element_size())
        if need > self.kv_bytes:
            raise ContextOverflow(
                f"{total} tokens need {need} bytes of KV cache, the budget is {self.kv_bytes}: raise kv_bytes",
                tokens=total,
                limit=limit,
            )


class SequenceState:
    """One conversation's tokens and cache. Made by `Engine.open`, `fork` or `Engine.load`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.token_ids: list[int] = []
        """Tokens in the cache, in order."""
        self.state: CacheState = engine.model.new_state(1)
        self.logits: torch.Tensor | None = None
        """fp32 [1, V] after the last token."""

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.token_ids)

    @torch.no_grad()
    def append(self, ids: Sequence[int]) -> None:
        """Feeds `ids` in chunks. Raises PromptError, ContextOverflow; then nothing has changed."""
        ids = list(ids)
        self.engine.check(ids, held=self.length)
        chunk = self.engine.prefill_chunk
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            self.logits = self.engine.model.extend(torch.tensor([part]), self.state)
            self.token_ids.extend(part)

    def generate(self, params: SamplingParams) -> Iterator[TokenEvent]:
        """Samples until a stop id, `max_tokens` or the end of the context. Every sampled token but the last is fed."""
        limit = self.engine.config.max_position_embeddings
        for count in range(1, params.max_tokens + 1):
            assert self.logits is not None
            ids, logprobs = sample(self.logits, [params], [self.length])
            token = int(ids[0])
            reason: FinishReason | None = None
            if token in params.stop_ids:
                reason = "stop"
            elif count == params.max_tokens or self.length + 1 >= limit:
                reason = "length"
            yield TokenEvent(token, float(logprobs[0]), self.length, reason)
            if reason is not None:
                return
            self.append([token])

    def fork(self) -> SequenceState:
        """An independent copy."""
        twin = SequenceState(self.engine)
        twin.token_ids = list(self.token_ids)
        twin.state = self.state.select(torch.tensor([0]))
        twin.logits = self.logits
        return twin

    def rewind(self, position: int) -> None:
        """Goes back to the first `position` tokens, by feeding them anew. Raises ValueError outside 1..length."""
        if not 1 <= position <= self.length:
            raise ValueError(f"cannot rewind to {position}: the sequence holds {self.length} tokens")
        if position == self.length:
            return
        fresh = self.engine.open(self.token_ids[:position])
        self.token_ids, self.state, self.logits = fresh.token_ids, fresh.state, fresh.logits

    def save(self, path: str | Path) -> None:
        """Writes tokens and cache to one file, atomically."""
        from rorqual.engine.saved import save_sequence

        save_sequence(self, path)

    def usage(self) -> KVUsage:
        """Bytes this sequence's cache holds."""
        config = self.engine.config
        per_token = 2 * 8 * config.head_dim * 2 * config.num_hidden_layers
        return KVUsage(self.length, self.state.held_bytes(), per_token * self.length)


def predicted_bytes(config: Config, tokens: int, element_size: int) -> int:
    """Bytes `CacheState.held_bytes` reports for one sequence of `tokens` tokens."""
    total = 0
    for ratio in config.compress_ratios:
        total += min(tokens, config.sliding_window) * config.head_dim * element_size
        if ratio:
            overlap = ratio == config.csa_ratio
            coff = 2 if overlap else 1
            widths = [config.head_dim, config.index_head_dim] if overlap else [config.head_dim]
            for width in widths:
                total += (coff * ratio - 1) * 2 * coff * width * 4 + tokens // ratio * width * element_size
    return total
