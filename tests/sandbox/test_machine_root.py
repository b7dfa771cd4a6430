"""Root images of machines: the host's packages as one EROFS image, the store's images by their layers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rorqual.sandbox import Sandbox, images
from rorqual.sandbox.errors import HostUnfit, ImageNotFound, Unsupported
from rorqual.sandbox.machines import rootfs
from rorqual.sandbox.state import StateDir


def test_base_is_made_once_and_holds_what_its_packages_need(state: StateDir, tmp_path: Path) -> None:
    state.prepare()
    try:
        first = rootfs.base_layer(state=state, cache=tmp_path)
    except HostUnfit as error:
        pytest.skip(str(error))
    assert rootfs.base_layer(state=state, cache=tmp_path) == first
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    dump = shutil.which("dump.erofs")
    if dump is None:
        pytest.skip("apt-get install erofs-utils")
    for path, there in (("/usr/bin/bash", True), ("/etc/passwd", True), ("/root/.bashrc", False)):
        words = subprocess.run([dump, f"--path={path}", first], capture_output=True, text=True, check=False)
        assert ("Size" in words.stdout) == there, path


def test_packages_are_followed_to_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        "a\tyes\t1\tii \t\tb (>= 2), c | d\t",
        "b\tno\t1\tii \te\t\t",
        "d\tno\t3\tii \t\t\tvirtual-d (= 3)",
        "e\tno\t1\tii \t\tvirtual-d, missing\t",
        "f\tno\t1\tii \t\t\t",
        "g\tyes\t1\trc \t\t\t",
        "python3\tno\t3.11\tii \t\ta\t",
    ]
    monkeypatch.setattr(rootfs, "_dpkg", lambda *arguments: "\n".join(rows))
    assert rootfs._packages() == {"a": "1", "b": "1", "d": "3", "e": "1", "python3": "3.11"}


def test_a_host_without_dpkg_says_what_else_there_is(
    monkeypatch: pytest.MonkeyPatch, state: StateDir
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostUnfit, match=r"images\.import_oci"):
        rootfs.base_layer(state=state)


def test_what_a_machine_cannot_mount_is_refused(state: StateDir, runtime: str) -> None:
    state.prepare()
    with pytest.raises(ImageNotFound):
        rootfs.machine_root("no-such-image", state=state)
    with Sandbox.create() as sb:
        sb.files.write("a", "1")
        taken = sb.snapshot()
    with pytest.raises(Unsupported, match="container's snapshot"):
        rootfs.machine_root(taken.name, state=state)
    assert images.remove_image(taken.name)


@pytest.mark.slow
def test_an_image_of_the_store_boots(state: StateDir, tmp_path: Path, runtime: str) -> None:
    busybox = shutil.which("busybox")
    if busybox is None or "not a dynamic" not in _ldd(busybox):
        pytest.skip("apt-get install busybox-static")
    (tmp_path / "bin").mkdir()
    shutil.copy(busybox, tmp_path / "bin/busybox")
    for name in ("sh", "cat", "echo", "id", "ls"):
        (tmp_path / "bin" / name).symlink_to("busybox")
    (tmp_path / "hello").write_text("from the image\n")
    images.import_directory(tmp_path, name="tiny")
    try:
        with Sandbox.create(substrate="microvm", image="tiny", memory_mb=128, disk_mb=16) as sb:
            assert sb.commands.run("cat /hello; id -u; echo new > /tmp/x; cat /tmp/x").stdout.split("\n") == [
                "from the image",
                "1000",
                "new",
                "",
            ]
    except HostUnfit as error:
        pytest.skip(str(error))
    finally:
        images.remove_image("tiny")


def _ldd(path: str) -> str:
    done = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
