"""A remote layer's data on the local disk: which chunks exist, which are here, and whether they are what they must be.

<layers>/<id>.lazy/
    layer.json    where it comes from, and the sizes (images/pull.py writes it)
    meta.erofs    the image without the files' content, whole and checked
    table         the chunk table, checked
    data          the files' content, a sparse file that fills
    present       one byte a chunk, memory-mapped: what a killed process had written counts for the next one
    trace         the order in which chunks were first touched
    complete      exists once everything is here and on the disk
Chunk table, little-endian: b"RQCHUNK1", u32 chunk bytes, u32 count, u64 data bytes, then per chunk its SHA-256, u64
offset in the blob, u32 stored bytes. A chunk whose stored length is its length is stored as it is, a shorter one is
a zlib stream. Standard library only. Thread-safe; several processes may fill one layer, since a chunk has one value.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass

MAGIC = b"RQCHUNK1"
_HEADER = struct.Struct("<8sIIQ")
_ENTRY = struct.Struct("<32sQI")
CHUNK_BYTES = 256 << 10
MIN_CHUNK, MAX_CHUNK = 4 << 10, 4 << 20
_PRESENT_HEADER = 64
_ABSENT, _HERE, _UNSURE = 0, 1, 2
"""_UNSURE: written before the host's last boot; a power failure may have kept the mark and lost the data."""


class BadChunk(Exception):
    """What came is not what the table says. The text says how."""


@dataclass(frozen=True, slots=True)
class Table:
    """The chunks of one layer."""

    chunk_bytes: int
    data_bytes: int
    entries: bytes
    """Packed entries, as in the file."""

    @property
    def count(self) -> int:
        return len(self.entries) // _ENTRY.size

    def entry(self, index: int) -> tuple[bytes, int, int]:
        """(SHA-256, offset in the blob, stored bytes)."""
        digest, offset, stored = _ENTRY.unpack_from(self.entries, index * _ENTRY.size)
        return digest, offset, stored

    def length(self, index: int) -> int:
        """Bytes of a chunk, unpacked."""
        return min(self.chunk_bytes, self.data_bytes - index * self.chunk_bytes)

    def unpack(self, index: int, stored: bytes) -> bytes:
        """The chunk, checked against its hash. Raises BadChunk."""
        digest, _, size = self.entry(index)
        length = self.length(index)
        if len(stored) != size:
            raise BadChunk(f"chunk {index}: {len(stored)} bytes came, the table says {size}")
        data = stored
        if size != length:
            try:
                unpacker = zlib.decompressobj()
                data = unpacker.decompress(stored, length + 1)
            except zlib.error as error:
                raise BadChunk(f"chunk {index}: {error}") from error
        if len(data) != length or hashlib.sha256(data).digest() != digest:
            raise BadChunk(f"chunk {index}: its content has another hash than the table says")
        return data


def pack_table(entries: list[tuple[bytes, int, int]], *, chunk_bytes: int, data_bytes: int) -> bytes:
    """The file of a table."""
    body = b"".join(_ENTRY.pack(*entry) for entry in entries)
    return _HEADER.pack(MAGIC, chunk_bytes, len(entries), data_bytes) + body


