"""ResponseStore: answers of /v1/responses by their id, so that a client need not send its history again.

A stored response holds its own input and output and names the one before it; a conversation is the walk back. Bounded
in bytes, least recently used first out; using a response uses all that it goes back to. Each holder of a key has a
space of its own. On a shelf it outlives the process. Thread-safe.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.serve.shelf import Shelf
from rorqual.serve.wire import json_bytes

__all__ = ["ResponseStore", "StoredResponse"]

STORE = "response"


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

    def __init__(self, limit_bytes: int, *, shelf: Shelf | None = None) -> None:
        self.limit_bytes, self._shelf = limit_bytes, shelf
        self.held_bytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], tuple[StoredResponse, int]] = OrderedDict()
        for _, value in shelf.items(STORE) if shelf is not None else ():
            if (found := _read(value)) is not None:
                self._add(*found)

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, tenant: str, stored: StoredResponse) -> None:
        """Keeps a response; one larger than the store is not kept."""
        with self._lock:
            gone = self._add(tenant, stored)
        if self._shelf is not None:
            name = tenant, str(stored.response["id"])
            if name not in gone:
                self._shelf.put(STORE, json_bytes(name), _written(tenant, stored))
            self._shelf.drop(STORE, map(json_bytes, gone))

    def _add(self, tenant: str, stored: StoredResponse) -> list[tuple[str, str]]:
        """Takes a response in; returns those that had to go, it itself if it is too large."""
        name = tenant, str(stored.response["id"])
        size = 2 * len(_written(tenant, stored)) + 500  # objects take about twice their text
        if size > self.limit_bytes:
            return [name]
        self.held_bytes += size - (self._kept.pop(name)[1] if name in self._kept else 0)
        self._kept[name] = stored, size
        gone: list[tuple[str, str]] = []
        while self.held_bytes > self.limit_bytes:
            old, (_, freed) = self._kept.popitem(last=False)
            self.held_bytes -= freed
            gone.append(old)
        return gone

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A response, or None."""
        with self._lock:
            return self._use(tenant, response_id)

    def delete(self, tenant: str, response_id: str) -> bool:
        """Forgets a response. False: there was none."""
        with self._lock:
            found = self._kept.pop((tenant, response_id), None)
            self.held_bytes -= found[1] if found else 0
        if found and self._shelf is not None:
            self._shelf.drop(STORE, [json_bytes((tenant, response_id))])
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

    def first(self, tenant: str, response_id: str) -> str:
        """The id of the response that a conversation began with, as far as it is kept: it names the conversation."""
        with self._lock:
            while (found := self._kept.get((tenant, response_id))) is not None and found[
                0
            ].previous is not None:
                response_id = found[0].previous
        return response_id

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


def _written(tenant: str, stored: StoredResponse) -> bytes:
    return json_bytes(
        {
            "tenant": tenant,
            "response": stored.response,
            "input": list(stored.input),
            "previous": stored.previous,
        }
    )


def _read(value: bytes) -> tuple[str, StoredResponse] | None:
    """Holder and response as they were written; None for anything else."""
    try:
        fields = json.loads(value)
        response, inputs, previous = fields["response"], fields["input"], fields["previous"]
        whole = (
            isinstance(response, dict)
            and isinstance(response["id"], str)
            and isinstance(response["output"], list)
        )
        if not whole or not isinstance(inputs, list) or not isinstance(previous, str | None):
            return None
        return str(fields["tenant"]), StoredResponse(response=response, input=inputs, previous=previous)
    except (ValueError, KeyError, TypeError):
        return None
