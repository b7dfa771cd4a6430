"""ReplayStore: what was sampled, so that a history comes back as the very ids of its answers.

Clients re-serialize arguments, trim text and lose reasoning; re-rendered, their history would be another prefix
(spec/encoding.md 5.3). A finished turn is found by the id of its first call, else by the prompt it followed and
what it shows. It is used only if what the client sent agrees with what was said; an edit wins. Bounded in bytes,
least recently used first out; each holder of a key has a space of its own. On a shelf it outlives the process.
Thread-safe.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rorqual.serve.shelf import Shelf

__all__ = ["Record", "ReplayStore", "canonical_calls", "prompt_digest", "reasoning_signature"]


STORE = "replay"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One finished turn."""

    ids: tuple[int, ...]
    """As sampled; ends in EOS."""
    thinking: bool
    """Whether the turn began in reasoning."""
    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    """(name, arguments in canonical JSON)."""

    @property
    def size(self) -> int:
        """Bytes, about."""
        return 8 * len(self.ids) + 4 * (len(self.content) + len(self.reasoning)) + 500

    def agrees(self, content: str, reasoning: str, calls: tuple[tuple[str, str], ...]) -> bool:
        """Whether a client's message says the same; absent reasoning is lost, not edited."""
        return (
            content.strip() == self.content.strip()
            and calls == self.calls
            and (not reasoning or reasoning == self.reasoning)
        )


def prompt_digest(ids: Iterable[int]) -> bytes:
    """Name of a prompt."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def reasoning_signature(reasoning: str) -> str:
    """Name of a reasoning text: opaque to clients, who send it back with the text or instead of it."""
    digest = hashlib.blake2b(reasoning.encode("utf-8", "surrogatepass"), digest_size=24).digest()
    return "rq1." + base64.urlsafe_b64encode(digest).decode()


def canonical_calls(calls: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """(name, arguments) with arguments compared as JSON, not as text."""
    out = []
    for call in calls:
        function = call["function"]
        text = function.get("arguments") or ""
        with suppress(ValueError, RecursionError):  # what is not JSON is compared as text
            text = json.dumps(json.loads(text), sort_keys=True)
        out.append((function["name"], text))
    return tuple(out)


class ReplayStore:
    """Records by call id and by what was said after which prompt."""

    def __init__(self, limit_bytes: int, *, shelf: Shelf | None = None) -> None:
        self.limit_bytes, self._shelf = limit_bytes, shelf
        self.held_bytes = 0
        self._lock = threading.Lock()
        self._records: OrderedDict[bytes, tuple[Record, tuple[tuple[str, str], ...]]] = OrderedDict()
        self._by_name: dict[tuple[str, str], bytes] = {}
        for key, value in shelf.items(STORE) if shelf is not None else ():
            if (found := _read(value)) is not None:
                self._add(key, *found)

    def __len__(self) -> int:
        return len(self._records)

    def put(self, tenant: str, prompt: bytes, *, record: Record, names: Sequence[str] = ()) -> None:
        """Keeps a turn. prompt: `prompt_digest` of what it followed. names: ids given to its calls, and whatever else
        a client may send instead of the turn, such as the signature of its reasoning."""
        if record.size > self.limit_bytes:
            return
        key = _key(tenant, prompt, record.content, record.calls)
        keys = tuple((tenant, name) for name in names)
        with self._lock:
            gone = self._add(key, record, keys)
        if self._shelf is not None:
            self._shelf.put(STORE, key, _written(record, keys))
            self._shelf.drop(STORE, gone)

    def _add(self, key: bytes, record: Record, keys: tuple[tuple[str, str], ...]) -> list[bytes]:
        """Takes a record in; returns the keys that had to go."""
        if key in self._records:
            self._drop(key)
        self._records[key] = record, keys
        self._by_name.update(dict.fromkeys(keys, key))
        self.held_bytes += record.size
        gone: list[bytes] = []
        while self.held_bytes > self.limit_bytes:
            gone.append(next(iter(self._records)))
            self._drop(gone[-1])
        return gone

    def by_name(self, tenant: str, name: str) -> Record | None:
        """The turn that made a call, or whose reasoning has this signature."""
        with self._lock:
            return self._use(self._by_name.get((tenant, name)))

    def by_prompt(
        self, tenant: str, prompt: bytes, *, content: str, calls: tuple[tuple[str, str], ...]
    ) -> Record | None:
        """The turn that said this after that prompt."""
        with self._lock:
            return self._use(_key(tenant, prompt, content, calls))

    def _use(self, key: bytes | None) -> Record | None:
        if key is None or key not in self._records:
            return None
        self._records.move_to_end(key)
        return self._records[key][0]

    def _drop(self, key: bytes) -> None:
        record, names = self._records.pop(key)
        self.held_bytes -= record.size
        for name in names:
            if self._by_name.get(name) == key:
                del self._by_name[name]


def _key(tenant: str, prompt: bytes, content: str, calls: tuple[tuple[str, str], ...]) -> bytes:
    said = json.dumps([tenant, content.strip(), calls]).encode()
    return hashlib.blake2b(prompt + said, digest_size=16).digest()


def _written(record: Record, names: tuple[tuple[str, str], ...]) -> bytes:
    fields = {
        "ids": record.ids,
        "thinking": record.thinking,
        "content": record.content,
        "reasoning": record.reasoning,
        "calls": record.calls,
        "names": names,
    }
    return json.dumps(fields).encode()  # escaped, so that lone surrogates have bytes too


def _read(value: bytes) -> tuple[Record, tuple[tuple[str, str], ...]] | None:
    """A record and its names as they were written; None for anything else."""
    try:
        fields = json.loads(value)
        names = tuple((str(tenant), str(name)) for tenant, name in fields["names"])
        record = Record(
            ids=tuple(int(token) for token in fields["ids"]),
            thinking=bool(fields["thinking"]),
            content=str(fields["content"]),
            reasoning=str(fields["reasoning"]),
            calls=tuple((str(name), str(arguments)) for name, arguments in fields["calls"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
    return record, names