def parse_table(data: bytes, *, blob_bytes: int) -> Table:
    """Reads a table. Raises ValueError, which says what in it cannot be.

    blob_bytes: size of the file that holds the stored chunks.
    """
    if len(data) < _HEADER.size:
        raise ValueError("the chunk table is cut short")
    magic, chunk_bytes, count, data_bytes = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it is no chunk table (or of a newer version)")
    if not MIN_CHUNK <= chunk_bytes <= MAX_CHUNK or chunk_bytes & (chunk_bytes - 1):
        raise ValueError(
            f"chunks of {chunk_bytes} bytes (a power of two from {MIN_CHUNK} to {MAX_CHUNK} is read)"
        )
    if count != -(-data_bytes // chunk_bytes) or len(data) != _HEADER.size + count * _ENTRY.size:
        raise ValueError(f"{count} chunks do not fit {data_bytes} bytes of data and a table of {len(data)}")
    table = Table(chunk_bytes, data_bytes, data[_HEADER.size :])
    for index in range(count):
        _, offset, stored = table.entry(index)
        if not 0 < stored <= table.length(index) or offset + stored > blob_bytes:
            raise ValueError(f"chunk {index} cannot be {stored} bytes at {offset} of {blob_bytes}")
    return table


class LayerCache:
    """An open `<id>.lazy` directory. Close it."""

    def __init__(self, directory: str) -> None:
        """Raises OSError or ValueError when the directory is not one."""
        self.directory = directory
        with open(f"{directory}/layer.json", encoding="utf-8") as file:
            self.record: dict[str, object] = json.load(file)
        with open(f"{directory}/table", "rb") as raw:
            self.table = parse_table(raw.read(), blob_bytes=_integer(self.record, "blob_bytes"))
        self.size_bytes = self.table.data_bytes
        self._data = os.open(f"{directory}/data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(self._data).st_size != self.size_bytes:
                os.ftruncate(self._data, self.size_bytes)
            self._present = self._map_present()
        except BaseException:
            os.close(self._data)
            raise

    def _map_present(self) -> mmap.mmap:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip().encode()
        length = _PRESENT_HEADER + self.table.count
        fd = os.open(f"{self.directory}/present", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_size != length:
                os.ftruncate(fd, 0)
                os.posix_fallocate(fd, 0, length)  # a full disk must be an error here, not a SIGBUS later
                os.pwrite(fd, boot, 0)
            present = mmap.mmap(fd, length)
            if bytes(present[: len(boot)]) != boot:
                marks = bytes(present[_PRESENT_HEADER:]).replace(bytes([_HERE]), bytes([_UNSURE]))
                present[_PRESENT_HEADER:] = marks
                present.flush()
                present[: len(boot)] = boot
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # mmap keeps a copy of the descriptor, and with it the lock
            os.close(fd)
        return present

    def close(self) -> None:
        self._present.close()
        os.close(self._data)

    def __enter__(self) -> LayerCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- chunks
    # ------------------------------------------------------------------------------------------------

    def here(self, index: int) -> bool:
        """Whether a chunk can be read from the local file."""
        mark = self._present[_PRESENT_HEADER + index]
        if mark == _UNSURE:
            digest, _, _ = self.table.entry(index)
            length = self.table.length(index)
            data = os.pread(self._data, length, index * self.table.chunk_bytes)
            mark = _HERE if hashlib.sha256(data).digest() == digest else _ABSENT
            self._present[_PRESENT_HEADER + index] = mark
        return mark == _HERE

    def count_here(self) -> int:
        """Chunks on the local disk."""
        marks = bytes(self._present[_PRESENT_HEADER:])
        return len(marks) - marks.count(bytes([_ABSENT]))

    def complete(self) -> bool:
        """Whether everything is here, so that the layer needs no loader any more."""
        return bytes(self._present[_PRESENT_HEADER:]).count(bytes([_HERE])) == self.table.count

    def store(self, index: int, data: bytes) -> bool:
        """Keeps a checked chunk. False when the disk is full: it stays usable, and will be fetched again."""
        at = index * self.table.chunk_bytes
        try:
            view = memoryview(data)
            while view:
                count = os.pwrite(self._data, view, at)
                view, at = view[count:], at + count
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return False
            raise
        self._present[_PRESENT_HEADER + index] = _HERE
        return True

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the local file; chunks that are not here read as zeros."""
        return os.pread(self._data, size, offset)

    def seal(self) -> None:
        """Brings data and marks to the disk, then says that the layer needs no loader any more."""
        os.fdatasync(self._data)
        self._present.flush()
        os.close(os.open(f"{self.directory}/complete", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))

    # -- trace
    # ------------------------------------------------------------------------------------------------

    def trace(self) -> list[int]:
        """Chunks in the order in which a first run touched them; [] when nobody has recorded it."""
        with contextlib.suppress(OSError), open(f"{self.directory}/trace", "rb") as file:
            return parse_trace(file.read(4 * self.table.count), count=self.table.count)
        return []


def parse_trace(data: bytes, *, count: int) -> list[int]:
    """A list of chunk numbers, as far as it is one: a trace is a hint, never an authority."""
    numbers = struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])
    return list(dict.fromkeys(number for number in numbers if number < count))


def pack_trace(numbers: list[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def _integer(record: dict[str, object], name: str) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"layer.json: {name} is {value!r}, not a number")
    return value
