"""PageStore: prefixes on disk, written once, within a bound of bytes and of bytes a second.

A page record holds 128 token ids and the page over all layers; its parent is the page before it: the file is the
prefix tree. A snapshot record stands at a page; a tail record ends a spilled sequence (sequence_file.py). A turn of a
conversation writes its new pages alone.

Window strategies, for the rows that a restart needs beside the pages (spec/model.md 3.1):
    full      a snapshot at every page boundary it is given: restarts replay nothing, 8 times the bytes
    periodic  snapshots as long as they stay below a tenth of the pages' bytes, one of them saved for the end: a
              restart replays nothing, one after a kill some
    zero      none: restarts replay `replay_tokens` tokens
When the bound is reached, least recently used leaves go: a tombstone record names them, and their bytes go back to
the file system in place, so that letting go writes next to nothing. Opening compacts a file that is mostly dead. What
is damaged is a miss, and said in the log and in the statistics; never wrong logits.    (decisions 0011 and 0020)
Owns files. Pages in memory are the pool's and the prefix tree's.
"""

from __future__ import annotations

import enum
import heapq
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.errors import DamagedFile, SequenceFileError
from rorqual.engine.layout import PAGE_TOKENS, CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.engine.prefix_match import page_keys
from rorqual.engine.recordfile import HEAD_BYTES, NONE, NewRecord, Record, RecordFile, Syncer
from rorqual.engine.sequence import PagedSequence, Paging
from rorqual.engine.sequence_file import (
    DEAD,
    PAGE,
    SNAPSHOT,
    frozen_copy,
    rebuild,
    tail_record,
)
from rorqual.engine.snapshot import Snapshot
from rorqual.engine.store_index import StoreIndex, StoreNode, bytes_of, records_of

__all__ = ["PageStore", "StoreConfig", "StoreStatistics", "WindowStrategy"]

log = logging.getLogger(__name__)

PERIODIC_SHARE = 0.09
"""Snapshots a periodic store may write for each byte of pages: all it writes stays below 1.1 times the pages."""
BURST_SECONDS = 60.0
"""What a store that did not write for so long may write at once."""
COMPACT_BYTES = 1 << 20
"""A file with fewer dead bytes is not worth a copy."""


