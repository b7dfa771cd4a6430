"""A FUSE file system of one flat directory of read-only files: the data of remote layers, <id>.lazy each.

Speaks the kernel's protocol on /dev/fuse itself, since no library lets another process keep the connection while its
server dies and comes back (FUSE_NOTIFY_RESEND), and a thousand reads a millisecond are not needed here: the EROFS
mount above caches. Only the kernel writes to the connection; requests come from the EROFS mount alone. Standard
library only. Source: Linux include/uapi/linux/fuse.h (7.31 and newer).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rorqual.sandbox.loader.chunks import BadChunk
from rorqual.sandbox.loader.fetch import Fetcher
from rorqual.sandbox.loader.remote import RemoteError

NAME = re.compile(r"[0-9a-f]{64}\.lazy")
DEMAND_THREADS = 16
_BUFFER = 1 << 16
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_DAY_S = 86400
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _RELEASEDIR, _INTERRUPT, _DESTROY, _BATCH_FORGET = 25, 26, 27, 29, 36, 38, 42
_NOTIFY_RESEND = 7
_ASYNC_READ, _PARALLEL_DIROPS, _MAX_PAGES, _INIT_EXT = 1 << 0, 1 << 18, 1 << 22, 1 << 30
_ASYNC_DIO = 1 << 15
_HAS_RESEND = 1 << 7
"""Of the second word of flags."""
_OPEN_DIRECT = 1
"""Not through the page cache: the EROFS mount above keeps what it reads."""
_ROOT = 1


def node_of(name: str) -> int:
    """The inode number of a layer's file: a function of its name, so that a new server knows what an old one gave."""
    return int(name[:15], 16) + 2


def handshake(fd: int) -> bool:
    """Answers the kernel's first request. True when it can send requests again that a dead server had taken."""
    request = os.read(fd, _BUFFER)
    _, opcode, unique, *_ = _IN.unpack_from(request)
    if opcode != _INIT:
        raise OSError(errno.EPROTO, f"FUSE request {opcode} came before INIT")
    major, minor, readahead, flags = struct.unpack_from("<IIII", request, _IN.size)
    more = struct.unpack_from("<I", request, _IN.size + 16)[0] if flags & _INIT_EXT else 0
    ours = flags & (_ASYNC_READ | _PARALLEL_DIROPS | _MAX_PAGES | _INIT_EXT | _ASYNC_DIO)
    body = struct.pack(
        "<IIIIHHIIHHII24x", 7, min(minor, 31), readahead, ours, 64, 48, 4096, 1, 256, 0, more & _HAS_RESEND, 0
    )
    if major != 7:
        raise OSError(errno.EPROTO, f"FUSE protocol {major}.{minor} is not spoken here")
    os.write(fd, _OUT.pack(_OUT.size + len(body), 0, unique) + body)
    return bool(more & _HAS_RESEND)


def resend(fd: int) -> None:
    """Asks the kernel to send again what a dead server had read and not answered. Raises OSError on old kernels."""
    os.write(fd, _OUT.pack(_OUT.size, _NOTIFY_RESEND, 0))


