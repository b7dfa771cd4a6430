"""Imports a directory of this host as an image or as a layer for others."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from rorqual.sandbox.errors import ImageRejected, InvalidRequest
from rorqual.sandbox.images import layers
from rorqual.sandbox.images.base import USER_ID
from rorqual.sandbox.images.store import ImageInfo, image_directory, install
from rorqual.sandbox.images.unpack import Bounds, Root, furnish
from rorqual.sandbox.keeper.layers import Budget, LayerRefused, copy_tree
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import StateDir


def import_directory(
    path: str | Path,
    *,
    name: str,
    at: str = "/",
    owner: int | None = None,
    bounds: Bounds | None = None,
    state: StateDir | None = None,
) -> ImageInfo:
    """Imports a directory as it is now. `create(image=name)`, or on top of another: `create(layers=[name])`.

    at: where in the sandbox its content lies. '/' makes a whole root, with mount points and an account `user` added
    where they lack; anything else makes a layer. owner: the id inside that everything belongs to (1000 is `user`);
    None keeps the owners as they are on the host.

    Raises:
        InvalidRequest: the name or `at` is not one.
        ImageRejected: it is no directory, too large, or holds what a layer cannot carry (devices).
    """
    state = state or StateDir.from_environment()
    state.prepare()
    image_directory(name, state=state)
    parts = [part for part in at.split("/") if part]
    if not at.startswith("/") or ".." in parts or "." in parts or "\0" in at:
        raise InvalidRequest(f"at: {at!r} must be an absolute path inside, without '..'")
    if owner is not None and not 0 <= owner < 65535:
        raise InvalidRequest(f"owner: {owner!r} must be an id from 0 to 65534")
    bounds = bounds or Bounds()
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
    try:
        building.chmod(0o755)
        root = building / "rootfs"
        target = root.joinpath(*parts)
        target.mkdir(parents=True, mode=0o755)
        budget = Budget(max_bytes=bounds.max_bytes, max_entries=bounds.max_entries)
        _copy(Path(path), target, budget)
        for index in range(len(parts)):  # equal imports make equal layers
            os.utime(root.joinpath(*parts[:index]), (0, 0))
        if owner is not None and os.geteuid() == 0:
            _give(target, owner)
        if not parts:
            held = Root(str(root), source=str(path))
            try:
                furnish(held, user_id=USER_ID)
            finally:
                held.close()
        record = {"origin": "directory", "size_bytes": budget.size_bytes, "digest": "", "envs": {}}
        with layers.kept(state):
            if layers.usable():
                record["layers"] = layers.seal(root, state=state)
            install(building, name=name, state=state, record=record)
    except BaseException:
        remove_tree(str(building))
        raise
    return ImageInfo(name=name, origin="directory", size_bytes=budget.size_bytes, digest="")


def _copy(source: Path, target: Path, budget: Budget) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        here = os.open(source, flags)
    except OSError as error:
        raise ImageRejected(str(source), f"cannot be read as a directory: {error.strerror}") from error
    there = os.open(target, flags)
    try:
        copy_tree(here, there, budget=budget)
    except LayerRefused as error:
        raise ImageRejected(str(source), str(error)) from error
    except OSError as error:
        raise ImageRejected(str(source), f"cannot be copied: {error}") from error
    finally:
        os.close(here)
        os.close(there)


def _give(place: Path, owner: int) -> None:
    """Our copy, which nobody else writes: no link is followed."""
    for path, directories, files in os.walk(place):
        for name in (".", *directories, *files):
            entry = os.path.join(path, name)
            mode = os.lstat(entry).st_mode
            os.chown(entry, owner, owner, follow_symlinks=False)
            if not stat.S_ISLNK(mode):
                os.chmod(entry, stat.S_IMODE(mode))
