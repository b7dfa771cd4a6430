"""The guests' Linux kernel: Debian's cloud kernel, found in /boot or fetched once from the host's own package archive.

    kernels/<release>/vmlinuz       the bzImage
    kernels/<release>/vmlinux       its payload, an ELF file: what Firecracker boots, and QEMU without unpacking
    kernels/<release>/modules/*.ko  the modules of MODULES and those they depend on, by their names with '_'
The package manager checks what it downloads against the archive's signatures; here only files are taken out of the
package, nothing of it is run or installed. Owns that directory of the cache.
Sources: Documentation/x86/boot.rst (payload_offset), the .modinfo section of kernel modules.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import cache_dir

PACKAGE = "linux-image-cloud-amd64"
FIX = f"apt-get install {PACKAGE}"
MODULES = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_balloon",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
)
"""Everything that some machine of ours may load (initrd.py picks)."""
_FETCH_S = 300.0
_MAX_VMLINUX = 512 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A kernel on this host's disk."""

    release: str
    """As in `uname -r`: '6.1.0-56-cloud-amd64'."""
    bzimage: Path
    vmlinux: Path
    modules: Path
    """Directory of the .ko files."""

    def module(self, name: str) -> Path:
        """Its file. Raises HostUnfit when this kernel has no such module (it may be built in)."""
        path = self.modules / f"{name}.ko"
        if not path.is_file():
            raise HostUnfit(f"kernel {self.release} has no module {name} in {self.modules}.", fix=FIX)
        return path

    def closure(self, names: Sequence[str]) -> tuple[Path, ...]:
        """The files of these modules and of all that they need, in the order in which they load."""
        order: list[Path] = []

        def add(name: str) -> None:
            path = self.module(name)
            if path not in order:
                for needed in dependencies(path.read_bytes()):
                    add(needed)
                order.append(path)

        for name in names:
            add(name)
        return tuple(order)


def dependencies(module: bytes) -> list[str]:
    """The modules that a .ko file names as needed."""
    match = re.search(rb"(?:^|\0)depends=([^\0]*)\0", module)
    text = match[1].decode("ascii", "replace") if match else ""
    return [name.replace("-", "_") for name in text.split(",") if name]


def find_kernel(*, cache: Path | None = None, also: Sequence[str] = ()) -> Kernel:
    """The newest cloud kernel of the cache; taken from /boot, else fetched, when the cache has none (seconds, once).

    also: modules that its copy is to have beside MODULES, in a cache of its own.
    Raises:
        HostUnfit: not an x86-64 host, or there is none and none can be fetched; `fix` is the one command.
    """
    if platform.machine() != "x86_64":
        raise HostUnfit(f"there is no guest kernel for {platform.machine()} hosts yet, only for x86_64.")
    place = (cache or cache_dir()) / "kernels"
    place.mkdir(parents=True, exist_ok=True)
    for release in _releases(place):
        kernel = _at(place / release, release)
        if kernel.bzimage.is_file() and kernel.vmlinux.is_file():
            return kernel
    problem = ""
    for release in _releases(Path("/boot"), prefix="vmlinuz-"):
        if "cloud" in release and Path(f"/lib/modules/{release}").is_dir():
            try:
                return _install(place, Path("/"), release, also)
            except (OSError, ValueError) as error:
                problem = f"/boot/vmlinuz-{release}: {error}; "
    return _fetch(place, problem, also)


def _releases(place: Path, *, prefix: str = "") -> list[str]:
    names = [
        path.name.removeprefix(prefix)
        for path in place.glob(f"{prefix}[0-9]*")
        if re.fullmatch(r"[0-9][A-Za-z0-9.+~-]*", path.name.removeprefix(prefix))
    ]
    return sorted(names, key=lambda name: [int(part) for part in re.findall(r"[0-9]+", name)], reverse=True)


def _at(place: Path, release: str) -> Kernel:
    return Kernel(
        release=release,
        bzimage=place / "vmlinuz",
        vmlinux=place / "vmlinux",
        modules=place / "modules",
    )


