"""Disk images from strangers: what is refused before QEMU opens it, what an overlay is. Real qemu-img, no machine."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from rorqual.sandbox.errors import ImageRejected
from rorqual.sandbox.host import find_program
from rorqual.sandbox.machines import disks

pytestmark = pytest.mark.skipif(find_program("qemu-img") is None, reason="apt-get install qemu-utils")


def make(path: Path, *arguments: str, size: str = "64M", format: str = "qcow2") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", format, *arguments, str(path), size], check=True)
    return path


def write(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


def full(path: Path) -> Path:
    """A qcow2 with data in it."""
    source = path.with_suffix(".raw")
    source.write_bytes(os.urandom(3 << 20) + bytes(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(source), str(path)], check=True)
    return path


def test_raw_qcow2_and_iso_are_told_apart_by_their_own_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.qcow2").write_bytes(bytes(1 << 20))  # a name says nothing
    assert disks.inspect(tmp_path / "a.qcow2").format == "raw"
    found = disks.inspect(full(tmp_path / "b.raw.img"))
    assert (found.format, found.virtual_bytes) == ("qcow2", 4 << 20)
    (tmp_path / "c").write_bytes(bytes(0x8001) + b"CD001" + bytes(4096))
    assert disks.inspect(tmp_path / "c").format == "iso"
    assert disks.inspect(make(tmp_path / "d", "-o", "compat=0.10")).format == "qcow2"


def test_a_backing_file_is_refused_before_anything_opens_it(tmp_path: Path) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:$6$secret:19000:0:99999:7:::\n" * 20)
    image = make(tmp_path / "evil.qcow2", "-u", "-b", str(secret), "-F", "raw")
    with pytest.raises(ImageRejected, match=r"names a backing file .*shadow.*your rights"):
        disks.inspect(image)
    # The same without the length, and with the offset alone.
    with pytest.raises(ImageRejected, match="backing file"):
        disks.inspect(write(image, 16, struct.pack(">I", 0)))
    image = make(tmp_path / "evil2.qcow2", "-u", "-b", "nbd://203.0.113.1/x", "-F", "raw")
    with pytest.raises(ImageRejected, match="backing file"):
        disks.inspect(image)


def test_data_kept_in_another_file_is_refused(tmp_path: Path) -> None:
    image = make(tmp_path / "evil.qcow2", "-o", f"data_file={tmp_path}/target.raw")
    with pytest.raises(ImageRejected, match="another file"):
        disks.inspect(image)
    # The flag taken off, the header's extension with the name left in.
    features = struct.unpack(">Q", image.read_bytes()[72:80])[0]
    with pytest.raises(ImageRejected, match="another file"):
        disks.inspect(write(image, 72, struct.pack(">Q", features & ~4)))


@pytest.mark.parametrize(
    ("at", "data", "words"),
    [
        (4, struct.pack(">I", 1), "qcow version 1"),
        (4, struct.pack(">I", 77), "qcow version 77"),
        (20, struct.pack(">I", 63), "clusters of"),
        (24, struct.pack(">Q", 1 << 62), "more than"),
        (32, struct.pack(">I", 1), "encrypted"),
        (36, struct.pack(">I", 0xFFFFFFFF), "L1 table ends"),
        (40, struct.pack(">Q", 1 << 40), "L1 table ends"),
        (48, struct.pack(">Q", 1 << 50), "refcount table ends"),
        (72, struct.pack(">Q", 2), "marked corrupt"),
        (100, struct.pack(">I", 0xFFFFFFFF), "header has"),
        (40, struct.pack(">Q", 4096 + 512), "corrupt|qemu-img check"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, at: int, data: bytes, words: str) -> None:
    with pytest.raises(ImageRejected, match=words):
        disks.inspect(write(full(tmp_path / "x.qcow2"), at, data))


@pytest.mark.parametrize("keep", [10, 80, 4096, 200_000, 1 << 20, (3 << 20) - 1])
def test_a_disk_that_was_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    image = full(tmp_path / "x.qcow2")
    os.truncate(image, keep)
    with pytest.raises(ImageRejected, match=r"cut off|header has|qemu-img check|corrupt"):
        disks.inspect(image)


@pytest.mark.parametrize("name", ["vmdk", "vdi", "vhdx", "vpc", "qed"])
def test_formats_that_may_name_files_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageRejected, match="qemu-img convert"):
        disks.inspect(make(tmp_path / "x", format=name))


@pytest.mark.parametrize(
    "head", [b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"# Disk DescriptorFile\n"]
)
def test_packed_and_descriptor_files_are_refused(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "x").write_bytes(head + bytes(4096))
    with pytest.raises(ImageRejected, match=r"unpack|convert"):
        disks.inspect(tmp_path / "x")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / "none"):
        with pytest.raises(ImageRejected):
            disks.inspect(path)


def test_an_overlay_takes_the_writes_and_its_base_none(tmp_path: Path) -> None:
    base = disks.inspect(full(tmp_path / "base"))
    before = (tmp_path / "base").read_bytes()
    disks.overlay(base, tmp_path / "top", size_bytes=8 << 20)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", str(tmp_path / "top")],
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "base").read_bytes() == before
    found = subprocess.run(
        ["qemu-img", "info", "--output=json", str(tmp_path / "top")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert f'"virtual-size": {8 << 20}' in found.stdout
