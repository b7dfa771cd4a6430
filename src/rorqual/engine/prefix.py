"""PrefixTree: cached prefixes by their tokens, a page (128 tokens) a node, with the snapshots that a restart needs.

A prompt walks down as far as its pages are known. Where a turn ended inside a page stands a frontier: a copy of the
open page and the exact rows, from which the next turn goes on at once. Else the deepest page boundary is used: at
once where a snapshot stands, or after a replay over the entries that are there, from the nearest snapshot above or
blindly (sequence.py); the match says how many tokens that is. Positions are those of token ids that were computed,
never guessed from text.                                                                    (spec/engines.md 5)
Who goes for want of memory: leaves, least recently used first, and those that are warm (kept for a conversation that
came back not long ago) only when nothing else is left: a one-off or a sub-agent does not take the main session's
pages (spec/agent_and_serving.md 1.3). Pinned nodes and pages that a live sequence uses never go.
Owns one reference to each of its pages. Used by one thread.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rorqual.engine.errors import CacheFull
from rorqual.engine.layout import PAGE_TOKENS
from rorqual.engine.pool import PagePool
from rorqual.engine.prefix_match import Match, Node, frontier_of, look_up, page_keys, rest_key
from rorqual.engine.sequence import PagedSequence, Paging
from rorqual.engine.snapshot import Snapshot

__all__ = ["Match", "Pin", "PrefixStatistics", "PrefixTree", "page_keys"]

FRONTIER_TOKENS = 8
"""Shorter prefixes are cheaper to compute than to keep."""
GHOSTS = 1 << 16
"""Evicted pages that are remembered by name, so that a miss can say why."""


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """Nodes that stay until `PrefixTree.unpin`."""

    nodes: tuple[Node, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are pinned."""
        return self.nodes[-1].tokens if self.nodes else 0

    def nbytes(self, page_bytes: int) -> int:
        """Bytes of its pages and snapshots."""
        snapshots = sum(len(node.snapshot.data) for node in self.nodes if node.snapshot is not None)
        return len(self.nodes) * page_bytes + snapshots


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixStatistics:
    """Counts since the start, and what is held now."""

    reasons: dict[str, int]
    """Look-ups by `Match.reason`."""
    asked_tokens: int
    hit_tokens: int
    replayed_tokens: int
    evicted_pages: int
    evicted_warm: int
    """Of these, pages that were warm: nothing else was left."""
    pages: int
    frontiers: int
    snapshots: int
    snapshot_bytes: int


