"""The image store: <state>/images/<name>/image.json. An image is complete when its directory has its name.

image.json names its layers in <state>/layers, the top one first (layers.py); where EROFS cannot be mounted, its files
lie beside it in rootfs/ instead.

Images are built in a `.building-*` directory and renamed into place, so that a killed build leaves nothing
usable and `prune()` finds it. Owns names and lookup; base.py, debian.py and oci.py make the contents.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import ImageError, ImageNotFound, InvalidRequest, Unsupported
from rorqual.sandbox.images import layers as stacks
from rorqual.sandbox.images import snapshots
from rorqual.sandbox.images.base import RootFs, base_image
from rorqual.sandbox.keeper import leases
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import StateDir

BASE_NAMES = ("base", "host")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(?::[a-z0-9][a-z0-9._-]{0,62})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInfo:
    """One image on this host."""

    name: str
    origin: str
    """'host', 'debian', 'oci', 'directory', 'remote' or 'snapshot'."""
    size_bytes: int | None
    """Sum of its files; None for the host's own directories."""
    digest: str
    """Manifest digest of an OCI image, '' otherwise."""


def image_directory(name: str, *, state: StateDir) -> Path:
    """Raises InvalidRequest when the name is not one."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"image: {name!r} is not an image name (lower-case letters, digits, '.', '_', '-', ':')"
        )
    return state.images / name.replace(":", "@")


def images(*, state: StateDir | None = None) -> list[ImageInfo]:
    """Every image on this host, the base image first."""
    state = state or StateDir.from_environment()
    result = [ImageInfo(name="base", origin="host", size_bytes=None, digest="")]
    if state.images.is_dir():
        for place in sorted(state.images.iterdir()):
            record = place / "image.json"
            if not place.name.startswith(".") and record.is_file():
                data = json.loads(record.read_text(encoding="utf-8"))
                result.append(
                    ImageInfo(
                        name=place.name.replace("@", ":"),
                        origin=data["origin"],
                        size_bytes=data["size_bytes"],
                        digest=data["digest"],
                    )
                )
    return result


def remove_image(name: str, *, state: StateDir | None = None) -> bool:
    """Removes an image; False when there was none. Sandboxes that run on it must be gone first.

    Raises:
        ImageError: snapshots are built on it, or (a snapshot) a live sandbox runs on it.
    """
    state = state or StateDir.from_environment()
    place = image_directory(name, state=state)
    if not place.is_dir():
        return False
    above = [child for child, below in snapshots.parents(state).items() if name in below]
    if above:
        raise ImageError(
            f"image {name!r} cannot go: {', '.join(sorted(above))} is built on it; remove that first"
        )
    if (place / leases.FILE).exists():
        if not leases.remove_unused(str(place)):
            raise ImageError(f"image {name!r} cannot go: a live sandbox runs on it; kill that first")
        return True
    doomed = state.images / f".removing-{os.getpid()}-{place.name}"
    os.rename(place, doomed)
    remove_tree(str(doomed))
    stacks.remove_unused(state)
    return True


def install(building: Path, *, name: str, state: StateDir, record: dict[str, Any]) -> None:
    """Writes image.json and renames the finished directory into place; an older image of this name gives
    way."""
    with (building / "image.json").open("w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    if snapshots.FORK_NAME.fullmatch(name):
        os.rename(building, state.images / name)
        return
    remove_image(name, state=state)
    os.rename(building, image_directory(name, state=state))
    fd = os.open(state.images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def root_file_system(name: str, *, layers: Sequence[str] = (), state: StateDir) -> RootFs:
    """What a sandbox of this image is made of, with these images on top of it, the later over the earlier.

    Raises:
        ImageNotFound: no such image; the message names those that exist.
        InvalidRequest: not a name, or not one that can lie on another.
        ImageError: a layer of it is gone.
    """
    root = _root(name, state=state)
    if not layers:
        return root
    return stacks.stack(root, [(layer, _root(layer, state=state)) for layer in layers])


def _root(name: str, *, state: StateDir) -> RootFs:
    state.prepare()
    if name in BASE_NAMES:
        return base_image(state.images)
    fork = snapshots.FORK_NAME.fullmatch(name)
    place = state.images / name if fork else image_directory(name, state=state)
    if not (place / "image.json").is_file():
        raise ImageNotFound(name, known=[info.name for info in images(state=state)])
    record = json.loads((place / "image.json").read_text(encoding="utf-8"))
    if record["origin"] == "memory":
        raise Unsupported(
            f"image={name!r} here",
            reason="it is a machine's memory, and goes on as a machine only",
            available=["substrate='microvm'"],
        )
    if "stack" in record:
        below = tuple(record.get("parent_layers", ()))
        parent = root_file_system(record["parent"], layers=below, state=state)
        return snapshots.on_top(name, place, record, parent)
    if "layers" in record:
        return RootFs(overlays=(("/", stacks.of_record(name, record, state=state)),), envs=record["envs"])
    note = "this image is a plain directory: " + (
        stacks.probe()[1] if not stacks.usable() else "it was imported where no layers could be mounted"
    )
    return RootFs(overlays=(("/", (str(place / "rootfs"),)),), envs=record["envs"], notes=(note,))
