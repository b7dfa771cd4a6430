"""Sessions: conversations by the name their client gives them, and what the cache holds of each.

A session is the header `X-Session-Id`, else `prompt_cache_key`, else `user`; in the Responses protocol else the
response that the chain of `previous_response_id` began with (spec/agent_and_serving.md 1.3). Nobody needs one: prefixes
are found by their tokens. It is for looking, pinning, forking, writing to disk and forgetting. Each holder of a key
has a space of its own. Bounded: the least recently used ones that are not pinned go first, and with a session goes its
name alone, not its prefix. On a shelf, names and tokens outlive the process.
Owns names and tokens. Used in the scheduler's thread, which owns the cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine import Engine, Located, Pinned
from rorqual.serve.errors import BadRequest, NotFound
from rorqual.serve.shelf import Shelf

__all__ = ["Session", "Sessions", "session_name"]

STORE = "session"
NAME = re.compile(r"[A-Za-z0-9._:@-]{1,128}")
SESSION_BYTES = 500


@dataclass(kw_only=True, eq=False)
class Session:
    """One conversation."""

    tenant: str
    id: str
    ids: array[int] = field(default_factory=lambda: array("i"))
    """Prompt and answer of its last turn."""
    turns: int = 0
    created: float = 0.0
    """Seconds since 1970, as `used`."""
    used: float = 0.0
    parent: str | None = None
    """It was forked off this one."""
    pinned: bool = False
    pin: Pinned | None = None
    parts: list[int] = field(default_factory=list)
    """How many tokens each part on the shelf holds."""

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        return 4 * len(self.ids) + SESSION_BYTES


def session_name(header: str | None, *others: str | None) -> str | None:
    """The session's id: the header's, which must be a name; else the first of `others`, by a digest if it is none.

    Raises BadRequest.
    """
    if header is not None:
        if NAME.fullmatch(header) is None:
            raise BadRequest(
                "X-Session-Id is 1 to 128 letters, digits and . _ : @ -",
                param="X-Session-Id",
                code="invalid_value",
            )
        return header
    for other in others:
        if other:
            named = NAME.fullmatch(other) is not None
            digest = hashlib.blake2b(other.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
            return other if named else f"key-{digest}"
    return None


class Sessions:
    """Sessions by holder and id."""

    def __init__(self, engine: Engine, limit_bytes: int, *, shelf: Shelf | None = None) -> None:
        self.limit_bytes, self._engine, self._shelf = limit_bytes, engine, shelf
        self.held_bytes = 0
        self._kept: OrderedDict[tuple[str, str], Session] = OrderedDict()
        for _, value in shelf.items(STORE) if shelf is not None else ():
            self._read(value)

    def __len__(self) -> int:
        return len(self._kept)

    # --- turns

    def note(self, tenant: str, session_id: str, ids: Sequence[int]) -> None:
        """A turn ended: its prompt and answer."""
        session = self._kept.get((tenant, session_id))
        if session is None:
            session = Session(tenant=tenant, id=session_id, created=time.time())
        session.turns += 1
        self._set(session, ids)

    def _set(self, session: Session, ids: Sequence[int]) -> None:
        old, new = session.ids, array("i", ids)
        self._forget(session)
        session.ids, session.used = new, time.time()
        self._kept[session.tenant, session.id] = session
        self.held_bytes += session.size
        if session.pinned and sum(map(self._pinned_bytes, self._kept.values())) <= self._engine.kv_bytes // 2:
            self._pin(session, pinned=True)  # else what was pinned stays so, and no more
        self._write(session, old)
        for one in [one for one in self._kept.values() if not one.pinned and one is not session]:
            if self.held_bytes <= self.limit_bytes:
                break
            self._forget(one)
            self._unshelve(one)

    def _forget(self, session: Session) -> None:
        if self._kept.pop((session.tenant, session.id), None) is not None:
            self.held_bytes -= session.size

    # --- what clients ask for

    def list(self, tenant: str) -> list[dict[str, Any]]:
        """The sessions of a holder, the last used first."""
        return [_shown(one) for one in reversed(self._kept.values()) if one.tenant == tenant]

    def inspect(self, tenant: str, session_id: str) -> dict[str, Any]:
        """A session and where its tokens lie. Raises NotFound, as all that follow."""
        session = self._get(tenant, session_id)
        place = self._engine.locate(session.ids, space=tenant)
        return {
            **_shown(session),
            "tier": _tier(place),
            "kv_bytes": place.page_bytes,
            "cached_tokens": {"live": place.live, "ram": place.memory, "disk": place.disk},
        }

    def pin(self, tenant: str, session_id: str, *, pinned: bool) -> dict[str, Any]:
        """Keeps what is cached of a session from eviction, whatever else asks for room; or no longer.

        Raises BadRequest when more than half of the cache would be pinned.
        """
        session = self._get(tenant, session_id)
        was = session.pinned
        self._pin(session, pinned=pinned)
        held, room = sum(map(self._pinned_bytes, self._kept.values())), self._engine.kv_bytes // 2
        if pinned and held > room:
            self._pin(session, pinned=was)
            raise BadRequest(
                f"{held} bytes would be pinned, of at most {room} (half of the cache): unpin another session first",
                param="pinned",
                code="cache_full",
            )
        self._write(session, session.ids)
        return self.inspect(tenant, session_id)

    def _pinned_bytes(self, session: Session) -> int:
        tree = session.pin.tree if session.pin is not None else None
        return 0 if tree is None else tree.nbytes(self._engine.pool.layout.page_bytes)

    def fork(self, tenant: str, session_id: str, *, name: str | None) -> dict[str, Any]:
        """A second session that begins where this one is. Raises BadRequest for a name that is taken or is none."""
        session = self._get(tenant, session_id)
        name = name or f"fork-{secrets.token_hex(8)}"
        if NAME.fullmatch(name) is None:
            raise BadRequest("id is 1 to 128 letters, digits and . _ : @ -", param="id")
        if (tenant, name) in self._kept:
            raise BadRequest(f"there is a session {name!r} already", param="id")
        now = time.time()
        twin = Session(tenant=tenant, id=name, created=now, turns=session.turns, parent=session.id)
        self._set(twin, session.ids)
        return self.inspect(tenant, name)

    def checkpoint(self, tenant: str, session_id: str) -> dict[str, Any]:
        """Writes what memory holds of a session to disk now. Raises EngineError without a disk, or if it refuses."""
        session = self._get(tenant, session_id)
        self._engine.checkpoint(session.ids, space=tenant)
        return self.inspect(tenant, session_id)

    def delete(self, tenant: str, session_id: str) -> None:
        """Forgets a session, and what only it has in the cache, in memory and on disk."""
        session = self._get(tenant, session_id)
        self._pin(session, pinned=False)
        self._forget(session)
        self._unshelve(session)
        self._engine.discard(session.ids, space=tenant)

    def _get(self, tenant: str, session_id: str) -> Session:
        session = self._kept.get((tenant, session_id))
        if session is None:
            raise NotFound(f"no session {session_id!r} is known", param="session_id")
        return session

    def _pin(self, session: Session, *, pinned: bool) -> None:
        if session.pin is not None:
            self._engine.unpin(session.pin)
        session.pin = self._engine.pin(session.ids, space=session.tenant) if pinned else None
        session.pinned = pinned

    # --- the shelf: a head, and the tokens in parts, so that a turn writes its own alone

    def _write(self, session: Session, old: Sequence[int]) -> None:
        if self._shelf is None:
            return
        same, parts = 0, list[int]()
        for count in session.parts:
            if session.ids[same : same + count] != old[same : same + count] or same + count > len(
                session.ids
            ):
                break
            same += count
            parts.append(count)
        self._shelf.drop(STORE, [_name(session, n) for n in range(len(parts) + 1, len(session.parts) + 1)])
        if same < len(session.ids):
            parts.append(len(session.ids) - same)
            part = {
                "tenant": session.tenant,
                "id": session.id,
                "at": same,
                "ids": _packed(session.ids[same:]),
            }
            self._shelf.put(STORE, _name(session, len(parts)), json.dumps(part).encode())
        session.parts = parts
        head = {**_shown(session), "tenant": session.tenant}
        self._shelf.put(STORE, _name(session, 0), json.dumps(head).encode())

    def _unshelve(self, session: Session) -> None:
        if self._shelf is not None:
            self._shelf.drop(STORE, [_name(session, n) for n in range(len(session.parts) + 1)])

    def _read(self, value: bytes) -> None:
        """A head or a part, as it was written; anything else is passed over."""
        try:
            fields = json.loads(value)
            key = str(fields["tenant"]), str(fields["id"])
            session = self._kept.get(key)
            if session is None:
                session = self._kept[key] = Session(tenant=key[0], id=key[1])
                self.held_bytes += session.size
            if "at" in fields:
                ids = array("i")
                ids.frombytes(base64.b64decode(fields["ids"], validate=True))
                if fields["at"] == len(session.ids):
                    session.ids += ids
                    session.parts.append(len(ids))
                    self.held_bytes += 4 * len(ids)
                return
            session.turns, session.parent = int(fields["turns"]), fields["parent"]
            session.created, session.used = float(fields["created"]), float(fields["last_used"])
            self._kept.move_to_end(key)
        except (ValueError, KeyError, TypeError):
            return


def _shown(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "object": "session",
        "tokens": len(session.ids),
        "turns": session.turns,
        "pinned": session.pinned,
        "parent": session.parent,
        "created": session.created,
        "last_used": session.used,
    }


def _tier(place: Located) -> str:
    if place.live:
        return "live"
    return "ram" if place.memory else "disk" if place.disk else "none"


def _packed(ids: array[int]) -> str:
    return base64.b64encode(ids.tobytes()).decode()


def _name(session: Session, part: int) -> bytes:
    return json.dumps([session.tenant, session.id, part]).encode()
