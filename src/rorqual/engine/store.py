"""PageStore: prefixes on disk, written once; and the files of saved sequences. Both are record files (recordfile.py).

A page record holds 128 token ids and the page over all layers; its parent is the page before it: the file is the
prefix tree. A snapshot record stands at a page. A tail record holds what lies behind the last whole page: tokens, the
open page, the exact rings, and the logits of a saved sequence. A turn of a conversation writes its new pages alone.

Window strategies, for the rows that a restart needs beside the pages (spec/model.md 3.1):
    full      a snapshot at every page boundary it is given: restarts replay nothing, 8 times the bytes
    periodic  snapshots as long as they stay below a tenth of the pages' bytes, one of them saved for the end: a
              restart replays nothing, one after a kill some
    zero      none: restarts replay `replay_tokens` tokens
What is damaged is a miss, and said in the log and in the statistics; never wrong logits.          (decision 0011)
Owns files. Pages in memory are the pool's and the prefix tree's.
"""

from __future__ import annotations

import enum
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.errors import SequenceFileError
from rorqual.engine.layout import PAGE_TOKENS, CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.engine.prefix import page_keys
from rorqual.engine.recordfile import NONE, NewRecord, Record, RecordFile
from rorqual.engine.sequence import PagedSequence, Paging
from rorqual.engine.snapshot import Snapshot

__all__ = ["PageStore", "StoreStatistics", "WindowStrategy", "load_file", "save_file"]

log = logging.getLogger(__name__)

PAGE, SNAPSHOT, TAIL = 1, 2, 3
PERIODIC_SHARE = 0.09
"""Snapshots a periodic store may write for each byte of pages: all it writes stays below 1.1 times the pages."""


class WindowStrategy(enum.Enum):
    """Which snapshots a store writes."""

    FULL = "full"
    PERIODIC = "periodic"
    ZERO = "zero"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatistics:
    """Counts since the store was opened, and what the file holds."""

    file_bytes: int
    pages: int
    snapshots: int
    written_bytes: int
    new_page_bytes: int
    """Of the pages that were written: what had to be."""
    damaged: int
    """Records that did not match their checksum when they were read."""


@dataclass(slots=True, eq=False)
class _Node:
    record: Record | None
    parent: _Node | None
    key: bytes
    depth: int
    children: dict[bytes, _Node] = field(default_factory=dict)
    snapshot: Record | None = None

    @property
    def number(self) -> int:
        return NONE if self.record is None else self.record.number


