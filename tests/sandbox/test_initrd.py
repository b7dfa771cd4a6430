"""The initial file system: read back by a cpio of somebody else's, its modules without signatures."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.machines.initrd import initrd, newc, unsigned
from rorqual.sandbox.machines.kernel import Kernel

MAGIC = b"~Module signature appended~\n"


def test_another_cpio_reads_the_archive(tmp_path: Path) -> None:
    cpio = shutil.which("cpio") or shutil.which("busybox")
    if cpio is None:
        pytest.skip("apt-get install cpio")
    files = [("init", b"\x7fELF" + bytes(1001)), ("modules/00-a.ko", b"a"), ("modules/01-b.ko", b"")]
    command = [cpio, "-idm"] if cpio.endswith("cpio") else [cpio, "cpio", "-idm"]
    subprocess.run(command, input=newc(files), cwd=tmp_path, check=True, capture_output=True)
    for name, data in files:
        assert (tmp_path / name).read_bytes() == data and (tmp_path / name).stat().st_mode & 0o111
    assert sorted(path.name for path in tmp_path.iterdir()) == ["init", "modules"]


def test_a_modules_signature_goes_and_the_module_stays() -> None:
    module = b"\x7fELF" + bytes(100)
    signed = module + b"s" * 77 + bytes(8) + struct.pack(">I", 77) + MAGIC
    assert unsigned(signed) == module == unsigned(module)
    for forged in (MAGIC, bytes(8) + struct.pack(">I", 1 << 31) + MAGIC):
        assert unsigned(forged) == forged


def test_the_same_content_is_made_once(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(b"module")
    (tmp_path / "agent").write_bytes(b"agent")
    kernel = Kernel(release="1", bzimage=tmp_path, vmlinux=tmp_path, modules=tmp_path)
    first = initrd(kernel, tmp_path / "agent", ["a"], cache=tmp_path / "cache")
    assert initrd(kernel, tmp_path / "agent", ["a"], cache=tmp_path / "cache") == first
    (tmp_path / "agent").write_bytes(b"another")
    assert initrd(kernel, tmp_path / "agent", ["a"], cache=tmp_path / "cache") != first
    assert len(list((tmp_path / "cache/guests").iterdir())) == 2
    with pytest.raises(HostUnfit, match="no module missing"):
        initrd(kernel, tmp_path / "agent", ["missing"], cache=tmp_path / "cache")
