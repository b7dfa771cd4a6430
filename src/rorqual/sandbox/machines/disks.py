"""Disk images of full machines: what an image file is, and the overlay that takes a machine's writes.

An image file is not trusted. Its format is told from its own first bytes and passed on by name, never guessed by
QEMU; only raw, qcow2 and ISO 9660 are taken. A qcow2 file may name other files (a backing file, a data file) that
QEMU would open with our rights: such an image is refused before any QEMU program has seen it. Header fields of qcow2:
docs/interop/qcow2.txt of QEMU.
Owns checks and overlays. Never writes to an image.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rorqual.sandbox.errors import HostUnfit, ImageRejected, SandboxError
from rorqual.sandbox.host import find_program

DiskFormat = Literal["raw", "qcow2", "iso"]
MAX_VIRTUAL = 16 << 40
"""Largest disk a machine gets, in bytes."""
_HEADER = 1 << 20
_QCOW2 = b"QFI\xfb"
_ISO_AT, _ISO = 0x8001, b"CD001"
_DIRTY, _CORRUPT, _DATA_FILE = 1, 2, 4
_BACKING_FORMAT, _DATA_FILE_NAME = 0xE2792ACA, 0x44415441
_CHECK_S = 120.0
# Formats that can name other files, or that are somebody's mistake: a raw disk does not begin like this.
_FOREIGN = (
    (b"KDMV", "VMDK"),
    (b"COWD", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VHD"),
    (b"QED\0", "QED"),
    (b"LUKS\xba\xbe", "LUKS"),
    (b"<<< ", "VDI"),
    (b"WithoutFreeSpace", "Parallels"),
    (b"WithouFreSpacExt", "Parallels"),
    (b"Bochs Virtual HD Image", "Bochs"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "zip"),
    (b"BZh", "bzip2"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """An image file that was looked at."""

    path: Path
    """Absolute, without links."""
    format: DiskFormat
    virtual_bytes: int
    """What the machine sees."""
    file_bytes: int


def inspect(path: Path, *, deep: bool = True) -> Disk:
    """What this file is. deep: also has `qemu-img check` follow every cluster of a qcow2.

    Raises:
        ImageRejected: not a disk image we take, names other files, is cut off or corrupt.
        HostUnfit: no qemu-img.
    """
    try:
        real = path.resolve(strict=True)
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise ImageRejected(str(path), f"cannot be opened: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ImageRejected(str(path), "is not a regular file; copy the device or directory into one")
        head = os.pread(fd, _HEADER, 0)
        size = info.st_size
    finally:
        os.close(fd)
    if head.startswith(_QCOW2):
        virtual = _qcow2(head, size, source=str(path))
        if deep:
            _check(real, size, cluster=1 << struct.unpack_from(">I", head, 20)[0], source=str(path))
        return Disk(path=real, format="qcow2", virtual_bytes=virtual, file_bytes=size)
    for magic, foreign in _FOREIGN:
        if head.startswith(magic):
            packed = foreign in ("gzip", "xz", "zstd", "zip", "bzip2")
            how = "unpack it first" if packed else "convert it first (qemu-img convert -O qcow2)"
            raise ImageRejected(str(path), f"is a {foreign} file; raw, qcow2 and ISO 9660 are taken: {how}")
    if size < 512:
        raise ImageRejected(str(path), f"has {size} bytes, too few for a disk")
    kind: DiskFormat = "iso" if head[_ISO_AT : _ISO_AT + 5] == _ISO else "raw"
    if size > MAX_VIRTUAL:
        raise ImageRejected(str(path), f"has {size} bytes, more than {MAX_VIRTUAL}")
    return Disk(path=real, format=kind, virtual_bytes=size, file_bytes=size)


def overlay(base: Disk, target: Path, *, size_bytes: int = 0) -> None:
    """A qcow2 at `target` on top of `base`, which is never written. size_bytes: what the machine sees, when larger.

    Raises:
        SandboxError: qemu-img failed.
        HostUnfit: no qemu-img.
    """
    size = max(size_bytes, base.virtual_bytes)
    backing = {"raw": "raw", "qcow2": "qcow2", "iso": "raw"}[base.format]
    options = ["-o", "lazy_refcounts=off,cluster_size=65536"]
    # A file name is taken literally only after 'file:'; a path like 'nbd:...' never gets here, it is absolute.
    command = ["create", "-q", "-f", "qcow2", *options, "-F", backing, "-b", str(base.path)]
    _run([*command, str(target), str(size)], source=str(target))


def _qcow2(head: bytes, size: int, *, source: str) -> int:
    """Its virtual size. Every field that makes QEMU open something else refuses the image."""
    if len(head) < 72:
        raise ImageRejected(source, f"a qcow2 header has at least 72 bytes, and this file has {len(head)}")
    version, backing_at, backing_size, cluster_bits, virtual, crypt, l1_size, l1_at, table_at, table_clusters = (
        struct.unpack_from(">IQIIQIIQQI", head, 4)
    )  # fmt: skip
    if version not in (2, 3):
        raise ImageRejected(source, f"is qcow version {version}; 2 and 3 are taken")
    if backing_at or backing_size:
        name = head[backing_at : backing_at + min(backing_size, 1023)].decode("utf-8", "replace")
        raise ImageRejected(
            source,
            f"names a backing file ({name[:200]!r}), which would be read with your rights; make it stand alone: "
            "qemu-img convert -O qcow2",
        )
    if crypt:
        raise ImageRejected(source, "is encrypted; decrypt it with qemu-img convert")
    if not 9 <= cluster_bits <= 21:
        raise ImageRejected(source, f"has clusters of 2^{cluster_bits} bytes; 9 to 21 are taken")
    length = 72
    if version == 3:
        if len(head) < 104:
            raise ImageRejected(
                source, f"a qcow2 v3 header has at least 104 bytes; this file has {len(head)}"
            )
        incompatible = struct.unpack_from(">Q", head, 72)[0]
        length = struct.unpack_from(">I", head, 100)[0]
        if incompatible & _DATA_FILE:
            raise ImageRejected(
                source, "keeps its data in another file; make it stand alone: qemu-img convert"
            )
        if incompatible & _CORRUPT:
            raise ImageRejected(source, "is marked corrupt; try a copy of it with qemu-img check -r all")
        if not 104 <= length <= min(1 << cluster_bits, len(head)):
            raise ImageRejected(source, f"says that its header has {length} bytes")
    _extensions(head, length, 1 << cluster_bits, source=source)
    if virtual > MAX_VIRTUAL:
        raise ImageRejected(source, f"is a disk of {virtual} bytes, more than {MAX_VIRTUAL}")
    ends = {"L1 table": l1_at + 8 * l1_size, "refcount table": table_at + (table_clusters << cluster_bits)}
    for name, end in ends.items():
        if end > size:
            raise ImageRejected(source, f"is cut off: its {name} ends at byte {end} of {size}")
    return int(virtual)


def _extensions(head: bytes, at: int, end: int, *, source: str) -> None:
    end = min(end, len(head))
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            return
        if kind in (_BACKING_FORMAT, _DATA_FILE_NAME):
            raise ImageRejected(
                source, "its header names another file; make it stand alone: qemu-img convert"
            )
        at += 8 + (length + 7) // 8 * 8
    # No end mark: version 2 headers may stop at the cluster's end.


def _check(path: Path, size: int, *, cluster: int, source: str) -> None:
    words = _run(["check", "-U", "-f", "qcow2", "--output=json", str(path)], source=source, codes=(0, 2, 3))
    try:
        report: dict[str, Any] = json.loads(words)
        errors = int(report.get("corruptions", 0)) + int(report.get("check-errors", 0))
        end = int(report.get("image-end-offset", 0))
    except (ValueError, TypeError, AttributeError) as error:
        raise ImageRejected(source, f"qemu-img check gave no report: {words[:200]!r}") from error
    if end > -(-size // cluster) * cluster:  # the last cluster of a table need not be there to its end
        raise ImageRejected(source, f"is cut off: clusters are in use up to byte {end} of {size}")
    if errors:
        raise ImageRejected(source, f"is corrupt: qemu-img check finds {errors} errors")


def _run(args: list[str], *, source: str, codes: tuple[int, ...] = (0,)) -> str:
    """qemu-img on bytes that are not trusted: bounded memory, CPU time, and its own words in the error."""
    program, limit = find_program("qemu-img"), find_program("prlimit")
    if program is None:
        raise HostUnfit("qemu-img is not installed.", fix="apt-get install qemu-utils")
    bound = [limit, f"--as={4 << 30}", f"--cpu={int(_CHECK_S)}", "--core=0"] if limit else []
    try:
        done = subprocess.run(
            [*bound, program, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            timeout=_CHECK_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageRejected(source, f"qemu-img {args[0]} was not done in {_CHECK_S:g} s") from error
    if done.returncode not in codes:
        words = (done.stderr or done.stdout).strip().splitlines()
        what = words[-1][:300] if words else f"exit status {done.returncode}"
        if args[0] == "check":
            raise ImageRejected(source, f"qemu-img check: {what}")
        raise SandboxError(f"{source}: qemu-img {args[0]} failed: {what}")
    return done.stdout