class PageStore:
    """The prefixes of one model and cache format in `directory`. One process at a time; used by one thread.

    `limit_bytes` bounds the file: beyond it nothing is written any more (`put` returns what it wrote; the log says
    so once). Raises SequenceFileError when the file cannot be used: of another model, locked, no file of ours.
    """

    def __init__(
        self,
        directory: str | Path,
        layout: CacheLayout,
        *,
        fingerprint: bytes,
        strategy: WindowStrategy = WindowStrategy.PERIODIC,
        limit_bytes: int | None = None,
    ) -> None:
        self.layout, self.strategy, self.limit_bytes = layout, strategy, limit_bytes
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SequenceFileError(f"{directory} cannot be made: {error.strerror}") from error
        self._file = RecordFile(
            self.directory / "prefixes.rqk",
            fingerprint=fingerprint,
            page_bytes=layout.page_bytes,
            writable=True,
        )
        self._roots: dict[bytes, _Node] = {}
        self._nodes: dict[int, _Node] = {}  # by record number
        self._tails: dict[str, Record] = {}
        self._written = self._page_bytes = self._damaged = self._snapshots = 0
        self._page_total = self._snapshot_total = 0  # of the whole file: the periodic budget
        self._told_full = False
        for record in self._file.records:
            self._index(record)
        if self._file.lost_bytes:
            log.warning(
                "the end of a cache file held no whole record and is cut off",
                extra={"path": str(self._file.path), "bytes": self._file.lost_bytes},
            )

    def _index(self, record: Record) -> None:
        if (
            record.kind == PAGE
            and len(record.meta) >= 4 * PAGE_TOKENS
            and record.size == self.layout.page_bytes
        ):
            key, space = record.meta[: 4 * PAGE_TOKENS], record.meta[4 * PAGE_TOKENS :]
            if record.parent == NONE:
                parent = self._roots.setdefault(space, _Node(None, None, b"", 0))
            elif record.parent in self._nodes:
                parent = self._nodes[record.parent]
            else:
                return
            node = _Node(record, parent, key, parent.depth + 1)
            parent.children[key] = node
            self._nodes[record.number] = node
            self._page_total += record.size
        elif record.kind == SNAPSHOT and record.parent in self._nodes:
            self._nodes[record.parent].snapshot = record
            self._snapshot_total += record.size
            self._snapshots += 1
        elif record.kind == TAIL:
            name = _tail_meta(record).get("name")
            if isinstance(name, str):
                self._tails[name] = record

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._file.close()

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
    ) -> int:
        """Writes the whole pages of `ids` that the file lacks, and snapshots as the strategy has it; bytes written.

        last: nothing follows (the engine closes): a periodic store, which always keeps enough of its share for one
        more snapshot, may spend that too. Durable on return.
        Raises SequenceFileError when the disk refuses; then the file is as it was.
        """
        node = self._roots.setdefault(space.encode(), _Node(None, None, b"", 0))
        new: list[NewRecord] = []
        path: list[tuple[bytes, _Node | None]] = []
        number, parent = len(self._file.records), node.number
        current: _Node | None = node
        page_bytes = 0
        for key, page in zip(page_keys(ids), pages, strict=False):
            current = current.children.get(key) if current is not None else None
            path.append((key, current))
            if current is None:
                meta = key + (space.encode() if parent == NONE else b"")
                new.append(NewRecord(PAGE, parent, meta, [pool.read_page(page).data]))
                parent, number = number, number + 1
                page_bytes += self.layout.page_bytes
            else:
                parent = current.number
        first = len(self._file.records)
        fresh_at = len(path) - len(new)  # depth where the new pages begin
        credit = PERIODIC_SHARE * (self._page_total + page_bytes) - self._snapshot_total
        for snapshot in sorted(snapshots, key=lambda s: -s.position):
            depth = snapshot.position // PAGE_TOKENS
            if snapshot.position % PAGE_TOKENS or not 0 < depth <= len(path):
                continue
            there = path[depth - 1][1]
            if there is not None and there.snapshot is not None:
                continue
            wanted = self.strategy is WindowStrategy.FULL or (
                self.strategy is WindowStrategy.PERIODIC and len(snapshot.data) * (1 if last else 2) <= credit
            )
            if wanted:
                at = there.number if there is not None else first + depth - 1 - fresh_at
                new.append(NewRecord(SNAPSHOT, at, b"", [snapshot.data.data]))
                credit -= len(snapshot.data)
        return self._append(new, page_bytes)

    def _append(self, new: list[NewRecord], page_bytes: int) -> int:
        if not new:
            return 0
        before = self._file.nbytes
        size = sum(len(part) for record in new for part in record.data)
        if self.limit_bytes is not None and before + size > self.limit_bytes:
            if not self._told_full:
                log.warning(
                    "the cache file is full: new prefixes stay in memory only", extra={"bytes": before}
                )
                self._told_full = True
            return 0
        for record in self._file.append(new):
            self._index(record)
        self._written += self._file.nbytes - before
        self._page_bytes += page_bytes
        return self._file.nbytes - before

    # --- reading

    def depth(self, ids: Sequence[int], *, space: str = "") -> int:
        """Tokens of `ids` whose whole pages the file holds."""
        return len(self._path(ids, space)) * PAGE_TOKENS

    def _path(self, ids: Sequence[int], space: str) -> list[_Node]:
        node, path = self._roots.get(space.encode()), list[_Node]()
        for key in page_keys(ids):
            node = node.children.get(key) if node is not None else None
            if node is None:
                break
            path.append(node)
        return path

    def load(
        self, ids: Sequence[int], *, pool: PagePool, skip: int = 0, space: str = ""
    ) -> tuple[list[int], list[Snapshot]]:
        """Reads the pages of `ids` from token `skip` (a multiple of 128) on into the pool, and their last snapshot.

        The caller holds the pages it gets (one reference each). A damaged page ends the prefix there. CacheFull.
        """
        path = self._path(ids, space)
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
                return pages, [Snapshot(node.depth * PAGE_TOKENS, _frozen(data))]
        return pages, []

    def _read(self, node: _Node | None, record: Record | None) -> NDArray[np.uint8] | None:
        """Data of a record, or None when it is damaged; then the page and what follows it are forgotten."""
        assert record is not None
        try:
            return self._file.read(record)
        except SequenceFileError as error:
            log.warning("a cached record is damaged and counts as a miss: %s", error)
            self._damaged += 1
            if node is not None and node.parent is not None:
                node.parent.children.pop(node.key, None)
            return None

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
        )
        path = self._path(sequence.token_ids, space)
        if len(path) != sequence.length // PAGE_TOKENS:
            raise SequenceFileError(f"{self._file.path} has reached its limit of {self.limit_bytes} bytes")
        tail = _tail(sequence, path[-1].number if path else NONE, name=name)
        tail_bytes = self._append([tail], 0)
        if not tail_bytes:
            raise SequenceFileError(f"{self._file.path} has reached its limit of {self.limit_bytes} bytes")
        return written + tail_bytes

    def unspill(self, name: str, paging: Paging) -> PagedSequence:
        """The sequence that was spilled as `name`. Raises SequenceFileError (unknown, damaged), CacheFull."""
        record = self._tails.get(name)
        if record is None:
            raise SequenceFileError(f"{self._file.path} holds no sequence {name!r}")
        nodes: list[_Node] = []
        node = self._nodes.get(record.parent)
        while node is not None and node.record is not None:
            nodes.append(node)
            node = node.parent
        records = [n.record for n in reversed(nodes) if n.record is not None]
        sequence, _ = _rebuild(self._file, records, record, paging)
        return sequence

    def forget(self, name: str) -> None:
        """The spilled sequence is no longer wanted (its bytes stay until the file goes)."""
        self._tails.pop(name, None)

    def statistics(self) -> StoreStatistics:
        """Counts since the store was opened and what the file holds."""
        return StoreStatistics(
            file_bytes=self._file.nbytes,
            pages=len(self._nodes),
            snapshots=self._snapshots,
            written_bytes=self._written,
            new_page_bytes=self._page_bytes,
            damaged=self._damaged,
        )


