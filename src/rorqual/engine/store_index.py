"""The index of a page store: which records of its file are in use, as a tree by tokens.

Built by reading the records in order, tombstones included; kept as records are appended and let go of. Owns nodes,
uses and pins, and the sums. Never touches the file: store.py does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rorqual.engine.layout import PAGE_TOKENS, CacheLayout
from rorqual.engine.prefix_match import page_keys
from rorqual.engine.recordfile import HEAD_BYTES, NONE, Record
from rorqual.engine.sequence_file import DEAD, PAGE, SNAPSHOT, TAIL, tail_meta

__all__ = ["StoreIndex", "StoreNode", "bytes_of", "records_of"]


@dataclass(slots=True, eq=False)
class StoreNode:
    """A page on disk; a root has no record."""

    record: Record | None
    parent: StoreNode | None
    key: bytes
    depth: int
    """Pages up to and with this one."""
    children: dict[bytes, StoreNode] = field(default_factory=dict)
    snapshot: Record | None = None
    used: int = 0
    pins: int = 0

    @property
    def number(self) -> int:
        """Of its record."""
        return NONE if self.record is None else self.record.number


class StoreIndex:
    """The records that are in use. Used by one thread."""

    def __init__(self, layout: CacheLayout, records: Iterable[Record]) -> None:
        self._layout = layout
        self.nodes: dict[int, StoreNode] = {}
        """Pages by record number."""
        self.tails: dict[str, Record] = {}
        """Spilled sequences by name."""
        self.tail_paths: dict[str, list[StoreNode]] = {}
        """The pages of each, which are held until it comes back."""
        self.page_bytes = self.snapshot_bytes = self.snapshots = self.tick = 0
        self.live_bytes = 0
        """Bytes of all of them, heads included."""
        self._roots: dict[bytes, StoreNode] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """The next record of the file; what makes no sense behind the others is passed over."""
        if (
            record.kind == PAGE
            and len(record.meta) >= 4 * PAGE_TOKENS
            and record.size == self._layout.page_bytes
        ):
            key, space = record.meta[: 4 * PAGE_TOKENS], record.meta[4 * PAGE_TOKENS :]
            if record.parent == NONE:
                parent = self._roots.setdefault(space, StoreNode(None, None, b"", 0))
            elif record.parent in self.nodes:
                parent = self.nodes[record.parent]
            else:
                return
            node = StoreNode(record, parent, key, parent.depth + 1, used=self.tick)
            parent.children[key] = node
            self.nodes[record.number] = node
            self.page_bytes += record.size
        elif record.kind == SNAPSHOT and record.parent in self.nodes:
            self.nodes[record.parent].snapshot = record
            self.snapshot_bytes += record.size
            self.snapshots += 1
        elif record.kind == TAIL:
            name = tail_meta(record).get("name")
            if isinstance(name, str):
                self.tails[name] = record
        elif record.kind == DEAD and len(record.meta) % 4 == 0:
            for number in np.frombuffer(record.meta, dtype="<u4").tolist():
                self._bury(number)
            return
        else:
            return
        self.live_bytes += bytes_of(record)

    def _bury(self, number: int) -> None:
        """What a tombstone says: this record is no more."""
        node = self.nodes.get(number)
        if node is not None and not node.children:
            self.unlink(node)
            return
        for tail in [name for name, record in self.tails.items() if record.number == number]:
            self.live_bytes -= bytes_of(self.tails.pop(tail))

    def path(self, ids: Sequence[int], space: str) -> list[StoreNode]:
        """The pages of `ids` that are known, from the first on."""
        node, path = self._roots.get(space.encode()), list[StoreNode]()
        for key in page_keys(ids) if node is not None else ():
            node = node.children.get(key) if node is not None else None
            if node is None:
                break
            path.append(node)
        return path

    def unlink(self, node: StoreNode) -> None:
        """Takes a leaf out of the index."""
        assert node.parent is not None and not node.children and node.record is not None
        if node.parent.children.get(node.key) is node:
            del node.parent.children[node.key]
        del self.nodes[node.number]
        self.page_bytes -= node.record.size
        if node.snapshot is not None:
            self.snapshot_bytes -= node.snapshot.size
            self.snapshots -= 1
        self.live_bytes -= sum(bytes_of(record) for record in records_of(node))

    def touch(self, path: Sequence[StoreNode]) -> None:
        """These are the last used now."""
        self.tick += 1
        for node in path:
            node.used = self.tick

    @staticmethod
    def hold(path: Sequence[StoreNode]) -> None:
        """These may not go, until `release`."""
        for node in path:
            node.pins += 1

    @staticmethod
    def release(path: Sequence[StoreNode]) -> None:
        """Takes back one `hold`."""
        for node in path:
            node.pins -= 1

    def drop_tail(self, name: str) -> tuple[Record, list[StoreNode]]:
        """Takes a spilled sequence out; its record, and the pages that were held for it."""
        record = self.tails.pop(name)
        self.live_bytes -= bytes_of(record)
        return record, self.tail_paths.pop(name, [])


def records_of(node: StoreNode) -> list[Record]:
    """A page's record, and its snapshot's if there is one."""
    return [record for record in (node.record, node.snapshot) if record is not None]


def bytes_of(record: Record) -> int:
    """Bytes of a record in the file."""
    return HEAD_BYTES + len(record.meta) + record.size
