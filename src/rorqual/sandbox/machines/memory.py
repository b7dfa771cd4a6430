"""The memory of a machine as a file: taken out of its VMM, kept in a snapshot, shared by the children of a fork.

A VMM's memory is a memfd (keeper/machine.py), so it is read through /proc/<pid>/fd while the machine is stopped; only
what the guest has touched is copied. A snapshot that is kept has RAM, a sparse file; for a fork it is a sealed memfd of
this process, which children map privately and nobody can write.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import SandboxError
from rorqual.sandbox.keeper.sparse import copy_sparse

RAM, STATE, DISK = "ram", "state", "disk"
"""Files of a snapshot."""
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_held: dict[str, int] = {}
"""Path of a fork's directory -> its memfd."""


def shared_ram(pid: int) -> str:
    """The path of the VMM's memory where it is a memfd of its own; '' where it runs on a fork's private mapping."""
    place = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(place):
            if not os.readlink(f"{place}/{name}").startswith("/memfd:rorqual-ram"):
                continue
            fd = os.open(f"{place}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
            finally:
                os.close(fd)
            return "" if sealed else f"{place}/{name}"
    except OSError as error:
        raise SandboxError(f"the memory of the VMM {pid} cannot be read: {error}") from error
    return ""


async def take_ram(source: str, target: Path, *, durable: bool) -> dict[str, Any]:
    """Copies a stopped machine's memory to `target`/ram, or holds it as a memfd for a fork. Raises OSError."""
    return await asyncio.to_thread(_take, source, target, durable)


def _take(source: str, target: Path, durable: bool) -> dict[str, Any]:
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if durable:
            writer = os.open(target / RAM, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        else:
            writer = os.memfd_create("rorqual-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            copied = copy_sparse(reader, writer)
            if durable:
                os.fsync(writer)
                return {"ram_bytes": copied}
            fcntl.fcntl(writer, fcntl.F_ADD_SEALS, _SEALS)
            _held[str(target)] = writer
            path, writer = f"/proc/{os.getpid()}/fd/{writer}", -1
            return {"ram_bytes": copied, "ram": path}
        finally:
            if writer >= 0:
                os.close(writer)
    finally:
        os.close(reader)


def let_go(place: Path) -> None:
    """Closes a fork's memfd: its children have their mappings. Idempotent."""
    fd = _held.pop(str(place), -1)
    if fd >= 0:
        os.close(fd)


def moved(old: Path, new: Path) -> None:
    """The fork's directory has its final name."""
    if str(old) in _held:
        _held[str(new)] = _held.pop(str(old))


def copy_disk(source: Path, target: Path, *, durable: bool) -> None:
    """A stopped machine's disk, without its holes. Raises OSError."""
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copy_sparse(reader, writer)
            if durable:
                os.fsync(writer)
        finally:
            os.close(writer)
    finally:
        os.close(reader)
