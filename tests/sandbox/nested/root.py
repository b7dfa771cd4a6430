"""The root file system of the emulated host: an EROFS image with Python, the test tools and a few Debian programs.

Owns what goes in: files of named packages, the libraries their programs need, this Python without its test suite, the
distributions the tests import. The project itself is not in it (host.py hands it over at each run), so that the image
is made once and kept in the cache, under a name that says what it was made of.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = (
    "bash", "busybox-static", "coreutils", "dash", "erofs-utils", "findutils", "grep", "iproute2", "libc-bin", "login",
    "libnftables1", "mount", "nftables", "procps", "sed", "util-linux",
)  # fmt: skip
DISTRIBUTIONS = ("dnspython", "h11", "pytest", "pytest-asyncio", "pytest-timeout", "qemu.qmp", "rorqual")
LEFT_OUT = {"ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter", "turtledemo", "site-packages"}
VERSION = 2
"""Part of the image's name: a change of what goes in makes a new one."""


def make(cache: Path) -> Path:
    """The image, built when missing. Two processes may do so at once. Raises CalledProcessError of mkfs.erofs."""
    files = sorted(set(contents()))
    digest = hashlib.sha256(f"{VERSION}".encode())
    for path in files:
        found = path.lstat()
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    image = cache / f"nested-root-{digest.hexdigest()[:16]}.erofs"
    if image.exists():
        return image
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as building:
        tree = Path(building) / "root"
        for name in ("dev", "etc", "proc", "root", "run", "sys", "tmp", "var"):
            (tree / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (tree / "usr" / name).mkdir(parents=True)
            (tree / name).symlink_to(f"usr/{name}")
        for path in (*files, *libraries(files)):
            copy(path, tree)
        (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
        (tree / "etc/group").write_text("root:x:0:\n")
        made = Path(building) / image.name
        subprocess.run(
            ["mkfs.erofs", "--quiet", "--all-root", made, tree], check=True, stdout=subprocess.DEVNULL
        )
        for old in cache.glob("nested-root-*.erofs"):
            old.unlink(missing_ok=True)
        made.rename(image)
    return image


def copy(path: Path, tree: Path) -> None:
    target = tree / str(real_parent(path)).lstrip("/")
    if target.is_symlink() or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, target, follow_symlinks=False)


def real_parent(path: Path) -> Path:
    """The same file with no link above it: /lib/x is /usr/lib/x on a merged system."""
    return path.parent.resolve() / path.name


def contents() -> Iterator[Path]:
    """All but the libraries, which follow from these."""
    yield from debian_files()
    prefix = Path(sys.base_prefix).resolve()
    python = Path(sys.executable).resolve()
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    yield from (python, prefix / "bin/python3")
    yield from (path for path in tree_files(standard) if path.suffix != ".a")
    yield from distribution_files()
    if sys.prefix != sys.base_prefix:
        yield Path(sys.prefix) / "pyvenv.cfg"
        yield from (path for path in (Path(sys.prefix) / "bin").iterdir() if path.name.startswith("python"))


def tree_files(top: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(top):
        names[:] = [name for name in names if name not in LEFT_OUT and not name.startswith("config-")]
        yield from (Path(folder) / name for name in files)


def debian_files() -> Iterator[Path]:
    listed = subprocess.run(["dpkg", "-L", *PACKAGES], capture_output=True, text=True, check=True).stdout
    for line in sorted(set(listed.split("\n"))):
        path = Path(line)
        if line.startswith(("/bin/", "/sbin/", "/lib/", "/usr/bin/", "/usr/sbin/", "/usr/lib/")) and (
            path.is_symlink() or path.is_file()
        ):
            yield path


def libraries(programs: list[Path]) -> Iterator[Path]:
    """Every shared library that one of these needs, with the links that lead to it, and the loader."""
    found: set[Path] = set()
    elf = [str(path) for path in programs if not path.is_symlink() and is_elf(path)]
    listed = subprocess.run(["ldd", *elf], capture_output=True, text=True, check=False).stdout
    for match in re.finditer(r"(?:=> |^\s)(/\S+) \(0x", listed, re.MULTILINE):
        path = Path(match[1])
        while path not in found:
            found.add(path)
            if path.is_symlink():
                path = real_parent(path.parent / os.readlink(path))
    yield from found


def is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def distribution_files() -> Iterator[Path]:
    """Files of the distributions and of what they require, without extras."""
    wanted, seen = list(DISTRIBUTIONS), set()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for entry in found.requires or []:
            requirement = Requirement(entry)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
        for file in found.files or []:
            path = Path(str(found.locate_file(file)))
            if path.is_file() and ".." not in file.parts and file.suffix not in (".c", ".h", ".pyi"):
                yield path
