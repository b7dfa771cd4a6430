"""Leases on snapshot layers: a shared file lock per user of a layer, which the kernel drops at any kind of death.

A layer's directory holds a file `lease`. Whoever runs a sandbox on it, or is about to, holds a shared lock; who wants
to remove it needs an exclusive one. A fork's layers (`.fork-*`) have no name and go with their last user.
"""

from __future__ import annotations

import fcntl
import os

from rorqual.sandbox.keeper.removal import remove_tree

FILE = "lease"
FORK_PREFIX = ".fork-"


def take(paths: list[str]) -> list[int]:
    """Descriptors that hold the leases. Raises OSError when a layer is gone, and then holds none."""
    fds: list[int] = []
    try:
        for path in paths:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            fcntl.flock(fds[-1], fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.stat(path)  # removed between the two steps: its lock would hold nothing
    except OSError:
        give(fds)
        raise
    return fds


def give(fds: list[int]) -> None:
    """Lets go. Idempotent."""
    while fds:
        os.close(fds.pop())


def is_fork(place: str) -> bool:
    return os.path.basename(place).startswith(FORK_PREFIX)


def remove_unused(place: str) -> bool:
    """Removes a layer's directory unless somebody holds a lease on it. True when it is gone."""
    try:
        fd = os.open(f"{place}/{FILE}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return not os.path.exists(place)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doomed = os.path.join(os.path.dirname(place), f".removing-{os.getpid()}-{os.path.basename(place)}")
        os.rename(place, doomed)
        return remove_tree(doomed)
    except OSError:  # in use, or gone meanwhile
        return not os.path.exists(place)
    finally:
        os.close(fd)
