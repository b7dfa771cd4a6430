"""PrefixTree: cached prefixes by their tokens, a page (128 tokens) a node, with the snapshots that a restart needs.

A prompt walks down as far as its pages are known. The deepest page boundary is usable at once where a snapshot
stands; else the rings are rebuilt by a replay over the entries that are there, from the nearest snapshot above or
blindly (sequence.py), and the match says how many tokens that is. Hits are multiples of 128, nothing coarser.
Least recently used leaves go first; pinned nodes and pages that a live sequence uses never do. Positions are those
of token ids that were computed, never guessed from text.                                   (spec/engines.md 5)
Owns one reference to each of its pages. Used by one thread.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rorqual.engine.layout import PAGE_TOKENS
from rorqual.engine.pool import PagePool
from rorqual.engine.sequence import PagedSequence, Paging, replay_tokens
from rorqual.engine.snapshot import Snapshot

__all__ = ["Match", "PrefixStatistics", "PrefixTree", "page_keys"]


def page_keys(ids: Sequence[int]) -> list[bytes]:
    """One key for each whole page of `ids`: its tokens as little-endian int32."""
    raw = np.asarray(ids[: len(ids) // PAGE_TOKENS * PAGE_TOKENS], dtype="<i4").tobytes()
    return [raw[at : at + 4 * PAGE_TOKENS] for at in range(0, len(raw), 4 * PAGE_TOKENS)]


@dataclass(slots=True, eq=False)
class _Node:
    key: bytes
    parent: _Node | None
    page: int = -1
    tokens: int = 0
    """Position at the end of this page."""
    children: dict[bytes, _Node] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    used: int = 0
    pins: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What a prompt found."""

    tokens: int
    """Tokens that need not be fed; a multiple of 128, less than the prompt's length."""
    replay: int
    """Of these, tokens that are replayed to rebuild the rings (0 where a snapshot stands)."""
    known: int
    """Tokens of whole pages that the tree holds of this prompt."""
    reason: str
    """`hit`, or why there was none: `empty`, `short` (no whole page before the last token), `new` (the first page
    is unknown), `replay` (every boundary would need a longer replay than allowed)."""
    pages: tuple[int, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixStatistics:
    """Counts since the start, and what is held now."""

    reasons: dict[str, int]
    """Look-ups by `Match.reason`."""
    asked_tokens: int
    hit_tokens: int
    replayed_tokens: int
    evicted_pages: int
    pages: int
    snapshots: int
    snapshot_bytes: int


class PrefixTree:
    """Prefixes in one pool. `snapshot_bytes` bounds the snapshots that the tree keeps (None: the pool's budget)."""

    def __init__(self, pool: PagePool, *, snapshot_bytes: int | None = None) -> None:
        self.pool, self.layout = pool, pool.layout
        self.snapshot_limit = snapshot_bytes
        self._roots: dict[str, _Node] = {}
        self._tick = 0
        self._pages = self._evicted = self._asked = self._hit = self._replayed = 0
        self._snapshot_bytes = 0
        self._reasons: Counter[str] = Counter()

    # --- looking up

    def match(self, ids: Sequence[int], *, space: str = "", max_replay: int | None = None) -> Match:
        """The longest usable prefix of `ids`, at least one token being left to feed. Changes no counter.

        space: prefixes of one space are invisible in another (holders of keys). max_replay: None is no limit.
        """
        return self._match(self._path(ids, space), ids, space, max_replay)

    def open(
        self, paging: Paging, ids: Sequence[int], *, space: str = "", max_replay: int | None = None
    ) -> tuple[PagedSequence, Match]:
        """A sequence that holds the longest usable prefix of `ids` (maybe nothing), and the match.

        Raises CacheFull.
        """
        path = self._path(ids, space)
        match = self._match(path, ids, space, max_replay)
        nodes = path[: match.tokens // PAGE_TOKENS]
        self._touch(nodes)
        if nodes:
            nodes[-1].pins += 1  # its ancestors have a child, which protects them
        try:
            sequence = PagedSequence(paging)
            try:
                if nodes:
                    sequence.adopt(ids[: match.tokens], match.pages, snapshots=match.snapshots)
            except BaseException:
                sequence.close()
                raise
        finally:
            if nodes:
                nodes[-1].pins -= 1
        self._reasons[match.reason] += 1
        self._asked += len(ids)
        self._hit += match.tokens
        self._replayed += match.replay
        return sequence, match

    def _path(self, ids: Sequence[int], space: str) -> list[_Node]:
        node, path = self._roots.get(space), list[_Node]()
        for key in page_keys(ids):
            node = node.children.get(key) if node is not None else None
            if node is None:
                break
            path.append(node)
        return path

    def _match(self, path: list[_Node], ids: Sequence[int], space: str, max_replay: int | None) -> Match:
        known = len(path) * PAGE_TOKENS
        usable = path[: (len(ids) - 1) // PAGE_TOKENS] if ids else []
        if not usable:
            whole = len(ids) > PAGE_TOKENS
            reason = "short" if not whole else "empty" if space not in self._roots else "new"
            return Match(tokens=0, replay=0, known=known, reason=reason)
        blind = replay_tokens(self.layout)
        stands = [0]  # of each depth, the nearest snapshot at or above it
        for node in usable:
            stands.append(node.tokens if node.snapshot is not None else stands[-1])
        for depth in range(len(usable), 0, -1):
            position = depth * PAGE_TOKENS
            replay = min(position - stands[depth], blind)
            if max_replay is None or replay <= max_replay:
                return Match(
                    tokens=position,
                    replay=replay,
                    known=known,
                    reason="hit",
                    pages=tuple(node.page for node in usable[:depth]),
                    snapshots=tuple(n.snapshot for n in usable[:depth] if n.snapshot is not None),
                )
        return Match(tokens=0, replay=0, known=known, reason="replay")

    # --- keeping

    def insert(self, sequence: PagedSequence, *, space: str = "") -> int:
        """Keeps the whole pages of a sequence, and its snapshots; returns how many pages were new.

        The sequence goes on as it likes: pages are shared, and a page that is here already is not kept twice.
        """
        return self.insert_pages(
            sequence.token_ids, sequence.pages, snapshots=tuple(sequence.snapshots.values()), space=space
        )

    def insert_pages(
        self,
        ids: Sequence[int],
        pages: Sequence[int],
        *,
        snapshots: Sequence[Snapshot] = (),
        space: str = "",
    ) -> int:
        """As `insert`, of the pages that hold `ids`."""
        node = self._roots.setdefault(space, _Node(b"", None))
        path, fresh = list[_Node](), list[int]()
        for key, page in zip(page_keys(ids), pages, strict=False):
            child = node.children.get(key)
            if child is None:
                child = _Node(key, node, page=page, tokens=node.tokens + PAGE_TOKENS)
                node.children[key] = child
                fresh.append(page)
            path.append(child)
            node = child
        if fresh:
            self.pool.share_pages(fresh)
            self._pages += len(fresh)
        for snapshot in snapshots:
            number = snapshot.position // PAGE_TOKENS - 1
            aligned = snapshot.position % PAGE_TOKENS == 0 and 0 <= number < len(path)
            if aligned and path[number].snapshot is None:
                path[number].snapshot = snapshot
                self._snapshot_bytes += len(snapshot.data)
        self._touch(path)
        if self.snapshot_limit is not None and self._snapshot_bytes > self.snapshot_limit:
            self._thin(self.snapshot_limit)
        return len(fresh)

    def pin(self, ids: Sequence[int], *, space: str = "") -> int:
        """Keeps what is known of `ids` from eviction until `unpin`; returns the tokens pinned."""
        path = self._path(ids, space)
        for node in path:
            node.pins += 1
        return len(path) * PAGE_TOKENS

    def unpin(self, ids: Sequence[int], *, space: str = "") -> None:
        """Takes back one `pin` of the same tokens."""
        for node in self._path(ids, space):
            assert node.pins > 0, "unpinned more often than pinned"
            node.pins -= 1

    # --- letting go

    def evict(self, need: int) -> bool:
        """Frees at least `need` bytes if it can, least recently used leaves first; whether anything was freed."""
        target = max(need, self._pages // 16 * self.layout.page_bytes)  # in bulk: finding leaves costs a walk
        leaves = [(node.used, id(node), node) for node in self._nodes() if self._evictable(node)]
        heapq.heapify(leaves)
        freed = 0
        dropped: list[int] = []
        while leaves and freed < target:
            _, _, node = heapq.heappop(leaves)
            freed += self.layout.page_bytes + self._forget_snapshot(node)
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            dropped.append(node.page)
            if self._evictable(parent):
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        self.pool.drop_pages(dropped)
        self._pages -= len(dropped)
        self._evicted += len(dropped)
        if freed < need:  # pages in use stay, but their snapshots may go
            before = self._snapshot_bytes
            self._thin(max(before - (need - freed), 0))
            freed += before - self._snapshot_bytes
        for space in [s for s, root in self._roots.items() if not root.children]:
            del self._roots[space]
        return freed > 0

    def clear(self) -> None:
        """Forgets everything; pages in use by sequences stay theirs."""
        self.pool.drop_pages([node.page for node in self._nodes()])
        self._roots.clear()
        self._pages = self._snapshot_bytes = 0

    def _evictable(self, node: _Node) -> bool:
        leaf = node.parent is not None and not node.children and not node.pins
        return leaf and self.pool.references(node.page) == 1

    def _thin(self, limit: int) -> None:
        """Drops least recently used snapshots, pinned ones last and never, down to `limit` bytes."""
        candidates = [node for node in self._nodes() if node.snapshot is not None and not node.pins]
        # Of equally old ones the shallower goes first: the deeper one spares more.
        for node in sorted(candidates, key=lambda node: (node.used, node.tokens)):
            if self._snapshot_bytes <= limit:
                return
            self._forget_snapshot(node)

    def _forget_snapshot(self, node: _Node) -> int:
        size = len(node.snapshot.data) if node.snapshot is not None else 0
        node.snapshot = None
        self._snapshot_bytes -= size
        return size

    def _touch(self, path: Sequence[_Node]) -> None:
        self._tick += 1
        for node in path:
            node.used = self._tick

    def _nodes(self) -> Iterator[_Node]:
        for root in self._roots.values():
            yield from self._below(root)

    @staticmethod
    def _below(root: _Node) -> Iterator[_Node]:
        stack = list(root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    # --- inspection

    def branches(self) -> Iterator[tuple[str, list[int], list[int], list[Snapshot]]]:
        """Every longest prefix: space, token ids, pages, snapshots; the last used first."""
        leaves = [
            (node.used, space, node)
            for space, root in self._roots.items()
            for node in self._below(root)
            if not node.children
        ]
        for _, space, leaf in sorted(leaves, key=lambda entry: -entry[0]):
            path, node = list[_Node](), leaf
            while node.parent is not None:
                path.append(node)
                node = node.parent
            path.reverse()
            ids = np.frombuffer(b"".join(node.key for node in path), dtype="<i4").tolist()
            yield space, ids, [n.page for n in path], [n.snapshot for n in path if n.snapshot is not None]

    def held_pages(self) -> list[int]:
        """The pages the tree holds a reference to."""
        return [node.page for node in self._nodes()]

    def statistics(self) -> PrefixStatistics:
        """Counts since the start and what is held now."""
        return PrefixStatistics(
            reasons=dict(self._reasons),
            asked_tokens=self._asked,
            hit_tokens=self._hit,
            replayed_tokens=self._replayed,
            evicted_pages=self._evicted,
            pages=self._pages,
            snapshots=sum(node.snapshot is not None for node in self._nodes()),
            snapshot_bytes=self._snapshot_bytes,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless parents, positions, counts and references agree."""
        pages = self.held_pages()
        assert len(pages) == len(set(pages)) == self._pages, "a page is in the tree twice, or miscounted"
        size = 0
        for node in self._nodes():
            assert node.parent is not None and node.parent.children[node.key] is node
            assert node.tokens == node.parent.tokens + PAGE_TOKENS and node.pins >= 0
            assert self.pool.references(node.page) >= 1, f"page {node.page} is in the tree and free"
            if node.snapshot is not None:
                assert node.snapshot.position == node.tokens
                size += len(node.snapshot.data)
        assert size == self._snapshot_bytes