class WindowStrategy(enum.Enum):
    """Which snapshots a store writes."""

    FULL = "full"
    PERIODIC = "periodic"
    ZERO = "zero"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Where and how prefixes are kept on disk. Raises ValueError, naming the field."""

    directory: str | Path
    window: WindowStrategy = WindowStrategy.PERIODIC
    limit_bytes: int | None = None
    """Bytes on disk; beyond them least recently used prefixes go. None: no bound."""
    bytes_per_second: int | None = None
    """What may be written over time; what is over it stays in memory until the engine closes. None: no bound."""
    sync: Literal["now", "later"] = "now"
    """Whether a write is durable against a loss of power on return, or soon after (a kill loses nothing)."""

    def __post_init__(self) -> None:
        for name in ("limit_bytes", "bytes_per_second"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatistics:
    """Counts since the store was opened, and what the file holds."""

    file_bytes: int
    """Length of the file; what was let go of has no blocks in it."""
    live_bytes: int
    pages: int
    snapshots: int
    written_bytes: int
    new_page_bytes: int
    """Of the pages that were written: what had to be."""
    evicted_pages: int
    deferred_pages: int
    """Pages that were not written for want of room or budget, each time counted."""
    damaged: int
    """Records that did not match their checksum when they were read."""


class PageStore:
    """The prefixes of one model and cache format in a directory. One process at a time; used by one thread.

    Raises SequenceFileError when the file cannot be used: of another model, locked, no file of ours. clock: seconds.
    """

    def __init__(
        self,
        config: StoreConfig,
        layout: CacheLayout,
        *,
        fingerprint: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout, self.config = layout, config
        self.directory = Path(config.directory)
        self._fingerprint, self._clock = fingerprint, clock
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SequenceFileError(f"{self.directory} cannot be made: {error.strerror}") from error
        self._written = self._page_bytes = self._damaged = self._evicted = self._deferred = 0
        self._credit, self._credit_at = self._burst, clock()
        self._told_full = False
        self._syncer: Syncer | None = None
        path = self.directory / "prefixes.rqk"
        try:
            self._file = self._open(path)
        except DamagedFile as error:
            aside = path.with_name(f"{path.name}.damaged")
            log.warning("%s: it is now %s, and a new one begins", error, aside)
            os.replace(path, aside)
            self._file = self._open(path)
        if self._file.lost_bytes:
            log.warning(
                "the end of a cache file held no whole record and is cut off",
                extra={"path": str(self._file.path), "bytes": self._file.lost_bytes},
            )
        self._read_index()
        if self._file.nbytes - self.live_bytes > max(self.live_bytes, COMPACT_BYTES):
            try:
                self.compact()
            except SequenceFileError as error:
                log.warning("%s", error)
        if config.sync == "later":
            self._syncer = Syncer(self._file)

    def _open(self, path: Path) -> RecordFile:
        return RecordFile(
            path, fingerprint=self._fingerprint, page_bytes=self.layout.page_bytes, writable=True
        )

    def _read_index(self) -> None:
        self._index = StoreIndex(self.layout, self._file.records)
        # Tails are of sequences that a process spilled which is no more.
        self._drop_records([self._index.drop_tail(name)[0] for name in list(self._index.tails)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if self._syncer is not None:
            self._syncer.close()
        self._file.close()

    @property
    def live_bytes(self) -> int:
        """Bytes of the records that are in use."""
        return self._index.live_bytes

    @property
    def closed(self) -> bool:
        """Whether the file was closed."""
        return self._file.closed

    # --- writing

    def put(
        self,
        ids: Sequence[int],
        pages: Sequence[int],
        *,
        pool: PagePool,
        snapshots: Sequence[Snapshot] = (),
        space: str = "",
        last: bool = False,
        urgent: bool = False,
    ) -> int:
        """Writes the whole pages of `ids` that the file lacks, and snapshots as the strategy has it; bytes written.

        As many of them, from the front, as room and budget allow. urgent: the budget does not count. last: nothing
        follows (the engine closes, or somebody asked for it): urgent, and a periodic store, which always keeps enough
        of its share for one more snapshot, may spend that too.
        Raises SequenceFileError when the disk refuses; then the file is as it was.
        """
        keys = page_keys(ids)[: len(pages)]
        path = self._index.path(ids, space)[: len(keys)]
        self._index.touch(path)
        record_bytes = HEAD_BYTES + 4 * PAGE_TOKENS + len(space.encode()) + self.layout.page_bytes
        count = self._affordable(len(keys) - len(path), record_bytes, path=path, urgent=urgent or last)
        new: list[NewRecord] = []
        first, parent = len(self._file.records), path[-1].number if path else NONE
        for depth in range(len(path), len(path) + count):
            meta = keys[depth] + (space.encode() if parent == NONE else b"")
            new.append(NewRecord(PAGE, parent, meta, [pool.read_page(pages[depth]).data]))
            parent = first + depth - len(path)
        page_bytes = count * self.layout.page_bytes
        credit = PERIODIC_SHARE * (self._index.page_bytes + page_bytes) - self._index.snapshot_bytes
        room = self._room() - count * record_bytes
        for snapshot in sorted(snapshots, key=lambda s: -s.position):
            depth, size = snapshot.position // PAGE_TOKENS, len(snapshot.data)
            if snapshot.position % PAGE_TOKENS or not 0 < depth <= len(path) + count:
                continue
            if size + HEAD_BYTES > room or (depth <= len(path) and path[depth - 1].snapshot is not None):
                continue
            wanted = self.config.window is WindowStrategy.FULL or (
                self.config.window is WindowStrategy.PERIODIC and size * (1 if last else 2) <= credit
            )
            if wanted:
                at = path[depth - 1].number if depth <= len(path) else first + depth - 1 - len(path)
                new.append(NewRecord(SNAPSHOT, at, b"", [snapshot.data.data]))
                credit -= size
                room -= size + HEAD_BYTES
        return self._append(new, page_bytes)

    def _affordable(self, wanted: int, size: int, *, path: Sequence[StoreNode], urgent: bool) -> int:
        """How many of `wanted` new pages behind `path` may be written; makes room for them."""
        if wanted <= 0:
            return 0
        count = wanted
        if self.config.bytes_per_second is not None and not urgent:
            now = self._clock()
            earned = (now - self._credit_at) * self.config.bytes_per_second
            self._credit, self._credit_at = min(self._credit + earned, self._burst), now
            count = min(count, max(int(self._credit // size), 0))
        if self._room() < count * size:
            self._index.hold(path)
            self._evict(count * size - self._room())
            self._index.release(path)
            if self._room() < size and not self._told_full:
                log.warning(
                    "the cache file is full: new prefixes stay in memory only",
                    extra={"bytes": self.live_bytes},
                )
                self._told_full = True
            count = min(count, max(self._room() // size, 0))
        self._deferred += wanted - count
        return count

    @property
    def _burst(self) -> float:
        return BURST_SECONDS * (self.config.bytes_per_second or 0)

    def _room(self) -> int:
        limit = self.config.limit_bytes
        return 1 << 62 if limit is None else limit - self.live_bytes

    def _append(self, new: Sequence[NewRecord], page_bytes: int) -> int:
        if not new:
            return 0
        before = self._file.nbytes
        self._index.tick += 1
        for record in self._file.append(new, sync=self._syncer is None):
            self._index.add(record)
        if self._syncer is not None:
            self._syncer.wake()
        written = self._file.nbytes - before
        self._written += written
        self._credit -= written
        self._page_bytes += page_bytes
        return written

    # --- reading

    def depth(self, ids: Sequence[int], *, space: str = "") -> int:
        """Tokens of `ids` whose whole pages the file holds."""
        return len(self._index.path(ids, space)) * PAGE_TOKENS

    def load(
        self, ids: Sequence[int], *, pool: PagePool, skip: int = 0, space: str = ""
    ) -> tuple[list[int], list[Snapshot]]:
        """Reads the pages of `ids` from token `skip` (a multiple of 128) on into the pool, and their last snapshot.

        The caller holds the pages it gets (one reference each). A damaged page ends the prefix there. CacheFull.
        """
        path = self._index.path(ids, space)
        self._index.touch(path)
        wanted = path[skip // PAGE_TOKENS :]
        pages = pool.take_pages(len(wanted))
        for number, node in enumerate(wanted):
            data = self._read(node, node.record)
            if data is None:
                pool.drop_pages(pages[number:])
                del pages[number:]
                break
            pool.write_page(pages[number], data)
        deepest = skip + len(pages) * PAGE_TOKENS
        for node in reversed(path[: deepest // PAGE_TOKENS]):
            if node.snapshot is not None:
                data = self._read(None, node.snapshot)
                if data is None:
                    node.snapshot = None
                    continue
                return pages, [Snapshot(node.depth * PAGE_TOKENS, frozen_copy(data))]
        return pages, []

    def _read(self, node: StoreNode | None, record: Record | None) -> NDArray[np.uint8] | None:
        """Data of a record, or None when it is damaged; then the page and what follows it are forgotten."""
        assert record is not None
        try:
            return self._file.read(record)
        except SequenceFileError as error:
            log.warning("a cached record is damaged and counts as a miss: %s", error)
            self._damaged += 1
            if node is not None:
                self._lose(node)
            return None

    def _lose(self, node: StoreNode) -> None:
        """Lets go of a page and of all that hangs on it."""
        below, stack = list[StoreNode](), [node]
        while stack:
            below.append(stack.pop())
            stack.extend(below[-1].children.values())
        for one in reversed(below):
            self._index.unlink(one)
        self._drop_records([record for one in reversed(below) for record in records_of(one)])

    # --- letting go

    def pin(self, ids: Sequence[int], *, space: str = "") -> tuple[object, ...]:
        """Keeps what the file holds of `ids` until `unpin` of what this returns; counts as a use."""
        path = self._index.path(ids, space)
        self._index.touch(path)
        self._index.hold(path)
        return tuple(path)

    def unpin(self, pinned: Sequence[object]) -> None:
        """Takes back one `pin`."""
        self._index.release([node for node in pinned if isinstance(node, StoreNode)])

    def discard(self, ids: Sequence[int], *, space: str = "") -> int:
        """Lets go of the pages that only `ids` goes through; returns their number."""
        gone: list[StoreNode] = []
        for node in reversed(self._index.path(ids, space)):
            if node.children or node.pins:
                break
            self._index.unlink(node)
            gone.append(node)
        self._drop_records([record for node in gone for record in records_of(node)])
        return len(gone)

    def _evict(self, need: int) -> None:
        """Lets go of least recently used leaves until `need` bytes are free, if it can; in bulk."""
        target = max(need, (self.config.limit_bytes or 0) // 16)
        leaves = [(n.used, n.number, n) for n in self._index.nodes.values() if not n.children and not n.pins]
        heapq.heapify(leaves)
        gone: list[Record] = []
        freed = 0
        while leaves and freed < target:
            node = heapq.heappop(leaves)[2]
            gone += records_of(node)
            freed += sum(bytes_of(record) for record in records_of(node))
            self._index.unlink(node)
            self._evicted += 1
            parent = node.parent
            if parent is not None and parent.record is not None and not parent.children and not parent.pins:
                heapq.heappush(leaves, (parent.used, parent.number, parent))
        self._drop_records(gone)

    def _drop_records(self, gone: Sequence[Record]) -> None:
        """Says in the file that these are no more, and gives their blocks back. A disk that refuses is no harm: the
        records come back with the next opening."""
        if not gone:
            return
        numbers = np.asarray([record.number for record in gone], dtype="<u4").tobytes()
        try:
            self._file.append([NewRecord(DEAD, NONE, numbers, [])], sync=False)
        except SequenceFileError as error:
            log.warning("what was let go of may come back after a restart: %s", error)
            return
        self._file.punch(gone)

    def compact(self) -> None:
        """Copies what is live into a new file and puts it in place: whole or not at all. No sequence may be spilled.

        Raises SequenceFileError when the disk refuses; then the file is as it was.
        """
        path = self._file.path
        fresh_path = path.with_name(f".{path.name}.tmp")
        if self._index.tails:
            raise SequenceFileError(f"{path} cannot be compacted: sequences wait in it")
        fresh_path.unlink(missing_ok=True)
        fresh = self._open(fresh_path)
        try:
            moved: dict[int, int] = {NONE: NONE}
            for number in sorted(self._index.nodes):  # parents come before their children
                node = self._index.nodes[number]
                assert node.record is not None and node.parent is not None
                for record in records_of(node):
                    parent = moved.get(record.parent)
                    data = self._read(None, record) if parent is not None else None
                    if data is None or parent is None:
                        continue
                    new = NewRecord(record.kind, parent, record.meta, [data.data])
                    moved[record.number] = fresh.append([new], sync=False)[0].number
            fresh.sync()
            os.replace(fresh_path, path)
            _sync_directory(path.parent)
        except (OSError, SequenceFileError) as error:
            fresh.close()
            fresh_path.unlink(missing_ok=True)
            raise SequenceFileError(f"{path} cannot be compacted: {error}") from error
        log.info("a cache file was compacted: %d bytes of %d", fresh.nbytes, self._file.nbytes)
        syncing = self._syncer is not None
        if self._syncer is not None:
            self._syncer.close()
        self._file.close()
        self._file = fresh
        fresh.path = path
        self._read_index()
        self._syncer = Syncer(fresh) if syncing else None

    # --- sequences that stopped in the middle of a page

    def spill(self, name: str, sequence: PagedSequence, *, space: str = "") -> int:
        """Writes all that `sequence` needs to go on exactly where it is, under `name`; bytes written.

        Raises SequenceFileError when the disk refuses, or the file's limit does; the sequence is as it was.
        """
        written = self.put(
            sequence.token_ids,
            sequence.pages,
            pool=sequence.pool,
            snapshots=tuple(sequence.snapshots.values()),
            space=space,
            urgent=True,
        )
        path = self._index.path(sequence.token_ids, space)
        tail = tail_record(sequence, path[-1].number if path else NONE, name=name)
        size = HEAD_BYTES + len(tail.meta) + sum(len(part) for part in tail.data)
        if len(path) != sequence.length // PAGE_TOKENS or size > self._room():
            raise SequenceFileError(
                f"{self._file.path} has reached its limit of {self.config.limit_bytes} bytes"
            )
        written += self._append([tail], 0)
        self._index.hold(path)  # until it comes back
        self._index.tail_paths[name] = path
        return written

    def unspill(self, name: str, paging: Paging) -> PagedSequence:
        """The sequence that was spilled as `name`. Raises SequenceFileError (unknown, damaged), CacheFull."""
        record = self._index.tails.get(name)
        if record is None:
            raise SequenceFileError(f"{self._file.path} holds no sequence {name!r}")
        records = [node.record for node in self._index.tail_paths[name] if node.record is not None]
        sequence, _ = rebuild(self._file, records, record, paging)
        return sequence

    def forget(self, name: str) -> None:
        """The spilled sequence is no longer wanted."""
        if name in self._index.tails and not self.closed:
            record, path = self._index.drop_tail(name)
            self._index.release(path)
            self._drop_records([record])

    def statistics(self) -> StoreStatistics:
        """Counts since the store was opened and what the file holds."""
        return StoreStatistics(
            file_bytes=self._file.nbytes,
            live_bytes=self.live_bytes,
            pages=len(self._index.nodes),
            snapshots=self._index.snapshots,
            written_bytes=self._written,
            new_page_bytes=self._page_bytes,
            evicted_pages=self._evicted,
            deferred_pages=self._deferred,
            damaged=self._damaged,
        )


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
