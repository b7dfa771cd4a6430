"""The kernel calls that Python 3.11 does not wrap: mount, unshare, idmapped mounts, prctl.

Thin ctypes wrappers that raise OSError with the step's name. Used by the launcher child only, after its fork.
Sources: mount(2), unshare(2), mount_setattr(2), open_tree(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
_SYS_OPEN_TREE = 428  # the same number on every architecture: added after the tables were unified
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_IDMAP = 0x00100000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, step: str) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{step}: {os.strerror(errno)}")
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(namespace: int, kind: int) -> None:
    """Enters the namespace of the open descriptor; `kind` is its CLONE_ flag."""
    _check(_libc.setns(ctypes.c_int(namespace), ctypes.c_int(kind)), "setns")


def prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def mount(source: str, target: str, *, fstype: str = "", flags: int = 0, data: str = "") -> None:
    result = _libc.mount(
        source.encode(),
        target.encode(),
        fstype.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _check(result, f"mount {fstype or 'bind'} {source} at {target}")


def umount(target: str, *, flags: int = MNT_DETACH) -> None:
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def open_tree(path: str) -> int:
    """A detached copy of the mount at `path`, as a descriptor for `attach`, in this process or another."""
    return _check(
        _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC),
        f"open_tree {path}",
    )


def attach(tree: int, target: str, *, readonly: bool, idmap_fd: int | None = None) -> None:
    """Puts a detached mount at `target`, with ids shifted by the user namespace `idmap_fd` when given."""
    flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if readonly else 0)
    if idmap_fd is not None:
        # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
        attr = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, idmap_fd)
        _check(
            _libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attr, ctypes.c_size_t(len(attr))),
            f"idmapped mount at {target}",
        )
    _check(
        _libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH),
        f"move_mount at {target}",
    )
    mount("none", target, flags=MS_REMOUNT | MS_BIND | flags)


def bind(source: str, target: str, *, readonly: bool, idmap_fd: int | None = None) -> None:
    """Bind-mounts `source` at `target`, with ids shifted by the user namespace `idmap_fd` when given."""
    if idmap_fd is None:
        flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if readonly else 0)
        mount(source, target, flags=MS_BIND)
        mount("none", target, flags=MS_REMOUNT | MS_BIND | flags)
        return
    tree = open_tree(source)
    try:
        attach(tree, target, readonly=readonly, idmap_fd=idmap_fd)
    finally:
        os.close(tree)


def below(root: str, inside: str) -> str | None:
    """The directory `inside` below `root`; None when it is not there or a link leads to it.

    For trees that nobody writes: each step is looked at by its name.
    """
    here = root
    for part in inside.split("/"):
        if part in ("", "."):
            continue
        here = f"{here}/{part}"
        if part == ".." or not os.path.isdir(here) or os.path.islink(here):
            return None
    return here


def user_namespace(uid_map: str, gid_map: str) -> int:
    """Returns a file descriptor of a new user namespace with these maps. Needs root."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            unshare(CLONE_NEWUSER)
            os.write(ready[1], b"1")
            os.close(go[1])
            os.read(go[0], 1)
        finally:
            os._exit(0)
    os.close(ready[1])
    os.close(go[0])
    try:
        if not os.read(ready[0], 1):
            raise OSError(1, "this kernel refuses new user namespaces")
        for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(text)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready[0])
        os.close(go[1])
        os.waitpid(pid, 0)
