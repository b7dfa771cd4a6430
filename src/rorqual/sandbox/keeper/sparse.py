"""Copies a file without its holes: memory and disks of machines, which are mostly holes."""

from __future__ import annotations

import errno
import os

_CHUNK = 1 << 24


def copy_sparse(reader: int, writer: int) -> int:
    """Copies a file's data, not its holes; returns the bytes copied. Raises OSError."""
    size = os.fstat(reader).st_size
    os.ftruncate(writer, size)
    at = copied = 0
    while at < size:
        try:
            start = os.lseek(reader, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                break
            raise
        end = os.lseek(reader, start, os.SEEK_HOLE)
        os.lseek(writer, start, os.SEEK_SET)
        offset = start
        while offset < end:
            sent = os.sendfile(writer, reader, offset, min(_CHUNK, end - offset))
            if not sent:
                raise OSError(errno.EIO, "the memory ended while it was copied")
            offset += sent
        copied += end - start
        at = end
    return copied
