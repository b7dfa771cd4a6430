"""Saved sequences: one sequence in a record file of its own, written beside and renamed; and the tail record.

A tail holds what lies behind the last whole page: tokens, the open page, the exact rings, and the logits of a saved
sequence. Spills in a page store end in the same record.                                         (decision 0011)
Owns one sequence's bytes. The prefixes of many are store.py's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.errors import SequenceFileError
from rorqual.engine.layout import PAGE_TOKENS
from rorqual.engine.prefix_match import page_keys
from rorqual.engine.recordfile import NONE, NewRecord, Record, RecordFile
from rorqual.engine.sequence import PagedSequence, Paging
from rorqual.engine.snapshot import Snapshot

__all__ = [
    "DEAD",
    "PAGE",
    "SNAPSHOT",
    "TAIL",
    "frozen_copy",
    "load_file",
    "rebuild",
    "save_file",
    "tail_meta",
    "tail_record",
]

PAGE, SNAPSHOT, TAIL, DEAD = 1, 2, 3, 4
"""Kinds of records."""


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
            file.append([tail_record(sequence, last, logits=logits)])
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
        return rebuild(file, records[:-1], records[-1], paging)


def tail_record(
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


def tail_meta(record: Record) -> dict[str, object]:
    try:
        meta = json.loads(record.meta)
    except ValueError:
        return {}
    return meta if isinstance(meta, dict) else {}


def rebuild(
    file: RecordFile, records: Sequence[Record], tail: Record, paging: Paging
) -> tuple[PagedSequence, NDArray[np.float32] | None]:
    """A sequence from its page records and its tail. Raises SequenceFileError, CacheFull."""
    pool, layout, meta = paging.pool, paging.pool.layout, tail_meta(tail)
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
        frozen = Snapshot(len(ids), frozen_copy(data[open_size : open_size + snapshot_size]))
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


def frozen_copy(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy that nobody changes: the mapping may go."""
    copy = data.copy()
    copy.flags.writeable = False
    return copy
