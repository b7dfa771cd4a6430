"""RecordFile: an append-only file of checked records: what a kill, a full disk or a flipped bit can do to it is known.

    file   = header (64 bytes: magic, version, page_bytes, fingerprint, CRC32) record*
    record = head (40 bytes: magic, kind, parent, lengths, CRC32 of meta, of data, of head) meta data
Little-endian. Records are numbered in order; a parent is the number of an earlier record or NONE. Appends go to the
end and are never rewritten; a punched record has no data any more. The scan at opening stops at the first record that
is not whole, and the next append starts there. Meta is checked at the scan, data when it is read, through a mapping.
(decisions 0011 and 0020)
Owns bytes. Never knows what a record means: store.py does.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.errors import DamagedFile, SequenceFileError

__all__ = ["HEAD_BYTES", "NONE", "NewRecord", "Record", "RecordFile", "Syncer"]

log = logging.getLogger(__name__)

VERSION = 1
NONE = 0xFFFFFFFF
"""No parent."""
_FILE = struct.Struct("<8sII32s12xI")
_HEAD = struct.Struct("<4sIIIQIII4x")
_FILE_MAGIC, _MAGIC = b"RORQUALK", b"RQRC"
HEAD_BYTES = _HEAD.size
META_LIMIT = 1 << 24
BLOCK = 4096
"""Bytes that a file system gives back as one."""
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


@dataclass(frozen=True, slots=True)
class NewRecord:
    """What `append` writes."""

    kind: int
    parent: int
    meta: bytes
    data: Sequence[bytes | memoryview]
    """Written one after the other."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record that the scan found whole. Its data is not read yet."""

    number: int
    kind: int
    parent: int
    meta: bytes
    at: int
    """Where its data starts in the file."""
    size: int
    crc: int


