"""EROFS layers: the same tree makes the same bytes, and what is mounted is what was there."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.sandbox import ImageError
from rorqual.sandbox.host import find_program
from rorqual.sandbox.images.erofs import digest_of, layer_image, layers_directory, make_image, mount_erofs
from rorqual.sandbox.keeper import linux
from rorqual.sandbox.state import StateDir

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or find_program("mkfs.erofs") is None, reason="needs root and mkfs.erofs"
)
Inode = tuple[int, int, int, int, int, int]


def in_private_mounts(work: Callable[[], Any]) -> Any:
    """Runs `work` in a thread with a mount namespace of its own, which goes with the thread."""
    box: list[Any] = []

    def run() -> None:
        try:
            linux.unshare(linux.CLONE_NEWNS)
            linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
            box.append(work())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def plant(place: Path, *, seed: int) -> Path:
    """A tree of every kind of entry, made in an order that the seed decides."""
    order = random.Random(seed)
    place.mkdir()
    folders = [f"d{number}" for number in range(12)]
    order.shuffle(folders)
    for name in folders:
        (place / name).mkdir()
    files = [(name, number) for name in folders for number in range(5)]
    order.shuffle(files)
    for name, number in files:
        data = random.Random(f"{name}{number}").randbytes(1 + 7000 * number)
        (place / name / f"f{number}").write_bytes(data)
        os.chown(place / name / f"f{number}", 70000 + number, number)
    (place / "d0/link").symlink_to("../d1/f1")
    os.link(place / "d2/f2", place / "d3/hard")
    os.mkfifo(place / "d4/pipe")
    os.mknod(place / "d5/gone", stat.S_IFCHR | 0o600, 0)
    os.setxattr(place / "d6", "trusted.overlay.opaque", b"y")
    for key in ("user.a", "user.b"):  # mkfs.erofs keeps the order in which the file system lists them
        os.setxattr(place / "d7/f1", key, key.encode() * 9)
    os.chmod(place / "d8/f1", 0o4755)
    for path in sorted(place.rglob("*"), reverse=True):
        os.utime(path, ns=(1, 1_600_000_000_123_456_789), follow_symlinks=False)
    os.utime(place, ns=(1, 1_600_000_001_000_000_000))
    return place


def listing(place: Path) -> dict[str, tuple[Inode, bytes, dict[str, bytes]]]:
    found = {}
    for path in [place, *sorted(place.rglob("*"))]:
        info = path.lstat()
        size = info.st_size if stat.S_ISREG(info.st_mode) else 0
        inode = (info.st_mode, info.st_uid, info.st_gid, size, info.st_mtime_ns, info.st_rdev)
        data = os.readlink(path).encode() if path.is_symlink() else b""
        data = path.read_bytes() if stat.S_ISREG(info.st_mode) else data
        marks = {name: os.getxattr(path, name, follow_symlinks=False) for name in _marks(path)}
        found[str(path.relative_to(place))] = (inode, data, marks)
    return found


def _marks(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def test_equal_trees_make_equal_images_in_whatever_order_they_were_written(
    state: StateDir, tmp_path: Path
) -> None:
    first = make_image(plant(tmp_path / "a", seed=1), state=state)
    second = make_image(plant(tmp_path / "b", seed=2), state=state)
    assert first == second
    assert first.name == digest_of(first) + ".erofs"
    assert stat.S_IMODE(first.stat().st_mode) == 0o444


def test_a_mounted_image_holds_what_the_directory_held(state: StateDir, tmp_path: Path) -> None:
    tree, target = plant(tmp_path / "tree", seed=3), tmp_path / "target"
    target.mkdir()
    image = make_image(tree, state=state)

    def look() -> tuple[dict[str, Any], bool, str]:
        how = mount_erofs(str(image), str(target))
        same = (target / "d2/f2").stat().st_ino == (target / "d3/hard").stat().st_ino
        return listing(target), same, how

    found, hard_link_kept, how = in_private_mounts(look)
    assert found == listing(tree)
    assert hard_link_kept
    assert how in ("file", "loop")


def test_a_kernel_without_file_backed_mounts_gets_a_loop_device_that_goes_with_the_mount(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("this host has no loop devices")
    tree, target = plant(tmp_path / "tree", seed=4), tmp_path / "target"
    target.mkdir()
    image = make_image(tree, state=state)
    real = linux.mount

    def old_kernel(source: str, place: str, **options: Any) -> None:
        if options.get("fstype") == "erofs" and not source.startswith("/dev/"):
            raise OSError(15, "Block device required")
        real(source, place, **options)

    monkeypatch.setattr(linux, "mount", old_kernel)

    def look() -> tuple[str, dict[str, Any]]:
        return mount_erofs(str(image), str(target)), listing(target)

    how, found = in_private_mounts(look)
    assert how == "loop"
    assert found == listing(tree)
    deadline = time.monotonic() + 30  # the kernel takes a dead thread's namespace down in its own time
    while any(image.name in name for name in backing_files()):
        assert time.monotonic() < deadline, "the loop device stayed"
        time.sleep(0.02)


def backing_files() -> list[str]:
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it may go while we look
            found.append(path.read_text())
    return found


def test_an_unchanged_tree_is_not_imaged_twice_and_a_changed_one_is(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = plant(tmp_path / "tree", seed=5)
    first = layer_image(tree, state=state)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")  # no mkfs.erofs: it would be an error to need it
        assert layer_image(tree, state=state) == first
    (tree / "d0/f0").write_bytes(b"?")
    assert layer_image(tree, state=state) != first


def test_the_image_is_made_again_when_its_file_is_gone(state: StateDir, tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", seed=6)
    first = layer_image(tree, state=state)
    first.unlink()
    assert layer_image(tree, state=state) == first
    assert first.is_file()


def test_what_is_no_directory_is_one_clear_line_and_leaves_nothing(state: StateDir, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    before = set(layers_directory(state).iterdir())
    with pytest.raises(ImageError, match=r"mkfs\.erofs failed"):
        make_image(tmp_path / "file", state=state)
    with pytest.raises(OSError, match="nothing"):
        layer_image(tmp_path / "nothing", state=state)
    assert set(layers_directory(state).iterdir()) == before | {layers_directory(state) / "by-tree"}