class PrefixTree:
    """Prefixes in one pool. `snapshot_bytes` bounds the snapshots that the tree keeps (None: the pool's budget).

    warm_seconds: how long what a conversation came back for stays behind others. clock: seconds, monotonic.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        snapshot_bytes: int | None = None,
        warm_seconds: float = 900.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool, self.layout = pool, pool.layout
        self.snapshot_limit, self.warm_seconds = snapshot_bytes, warm_seconds
        self._clock = clock
        self._roots: dict[str, Node] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._tick = 0
        self._pages = self._evicted = self._evicted_warm = 0
        self._asked = self._hit = self._replayed = 0
        self._snapshot_bytes = 0
        self._reasons: Counter[str] = Counter()

    @property
    def pages(self) -> int:
        """Pages held, those of frontiers included."""
        return self._pages

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages and snapshots that the tree holds, whoever else does."""
        return self._pages * self.layout.page_bytes + self._snapshot_bytes

    # --- looking up

    def match(self, ids: Sequence[int], *, space: str = "", max_replay: int | None = None) -> Match:
        """The longest usable prefix of `ids`, at least one token being left to feed. Changes no counter.

        space: prefixes of one space are invisible in another (holders of keys). max_replay: None is no limit.
        """
        return self._match(self._path(ids, space), ids, space, max_replay)

    def open(
        self,
        paging: Paging,
        ids: Sequence[int],
        *,
        space: str = "",
        max_replay: int | None = None,
        defer: bool = False,
    ) -> tuple[PagedSequence, Match]:
        """A sequence that holds the longest usable prefix of `ids` (maybe nothing), and the match.

        defer: what is to be replayed is left to the caller (`PagedSequence.adopt`). Raises CacheFull.
        """
        path = self._path(ids, space)
        match = self._match(path, ids, space, max_replay)
        nodes = path[: match.tokens // PAGE_TOKENS]
        if match.tokens % PAGE_TOKENS:
            front = frontier_of(nodes[-1] if nodes else self._roots[space], ids, limit=match.tokens)
            assert front is not None and front.tokens == match.tokens
            nodes.append(front)
        self._touch(nodes)
        pin = self._pin(nodes[-1:])  # its ancestors have something below them, which protects them
        try:
            sequence = PagedSequence(paging)
            try:
                if nodes:
                    sequence.adopt(ids[: match.tokens], match.pages, snapshots=match.snapshots, defer=defer)
                    if match.tokens % PAGE_TOKENS:
                        sequence.snapshots.pop(
                            match.tokens, None
                        )  # it served once, and is no page boundary's
            except BaseException:
                sequence.close()
                raise
        finally:
            self.unpin(pin)
        self._reasons[match.reason] += 1
        self._asked += len(ids)
        self._hit += match.tokens
        self._replayed += match.replay
        return sequence, match

    def _path(self, ids: Sequence[int], space: str) -> list[Node]:
        node, path = self._roots.get(space), list[Node]()
        for key in page_keys(ids):
            node = node.children.get(key) if node is not None else None
            if node is None:
                break
            path.append(node)
        return path

    def _match(self, path: list[Node], ids: Sequence[int], space: str, max_replay: int | None) -> Match:
        root = self._roots.get(space)
        last = path[-1] if path else root if root is not None else _root(space)
        missing = rest_key(ids, last.tokens)
        evicted = len(missing) == 4 * PAGE_TOKENS and last.digest_of(missing) in self._ghosts
        match = look_up(path, root, ids, layout=self.layout, max_replay=max_replay, evicted=evicted)
        live = bool(match.pages) and self.pool.references(match.pages[match.tokens // PAGE_TOKENS - 1]) > 1
        return replace(match, live=True) if live else match

    # --- keeping

    def insert(self, sequence: PagedSequence, *, space: str = "", warm: bool = False) -> int:
        """Keeps the whole pages of a sequence, and its snapshots; returns how many pages were new.

        The sequence goes on as it likes: pages are shared, and a page that is here already is not kept twice.
        """
        snapshots = tuple(sequence.snapshots.values())
        return self.insert_pages(
            sequence.token_ids, sequence.pages, snapshots=snapshots, space=space, warm=warm
        )

    def insert_pages(
        self,
        ids: Sequence[int],
        pages: Sequence[int],
        *,
        snapshots: Sequence[Snapshot] = (),
        space: str = "",
        warm: bool = False,
    ) -> int:
        """As `insert`, of the pages that hold `ids`. warm: a conversation came back for these."""
        node = self._roots.setdefault(space, _root(space))
        path, fresh = list[Node](), list[int]()
        for key, page in zip(page_keys(ids), pages, strict=False):
            child = node.children.get(key)
            if child is None:
                digest = node.digest_of(key)
                child = Node(key, node, page=page, tokens=node.tokens + PAGE_TOKENS, digest=digest)
                node.children[key] = child
                self._ghosts.pop(digest, None)
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
        self._touch(path, warm=warm)
        self._bound_snapshots()
        return len(fresh)

    def insert_frontier(
        self, sequence: PagedSequence, *, at: int, space: str = "", warm: bool = False
    ) -> bool:
        """Keeps position `at` of a sequence, whose whole pages were inserted: the head stands there or at most the
        layout's slack further. Whether it is kept now; not without room for it, nor for a few tokens."""
        if at < FRONTIER_TOKENS or not sequence.floor <= at <= sequence.length:
            return False
        ids = sequence.token_ids[:at]
        path = self._path(ids, space)
        if len(path) != at // PAGE_TOKENS:
            return False
        base = path[-1] if path else self._roots.setdefault(space, _root(space))
        key = rest_key(ids, base.tokens)
        there = base.frontiers.get(key) if key else base
        if there is None or there.snapshot is None:
            pin = self._pin([base])  # making room must not take what this hangs on
            try:
                snapshot = sequence.snapshot_at(at)
                self.pool.charge(snapshot, len(snapshot.data))
                if there is None:
                    page = self.pool.copy_page(sequence.pages[at // PAGE_TOKENS])
                    there = Node(key, base, page=page, tokens=at, digest=base.digest_of(key))
                    base.frontiers[key] = there
                    self._pages += 1
            except CacheFull:
                return False
            finally:
                self.unpin(pin)
            there.snapshot = snapshot
            self._snapshot_bytes += len(snapshot.data)
        self._touch([*path, there], warm=warm)
        self._bound_snapshots()
        return True

    def pin(self, ids: Sequence[int], *, space: str = "") -> Pin:
        """Keeps what is known of `ids` from eviction until `unpin`."""
        path = self._path(ids, space)
        base = path[-1] if path else self._roots.get(space)
        front = frontier_of(base, ids, limit=len(ids)) if base is not None else None
        return self._pin([*path, *([front] if front is not None else [])])

    def unpin(self, pin: Pin) -> None:
        """Takes back one `pin`."""
        for node in pin.nodes:
            assert node.pins > 0, "unpinned more often than pinned"
            node.pins -= 1

    def _pin(self, nodes: Sequence[Node]) -> Pin:
        for node in nodes:
            node.pins += 1
        return Pin(tuple(nodes))

    # --- letting go

    def evict(self, need: int) -> bool:
        """Frees at least `need` bytes if it can, cold leaves before warm ones, then least recently used ones first;
        whether anything was freed."""
        target = max(need, self._pages // 16 * self.layout.page_bytes)  # in bulk: finding leaves costs a walk
        now = self._clock()
        leaves = [(n.warm_until > now, n.used, id(n), n) for n in self._nodes() if self._evictable(n)]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < target:
            warm, _, _, node = leaves[0]
            if warm and freed >= need:
                break
            heapq.heappop(leaves)
            freed += self.layout.page_bytes + (len(node.snapshot.data) if node.snapshot is not None else 0)
            parent = node.parent
            assert parent is not None
            self._remove(node)
            self._evicted += 1
            self._evicted_warm += warm
            if not node.is_frontier:
                self._ghosts[node.digest] = None
                if len(self._ghosts) > GHOSTS:
                    self._ghosts.popitem(last=False)
            if self._evictable(parent):
                heapq.heappush(leaves, (parent.warm_until > now, parent.used, id(parent), parent))
        if freed < need:  # pages in use stay, but their snapshots may go
            before = self._snapshot_bytes
            self._thin(max(before - (need - freed), 0))
            freed += before - self._snapshot_bytes
        self._prune()
        return freed > 0

    def forget(self, ids: Sequence[int], *, space: str = "") -> int:
        """Lets go of what only `ids` goes through, whoever last used it; returns the tokens that nobody knows now."""
        path = self._path(ids, space)
        root = self._roots.get(space)
        for node in [*([root] if root is not None else []), *path]:
            rest = rest_key(ids, node.tokens)
            for front in [f for key, f in node.frontiers.items() if rest.startswith(key) and not f.pins]:
                self._remove(front)
        gone = 0
        for node in reversed(path):
            if not node.is_leaf or node.pins:
                break
            self._remove(node)
            gone += PAGE_TOKENS
        self._prune()
        return gone

    def clear(self) -> None:
        """Forgets everything; pages in use by sequences stay theirs."""
        self.pool.drop_pages([node.page for node in self._nodes()])
        self._roots.clear()
        self._ghosts.clear()
        self._pages = self._snapshot_bytes = 0

    def _evictable(self, node: Node) -> bool:
        return node.is_leaf and not node.pins and self.pool.references(node.page) == 1

    def _remove(self, node: Node) -> None:
        """Takes a leaf out, and gives its page back."""
        assert node.parent is not None
        self._forget_snapshot(node)
        del (node.parent.frontiers if node.is_frontier else node.parent.children)[node.key]
        self.pool.drop_pages([node.page])
        self._pages -= 1

    def _prune(self) -> None:
        for space in [s for s, root in self._roots.items() if not root.children and not root.frontiers]:
            del self._roots[space]

    def _bound_snapshots(self) -> None:
        if self.snapshot_limit is not None and self._snapshot_bytes > self.snapshot_limit:
            self._thin(self.snapshot_limit)

    def _thin(self, limit: int) -> None:
        """Drops snapshots (frontiers go with theirs) down to `limit` bytes: cold ones before warm ones, then least
        recently used ones first, pinned ones never."""
        now = self._clock()
        candidates = [node for node in self._nodes() if node.snapshot is not None and not node.pins]
        # Of equally old ones the shallower goes first: the deeper one spares more.
        for node in sorted(candidates, key=lambda node: (node.warm_until > now, node.used, node.tokens)):
            if self._snapshot_bytes <= limit:
                return
            if node.is_frontier:
                self._remove(node)
            else:
                self._forget_snapshot(node)

    def _forget_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self._snapshot_bytes -= len(node.snapshot.data)
            node.snapshot = None

    def _touch(self, path: Sequence[Node], *, warm: bool = False) -> None:
        self._tick += 1
        until = self._clock() + self.warm_seconds if warm else 0.0
        for node in path:
            node.used = self._tick
            if warm:
                node.warm_until = until

    def _nodes(self) -> Iterator[Node]:
        for root in self._roots.values():
            yield from root.below()

    # --- inspection

    def branches(self) -> Iterator[tuple[str, list[int], list[int], list[Snapshot]]]:
        """Every longest prefix of whole pages: space, token ids, pages, snapshots; the last used first."""
        leaves = [
            (node.used, space, node)
            for space, root in self._roots.items()
            for node in root.below()
            if not node.children and not node.is_frontier
        ]
        for _, space, leaf in sorted(leaves, key=lambda entry: -entry[0]):
            path, node = list[Node](), leaf
            while node.parent is not None:
                path.append(node)
                node = node.parent
            path.reverse()
            ids = np.frombuffer(b"".join(node.key for node in path), dtype="<i4").tolist()
            yield space, ids, [n.page for n in path], [n.snapshot for n in path if n.snapshot is not None]

    def branch(self, ids: Sequence[int], *, space: str = "") -> tuple[list[int], list[Snapshot]]:
        """Pages and snapshots of what is known of `ids`, whole pages only."""
        path = self._path(ids, space)
        return [n.page for n in path], [n.snapshot for n in path if n.snapshot is not None]

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
            evicted_warm=self._evicted_warm,
            pages=self._pages,
            frontiers=sum(node.is_frontier for node in self._nodes()),
            snapshots=sum(node.snapshot is not None for node in self._nodes()),
            snapshot_bytes=self._snapshot_bytes,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless parents, positions, counts and references agree."""
        pages = self.held_pages()
        assert len(pages) == len(set(pages)) == self._pages, "a page is in the tree twice, or miscounted"
        size = 0
        for node in self._nodes():
            assert node.parent is not None and node.pins >= 0
            where = node.parent.frontiers if node.is_frontier else node.parent.children
            assert where[node.key] is node and node.tokens == node.parent.tokens + len(node.key) // 4
            assert not node.is_frontier or (node.is_leaf and node.snapshot is not None)
            assert self.pool.references(node.page) >= 1, f"page {node.page} is in the tree and free"
            if node.snapshot is not None:
                assert node.snapshot.position == node.tokens
                size += len(node.snapshot.data)
        assert size == self._snapshot_bytes


def _root(space: str) -> Node:
    return Node(b"", None, digest=space.encode())