class Server:
    """Serves one connection until it ends."""

    def __init__(self, fd: int, layers: str, *, report: Callable[..., None]) -> None:
        """layers: the directory that holds <id>.lazy/."""
        self._fd = fd
        self._layers = layers
        self._report = report
        self._files: dict[int, Fetcher] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(DEMAND_THREADS, thread_name_prefix="rorqual-demand")

    def run(self) -> None:
        threading.Thread(target=self._settle, name="rorqual-settle", daemon=True).start()
        while True:
            try:
                request = os.read(self._fd, _BUFFER)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):  # ENOENT: it was interrupted
                    continue
                if error.errno == errno.ENODEV:  # unmounted
                    return
                raise
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            try:
                self._handle(opcode, unique, node, request)
            except Exception as error:
                self._report("loader", detail=f"request {opcode}: {error!r}")
                self._fail(unique, errno.EIO)

    def _settle(self) -> None:
        while True:
            time.sleep(0.5)
            with self._lock:
                files = list(self._files.values())
            for file in files:
                with contextlib.suppress(OSError):
                    file.settle()

    def _handle(self, opcode: int, unique: int, node: int, request: bytes) -> None:
        if opcode == _READ:
            _, offset, size = struct.unpack_from("<QQI", request, _IN.size)
            self._read(unique, node, offset, size)
        elif opcode == _LOOKUP:
            name = request[_IN.size :].rstrip(b"\0").decode("ascii", "replace")
            file = self._open(name) if NAME.fullmatch(name) else None
            if file is None:
                self._fail(unique, errno.ENOENT)
            else:
                times = struct.pack("<QQQQII", node_of(name), 0, _DAY_S, _DAY_S, 0, 0)
                self._answer(unique, times + _attributes(node_of(name), file.cache.size_bytes))
        elif opcode == _GETATTR:
            size = 0 if node == _ROOT else self._file(node).cache.size_bytes
            self._answer(unique, struct.pack("<QII", _DAY_S, 0, 0) + _attributes(node, size))
        elif opcode == _OPEN:
            self._open(self._file(node).name + ".lazy")
            self._answer(unique, struct.pack("<QII", 0, _OPEN_DIRECT, 0))
        elif opcode == _STATFS:
            self._answer(unique, struct.pack("<QQQQQIII", 0, 0, 0, 0, 0, 4096, 255, 4096) + bytes(28))
        elif opcode in (_RELEASE, _FLUSH, _OPENDIR, _RELEASEDIR):
            self._answer(unique, struct.pack("<QII", 0, 0, 0) if opcode == _OPENDIR else b"")
        elif opcode not in (_FORGET, _BATCH_FORGET, _INTERRUPT, _DESTROY):
            self._fail(unique, errno.ENOSYS)

    def _read(self, unique: int, node: int, offset: int, size: int) -> None:
        file = self._file(node)
        size = max(0, min(size, file.cache.size_bytes - offset))
        data = file.ready(offset, size) if size else b""
        if data is not None:
            self._answer(unique, data)
        else:
            self._pool.submit(self._fetch, unique, file, offset, size)

    def _fetch(self, unique: int, file: Fetcher, offset: int, size: int) -> None:
        try:
            data = file.read(offset, size)
        except (RemoteError, BadChunk):  # reported where it happened
            self._fail(unique, errno.EIO)
        except Exception as error:
            self._report("loader", layer=file.name, detail=repr(error))
            self._fail(unique, errno.EIO)
        else:
            self._answer(unique, data)

    def _file(self, node: int) -> Fetcher:
        file = self._files.get(node)
        if file is None:  # the server that had it is dead
            for name in os.listdir(self._layers):
                if NAME.fullmatch(name) and node_of(name) == node:
                    file = self._open(name)
        if file is None:
            raise OSError(errno.ESTALE, "its directory is gone")
        return file

    def _open(self, name: str) -> Fetcher | None:
        with self._lock:
            old = self._files.get(node_of(name))
            if old is not None and old.current():
                return old
            try:  # an old one of a layer that was removed and came back stays open: reads of it may be under way
                file = Fetcher(f"{self._layers}/{name}", report=self._report)
            except (OSError, ValueError, KeyError) as error:
                self._report("loader", layer=name, detail=f"cannot be opened: {error}")
                return None
            self._files[node_of(name)] = file
        order = file.cache.trace() if file.cache.record.get("prefetch", True) else []
        if order and not file.cache.complete():
            file.prefetch(order)
        return file

    def _answer(self, unique: int, body: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):  # the asker was killed
            os.writev(self._fd, (_OUT.pack(_OUT.size + len(body), 0, unique), body))

    def _fail(self, unique: int, number: int) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fd, _OUT.pack(_OUT.size, -number, unique))


def _attributes(node: int, size: int) -> bytes:
    mode, links = (0o40500, 2) if node == _ROOT else (0o100400, 1)
    return _ATTR.pack(node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)
