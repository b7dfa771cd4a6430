"""The files of a jailed VMM: what lies in the chroot that its jailer enters, and what is lent to it later.

`prepare` runs in the child of keeper/machine.py, in its private mount namespace, before the jailer is started:
    order["chroot"] = {"root": path below the VMM's directory, "files": {name: {"path": host path}}, "user": uid}
A file is read-only; with "copy": name, it is a copy in the sandbox's directory, which the VMM writes.
`lend` and `take_back` run in the keeper while the VMM lives, each in a process of its own, since a change of mount
namespace is for good. The VMM owns its chroot and may be taken over: whatever it puts in the place of a name, a mount
onto it stays inside of its own root. Standard library only. Sources: setns(2), open_tree(2), move_mount(2).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from rorqual.sandbox.keeper import linux
from rorqual.sandbox.keeper.sparse import copy_sparse

LENT = "out"
"""Name of the directory on which `lend` puts another."""


def prepare(home: str, chroot: dict[str, Any]) -> None:
    """Makes `home` a mount where device nodes and programs work (a host's /run often forbids both), and the files
    appear. Raises OSError, naming the step."""
    linux.mount(home, home, flags=linux.MS_BIND)
    linux.mount("none", home, flags=linux.MS_REMOUNT | linux.MS_BIND | linux.MS_NOSUID)
    root = f"{home}/{chroot['root']}"
    os.makedirs(f"{root}/{LENT}", mode=0o700)
    for name, item in chroot["files"].items():
        if "/" in name or name in ("", ".", "..", LENT):
            raise ValueError(f"{name!r} is not a name that a file in a chroot may have")
        target = f"{root}/{name}"
        if "copy" in item:
            item = {"path": _copied(home, item, chroot["user"]), "write": True}
        if stat.S_ISDIR(os.stat(item["path"]).st_mode):
            os.mkdir(target, 0o755)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644))
        linux.bind(item["path"], target, readonly=not item.get("write"))


def _copied(home: str, item: dict[str, Any], user: int) -> str:
    """A copy of a file, without its holes, in the sandbox's directory, for the VMM to write."""
    target = f"{os.path.dirname(home)}/{item['copy']}"
    reader = os.open(item["path"], os.O_RDONLY | os.O_CLOEXEC)
    writer = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        copy_sparse(reader, writer)
        os.fchown(writer, user, user)
    finally:
        os.close(reader)
        os.close(writer)
    return target


def lend(pid: int, path: str) -> None:
    """Makes the directory `path` of the host appear as /out of the VMM. Raises OSError."""

    def put(namespace: int, tree: int) -> None:
        linux.setns(namespace, linux.CLONE_NEWNS)
        linux.attach(tree, f"/{LENT}", readonly=False)

    tree = linux.open_tree(path)
    try:
        _inside(pid, lambda namespace: put(namespace, tree))
    finally:
        os.close(tree)


def take_back(pid: int) -> None:
    """The VMM loses the directory, files it still has open excepted. Raises OSError."""

    def away(namespace: int) -> None:
        linux.setns(namespace, linux.CLONE_NEWNS)
        linux.umount(f"/{LENT}")

    _inside(pid, away)


def _inside(pid: int, work: Callable[[int], None]) -> None:
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(namespace)
                code = 0
            except BaseException as error:
                os.write(write, str(error).encode()[:500])
            finally:
                os._exit(code)
        os.close(write)
        write = -1
        _, status = os.waitpid(child, 0)
        if status:
            said = os.read(read, 500).decode("utf-8", "replace")
            raise OSError(f"in the mount namespace of its VMM: {said or 'the step died'}")
    finally:
        for fd in (namespace, read, *([write] if write >= 0 else [])):
            os.close(fd)