class RecordFile:
    """One file, open for reading, and for appending when `writable` (then locked against other writers).

    Raises SequenceFileError when the file cannot be read, is no file of ours, of another version, another model or
    format (`fingerprint`, 32 bytes), or when somebody else writes it.
    """

    def __init__(self, path: Path, *, fingerprint: bytes, page_bytes: int, writable: bool) -> None:
        assert len(fingerprint) == 32
        self.path, self.writable = path, writable
        self.records: list[Record] = []
        self.lost_bytes = 0
        """Bytes at the end that held no whole record when the file was opened."""
        self._map: mmap.mmap | None = None
        self._told_no_holes = False
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SequenceFileError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self._open(fingerprint, page_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, fingerprint: bytes, page_bytes: int) -> None:
        if self.writable:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SequenceFileError(f"{self.path} is in use by another process") from error
        size = os.fstat(self._fd).st_size
        if (
            size < _FILE.size
            and self.writable
            and _file_head(fingerprint, page_bytes).startswith(os.pread(self._fd, size, 0))
        ):
            self._end = 0  # new, or killed while the first bytes were written
            self._write([_file_head(fingerprint, page_bytes)])
            return
        raw = os.pread(self._fd, _FILE.size, 0)
        if len(raw) < _FILE.size or raw[:8] != _FILE_MAGIC:
            raise SequenceFileError(f"{self.path} is not a saved sequence or cache file")
        _, version, page, model, crc = _FILE.unpack(raw)
        if crc != zlib.crc32(raw[:-4]):
            raise DamagedFile(f"{self.path} is damaged: its header does not match its checksum")
        if version != VERSION:
            raise SequenceFileError(f"{self.path} has format version {version}, this build reads {VERSION}")
        if model != fingerprint or page != page_bytes:
            raise SequenceFileError(
                f"{self.path} was written by another model or cache format: its cache means nothing to this one"
            )
        self._scan(size)

    def _scan(self, size: int) -> None:
        at = _FILE.size
        while at + _HEAD.size <= size:
            raw = os.pread(self._fd, _HEAD.size, at)
            if len(raw) < _HEAD.size:
                break
            magic, kind, parent, meta_size, data_size, meta_crc, data_crc, crc = _HEAD.unpack(raw)
            whole = magic == _MAGIC and crc == zlib.crc32(raw[:-8])
            end = at + _HEAD.size + meta_size + data_size
            if not whole or meta_size > META_LIMIT or end > size:
                break
            if parent != NONE and parent >= len(self.records):
                break
            meta = os.pread(self._fd, meta_size, at + _HEAD.size)
            if zlib.crc32(meta) != meta_crc:
                break
            start = at + _HEAD.size + meta_size
            self.records.append(Record(len(self.records), kind, parent, meta, start, data_size, data_crc))
            at = end
        self._end, self.lost_bytes = at, size - at

    @property
    def nbytes(self) -> int:
        """Bytes of header and whole records."""
        return self._end

    def append(self, new: Sequence[NewRecord], *, sync: bool = True) -> list[Record]:
        """Writes records at the end; with `sync` they are durable on return.

        Raises SequenceFileError when the disk refuses (full, quota, limit); then the file is as it was.
        """
        assert self.writable
        chunks: list[bytes | memoryview] = []
        added: list[Record] = []
        at, number = self._end, len(self.records)
        for record in new:
            assert len(record.meta) <= META_LIMIT and (record.parent == NONE or record.parent < number)
            size, crc = 0, 0
            for part in record.data:
                size += len(part)
                crc = zlib.crc32(part, crc)
            head = _HEAD.pack(
                _MAGIC, record.kind, record.parent, len(record.meta), size, zlib.crc32(record.meta), crc, 0
            )
            head = head[:-8] + struct.pack("<I4x", zlib.crc32(head[:-8]))
            chunks += [head, record.meta, *record.data]
            start = at + len(head) + len(record.meta)
            added.append(Record(number, record.kind, record.parent, record.meta, start, size, crc))
            at, number = start + size, number + 1
        self._write(chunks, sync=sync)
        self.records += added
        return added

    def _write(self, chunks: Sequence[bytes | memoryview], *, sync: bool = True) -> None:
        at = self._end
        try:
            if self.lost_bytes:  # the torn end of an earlier life
                os.ftruncate(self._fd, self._end)
                self.lost_bytes = 0
            for chunk in chunks:
                view = memoryview(chunk)
                while len(view):
                    done = os.pwrite(self._fd, view, at)
                    at += done
                    view = view[done:]
            if sync:
                os.fsync(self._fd)
        except OSError as error:
            try:
                os.ftruncate(self._fd, self._end)
            except OSError:  # it stays behind the end and is cut off by the next write or opening
                self.lost_bytes = 1
            raise SequenceFileError(
                f"{self.path} cannot be written: {error.strerror}; nothing of it was kept, memory holds all"
            ) from error
        self._end = at

    def sync(self) -> None:
        """Makes durable what was appended without. Raises SequenceFileError when the disk refuses."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise SequenceFileError(f"{self.path} cannot be written: {error.strerror}") from error

    def punch(self, records: Sequence[Record]) -> None:
        """Gives the blocks of these records' data back to the file system; nobody may read them any more. Where it
        cannot, they stay until the file is written anew, and the log says so once."""
        for record in records:
            begin = -(-record.at // BLOCK) * BLOCK
            length = (record.at + record.size) // BLOCK * BLOCK - begin
            self.records[record.number] = replace(record, meta=b"")
            if length > 0 and not self._punch(begin, length):
                return

    def _punch(self, start: int, length: int) -> bool:
        libc = ctypes.CDLL(None, use_errno=True)
        offset = ctypes.c_int64
        if not libc.fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, offset(start), offset(length)):
            return True
        code = ctypes.get_errno()
        if not self._told_no_holes:
            self._told_no_holes = True
            why = errno.errorcode.get(code, str(code))
            log.warning(
                "%s: the file system makes no holes (%s): it shrinks at the next start", self.path, why
            )
        return False

    def read(self, record: Record) -> NDArray[np.uint8]:
        """The data of a record, a view into the mapping that lasts as long as it is held.

        Raises SequenceFileError when it does not match its checksum, or the file has become shorter.
        """
        end = record.at + record.size
        if self._map is None or len(self._map) < end:
            if os.fstat(self._fd).st_size < end:
                raise SequenceFileError(f"{self.path} is shorter than its records: something truncated it")
            self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        elif os.fstat(self._fd).st_size < end:  # reading behind the end of a file would be a bus error
            raise SequenceFileError(f"{self.path} is shorter than its records: something truncated it")
        data = np.frombuffer(self._map, dtype=np.uint8, count=record.size, offset=record.at)
        if zlib.crc32(data.data) != record.crc:
            raise SequenceFileError(f"{self.path}: record {record.number} does not match its checksum")
        return data

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Closes the file. Views that were read stay valid. Idempotent."""
        if self._fd >= 0:
            if self.writable:
                # A view that somebody still holds keeps a twin of the descriptor, and so the lock.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1
        self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Syncer:
    """Makes a file's appends durable from a thread of its own, soon after `wake`. A disk that refuses is told."""

    def __init__(self, file: RecordFile) -> None:
        self._file = file
        self._event = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rorqual-sync", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        self._event.set()

    def _run(self) -> None:
        while not self._closing:
            self._event.wait()
            self._event.clear()
            try:
                self._file.sync()
            except SequenceFileError as error:
                log.warning("a cache file is not safe from a loss of power: %s", error)

    def close(self) -> None:
        """Syncs once more and ends. Idempotent."""
        self._closing = True
        self._event.set()
        self._thread.join()


def _file_head(fingerprint: bytes, page_bytes: int) -> bytes:
    raw = _FILE.pack(_FILE_MAGIC, VERSION, page_bytes, fingerprint, 0)
    return raw[:-4] + struct.pack("<I", zlib.crc32(raw[:-4]))
