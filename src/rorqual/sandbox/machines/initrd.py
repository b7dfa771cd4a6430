"""The initial file system of a machine: the guest agent as /init, and the kernel's modules in the order they load.

A cpio archive in the newc format (Documentation/driver-api/early-userspace/buffer-format.rst), not compressed: it is
2 MB, and an emulated CPU would take longer to unpack it than the host to read it. Kept in the cache by its content's
hash: guests/initrd-<16 hex digits>.cpio. native/guest/boot.c is what runs first.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from rorqual.sandbox.machines.kernel import Kernel
from rorqual.sandbox.state import cache_dir

_DIRECTORY, _FILE = 0o040755, 0o100755
_SIGNED = b"~Module signature appended~\n"


def initrd(kernel: Kernel, agent: Path, modules: Sequence[str], *, cache: Path | None = None) -> Path:
    """The file, made when missing. Raises HostUnfit when the kernel lacks a module, OSError."""
    files = [("init", agent.read_bytes())]
    for number, path in enumerate(kernel.closure(modules)):
        files.append((f"modules/{number:02}-{path.name}", unsigned(path.read_bytes())))
    data = newc(files)
    place = (cache or cache_dir()) / "guests"
    place.mkdir(parents=True, exist_ok=True)
    target = place / f"initrd-{hashlib.sha256(data).hexdigest()[:16]}.cpio"
    if not target.is_file():
        fd, temporary = tempfile.mkstemp(prefix=".building-", dir=place)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o644)
            os.rename(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    return target


def unsigned(module: bytes) -> bytes:
    """A module without its appended signature, whose check takes an emulated CPU 10 ms; this kernel does not insist.

    Layout (include/linux/module_signature.h): module, signature, 12 bytes whose last 4 are the signature's length (big
    endian), magic.
    """
    if not module.endswith(_SIGNED) or len(module) < len(_SIGNED) + 12:
        return module
    end = len(module) - len(_SIGNED) - 12
    (length,) = struct.unpack_from(">I", module, end + 8)
    return module[: end - length] if length <= end else module


def newc(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A cpio archive of these files, executable, with their directories, all of them root's and of time 0."""
    out = bytearray()
    made: set[str] = set()
    number = 1

    def entry(name: str, mode: int, data: bytes) -> None:
        nonlocal number
        raw = name.encode() + b"\0"
        links = 2 if mode == _DIRECTORY else 1
        fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        out.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
        out.extend(bytes(-len(out) % 4))
        out.extend(data)
        out.extend(bytes(-len(out) % 4))
        number += 1

    for name, data in files:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            directory = "/".join(parts[:depth])
            if directory not in made:
                made.add(directory)
                entry(directory, _DIRECTORY, b"")
        entry(name, _FILE, data)
    entry("TRAILER!!!", 0, b"")
    out.extend(bytes(-len(out) % 512))
    return bytes(out)
