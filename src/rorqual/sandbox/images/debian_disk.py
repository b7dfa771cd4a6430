"""Builds a bootable disk from Debian packages, for the fullvm substrate, and keeps those disks.

    <cache>/guests/<name>.json               what it is and how it was built
    <cache>/guests/<name>-<12 hex>.qcow2     the disk, never written again: overlays of live machines lie on it

mmdebstrap fills a directory, machines/boot_disk.py makes a disk of it that starts under BIOS and UEFI. In it: a kernel,
systemd, our guest agent, a root shell on the serial console, `user` (1000) logged in on the screen.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import selectors
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import HostUnfit, ImageError, InvalidRequest
from rorqual.sandbox.host import find_program
from rorqual.sandbox.images.debian import PACKAGE, codename
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.machines import boot_disk
from rorqual.sandbox.machines.agent_service import BINARY, agent_files
from rorqual.sandbox.state import cache_dir

KERNEL = "linux-image-cloud-amd64"
"""Debian's kernel for virtual machines. For USB devices and sound take linux-image-amd64 (70 MB more)."""
BASIC = ("systemd-sysv", "udev", "dbus", "kmod", "iproute2", "zstd")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_COMMAND_LINE = "console=tty0 console=ttyS0,115200 quiet fsck.mode=skip"
# No check of the file system: a machine writes to an overlay that nobody mounts a second time.
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskImage:
    """A disk of this host's cache."""

    name: str
    path: Path
    packages: tuple[str, ...]
    suite: str
    agent: bool
    """Our guest agent is in it."""
    virtual_mb: int
    size_bytes: int
    """The file's length."""


