"""Look-ups in a prefix tree: the longest usable prefix of a prompt, and why it is not longer.

A node is a page of 128 tokens; a frontier is a leaf of fewer, where a turn ended inside a page, with the exact rows
to go on from there. Owns nodes and how they are compared; prefix.py owns the tree, its references and its bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rorqual.engine.layout import PAGE_TOKENS, CacheLayout
from rorqual.engine.sequence import replay_tokens
from rorqual.engine.snapshot import Snapshot

__all__ = ["Match", "Node", "frontier_of", "look_up", "page_keys"]

TOKEN_BYTES = 4


def page_keys(ids: Sequence[int]) -> list[bytes]:
    """One key for each whole page of `ids`: its tokens as little-endian int32."""
    raw = np.asarray(ids[: len(ids) // PAGE_TOKENS * PAGE_TOKENS], dtype="<i4").tobytes()
    return [raw[at : at + 4 * PAGE_TOKENS] for at in range(0, len(raw), 4 * PAGE_TOKENS)]


def rest_key(ids: Sequence[int], start: int) -> bytes:
    """The key of the tokens from `start` on, at most a page of them."""
    return np.asarray(ids[start : start + PAGE_TOKENS], dtype="<i4").tobytes()


@dataclass(slots=True, eq=False)
class Node:
    """A page, a frontier (a key of less than a page), or a root (an empty key)."""

    key: bytes
    parent: Node | None
    page: int = -1
    tokens: int = 0
    """Position at its end."""
    digest: bytes = b""
    """Names all tokens up to its end."""
    children: dict[bytes, Node] = field(default_factory=dict)
    frontiers: dict[bytes, Node] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    used: int = 0
    warm_until: float = 0.0
    """Until then others go first."""
    pins: int = 0

    @property
    def is_frontier(self) -> bool:
        """Whether it ends inside a page."""
        return self.tokens % PAGE_TOKENS != 0

    @property
    def is_leaf(self) -> bool:
        """Whether nothing hangs on it."""
        return self.parent is not None and not self.children and not self.frontiers

    def digest_of(self, key: bytes) -> bytes:
        """The digest that a node with `key` below this one has."""
        return hashlib.blake2b(self.digest + key, digest_size=16).digest()

    def below(self) -> Iterable[Node]:
        """Everything that hangs on it."""
        stack = [*self.children.values(), *self.frontiers.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())
            stack.extend(node.frontiers.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What a prompt found."""

    tokens: int
    """Tokens that need not be fed, less than the prompt's length."""
    replay: int
    """Of these, tokens that are replayed to rebuild the rings (0 where a snapshot stands)."""
    known: int
    """Tokens of whole pages that the tree holds of this prompt."""
    reason: str
    """`hit`, or why there was none: `empty` (nothing is kept of this space), `short` (no whole page before the last
    token, and no frontier), `new` (the beginning is unknown), `evicted` (it was here, and went for want of memory),
    `replay` (every boundary would need a longer replay than allowed)."""
    diverged: int | None = None
    """The first token at which the prompt differs from the kept prefix that is most like it; None: it extends that."""
    evicted: bool = False
    """Whether more of this prompt was here, and went for want of memory."""
    live: bool = False
    """Whether a running sequence holds the last page too."""
    pages: tuple[int, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()


def frontier_of(node: Node, ids: Sequence[int], *, limit: int) -> Node | None:
    """The longest frontier of `node` that `ids` goes through, ending at `limit` or before."""
    if not node.frontiers:
        return None
    rest = rest_key(ids, node.tokens)
    for count in range(min(PAGE_TOKENS - 1, limit - node.tokens), 0, -1):
        found = node.frontiers.get(rest[: TOKEN_BYTES * count])
        if found is not None:
            return found
    return None


def look_up(
    path: Sequence[Node],
    root: Node | None,
    ids: Sequence[int],
    *,
    layout: CacheLayout,
    max_replay: int | None,
    evicted: bool,
) -> Match:
    """The match of `ids`, whose whole pages are known along `path`. evicted: the next page was here once."""
    known = len(path) * PAGE_TOKENS
    usable = path[: (len(ids) - 1) // PAGE_TOKENS] if ids else []
    base = usable[-1] if usable else root
    front = frontier_of(base, ids, limit=len(ids) - 1) if base is not None else None
    diverged = _divergence(path[-1] if path else root, ids)
    if not usable and front is None:
        reason = (
            "empty" if root is None else "new" if len(ids) > PAGE_TOKENS or diverged is not None else "short"
        )
        if evicted:
            reason = "evicted"
        return Match(tokens=0, replay=0, known=known, reason=reason, diverged=diverged, evicted=evicted)
    depth, replay = len(usable), 0
    if front is None:
        depth, replay = _deepest(usable, layout, max_replay)
        if not depth:
            return Match(tokens=0, replay=0, known=known, reason="replay", diverged=diverged, evicted=evicted)
    held = [*usable[:depth], *([front] if front is not None else [])]
    return Match(
        tokens=held[-1].tokens,
        replay=replay,
        known=known,
        reason="hit",
        diverged=diverged,
        evicted=evicted,
        pages=tuple(node.page for node in held),
        snapshots=tuple(node.snapshot for node in held if node.snapshot is not None),
    )


def _deepest(usable: Sequence[Node], layout: CacheLayout, max_replay: int | None) -> tuple[int, int]:
    """How many pages of `usable` can be gone on from, and the tokens to replay for it."""
    blind = replay_tokens(layout)
    stands = [0]  # of each depth, the nearest snapshot at or above it
    for node in usable:
        stands.append(node.tokens if node.snapshot is not None else stands[-1])
    for depth in range(len(usable), 0, -1):
        replay = min(depth * PAGE_TOKENS - stands[depth], blind)
        if max_replay is None or replay <= max_replay:
            return depth, replay
    return 0, 0


def _divergence(node: Node | None, ids: Sequence[int]) -> int | None:
    """Where `ids` leaves what hangs on `node`, the last page it shares; None where it goes beyond all of it."""
    if node is None or len(ids) <= node.tokens:
        return None
    rest = rest_key(ids, node.tokens)
    mine = np.frombuffer(rest, dtype="<i4")
    passed = best = -1
    for key in (*node.frontiers, *node.children):
        if key[:TOKEN_BYTES] != rest[:TOKEN_BYTES]:
            best = max(best, 0)
            continue
        theirs = np.frombuffer(key, dtype="<i4")
        size = min(len(mine), len(theirs))
        apart = np.flatnonzero(mine[:size] != theirs[:size])
        if len(apart):
            best = max(best, int(apart[0]))
        else:
            passed = max(passed, size)
    if best <= max(
        passed, -1 if node.tokens else 0
    ):  # at the root, other first tokens are just other prompts
        return None
    return node.tokens + best
