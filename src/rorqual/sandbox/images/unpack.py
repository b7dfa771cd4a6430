"""Unpacks the layers of an untrusted image into one directory, whiteouts applied.

Nothing leaves the root: every parent is opened with openat2(RESOLVE_IN_ROOT), which resolves symlinks and
'..' as chroot would, in the kernel; the last component is never followed. Bounded: bytes, entries, header
size. Device nodes are skipped (a sandbox has its own /dev). Layer format: OCI image-spec, layer.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from rorqual.sandbox.errors import ImageRejected

_SYS_OPENAT2 = 437
_RESOLVE = 0x10 | 0x02
"""RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS"""
HEADER_BYTES = 1 << 20
"""Longest pax or GNU header that is read into memory."""
_CHUNK = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How much an image may be, unpacked."""

    max_bytes: int = 16 << 30
    max_entries: int = 1_000_000
    max_layers: int = 128


@dataclass(kw_only=True, slots=True)
class Tally:
    """What was unpacked so far, over all layers."""

    size_bytes: int = 0
    entries: int = 0
    skipped_devices: int = 0


class ForwardReader:
    """A forward-only seekable view of a stream, which counts and refuses absurd reads."""

    def __init__(self, raw: IO[bytes], *, source: str, limit: int) -> None:
        self._raw = raw
        self._source = source
        self._limit = limit
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > max(HEADER_BYTES, _CHUNK):
            raise ImageRejected(self._source, f"a header of {size} bytes (at most {HEADER_BYTES} are read)")
        parts = []
        while size:
            data = self._raw.read(size)
            if not data:
                break
            parts.append(data)
            size -= len(data)
            self._position += len(data)
            if self._position > self._limit:
                raise ImageRejected(self._source, f"unpacks to more than {self._limit} bytes")
        return b"".join(parts)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 0 or offset < self._position:
            raise ImageRejected(self._source, "the tar stream points backwards")
        while self._position < offset:
            if not self.read(min(_CHUNK, offset - self._position)):
                break
        return self._position