def build_debian_disk(
    name: str,
    *,
    packages: Sequence[str] = (),
    agent: bool = True,
    kernel: str = KERNEL,
    size_mb: int = 4096,
    suite: str = "",
    mirror: str = "",
    timeout: float = 3600.0,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> DiskImage:
    """A disk with a minimal Debian and these packages; `create(substrate="fullvm", image=name)` starts it.

    Returns the one that is there when it was built from the same arguments, with this version's agent; `rebuild` makes
    it anew. size_mb: what the
    machine sees, at least 700; the file holds what is used. progress: called with a line at each step.

    Raises:
        InvalidRequest: an argument is wrong. HostUnfit: a program is missing; `fix` names the packages.
        ImageError: the build failed; the message ends with the failing program's own words.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"image: {name!r} is not a name (lower-case letters, digits, '.', '_', '-')")
    wrong = [package for package in (*packages, kernel) if not PACKAGE.fullmatch(package)]
    if wrong or not re.fullmatch(r"[a-z]*", suite):
        raise InvalidRequest(f"packages, kernel, suite: {wrong or suite!r}: not a Debian package or release")
    if isinstance(size_mb, bool) or not isinstance(size_mb, int) or not 700 <= size_mb <= 1 << 24:
        raise InvalidRequest(f"size_mb: {size_mb!r} must be a whole number from 700 to {1 << 24} (MiB)")
    tell = progress or (lambda line: None)
    suite = suite or codename()
    files = agent_files() if agent else {}
    recipe: dict[str, Any] = {
        "packages": sorted(set(packages)),
        "kernel": kernel,
        "size_mb": size_mb,
        "suite": suite,
        "mirror": mirror,
        "files": _digest({name: item for name, item in {**_settings(""), **files}.items() if name != BINARY}),
        "agent": _digest({BINARY: files[BINARY]}) if agent else "",
    }
    guests = _guests()
    with _locked(guests / f".{name}.lock"):
        found = _read(guests / f"{name}.json")
        if found is not None and found[1]["recipe"] == recipe and not rebuild:
            return found[0]
        program = find_program("mmdebstrap")
        missing = boot_disk.missing_packages() + ([] if program else ["mmdebstrap"])
        if program is None or missing:
            raise HostUnfit(
                f"building a disk needs {', '.join(missing)}.",
                fix=f"apt-get install --no-install-recommends {' '.join(missing)}",
            )
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=guests))
        as_owner = [] if os.geteuid() == 0 else [program, "--unshare-helper"]
        try:
            building.chmod(0o755)
            target = guests / f"{name}-{secrets.token_hex(6)}.qcow2"
            if (
                found is not None
                and not rebuild
                and agent
                and {**found[1]["recipe"], "agent": recipe["agent"]} == recipe
            ):
                tell("putting another agent into it")
                (building / "agent").write_bytes(files[BINARY][1])
                (building / "agent").chmod(files[BINARY][0])
                boot_disk.replace_file(
                    found[0].path,
                    building / "disk.qcow2",
                    inside=BINARY,
                    data=building / "agent",
                    work=building,
                )
            else:
                root_uuid = boot_disk.new_uuid()
                _fill(program, building, recipe, files, root_uuid=root_uuid, timeout=timeout, tell=tell)
                tell("making the disk")
                boot_disk.build(
                    building / "root",
                    building / "disk.qcow2",
                    root_uuid=root_uuid,
                    size_mb=size_mb,
                    work=building,
                    prefix=as_owner,
                )
            image = DiskImage(
                name=name,
                path=target,
                packages=tuple(recipe["packages"]),
                suite=suite,
                agent=agent,
                virtual_mb=size_mb,
                size_bytes=(building / "disk.qcow2").stat().st_size,
            )
            _install(building, image, recipe, guests)
        finally:
            if as_owner:
                subprocess.run([*as_owner, "rm", "-rf", str(building / "root")], check=False)
            remove_tree(str(building))
        tell(f"{name}: {image.size_bytes >> 20} MiB in {target}")
        return image


def disks() -> list[DiskImage]:
    """Every disk of the cache, by name."""
    found = (_read(path) for path in sorted(_guests().glob("*.json")))
    return [item[0] for item in found if item is not None]


def remove_disk(name: str) -> bool:
    """Removes a disk; False when there was none. Machines that run on it, and snapshots of them, must be gone first."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"image: {name!r} is not a name (lower-case letters, digits, '.', '_', '-')")
    guests = _guests()
    with _locked(guests / f".{name}.lock"):
        found = _read(guests / f"{name}.json")
        if found is None:
            return False
        (guests / f"{name}.json").unlink()
        found[0].path.unlink(missing_ok=True)
        return True


def _digest(files: dict[str, tuple[int, bytes]]) -> str:
    """Of what we put in beside the packages: another agent, or other settings, make another disk."""
    text = json.dumps(
        [[name, mode, hashlib.sha256(data).hexdigest()] for name, (mode, data) in sorted(files.items())]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _guests() -> Path:
    path = cache_dir() / "guests"
    path.mkdir(exist_ok=True)
    return path


def _read(path: Path) -> tuple[DiskImage, dict[str, Any]] | None:
    """None: not there, or its disk is not."""
    try:
        record = json.loads(path.read_text("utf-8"))
        fields = {**record["image"], "path": path.parent / record["image"]["path"]}
        image = DiskImage(**{**fields, "packages": tuple(fields["packages"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (image, record) if image.path.is_file() else None


def _install(building: Path, image: DiskImage, recipe: dict[str, Any], guests: Path) -> None:
    disk, record = building / "disk.qcow2", building / "record.json"
    disk.chmod(0o444)
    fields = asdict(image) | {"path": image.path.name}
    record.write_text(json.dumps({"image": fields, "recipe": recipe}), "utf-8")
    for path in (disk, record):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = _read(guests / f"{image.name}.json")
    os.rename(disk, image.path)
    os.rename(record, guests / f"{image.name}.json")
    fd = os.open(guests, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    if old is not None:  # machines that run on it hold it open, and new ones take the new one
        old[0].path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build of a name at a time; whoever waits finds it built."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _tar(path: Path, files: dict[str, tuple[int, bytes]]) -> Path:
    """files: path inside -> (mode, content); a mode of 0 makes a symlink to the content."""
    with tarfile.open(path, "w") as tar:
        for name, (mode, data) in files.items():
            member = tarfile.TarInfo(name.lstrip("/"))
            member.mode = mode or 0o777
            if mode:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, data.decode()
                tar.addfile(member)
    path.chmod(0o644)
    return path


def _fill(
    program: str,
    building: Path,
    recipe: dict[str, Any],
    agent: dict[str, tuple[int, bytes]],
    *,
    root_uuid: str,
    timeout: float,
    tell: Progress,
) -> None:
    early = _tar(
        building / "early.tar",
        {
            "etc/initramfs-tools/conf.d/rorqual": (0o644, b"MODULES=list\nCOMPRESS=zstd\nCOMPRESSLEVEL=3\n"),
            "usr/share/initramfs-tools/modules.d/rorqual": (0o644, _INITRD_MODULES),
        },
    )
    late = _tar(building / "late.tar", _settings(root_uuid) | agent)
    setup = (
        'chroot "$1" useradd --create-home --uid 1000 --shell /bin/bash user && '
        'chroot "$1" passwd --quiet --delete user && chroot "$1" passwd --quiet --delete root'
    )
    command = [
        program,
        "--variant=minbase",
        "--mode=" + ("root" if os.geteuid() == 0 else "unshare"),
        "--include=" + ",".join([recipe["kernel"], *BASIC, *recipe["packages"]]),
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        f"--essential-hook=tar-in {early} /",
        f"--customize-hook={setup}",
        f"--customize-hook=tar-in {late} /",
        "--format=directory",
        recipe["suite"],
        str(building / "root"),
        *([recipe["mirror"]] if recipe["mirror"] else []),
    ]
    log = building / "mmdebstrap.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
        )
        assert process.stderr is not None
        try:
            code = _follow(process, sink, timeout=timeout, tell=tell)
        except BaseException:
            process.kill()
            raise
        finally:
            process.stderr.close()
            process.wait()
    if code:
        words = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("E:")]
        raise ImageError(f"mmdebstrap failed: {' | '.join(words[-3:]) or f'exit status {code}'}")


def _follow(
    process: subprocess.Popen[bytes], sink: io.BufferedWriter, *, timeout: float, tell: Progress
) -> int:
    """Tells mmdebstrap's own steps ('I: ...') as they come. Raises ImageError when it is too slow."""
    assert process.stderr is not None
    end = time.monotonic() + timeout
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        while True:
            left = end - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise ImageError(f"mmdebstrap was not done after {timeout:g} s")
            data = process.stderr.read(65536)
            if not data:
                return process.wait()
            sink.write(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"I: "):
                    tell(line[3:].decode("utf-8", "replace").strip())


_INITRD_MODULES = b"virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\nahci\n"
_GETTY = "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin {user} --noclear {line}\n"


def _settings(root_uuid: str) -> dict[str, tuple[int, bytes]]:
    texts = {
        "etc/fstab": f"UUID={root_uuid} / ext4 errors=remount-ro 0 1\n",
        "boot/grub/grub.cfg": boot_disk.grub_config(root_uuid, command_line=_COMMAND_LINE),
        "etc/hostname": "sandbox\n",
        "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 sandbox\n::1 localhost ip6-localhost\n",
        "etc/systemd/system/serial-getty@.service.d/rorqual.conf": _GETTY.format(
            user="root", line="%I 115200 vt220"
        ),
        "etc/systemd/system/getty@tty1.service.d/rorqual.conf": _GETTY.format(user="user", line="%I linux"),
    }
    files = {name: (0o644, text.encode()) for name, text in texts.items()}
    # Work that a machine of minutes never profits from, and that costs an emulated one seconds of its start.
    off = ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
           "e2scrub_reap.service", "fstrim.timer", "modprobe@loop.service", "modprobe@dm_mod.service",
           "modprobe@drm.service", "sys-kernel-debug.mount", "sys-kernel-tracing.mount")  # fmt: skip
    files |= {f"etc/systemd/system/{name}": (0, b"/dev/null") for name in off}
    return files
