"""The guests' kernel: found, taken out of its package, and refused when it is not one."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
from pathlib import Path

import pytest

from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.machines import kernel

ELF = b"\x7fELF" + bytes(range(256)) * 40


def bzimage(payload: bytes, *, size: int, length: int | None = None) -> bytes:
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 16, len(payload) + 4 if length is None else length)
    return bytes(head) + bytes(16) + payload + struct.pack("<I", size)


def test_the_payload_is_unpacked() -> None:
    assert kernel.extract_vmlinux(bzimage(gzip.compress(ELF), size=len(ELF))) == ELF


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "not a Linux bzImage"),
        (b"MZ" * 1000, "not a Linux bzImage"),
        (bzimage(gzip.compress(ELF), size=len(ELF), length=1 << 31), "truncated"),
        (bzimage(b"\x00\x01\x02\x03\x04", size=10), "unknown way"),
        (bzimage(gzip.compress(ELF), size=1 << 31), "unpacks to"),
        (bzimage(gzip.compress(ELF), size=0), "unpacks to"),
        (bzimage(gzip.compress(ELF)[:-20], size=len(ELF)), "made"),
        (bzimage(gzip.compress(b"no elf"), size=6), "made 6 of 6"),
    ],
)
def test_what_is_no_kernel_says_so(image: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        kernel.extract_vmlinux(image)


def test_a_modules_needs_are_read() -> None:
    assert kernel.dependencies(b"license=GPL\0depends=virtio,virtio-ring\0name=x\0") == [
        "virtio",
        "virtio_ring",
    ]
    assert kernel.dependencies(b"depends=\0name=x\0") == [] == kernel.dependencies(b"\x7fELF")


def test_modules_load_after_what_they_need(tmp_path: Path) -> None:
    for name, needs in (("a", "b,c"), ("b", "c"), ("c", "")):
        (tmp_path / f"{name}.ko").write_bytes(b"\0depends=" + needs.encode() + b"\0")
    it = kernel.Kernel(release="1", bzimage=tmp_path, vmlinux=tmp_path, modules=tmp_path)
    assert [path.stem for path in it.closure(["a", "b"])] == ["c", "b", "a"]
    with pytest.raises(HostUnfit, match="no module d"):
        it.closure(["d"])


def test_a_kernel_is_there_and_is_made_once() -> None:
    try:
        found = kernel.find_kernel()
    except HostUnfit as error:
        pytest.skip(str(error))
    assert found.vmlinux.read_bytes()[:4] == b"\x7fELF"
    assert [path.stem for path in found.closure(["virtio_blk"])][-1] == "virtio_blk"
    assert kernel.find_kernel() == found
    assert not list(found.bzimage.parent.parent.glob(".building-*"))


def test_where_nothing_can_be_fetched_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("cloud" in path.name for path in Path("/boot").glob("vmlinuz-*")):
        pytest.skip("this host has a cloud kernel in /boot")
    for name, text in (
        ("apt-cache", "echo '  Depends: linux-image-9-cloud-amd64'"),
        ("apt-get", "echo E: No network >&2; exit 100"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostUnfit, match="No network") as caught:
        kernel.find_kernel(cache=tmp_path / "cache")
    assert caught.value.fix == "apt-get install linux-image-cloud-amd64"
    assert not list((tmp_path / "cache/kernels").iterdir())
    (tmp_path / "apt-cache").write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(HostUnfit, match="knows no"):
        kernel.find_kernel(cache=tmp_path / "cache")


def test_the_unpacked_kernel_of_this_host_is_what_its_header_says() -> None:
    try:
        found = kernel.find_kernel()
    except HostUnfit as error:
        pytest.skip(str(error))
    words = subprocess.run(["file", "-b", found.vmlinux], capture_output=True, text=True, check=False).stdout
    assert found.vmlinux.stat().st_size > 10 << 20 and (not words or "ELF 64-bit" in words)
