"""Known text: the token ids of text that was a prompt here before, so that only what follows it is tokenised.

A prompt that goes on from a known text gets exactly the ids it had then, whatever a tokenizer would make of the seam
(spec/agent_and_serving.md 1.1, text key and token payload). An entry holds the ids behind its parent's text, so a
conversation of n turns costs its length once. Keys are digests: of the segments of a conversation, special tokens
marked by a byte that no text has; or of a raw text. Each holder of a key has a space of its own. Bounded in bytes,
least recently used first out. Thread-safe.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual import chat
from rorqual.serve.shelf import Shelf

__all__ = ["NOTHING", "Known", "KnownText"]

STORE = "text"
MARK = b"\xff"
"""Around a special token; never in UTF-8."""
ENTRY_BYTES = 200


@dataclass(frozen=True, slots=True)
class _Entry:
    parent: bytes
    """Digest of the known text it follows; empty: none."""
    ids: array[int]
    replayed: int
    raw: tuple[str, int] | None
    """Of a raw text: holder and length in bytes."""

    @property
    def size(self) -> int:
        return 4 * len(self.ids) + ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Known:
    """A prefix that is known."""

    digest: bytes
    """Empty: nothing is."""
    length: int
    """Segments, or bytes of a raw text."""
    ids: list[int]
    replayed: int = 0
    """Answers in it that were given back as sampled."""


NOTHING = Known(b"", 0, [])


class KnownText:
    """Ids by holder and text. shelf: where they outlive the process."""

    def __init__(self, limit_bytes: int, *, shelf: Shelf | None = None) -> None:
        self.limit_bytes, self._shelf = limit_bytes, shelf
        self.held_bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._followers: Counter[bytes] = Counter()
        self._lengths: dict[str, Counter[int]] = {}
        for digest, value in shelf.items(STORE) if shelf is not None else ():
            if (entry := _read(value)) is not None:
                self._add(digest, entry)

    def __len__(self) -> int:
        return len(self._entries)

    def of_segments(self, tenant: str, segments: Sequence[chat.Segment]) -> Known:
        """The longest known beginning of a conversation, ending where a special token follows."""
        digests = self._segment_digests(tenant, segments)
        with self._lock:
            for length in sorted(digests, reverse=True):
                if (found := self._ids(digests[length])) is not None:
                    return Known(digests[length], length, found[0], found[1])
        return NOTHING

    def keep_segments(
        self,
        tenant: str,
        segments: Sequence[chat.Segment],
        ids: Sequence[int],
        *,
        after: Known,
        replayed: int,
    ) -> None:
        """The ids of `segments`, which go on from `after` and are followed by a special token."""
        state = _start(tenant, raw=False)
        for segment in segments:
            state.update(_bytes(segment))
        digest = state.digest()
        self._keep(digest, _Entry(after.digest, array("i", ids[len(after.ids) :]), replayed, None))

    def of_text(self, tenant: str, text: bytes) -> Known:
        """The longest known beginning of a raw text."""
        with self._lock:
            lengths = sorted(n for n in self._lengths.get(tenant, ()) if n <= len(text))
            state, done, digests = _start(tenant, raw=True), 0, dict[int, bytes]()
            for length in lengths:
                state.update(text[done:length])
                done = length
                digests[length] = state.copy().digest()
            for length in reversed(lengths):
                if (found := self._ids(digests[length])) is not None:
                    return Known(digests[length], length, found[0])
        return NOTHING

    def keep_text(self, tenant: str, text: bytes, ids: Sequence[int], *, after: Known) -> None:
        """The ids of a raw text that goes on from `after`."""
        state = _start(tenant, raw=True)
        state.update(text)
        entry = _Entry(after.digest, array("i", ids[len(after.ids) :]), 0, (tenant, len(text)))
        self._keep(state.digest(), entry)

    @staticmethod
    def _segment_digests(tenant: str, segments: Sequence[chat.Segment]) -> dict[int, bytes]:
        state, out = _start(tenant, raw=False), dict[int, bytes]()
        for number, segment in enumerate(segments):
            if segment.special and number:
                out[number] = state.copy().digest()
            state.update(_bytes(segment))
        return out

    def _ids(self, digest: bytes) -> tuple[list[int], int] | None:
        """Ids of a known text; its chain is the youngest then, its beginning the very youngest."""
        chain: list[bytes] = []
        at = digest
        while at:
            if at not in self._entries:
                return None
            chain.append(at)
            at = self._entries[at].parent
        ids: list[int] = []
        for name in chain:
            self._entries.move_to_end(name)
        for name in reversed(chain):
            ids.extend(self._entries[name].ids)
        return (ids, self._entries[digest].replayed) if chain else None

    def _keep(self, digest: bytes, entry: _Entry) -> None:
        with self._lock:
            if digest == entry.parent or digest in self._entries:
                return
            gone = self._add(digest, entry)
        if self._shelf is not None:
            if digest not in gone:
                self._shelf.put(STORE, digest, _written(entry))
            self._shelf.drop(STORE, gone)

    def _add(self, digest: bytes, entry: _Entry) -> list[bytes]:
        if entry.size > self.limit_bytes:
            return [digest]
        if entry.parent and entry.parent not in self._entries:
            return [digest]  # its beginning went
        self._entries[digest] = entry
        self._followers[entry.parent] += 1
        self.held_bytes += entry.size
        if entry.raw is not None:
            self._lengths.setdefault(entry.raw[0], Counter())[entry.raw[1]] += 1
        gone: list[bytes] = []
        while self.held_bytes > self.limit_bytes:
            # What others go on from stays; a use makes a beginning younger than what follows it, so this ends soon.
            name = next(one for one in self._entries if not self._followers[one])
            old = self._entries.pop(name)
            self.held_bytes -= old.size
            self._followers[old.parent] -= 1
            if not self._followers[old.parent]:
                del self._followers[old.parent]
            gone.append(name)
            if old.raw is not None:
                lengths = self._lengths[old.raw[0]]
                lengths[old.raw[1]] -= 1
                if not lengths[old.raw[1]]:
                    del lengths[old.raw[1]]
        return gone


def _start(tenant: str, *, raw: bool) -> hashlib.blake2b:
    return hashlib.blake2b(f"{raw:d}{tenant}".encode() + MARK, digest_size=16)


def _bytes(segment: chat.Segment) -> bytes:
    data = segment.text.encode("utf-8", "surrogatepass")
    return MARK + data + MARK if segment.special else data


def _written(entry: _Entry) -> bytes:
    ids = base64.b64encode(entry.ids.tobytes()).decode()
    fields = {"parent": entry.parent.hex(), "ids": ids, "replayed": entry.replayed, "raw": entry.raw}
    return json.dumps(fields).encode()


def _read(value: bytes) -> _Entry | None:
    """An entry as it was written; None for anything else."""
    try:
        fields = json.loads(value)
        ids = array("i")
        ids.frombytes(base64.b64decode(fields["ids"], validate=True))
        raw = None if fields["raw"] is None else (str(fields["raw"][0]), int(fields["raw"][1]))
        return _Entry(bytes.fromhex(fields["parent"]), ids, int(fields["replayed"]), raw)
    except (ValueError, KeyError, TypeError, IndexError):
        return None
