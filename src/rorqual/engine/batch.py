"""Batch: many sequences decoded in lock-step, each sampling, being fed, or waiting.

A step feeds one token to every busy row: its next forced token (prompt, tool result) or the one sampled last. New
prompts are prefilled together in ragged chunks; equal prompts once. Waiting rows are left out by compaction.
Owns row bookkeeping. What a token means is the caller's matter.                       (spec/rl.md 5.5, 7)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rorqual.engine.engine import Engine, FinishReason
from rorqual.engine.errors import EngineError
from rorqual.engine.sampler import SamplingParams, sample
from rorqual.model import CacheState

__all__ = ["Batch", "BatchEvent"]


@dataclass(frozen=True, slots=True)
class BatchEvent:
    """A token sampled for sequence `key`."""

    key: int
    token_id: int
    logprob: float
    finish_reason: FinishReason | None


@dataclass(slots=True)
class _Row:
    params: SamplingParams
    length: int = 0
    """Tokens in the cache."""
    pending: deque[int] = field(default_factory=deque)
    """Tokens to feed before sampling again."""
    sampled: int = 0
    """Tokens sampled in this turn."""
    waiting: bool = False


class Batch:
    """Sequences by caller-chosen integer keys. Not thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._rows: dict[int, _Row] = {}
        self._active: list[int] = []  # keys of `_state`'s rows, in order
        self._state: CacheState | None = None
        self._parked: dict[int, CacheState] = {}  # waiting rows, one state each

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def busy(self) -> int:
        """Rows that the next step would advance."""
        return sum(not row.waiting for row in self._rows.values())

    @torch.no_grad()
    def add(self, prompts: Mapping[int, Sequence[int]], params: Mapping[int, SamplingParams]) -> None:
        """Adds sequences; the next step feeds each prompt's last token. Raises PromptError, ContextOverflow."""
        for key, prompt in prompts.items():
            if key in self._rows:
                raise EngineError(f"sequence {key} is already in the batch")
            self.engine.check(prompt)
        unique: dict[tuple[int, ...], list[int]] = {}
        for key, prompt in prompts.items():
            unique.setdefault(tuple(prompt), []).append(key)
        texts = list(unique)
        state = self.engine.model.new_state(len(texts))
        longest, chunk = max(len(text) for text in texts) - 1, self.engine.prefill_chunk
        for start in range(0, longest, chunk):
            width = min(chunk, longest - start)
            counts = torch.tensor([min(max(len(text) - 1 - start, 0), width) for text in texts])
            padded = [[*text[start : min(start + width, len(text) - 1)]] for text in texts]
            ids = torch.tensor([part + [0] * (width - len(part)) for part in padded])
            self.engine.model.extend(ids, state, counts=counts)
        order = [(number, key) for number, text in enumerate(texts) for key in unique[text]]
        joined = state.select(torch.tensor([number for number, _ in order]))
        for number, key in order:
            self._rows[key] = _Row(params[key], len(texts[number]) - 1, deque(texts[number][-1:]))
            self._active.append(key)
        self._state = joined if self._state is None else CacheState.join([self._state, joined])

    def feed(self, key: int, ids: Sequence[int], params: SamplingParams) -> None:
        """Continues a waiting sequence: feeds `ids`, then samples anew. Raises ContextOverflow."""
        row = self._rows[key]
        if not row.waiting:
            raise EngineError(f"sequence {key} is still generating")
        self.engine.check(ids, held=row.length + len(row.pending))
        row.pending.extend(ids)
        row.params, row.sampled, row.waiting = params, 0, False
        if key in self._parked:
            state = self._parked.pop(key)
            self._state = state if self._state is None else CacheState.join([self._state, state])
            self._active.append(key)

    def remove(self, key: int) -> None:
        """Forgets a sequence."""
        del self._rows[key]
        self._parked.pop(key, None)

    @torch.no_grad()
    def step(self) -> list[BatchEvent]:
        """Feeds one token to every busy row; returns what was sampled. Rows that finish wait for `feed` or `remove`."""
        self._compact()
        if self._state is None or not self._active:
            return []
        rows = [self._rows.get(key) for key in self._active]
        busy = [row is not None and not row.waiting for row in rows]
        fed = [
            row.pending.popleft() if row is not None and go else 0 for row, go in zip(rows, busy, strict=True)
        ]
        counts = None if all(busy) else torch.tensor([int(go) for go in busy])
        logits = self.engine.model.extend(torch.tensor(fed)[:, None], self._state, counts=counts)
        drawing = []
        for number, (row, go) in enumerate(zip(rows, busy, strict=True)):
            if row is not None and go:
                row.length += 1
                if not row.pending:
                    drawing.append(number)
        if not drawing:
            return []
        chosen = [row for number in drawing if (row := rows[number]) is not None]
        ids, logprobs = sample(
            logits[drawing], [row.params for row in chosen], [row.length for row in chosen]
        )
        limit = self.engine.config.max_position_embeddings
        events = []
        for number, row, token, logprob in zip(drawing, chosen, ids.tolist(), logprobs.tolist(), strict=True):
            row.sampled += 1
            row.pending.append(token)
            reason: FinishReason | None = None
            if token in row.params.stop_ids:
                reason = "stop"
            elif row.sampled >= row.params.max_tokens or row.length + 1 >= limit:
                reason = "length"
            row.waiting = reason is not None
            events.append(BatchEvent(self._active[number], token, logprob, reason))
        return events

    def _compact(self) -> None:
        """Parks waiting rows and drops removed ones once they are a quarter of the batch."""
        if self._state is None:
            return
        idle = [key for key in self._active if key not in self._rows or self._rows[key].waiting]
        if not idle or (len(idle) * 4 < len(self._active) and len(idle) < len(self._active)):
            return
        for number, key in enumerate(self._active):
            row = self._rows.get(key)
            if row is not None and row.waiting:
                self._parked[key] = self._state.select(torch.tensor([number]))
        keep = [
            number
            for number, key in enumerate(self._active)
            if key in self._rows and not self._rows[key].waiting
        ]
        self._active = [self._active[number] for number in keep]
        self._state = self._state.select(torch.tensor(keep)) if keep else None
