"""What the gateway knows of one sandbox: its address, its policy, what it was refused, what its names stand for.

Everything here that a sandbox can make grow is bounded. Owns no socket and no rule.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from rorqual.sandbox.network.addresses import guest_address
from rorqual.sandbox.network.policy import Compiled, Ports

EVENTS = 512
QUERIES_PER_S = 200.0
QUERY_BURST = 600.0
MAX_KNOWN = 4096
"""Addresses that are remembered for a change of the policy."""


@dataclass(kw_only=True, slots=True)
class _Event:
    count: int
    first: float
    last: float
    reason: str


class Events:
    """What was refused: one row per (kind, what), the oldest given up when there are too many."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[str, str], _Event] = OrderedDict()
        self.dropped = 0

    def note(self, kind: str, what: str, reason: str) -> None:
        key, now = (kind, what[:255]), time.time()
        row = self._rows.get(key)
        if row is None:
            self._rows[key] = _Event(count=1, first=now, last=now, reason=reason[:255])
            if len(self._rows) > EVENTS:
                self._rows.popitem(last=False)
                self.dropped += 1
        else:
            row.count, row.last, row.reason = row.count + 1, now, reason[:255]
            self._rows.move_to_end(key)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "kind": kind,
                "what": what,
                "reason": row.reason,
                "count": row.count,
                "first": row.first,
                "last": row.last,
            }
            for (kind, what), row in self._rows.items()
        ]


@dataclass(kw_only=True, slots=True)
class Guest:
    """One sandbox."""

    id: str
    number: int
    policy: Compiled
    secrets: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: Events = field(default_factory=Events)
    known: OrderedDict[str, dict[str, float]] = field(default_factory=OrderedDict)
    """Address -> the names it stood for, and until when (monotonic)."""
    epoch: int = 0
    """The number of its policy."""
    namespace: int | None = None
    """Descriptor of a machine's namespace."""
    attached: bool = False
    pending: int = 0
    """Queries under way."""
    streams: int = 0
    """Connections to the name server."""
    tunnels: int = 0
    """Connections to the secret proxy."""
    dns_answered: int = 0
    dns_refused: int = 0
    dns_limited: int = 0
    secret_requests: int = 0
    secret_refused: int = 0
    tokens: float = QUERY_BURST
    refilled: float = field(default_factory=time.monotonic)

    @property
    def address(self) -> str:
        return guest_address(self.number)

    @property
    def interface(self) -> str:
        return f"s{self.number}"

    def may_ask(self) -> bool:
        """Takes a token for one query."""
        now = time.monotonic()
        self.tokens = min(QUERY_BURST, self.tokens + (now - self.refilled) * QUERIES_PER_S)
        self.refilled = now
        if self.tokens < 1.0:
            self.dns_limited += 1
            return False
        self.tokens -= 1.0
        return True

    def open_addresses(self) -> int:
        """How many addresses are open to it by a name. Counted only when there may be too many."""
        if len(self.known) < MAX_KNOWN:
            return 0
        now = time.monotonic()
        return sum(max(names.values()) > now for names in self.known.values())

    def learn(self, address: str, name: str, seconds: float) -> None:
        names = self.known.setdefault(address, {})
        self.known.move_to_end(address)
        if name in names or len(names) < 16:
            names[name] = time.monotonic() + seconds
        while len(self.known) > MAX_KNOWN:
            self.known.popitem(last=False)

    def still_allowed(self, policy: Compiled) -> tuple[list[tuple[str, Ports]], list[tuple[str, Ports, int]]]:
        """What of `known` the policy allows: (address, ports) of all, and with the seconds left of what stands."""
        now = time.monotonic()
        known: list[tuple[str, Ports]] = []
        fresh: list[tuple[str, Ports, int]] = []
        for address, names in self.known.items():
            every: set[int | None] = set()
            standing: set[int | None] = set()
            left = 0.0
            for name, until in names.items():
                ports = policy.ports(name)
                every.update(ports)
                if ports and until > now:
                    standing.update(ports)
                    left = max(left, until - now)
            if every:
                known.append((address, _ports(every)))
            if standing:
                fresh.append((address, _ports(standing), max(1, int(left))))
        return known, fresh

    def counters(self) -> dict[str, int]:
        return {
            "dns_answered": self.dns_answered,
            "dns_refused": self.dns_refused,
            "dns_limited": self.dns_limited,
            "secret_requests": self.secret_requests,
            "secret_refused": self.secret_refused,
            "events_dropped": self.events.dropped,
        }


def _ports(ports: set[int | None]) -> Ports:
    return (None,) if None in ports else tuple(sorted(port for port in ports if port is not None))