def save_file(
    path: Path, sequence: PagedSequence, *, fingerprint: bytes, logits: NDArray[np.float32] | None = None
) -> None:
    """Writes one sequence to one file, atomically: temporary file, fsync, rename, fsync of the directory.

    Raises SequenceFileError when the disk refuses; then `path` is what it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    layout, pool = sequence.layout, sequence.pool
    try:
        temporary.unlink(missing_ok=True)
        with RecordFile(
            temporary, fingerprint=fingerprint, page_bytes=layout.page_bytes, writable=True
        ) as file:
            for number, (key, page) in enumerate(
                zip(page_keys(sequence.token_ids), sequence.pages, strict=False)
            ):
                record = NewRecord(PAGE, number - 1 if number else NONE, key, [pool.read_page(page).data])
                file.append([record], sync=False)
            last = len(file.records) - 1 if file.records else NONE
            file.append([_tail(sequence, last, logits=logits)])
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise SequenceFileError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_file(
    path: Path, paging: Paging, *, fingerprint: bytes
) -> tuple[PagedSequence, NDArray[np.float32] | None]:
    """The reverse of `save_file`: the sequence and its logits. Raises SequenceFileError, CacheFull."""
    layout = paging.pool.layout
    with RecordFile(path, fingerprint=fingerprint, page_bytes=layout.page_bytes, writable=False) as file:
        records = file.records
        chained = all(
            record.kind == PAGE
            and record.parent == (number - 1 if number else NONE)
            and record.size == layout.page_bytes
            and len(record.meta) >= 4 * PAGE_TOKENS
            for number, record in enumerate(records[:-1])
        )
        if not records or records[-1].kind != TAIL or not chained or file.lost_bytes:
            raise SequenceFileError(f"{path} is incomplete or damaged: it holds no whole sequence")
        return _rebuild(file, records[:-1], records[-1], paging)


def _tail(
    sequence: PagedSequence,
    parent: int,
    *,
    name: str | None = None,
    logits: NDArray[np.float32] | None = None,
) -> NewRecord:
    whole = sequence.length // PAGE_TOKENS
    frozen = sequence.freeze()
    data: list[bytes | memoryview] = []
    if sequence.length % PAGE_TOKENS:
        data.append(sequence.pool.read_page(sequence.pages[whole]).data)
    data.append(frozen.data.data)
    if logits is not None:
        data.append(np.ascontiguousarray(logits, dtype="<f4").tobytes())
    meta = {
        "name": name,
        "length": sequence.length,
        "ids": [int(token) for token in sequence.token_ids[whole * PAGE_TOKENS :]],
        "snapshot": len(frozen.data),
        "logits": 0 if logits is None else int(logits.size),
    }
    return NewRecord(TAIL, parent, json.dumps(meta).encode(), data)


def _tail_meta(record: Record) -> dict[str, object]:
    try:
        meta = json.loads(record.meta)
    except ValueError:
        return {}
    return meta if isinstance(meta, dict) else {}


def _rebuild(
    file: RecordFile, records: Sequence[Record], tail: Record, paging: Paging
) -> tuple[PagedSequence, NDArray[np.float32] | None]:
    """A sequence from its page records and its tail. Raises SequenceFileError, CacheFull."""
    pool, layout, meta = paging.pool, paging.pool.layout, _tail_meta(tail)
    ids = [int(t) for record in records for t in np.frombuffer(record.meta[: 4 * PAGE_TOKENS], dtype="<i4")]
    more, length = meta.get("ids"), meta.get("length")
    snapshot_size, logits_size = meta.get("snapshot"), meta.get("logits")
    if (
        not isinstance(more, list)
        or not all(isinstance(t, int) and 0 <= t < layout.config.vocab_size for t in (*more, *ids))
        or not isinstance(snapshot_size, int)
        or not isinstance(logits_size, int)
        or length != len(ids) + len(more)
        or len(more) >= PAGE_TOKENS
    ):
        raise SequenceFileError(f"{file.path}: the record of its last tokens contradicts its pages")
    data = file.read(tail)
    open_size = layout.page_bytes if more else 0
    if len(data) != open_size + snapshot_size + 4 * logits_size or min(snapshot_size, logits_size) < 0:
        raise SequenceFileError(f"{file.path}: the record of its last tokens has the wrong size")
    ids += more
    pages = pool.take_pages(layout.pages(len(ids)))
    sequence = None
    try:
        for page, record in zip(pages, records, strict=False):
            pool.write_page(page, file.read(record))
        if more:
            pool.write_page(pages[-1], data[:open_size])
        frozen = Snapshot(len(ids), _frozen(data[open_size : open_size + snapshot_size]))
        sequence = PagedSequence(paging)
        sequence.adopt(ids, pages, snapshots=[frozen] if ids else [])
        sequence.snapshots.clear()  # it served once, and is no page boundary's
    except ValueError as error:
        if sequence is not None:
            sequence.close()
        raise SequenceFileError(f"{file.path}: {error}") from error
    except BaseException:
        if sequence is not None:
            sequence.close()
        raise
    finally:
        pool.drop_pages(pages)  # the sequence has references of its own
    logits = None
    if logits_size:
        logits = np.frombuffer(data[open_size + snapshot_size :].tobytes(), dtype="<f4").copy()
    return sequence, logits


def _frozen(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy that nobody changes: the mapping may go."""
    copy = data.copy()
    copy.flags.writeable = False
    return copy
