"""ResponseStore: answers of /v1/responses by their id, so that a client need not send its history again.

A stored response holds its own input and output and names the one before it; a conversation is the walk back. Bounded
in bytes, least recently used first out; using a response uses all that it goes back to. Each holder of a key has a
space of its own. Thread-safe. Not on disk.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.serve.wire import json_bytes

__all__ = ["ResponseStore", "StoredResponse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredResponse:
    """One finished response."""

    response: Mapping[str, Any]
    """As it was answered."""
    input: Sequence[Mapping[str, Any]]
    """Its own input items; those before it are its predecessor's."""
    previous: str | None


class ResponseStore:
    """Responses by holder and id."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], tuple[StoredResponse, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, tenant: str, stored: StoredResponse) -> None:
        """Keeps a response; one larger than the store is not kept."""
        size = (
            2 * len(json_bytes([stored.response, list(stored.input)])) + 500
        )  # objects take about twice their text
        if size > self.limit_bytes:
            return
        with self._lock:
            self._kept[tenant, str(stored.response["id"])] = stored, size
            self.held_bytes += size
            while self.held_bytes > self.limit_bytes:
                _, (_, gone) = self._kept.popitem(last=False)
                self.held_bytes -= gone

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A response, or None."""
        with self._lock:
            return self._use(tenant, response_id)

    def delete(self, tenant: str, response_id: str) -> bool:
        """Forgets a response. False: there was none."""
        with self._lock:
            found = self._kept.pop((tenant, response_id), None)
            self.held_bytes -= found[1] if found else 0
            return found is not None

    def history(self, tenant: str, response_id: str) -> list[Mapping[str, Any]] | None:
        """Items of the conversation up to and with a response; None if a part of it is not kept (any more)."""
        chain: list[StoredResponse] = []
        with self._lock:
            at: str | None = response_id
            while at is not None:
                stored = self._use(tenant, at)
                if stored is None:
                    return None
                chain.append(stored)
                at = stored.previous
        return [item for stored in reversed(chain) for item in (*stored.input, *stored.response["output"])]

    def item(self, tenant: str, item_id: str) -> Mapping[str, Any] | None:
        """An output item of a stored response."""
        with self._lock:
            for (owner, _), (stored, _) in reversed(self._kept.items()):
                for item in stored.response["output"] if owner == tenant else ():
                    if item.get("id") == item_id:
                        return dict(item)
        return None

    def _use(self, tenant: str, response_id: str) -> StoredResponse | None:
        found = self._kept.get((tenant, response_id))
        if found is None:
            return None
        self._kept.move_to_end((tenant, response_id))
        return found[0]
