"""PrefixStore: sequences kept for whoever comes back with the same beginning.

A kept state serves the prompts that start with all of its tokens, to the token and without a replay; the longest
one wins. They are kept at the end of the shared head, at the end of input and at
the end of output (spec/agent_and_serving.md 0.7). Least recently used states go first once `limit_bytes` is reached.
Each holder of a key has a space of its own. Used by the worker thread alone.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.engine import SequenceState

__all__ = ["PrefixStore", "state_bytes"]

MIN_TOKENS = 8
"""Shorter prefixes are cheaper to compute than to keep."""


def state_bytes(sequence: SequenceState) -> int:
    """Bytes a sequence takes, pages it shares with others included."""
    return sequence.usage().held_bytes + 8 * sequence.length


@dataclass(frozen=True, slots=True)
class _Kept:
    sequence: SequenceState
    size: int


class PrefixStore:
    """States by the tokens they hold."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.evictions = 0
        self._kept: OrderedDict[tuple[str, int, bytes], _Kept] = OrderedDict()
        self._lengths: dict[str, Counter[int]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def holds(self, tenant: str, ids: Sequence[int]) -> bool:
        """Whether exactly these tokens are kept; marks them as used."""
        key = (tenant, len(ids), _digests(ids, [len(ids)])[len(ids)])
        if key not in self._kept:
            return False
        self._kept.move_to_end(key)
        return True

    def put(self, tenant: str, sequence: SequenceState) -> None:
        """Keeps a sequence, which nobody may extend from now on. Too short or too large ones are not kept."""
        size = state_bytes(sequence)
        if sequence.length < MIN_TOKENS or size > self.limit_bytes or self.holds(tenant, sequence.token_ids):
            return
        length = sequence.length
        self._kept[tenant, length, _digests(sequence.token_ids, [length])[length]] = _Kept(sequence, size)
        self._lengths.setdefault(tenant, Counter())[length] += 1
        self.held_bytes += size
        while self.held_bytes > self.limit_bytes:
            (owner, gone, _), kept = self._kept.popitem(last=False)
            self.held_bytes -= kept.size
            self.evictions += 1
            lengths = self._lengths[owner]
            lengths[gone] -= 1
            if not lengths[gone]:
                del lengths[gone]

    def longest(self, tenant: str, ids: Sequence[int]) -> SequenceState | None:
        """A copy of the longest kept sequence that `ids` goes on from, at least one token being left to feed."""
        lengths = sorted(length for length in self._lengths.get(tenant, ()) if length < len(ids))
        digests = _digests(ids, lengths)
        for length in reversed(lengths):
            key = (tenant, length, digests[length])
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept.sequence.fork()
        return None


def _digests(ids: Sequence[int], lengths: Sequence[int]) -> dict[int, bytes]:
    """Digest of ids[:n] for each n of `lengths`, which ascend; one pass."""
    data = memoryview(array("q", ids)).cast("B")
    digest, done, out = hashlib.blake2b(digest_size=16), 0, {}
    for length in lengths:
        digest.update(data[8 * done : 8 * length])
        done = length
        out[length] = digest.copy().digest()
    return out
