"""Rows: the engine's `Batch` with the two moves that reuse of prefixes needs.

`adopt` takes in a sequence that was prefilled elsewhere (chunk by chunk, or from a kept state), `release` hands
the state of a row back. Everything else is `Batch`. Both belong there; until then this is the only file of the
room that knows its fields.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from rorqual.engine import Batch, SamplingParams, SequenceState
from rorqual.engine.batch import _Row

__all__ = ["Rows"]


class Rows(Batch):
    """Sequences decoded together, by caller-chosen integer keys. Not thread-safe."""

    def adopt(self, key: int, sequence: SequenceState, *, next_id: int, params: SamplingParams) -> None:
        """A row that holds `sequence` and is fed `next_id` by the next step. The sequence's state is taken over."""
        self._rows[key] = _Row(params, sequence.length, deque([next_id]))
        self._active.append(key)
        state = sequence.state
        self._state = state if self._state is None else state.join([self._state, state])

    def release(self, key: int, held: Sequence[int]) -> SequenceState:
        """Removes a row and returns its sequence. held: the tokens fed so far."""
        state = self._parked.get(key)
        if state is None:
            assert self._state is not None
            state = self._state.select(torch.tensor([self._active.index(key)]))
        self.remove(key)
        sequence = SequenceState(self.engine)
        sequence.state, sequence.token_ids = state, list(held)
        assert int(state.position[0]) == len(sequence.token_ids)
        return sequence
