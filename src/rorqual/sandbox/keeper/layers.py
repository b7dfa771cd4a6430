"""Copies what a sandbox has written, the upper directories of its overlays, as layers for later sandboxes.

The content is hostile: every step goes by directory descriptor and never through a link, a special file is never
opened, and entries, bytes and depth are bounded. Kept: names, types, owners (the host ids of the sandbox's user
namespace, so that nothing in the store belongs to an account of the host), modes with setuid, times to the nanosecond,
hard links, holes, `user.*` attributes, ACLs, file capabilities, whiteouts and opaque marks of the overlay. Refused:
device nodes (a sandbox cannot make them), overlay marks that a layer cannot carry (redirect, metacopy).
Standard library only; runs in a forked child of the keeper.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

MAX_DEPTH = 512
_OPAQUE = "trusted.overlay.opaque"
_OVERLAY_PRIVATE = {f"trusted.overlay.{name}" for name in ("origin", "impure", "nlink", "upper", "uuid")}
_COPIED = ("user.", "system.posix_acl_")
_CHUNK = 8 << 20


class LayerRefused(Exception):
    """What was written cannot, or must not, become a layer. The text names the path inside and the reason."""


@dataclass(kw_only=True)
class Budget:
    """How much may still be copied."""

    max_bytes: int
    max_entries: int
    size_bytes: int = 0
    entries: int = 0

    def entry(self) -> None:
        self.entries += 1
        if self.entries > self.max_entries:
            raise LayerRefused(f"more than {self.max_entries} files and directories were written")

    def data(self, count: int) -> None:
        self.size_bytes += count
        if self.size_bytes > self.max_bytes:
            raise LayerRefused(f"more than {self.max_bytes} bytes were written")


@dataclass(kw_only=True)
class _Level:
    source: int
    target: int
    name: str
    names: Iterator[os.DirEntry[str]]


def copy_tree(source: int, target: int, *, budget: Budget) -> None:
    """Copies the content and the attributes of directory `source` into the empty directory `target` (descriptors).

    Raises:
        LayerRefused: a bound or a rule; OSError with the path inside as its text's end.
    """
    links: dict[tuple[int, int], str] = {}
    top = os.dup(target)
    levels = [_Level(source=os.dup(source), target=os.dup(target), name="", names=os.scandir(source))]
    try:
        while levels:
            level = levels[-1]
            entry = next(level.names, None)
            if entry is None:
                _attributes(level.source, level.target, budget)
                levels.pop()
                os.close(level.source)
                os.close(level.target)
                continue
            name = entry.name
            budget.entry()
            try:
                below = _copy_entry(level, name, budget=budget, links=links, top=top, levels=levels)
            except OSError as error:
                where = "/".join([*(each.name for each in levels[1:]), name])[-200:]
                raise OSError(error.errno, f"{error.strerror}: /{where!s}") from error
            if below is not None:
                levels.append(below)
                if len(levels) > MAX_DEPTH:
                    raise LayerRefused(f"directories are nested deeper than {MAX_DEPTH}")
    finally:
        os.close(top)
        for level in levels:
            os.close(level.source)
            os.close(level.target)


def _copy_entry(
    level: _Level,
    name: str,
    *,
    budget: Budget,
    links: dict[tuple[int, int], str],
    top: int,
    levels: list[_Level],
) -> _Level | None:
    """Returns the level to descend into when the entry is a directory."""
    status = os.stat(name, dir_fd=level.source, follow_symlinks=False)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        os.mkdir(name, 0o700, dir_fd=level.target)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        source = os.open(name, flags, dir_fd=level.source)
        try:
            target = os.open(name, flags, dir_fd=level.target)
        except BaseException:
            os.close(source)
            raise
        return _Level(source=source, target=target, name=name, names=os.scandir(source))
    identity = (status.st_dev, status.st_ino)
    if status.st_nlink > 1 and identity in links:
        os.link(links[identity], name, src_dir_fd=top, dst_dir_fd=level.target, follow_symlinks=False)
        return None
    if kind == stat.S_IFREG:
        _copy_file(level, name, budget)
    elif kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=level.source), name, dir_fd=level.target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=level.target, follow_symlinks=False)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=level.target, follow_symlinks=False)
    elif kind == stat.S_IFCHR and status.st_rdev == 0:  # a whiteout: the overlay's mark of a removed file
        os.mknod(name, stat.S_IFCHR | 0o600, 0, dir_fd=level.target)
    elif kind in (stat.S_IFIFO, stat.S_IFSOCK):
        os.mknod(name, kind | 0o600, dir_fd=level.target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=level.target, follow_symlinks=False)
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=level.target)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=level.target, follow_symlinks=False)
    else:
        raise LayerRefused(f"a device node at {name!r}")
    # A whiteout may be one inode with many names; each is made anew.
    if status.st_nlink > 1 and kind != stat.S_IFCHR:
        links[identity] = "/".join([*(each.name for each in levels[1:]), name])
    return None


def _copy_file(level: _Level, name: str, budget: Budget) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    source = os.open(name, flags, dir_fd=level.source)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(name, flags, 0o600, dir_fd=level.target)
        try:
            _copy_data(source, target, budget)
            _attributes(source, target, budget)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_data(source: int, target: int, budget: Budget) -> None:
    """Data without its holes: a file of a terabyte that was never written costs nothing."""
    size = os.fstat(source).st_size
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # ENXIO: holes only from here on
            break
        end = os.lseek(source, at, os.SEEK_HOLE)
        budget.data(end - at)
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            count = os.sendfile(target, source, at, min(_CHUNK, end - at))
            if count == 0:
                raise LayerRefused("a file shrank while it was copied: the sandbox was not frozen")
            at += count
    os.ftruncate(target, size)


def _attributes(source: int, target: int, budget: Budget) -> None:
    """Owner, then mode (a change of owner clears setuid), then the rest; times last."""
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if name in _OVERLAY_PRIVATE:
            continue
        if name.startswith("trusted.") and name != _OPAQUE:
            raise LayerRefused(f"the overlay mark {name} cannot be carried by a layer")
        if name == _OPAQUE or name == "security.capability" or name.startswith(_COPIED):
            value = os.getxattr(source, name)
            budget.data(len(value))
            os.setxattr(target, name, value)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_uppers(disk: int, destination: str, targets: list[str], *, budget: Budget) -> list[list[str]]:
    """Copies upper<i> of the disk directory `disk` to <destination>/<i>; returns [target, '<i>'] of those not empty."""
    made = []
    for index, target in enumerate(targets):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        source = os.open(f"upper{index}", flags, dir_fd=disk)
        try:
            if not os.listdir(source):
                continue
            place = f"{destination}/{index}"
            os.mkdir(place, 0o700)
            copy = os.open(place, flags)
            try:
                copy_tree(source, copy, budget=budget)
            finally:
                os.close(copy)
            made.append([target, str(index)])
        finally:
            os.close(source)
    return made


def flush(directory: str) -> None:
    """Writes the file system of `directory` to its disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            errno = ctypes.get_errno()
            raise OSError(errno, f"syncfs {directory}: {os.strerror(errno)}")
    finally:
        os.close(fd)
