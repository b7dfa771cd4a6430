"""Makes a bootable disk from a directory that holds a Debian: the same disk starts under BIOS and under UEFI.

No loop device, no mount, no root needed: sfdisk and mke2fs write into a file, mtools fill the EFI partition, and
grub-mkimage makes one GRUB for each firmware, with all modules inside, that reads /boot/grub/grub.cfg.

    sector 0         GRUB's boot.img: loads the sector named at byte 0x5c         (BIOS)
    64 .. 2047       partition "BIOS boot": GRUB's core.img; its first sector lists where the rest is, at byte 0x1f4
    2048 .. 18431    EFI system partition, FAT: /EFI/BOOT/BOOTX64.EFI              (UEFI)
    18432 ..         ext4 with everything

Byte offsets: grub-core/boot/i386/pc/boot.S and diskboot.S. Owns the layout; images/debian_disk.py fills the directory.
"""

from __future__ import annotations

import struct
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from rorqual.sandbox.errors import HostUnfit, ImageError
from rorqual.sandbox.host import find_program

_CORE_AT, _ESP_AT, _ROOT_AT = 64, 2048, 18432
_TAIL = 2048
"""Sectors after the root partition: the second copy of the partition table is in the last 33."""
_MODULES = (
    "part_gpt part_msdos ext2 fat normal configfile linux search search_fs_uuid echo test minicmd serial"
)
_GRUB_DATA = Path("/usr/lib/grub")
NEEDS = (
    ("sfdisk", "fdisk"),
    ("mke2fs", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("mformat", "mtools"),
    ("mcopy", "mtools"),
    ("grub-mkimage", "grub-common"),
    ("qemu-img", "qemu-utils"),
)
"""(program, Debian package)."""


def missing_packages() -> list[str]:
    """Debian packages that this host lacks for building disks."""
    missing = [package for program, package in NEEDS if find_program(program) is None]
    for platform, package in (("i386-pc", "grub-pc-bin"), ("x86_64-efi", "grub-efi-amd64-bin")):
        if not (_GRUB_DATA / platform / "kernel.img").is_file():
            missing.append(package)
    return sorted(set(missing))


def grub_config(root_uuid: str, *, command_line: str) -> str:
    """The grub.cfg for a Debian, whose kernel is always /vmlinuz."""
    return (
        f"linux /vmlinuz root=UUID={root_uuid} ro {command_line}\n"
        "initrd /initrd.img\n"
        "echo 'starting Linux'\n"
        "boot\n"
    )


def new_uuid() -> str:
    return str(uuid.uuid4())


def build(
    tree: Path, target: Path, *, root_uuid: str, size_mb: int, work: Path, prefix: Sequence[str] = ()
) -> None:
    """Writes a qcow2 to `target`. work: a directory for what is needed on the way. prefix: what a program must be
    called through to see the tree's owners as they are.

    Raises:
        HostUnfit: a program is missing; `fix` names the packages.
        ImageError: one of them failed, most often because size_mb is too small.
    """
    missing = missing_packages()
    if missing:
        raise HostUnfit(
            f"building a disk needs {', '.join(missing)}.",
            fix=f"apt-get install --no-install-recommends {' '.join(missing)}",
        )
    raw = work / "disk.raw"
    sectors = size_mb * 2048
    with raw.open("wb") as file:
        file.truncate(sectors * 512)
    if prefix:
        raw.chmod(0o666)
    root_sectors = sectors - _TAIL - _ROOT_AT
    _run(
        ["sfdisk", "--quiet", str(raw)],
        text="label: gpt\nfirst-lba: 34\n"
        f"start={_CORE_AT}, size={_ESP_AT - _CORE_AT}, type=21686148-6449-6E6F-744E-656564454649\n"
        f"start={_ESP_AT}, size={_ROOT_AT - _ESP_AT}, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=esp\n"
        f"start={_ROOT_AT}, size={root_sectors}, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root\n",
    )
    # GRUB 2.06 cannot read a file system with metadata_csum_seed; not every mke2fs has it, so ask for old features.
    features = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    features += "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
    _run(
        [
            *(*prefix, "mke2fs", "-q", "-t", "ext4", "-L", "root", "-U", root_uuid, "-m", "1"),
            *("-O", features, "-E", f"offset={_ROOT_AT * 512},root_owner=0:0"),
            *("-d", str(tree), str(raw), f"{root_sectors // 2}k"),
        ]
    )
    early = work / "early.cfg"
    early.write_text(
        f"search --no-floppy --fs-uuid --set=root {root_uuid}\nset prefix=($root)/boot/grub\n", "utf-8"
    )
    for platform, extra in (("i386-pc", "biosdisk"), ("x86_64-efi", "efi_gop")):
        _run(
            [
                *("grub-mkimage", "-O", platform, "-o", str(work / platform), "-p", "/boot/grub"),
                *("-c", str(early), *_MODULES.split(), extra),
            ]
        )
    esp = f"{raw}@@{_ESP_AT * 512}"
    _run(["mformat", "-i", esp, "-T", str(_ROOT_AT - _ESP_AT), "-h", "16", "-s", "32", "::"])
    _run(["mmd", "-i", esp, "::/EFI", "::/EFI/BOOT"])
    _run(["mcopy", "-i", esp, str(work / "x86_64-efi"), "::/EFI/BOOT/BOOTX64.EFI"])
    _install_bios(raw, (work / "i386-pc").read_bytes())
    _run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target)])
    raw.unlink()


def replace_file(source: Path, target: Path, *, inside: str, data: Path, work: Path) -> None:
    """`target`: the disk `source` of `build`, with another content of one file that belongs to root.

    Raises ImageError: it did not end up there.
    """
    raw, back = work / "disk.raw", work / "written"
    _run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(source), str(raw)])
    device = f"{raw}?offset={_ROOT_AT * 512}"
    commands = work / "debugfs"
    commands.write_text(f"rm {inside}\nwrite {data} {inside}\ndump {inside} {back}\n", "utf-8")
    _run(["debugfs", "-w", "-f", str(commands), device])
    if not back.is_file() or back.read_bytes() != data.read_bytes():  # debugfs ends with 0 whatever happened
        raise ImageError(f"debugfs did not write {inside} into {source}")
    _run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target)])
    raw.unlink()


def _install_bios(raw: Path, core: bytes) -> None:
    boot = bytearray((_GRUB_DATA / "i386-pc/boot.img").read_bytes())
    image = bytearray(core) + bytes(-len(core) % 512)
    count = len(image) // 512
    if len(boot) != 512 or count > _ESP_AT - _CORE_AT:
        raise ImageError(f"GRUB's boot.img has {len(boot)} bytes and its core image {len(core)}: no place")
    with raw.open("r+b") as file:
        table = file.read(512)
        struct.pack_into("<Q", boot, 0x5C, _CORE_AT)
        boot[0x66:0x68] = b"\x90\x90"  # do not trust the drive's number less than the BIOS that gives it
        boot[440:512] = table[440:512]  # the disk's signature and sfdisk's protective entry
        file.seek(0)
        file.write(boot)
        struct.pack_into("<QHH", image, 0x1F4, _CORE_AT + 1, count - 1, 0x820)
        file.seek(_CORE_AT * 512)
        file.write(image)


def _run(command: list[str], *, text: str = "") -> None:
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "MTOOLS_SKIP_CHECK": "1"}
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, errors="replace", env=env, check=False
    )
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise ImageError(
            f"{command[0]} failed: {words[-1] if words else f'exit status {done.returncode}'}"
            + (" (is size_mb large enough?)" if "mke2fs" in command else "")
        )