def _fetch(place: Path, problem: str, also: Sequence[str]) -> Kernel:
    """Downloads the package that the archive calls the cloud kernel, without installing it."""
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=place))
    try:
        depends = _run(["apt-cache", "depends", PACKAGE], building)
        match = re.search(r"Depends: (linux-image-[0-9][a-z0-9.+-]*)", depends)
        if match is None:
            raise HostUnfit(
                f"{problem}the package archive knows no {PACKAGE}.", fix=f"apt-get update && {FIX}"
            )
        _run(["apt-get", "download", "-q", match[1]], building)
        packages = list(building.glob("*.deb"))
        if len(packages) != 1:
            raise HostUnfit(f"{problem}`apt-get download {match[1]}` brought no package.", fix=FIX)
        _run(["dpkg-deb", "-x", str(packages[0]), str(building / "root")], building)
        release = match[1].removeprefix("linux-image-")
        return _install(place, building / "root", release, also)
    except (OSError, ValueError) as error:
        raise HostUnfit(f"{problem}cannot fetch a guest kernel: {error}.", fix=FIX) from error
    finally:
        remove_tree(str(building))


def _run(command: list[str], cwd: Path) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_FETCH_S,
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"`{' '.join(command)}` took more than {_FETCH_S:g} s") from error
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
        raise OSError(f"`{' '.join(command)}`: {words[0] if words else f'status {done.returncode}'}")
    return done.stdout


def _install(place: Path, root: Path, release: str, also: Sequence[str] = ()) -> Kernel:
    """Copies what is needed out of `root` (a package's tree, or /). Whole or not at all. Raises OSError, ValueError."""
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=place))
    try:
        bzimage = (root / f"boot/vmlinuz-{release}").read_bytes()
        (building / "vmlinuz").write_bytes(bzimage)
        (building / "vmlinux").write_bytes(extract_vmlinux(bzimage))
        tree = next(
            path
            for path in (root / f"lib/modules/{release}", root / f"usr/lib/modules/{release}")
            if path.is_dir()
        )
        (building / "modules").mkdir()
        files = {path.stem.replace("-", "_"): path for path in (tree / "kernel").rglob("*.ko")}
        wanted = [*MODULES, *also]
        while wanted:
            name = wanted.pop()
            target = building / "modules" / f"{name}.ko"
            if name in files and not target.exists():
                shutil.copyfile(files[name], target)
                wanted += dependencies(target.read_bytes())
        for path in building.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # a VMM may run as another user
        building.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster, and its copy is as good
            os.rename(building, place / release)
        return _at(place / release, release)
    except StopIteration:
        raise OSError(f"no modules for {release} under {root}") from None
    finally:
        remove_tree(str(building))


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF file inside of a bzImage.

    Raises:
        ValueError: not a bzImage, or a payload that cannot be unpacked here.
    """
    if len(bzimage) < 0x260 or bzimage[0x202:0x206] != b"HdrS":
        raise ValueError("not a Linux bzImage (no HdrS at 0x202)")
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if len(payload) != length or length < 8:
        raise ValueError(f"truncated: its payload of {length} bytes starts at {start} of {len(bzimage)}")
    command = next((command for magic, command in _UNPACKERS if payload.startswith(magic)), None)
    if command is None:
        raise ValueError(f"its payload is packed in an unknown way ({payload[:6].hex()})")
    if not command:
        return payload
    # The last four bytes are the unpacked size, which the unpackers take for garbage.
    (size,) = struct.unpack_from("<I", payload, length - 4)
    if not 0 < size <= _MAX_VMLINUX:
        raise ValueError(f"its payload says that it unpacks to {size} bytes")
    try:
        done = subprocess.run(command, input=payload[:-4], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(
            f"unpacking needs {command[0]}: {error}. Install it, for example: apt-get install {command[0]}"
        ) from error
    if len(done.stdout) != size or not done.stdout.startswith(b"\x7fELF"):
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(
            f"{command[0]} made {len(done.stdout)} of {size} bytes of it: {words[-1] if words else 'no message'}"
        )
    return done.stdout


_UNPACKERS: tuple[tuple[bytes, list[str]], ...] = (
    (b"\x7fELF", []),
    (b"\x02\x21\x4c\x18", ["lz4", "-dc"]),
    (b"\x28\xb5\x2f\xfd", ["zstd", "-dcq"]),
    (b"\x1f\x8b", ["gzip", "-dc"]),
    (b"\xfd7zXZ", ["xz", "-dc"]),
)