class Root:
    """A directory that paths cannot leave."""

    def __init__(self, path: str, *, source: str) -> None:
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._source = source

    def close(self) -> None:
        os.close(self.fd)

    def open_in(self, path: str, flags: int, mode: int = 0) -> int:
        how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE)
        result = _libc.syscall(_SYS_OPENAT2, self.fd, path.encode() or b".", how, ctypes.c_size_t(len(how)))
        if result < 0:
            errno = ctypes.get_errno()
            raise OSError(errno, os.strerror(errno), path)
        return int(result)

    @contextlib.contextmanager
    def parent(self, path: str) -> Iterator[tuple[int, str]]:
        """(descriptor of the directory that holds `path`, its last component); missing directories are
        made."""
        parts = self.parts(path)
        if not parts:
            raise ImageRejected(self._source, f"entry {path!r} names the root itself")
        here = ""
        for part in parts[:-1]:
            above, here = here, f"{here}/{part}" if here else part
            try:
                fd = self.open_in(here, os.O_PATH | os.O_DIRECTORY)
            except FileNotFoundError:
                parent = self.open_in(above, os.O_PATH | os.O_DIRECTORY)
                try:
                    os.mkdir(part, 0o755, dir_fd=parent)
                except FileExistsError as error:
                    raise ImageRejected(
                        self._source, f"entry {path!r} goes through a dangling link"
                    ) from error
                finally:
                    os.close(parent)
                continue
            except NotADirectoryError as error:
                raise ImageRejected(self._source, f"entry {path!r} goes through a file") from error
            except OSError as error:
                raise ImageRejected(self._source, f"entry {path!r}: {error.strerror}") from error
            os.close(fd)
        fd = self.open_in("/".join(parts[:-1]), os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield fd, parts[-1]
        finally:
            os.close(fd)

    def parts(self, path: str) -> list[str]:
        if "\0" in path or len(path) > 4096:
            raise ImageRejected(self._source, f"entry {path[:80]!r} is not a path")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ImageRejected(self._source, f"entry {path!r} leaves the image ('..')")
        return parts


def unpack_layer(stream: IO[bytes], root: Root, tally: Tally, *, source: str, bounds: Bounds) -> None:
    """Applies one layer (an uncompressed tar stream) to the root.

    Raises:
        ImageRejected: malformed, hostile or too large.
    """
    # A tar stream is larger than its files by at most two blocks an entry and its headers.
    limit = bounds.max_bytes - tally.size_bytes + (64 << 20) + 2048 * bounds.max_entries
    reader = ForwardReader(stream, source=source, limit=limit)
    fresh: set[str] = set()
    try:
        with tarfile.open(fileobj=cast(Any, reader), mode="r:", errorlevel=2) as archive:
            while (member := archive.next()) is not None:
                cast(Any, archive).members = []  # tarfile keeps every header otherwise
                tally.entries += 1
                if tally.entries > bounds.max_entries:
                    raise ImageRejected(source, f"more than {bounds.max_entries} entries")
                if member.isreg():
                    tally.size_bytes += member.size
                    if tally.size_bytes > bounds.max_bytes:
                        raise ImageRejected(source, f"unpacks to more than {bounds.max_bytes} bytes")
                _apply(archive, member, root, tally, fresh, source=source)
    except RecursionError as error:
        raise ImageRejected(source, "directories nested too deep to replace") from error
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        raise ImageRejected(source, f"not a sound tar stream: {error}") from error


def _apply(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    root: Root,
    tally: Tally,
    fresh: set[str],
    *,
    source: str,
) -> None:
    if not root.parts(member.name):
        return  # './' itself
    with root.parent(member.name) as (directory, name):
        if name == ".wh..wh..opq":
            for entry in os.listdir(directory):
                if f"{_key(directory)}/{entry}" not in fresh:
                    _remove(directory, entry)
            return
        if name.startswith(".wh."):
            hidden = name.removeprefix(".wh.")
            if hidden in ("", ".", ".."):
                raise ImageRejected(source, f"whiteout {member.name!r} names no file")
            _remove(directory, hidden)
            return
        fresh.add(f"{_key(directory)}/{name}")
        if member.isdir():
            _directory(directory, name)
        elif member.isreg():
            _remove(directory, name)
            _file(archive, member, directory, name, source=source)
        elif member.issym():
            _remove(directory, name)
            os.symlink(member.linkname, name, dir_fd=directory)
        elif member.islnk():
            _hard_link(member, root, directory, name, source=source)
            return  # owner and mode are the target's
        elif member.isfifo():
            _remove(directory, name)
            os.mkfifo(name, 0o600, dir_fd=directory)
        else:
            tally.skipped_devices += 1
            return
        _attributes(member, directory, name)


def _key(directory: int) -> str:
    """A name for a directory; its inode number is none, since an overlay may change that while it is written."""
    return os.readlink(f"/proc/self/fd/{directory}")


def _remove(directory: int, name: str) -> None:
    try:
        info = os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(info.st_mode):
        shutil.rmtree(name, dir_fd=directory)  # symlink-safe with dir_fd
    else:
        os.unlink(name, dir_fd=directory)


def _directory(directory: int, name: str) -> None:
    try:
        info = os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        os.mkdir(name, 0o755, dir_fd=directory)
        return
    if not stat.S_ISDIR(info.st_mode):
        os.unlink(name, dir_fd=directory)
        os.mkdir(name, 0o755, dir_fd=directory)


def _file(
    archive: tarfile.TarFile, member: tarfile.TarInfo, directory: int, name: str, *, source: str
) -> None:
    data = archive.extractfile(member)
    assert data is not None
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
        left = member.size
        while left:
            piece = data.read(min(left, _CHUNK))
            if not piece:
                raise ImageRejected(source, f"{member.name}: the archive ends in the middle of it")
            file.write(piece)
            left -= len(piece)


def _hard_link(member: tarfile.TarInfo, root: Root, directory: int, name: str, *, source: str) -> None:
    with root.parent(member.linkname) as (other, target):
        try:
            info = os.lstat(target, dir_fd=other)
        except FileNotFoundError as error:
            raise ImageRejected(
                source, f"{member.name}: hard link to {member.linkname!r}, which is not there"
            ) from error
        if stat.S_ISDIR(info.st_mode):
            raise ImageRejected(source, f"{member.name}: hard link to the directory {member.linkname!r}")
        current = None
        with contextlib.suppress(FileNotFoundError):
            current = os.lstat(name, dir_fd=directory)
        if current is not None and (current.st_dev, current.st_ino) == (info.st_dev, info.st_ino):
            return
        _remove(directory, name)
        os.link(target, name, src_dir_fd=other, dst_dir_fd=directory, follow_symlinks=False)


def _attributes(member: tarfile.TarInfo, directory: int, name: str) -> None:
    """Owner (as root only: others cannot give files away), mode, time. Never through a link."""
    if os.geteuid() == 0:
        ids = (
            (member.uid, member.gid)
            if 0 <= member.uid < 65536 and 0 <= member.gid < 65536
            else (65534, 65534)
        )
        os.chown(name, *ids, dir_fd=directory, follow_symlinks=False)
    if not member.issym():
        mode = (
            member.mode & 0o7777
            if os.geteuid() == 0
            else (member.mode & 0o777) | 0o600 | (0o100 * member.isdir())
        )
        os.chmod(name, mode, dir_fd=directory)
    moment = max(0.0, min(float(member.mtime), 2.0**33))
    os.utime(name, (moment, moment), dir_fd=directory, follow_symlinks=False)


_MODES = {"tmp": 0o1777, "root": 0o700}
FURNISH_VERSION = 3
"""Of what `furnish` adds: part of the layer's identity."""


def furnish(root: Root, *, user_id: int) -> None:
    """Adds what every sandbox needs: mount points, and the account `user` unless the image has one."""
    for path in ("proc", "sys", "dev", "tmp", "run", ".rorqual", "etc", "home", "home/user", "root"):
        with root.parent(path) as (directory, name), contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=directory)
            if path in _MODES:
                os.chmod(name, _MODES[path], dir_fd=directory)  # mkdir is subject to the umask
    for path, line in (
        ("etc/passwd", f"user:x:{user_id}:{user_id}:user:/home/user:/bin/sh\n"),
        ("etc/group", f"user:x:{user_id}:\n"),
    ):
        try:
            fd = root.open_in(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o644)
        except OSError:
            continue  # a directory or a dangling link: the image has no accounts, and only root runs in it
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            continue
        with os.fdopen(fd, "r+b") as file:
            head = "root:x:0:0:root:/root:/bin/sh\n" if path.endswith("passwd") else "root:x:0:\n"
            text = file.read(1 << 20)
            if not text:
                file.write(head.encode())
            if b"\nuser:" not in b"\n" + text:
                file.write(line.encode() if text.endswith(b"\n") or not text else b"\n" + line.encode())
