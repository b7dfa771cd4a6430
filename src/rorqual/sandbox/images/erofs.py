"""Makes EROFS images of directories: the form in which a layer is kept, mounted and sent.

One directory, one file, named by its SHA-256: <state>/layers/<64 hex digits>.erofs. The same tree makes the same
bytes (names, owners, modes, times to the nanosecond, hard links, extended attributes, the overlay's whiteouts and
opaque marks are part of it), so equal layers are kept once; only where one file has several extended attributes does
the order in which they were set count, too. Uncompressed: what a sandbox reads is in the page cache as it lies on the
disk. Owns the call of mkfs.erofs and the names of the files; keeper/erofs.py mounts them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rorqual.sandbox.errors import ImageError
from rorqual.sandbox.images.programs import run_program
from rorqual.sandbox.keeper.erofs import mount_erofs
from rorqual.sandbox.state import StateDir

__all__ = [
    "SUFFIX",
    "digest_of",
    "kept",
    "layer_image",
    "layers_directory",
    "make_image",
    "mount_erofs",
    "recall",
    "remember",
    "run_mkfs",
]

SUFFIX = ".erofs"
_MAGIC = 0xE0F5E1E2
_NO_CHECKSUM = 0xFFFFFFFE
_UUID = "00000000-0000-0000-0000-000000000000"
_TIMEOUT_S = 1800.0
_NAME = re.compile(r"[0-9a-f]{64}")


def layers_directory(state: StateDir) -> Path:
    """<state>/layers, made when missing."""
    place = state.root / "layers"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


@contextlib.contextmanager
def kept(state: StateDir) -> Iterator[None]:
    """While an image is built: nobody removes layers that no image names yet (layers.remove_unused)."""
    fd = os.open(layers_directory(state) / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def layer_image(directory: str | Path, *, state: StateDir) -> Path:
    """The EROFS image of a directory, made at the first call and found again while the tree is unchanged.

    A tree counts as unchanged when names, types, owners, modes, sizes, inodes and times of change are the same. The
    file is read-only and complete; its name is its SHA-256.

    Raises:
        HostUnfit: no mkfs.erofs. ImageError: it failed; the message ends with its own words.
        OSError: the directory cannot be read, or the state directory not written.
    """
    known = _fingerprint(Path(directory))
    with kept(state):
        image = recall(known, state=state)
        if image is None:
            image = make_image(directory, state=state)
            remember(known, image, state=state)
    return image


def recall(name: str, *, state: StateDir) -> Path | None:
    """The image that `remember` was told under this name, while it is there. Counts as a use of it."""
    place = layers_directory(state)
    known = place / "by-tree" / name
    with contextlib.suppress(OSError):
        digest = os.readlink(known)
        if _NAME.fullmatch(digest) and (place / (digest + SUFFIX)).is_file():
            os.utime(known, follow_symlinks=False)
            return place / (digest + SUFFIX)
    return None


def remember(name: str, image: Path, *, state: StateDir) -> None:
    """Keeps an image that no record names, until nobody has asked for it for 30 days (layers.remove_unused)."""
    known = layers_directory(state) / "by-tree" / name
    known.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = f"{known}.{os.getpid()}-{os.urandom(4).hex()}"
    os.symlink(image.name.removesuffix(SUFFIX), temporary)
    os.rename(temporary, known)


def make_image(directory: str | Path, *, state: StateDir) -> Path:
    """Makes the image of a directory, without a look at what was made before. Raises as `layer_image`."""
    place = layers_directory(state)
    fd, building = tempfile.mkstemp(prefix=".building-", dir=place)
    os.close(fd)
    try:
        run_mkfs(Path(directory), building)
        digest = digest_of(building)
        os.chmod(building, 0o444)
        os.rename(building, place / (digest + SUFFIX))
        _sync_directory(place)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(building)
        raise
    return place / (digest + SUFFIX)


def run_mkfs(directory: Path, target: str, *, data: str = "", chunk_bytes: int = 0) -> None:
    """Runs mkfs.erofs so that equal trees give equal bytes. data: a second file for the files' content.

    Raises HostUnfit, ImageError.
    """
    # Extended inodes carry each file's own time; -T would set every file's time to one value, and Python would take
    # every compiled module for stale.
    arguments = ["--quiet", "-d0", "-U", _UUID, "-Eforce-inode-extended"]
    if data:
        arguments += [f"--chunksize={chunk_bytes}", f"--blobdev={data}"]
    arguments += [target, str(directory)]
    run_program(
        "mkfs.erofs",
        arguments,
        package="erofs-utils",
        about=str(directory),
        timeout=_TIMEOUT_S,
        lines=2,
        holding="erofs:",
    )
    _fix_superblock(target)


def _fix_superblock(image: str) -> None:
    """Takes the time of the build out, and with it the superblock's checksum: the file's name is its hash.

    On-disk format: struct erofs_super_block at 1024: magic, checksum, feature_compat (bit 0: checksum), ...,
    build_time u64 at 24, build_time_nsec u32 at 32 (Linux fs/erofs/erofs_fs.h).
    """
    with open(image, "r+b") as file:
        file.seek(1024)
        block = bytearray(file.read(64))
        magic, _, compat = struct.unpack_from("<III", block)
        if magic != _MAGIC:
            raise ImageError(f"{image}: mkfs.erofs left no EROFS image")
        struct.pack_into("<II", block, 4, 0, compat & _NO_CHECKSUM)
        struct.pack_into("<QI", block, 24, 0, 0)
        file.seek(1024)
        file.write(block)
        file.flush()
        os.fsync(file.fileno())


def digest_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(directory: Path) -> str:
    found = hashlib.sha256()
    for line in _tree(str(directory), ""):
        found.update(line)
    return found.hexdigest()


def _tree(path: str, below: str) -> Iterator[bytes]:
    """One line an entry, by name order; never through a link. The stack is explicit: any depth."""
    stack = [(path, below)]
    while stack:
        path, below = stack.pop()
        info = os.stat(path, follow_symlinks=False)
        yield _line(below, info)
        with os.scandir(path) as entries:
            names = sorted(entries, key=lambda entry: entry.name)
        for entry in names:
            inner = f"{below}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                stack.append((entry.path, inner))
            else:
                yield _line(inner, entry.stat(follow_symlinks=False))


def _line(name: str, info: os.stat_result) -> bytes:
    values = (info.st_mode, info.st_uid, info.st_gid, info.st_size, info.st_rdev, info.st_dev, info.st_ino)
    times = (info.st_mtime_ns, info.st_ctime_ns)
    return os.fsencode(name) + b"\0" + repr((*values, *times)).encode() + b"\n"


def _sync_directory(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
