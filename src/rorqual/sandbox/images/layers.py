"""Layers as an image's record names them, and what keeps the ones that are used.

A layer is <state>/layers/<64 hex>.erofs (a file) or <64 hex>.lazy (a directory: loader/chunks.py). A lower of a
`RootFs` is a host directory, or a layer's path, or `<layer's path>#/sub` for a directory inside it. Images and clients
that build one hold a shared lock on <state>/layers/lock; what nobody names is removed under an exclusive one.
Owns names, references and removal; loader/holder.py mounts.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rorqual.sandbox.errors import HostUnfit, ImageError, InvalidRequest
from rorqual.sandbox.host import find_program
from rorqual.sandbox.images.base import RootFs
from rorqual.sandbox.images.erofs import (
    SUFFIX,
    kept,
    layers_directory,
    make_image,
    mount_erofs,
    recall,
    remember,
    run_mkfs,
)
from rorqual.sandbox.keeper import linux
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.loader import client
from rorqual.sandbox.loader.events import read_events
from rorqual.sandbox.state import StateDir

__all__ = [
    "NAME",
    "disk_image",
    "holder_directory",
    "in_private_mounts",
    "is_layer",
    "kept",
    "layer_events",
    "mount_lowers",
    "names_of",
    "of_record",
    "prepare",
    "probe",
    "remove_unused",
    "seal",
    "stack",
    "usable",
]

NAME = re.compile(r"[0-9a-f]{64}\.(erofs|lazy)")
_CACHED_DAYS = 30
_STALE_S = 6 * 3600
T = TypeVar("T")


def is_layer(lower: str) -> bool:
    """Whether a lower of a RootFs is a layer, not a directory of the host."""
    return NAME.fullmatch(os.path.basename(lower.partition("#")[0])) is not None


def names_of(root: RootFs) -> list[str]:
    """The layers of a root file system, each once."""
    lowers = [lower.partition("#")[0] for _, all_lowers in root.overlays for lower in all_lowers]
    return list(dict.fromkeys(os.path.basename(lower) for lower in lowers if is_layer(lower)))


def holder_directory(state: StateDir) -> str:
    return str(state.run / "layers")


def prepare(root: RootFs, *, state: StateDir) -> None:
    """Has the layers of a root file system mounted, so that a launch finds them.

    Raises HostUnfit, which says which layer and why not.
    """
    names = names_of(root)
    if not names:
        return
    if os.geteuid() != 0:
        raise HostUnfit("this image is made of EROFS layers, which only root may mount.", fix="run as root")
    try:
        client.prepare(holder_directory(state), str(layers_directory(state)), names)
    except client.HolderError as error:
        raise HostUnfit(f"its layers cannot be mounted: {error}") from error


def usable() -> bool:
    """Whether this user can make and mount EROFS layers here; else images stay plain directories."""
    return probe()[0]


@functools.cache
def probe() -> tuple[bool, str, str]:
    """(whether a layer was made and mounted, how or why not, the command that would change it). Tried once."""
    if os.geteuid() != 0:
        return (
            False,
            "only root may mount EROFS: images are plain directories, and remote layers have none",
            "",
        )
    if find_program("mkfs.erofs") is None:
        return False, "mkfs.erofs is not in PATH: images are plain directories", "apt-get install erofs-utils"
    with tempfile.TemporaryDirectory(prefix="rorqual-probe-") as place:
        for name in ("tree", "target"):
            os.mkdir(f"{place}/{name}")
        try:
            run_mkfs(Path(place, "tree"), f"{place}/image")
            how = in_private_mounts(lambda: mount_erofs(f"{place}/image", f"{place}/target"))
        except (OSError, ImageError) as error:
            return (
                False,
                f"no EROFS image mounts here, so images are plain directories: {error}",
                "modprobe erofs",
            )
    ways = {
        "file": "straight from its file",
        "loop": "over a loop device, since this kernel is older than 6.12",
    }
    return True, f"a layer was made and mounted {ways[how]}", ""


def in_private_mounts(work: Callable[[], T]) -> T:
    """Runs `work` in a thread with a mount namespace of its own, which goes with the thread. Root only."""
    box: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            linux.unshare(linux.CLONE_NEWNS)
            linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
            box.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="rorqual-mounts")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return box[0]


def mount_lowers(lowers: tuple[str, ...] | list[str], place: str, *, state: StateDir) -> list[str]:
    """Inside `in_private_mounts`: the lowers as directories; layers are mounted below the directory `place`.

    Raises HostUnfit.
    """
    found = []
    mounted: dict[str, str] = {}
    for lower in lowers:
        if not is_layer(lower):
            found.append(lower)
            continue
        name, _, inside = lower.partition("#")
        if name not in mounted:
            target = f"{place}/l{len(os.listdir(place))}"
            os.mkdir(target, 0o700)
            directory = holder_directory(state)
            try:
                client.prepare(directory, str(layers_directory(state)), [os.path.basename(name)])
                (tree,) = client.trees(directory, [os.path.basename(name)])
            except (client.HolderError, OSError) as error:
                raise HostUnfit(f"{name}: cannot be mounted: {error}") from error
            try:
                linux.attach(tree, target, readonly=True)
            finally:
                os.close(tree)
            mounted[name] = target
        if (path := linux.below(mounted[name], inside)) is not None:
            found.append(path)
    return found


def disk_image(lower: str, *, state: StateDir) -> Path | None:
    """The one file that a machine gets as its disk for this layer; None for a remote one that is not all here.

    A fetched remote layer, which is two files, is made one, once. Raises HostUnfit, ImageError.
    """
    if lower.endswith(SUFFIX):
        return Path(lower)
    if not os.path.exists(f"{lower}/complete"):
        return None
    place = layers_directory(state)
    known = f"lazy-{os.path.basename(lower)[:64]}"
    with kept(state):
        if (image := recall(known, state=state)) is not None:
            return image
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=place))
        try:
            image = in_private_mounts(
                lambda: make_image(mount_lowers([lower], str(building), state=state)[0], state=state)
            )
        finally:
            remove_tree(str(building))
        remember(known, image, state=state)
    return image


def stack(root: RootFs, above: list[tuple[str, RootFs]]) -> RootFs:
    """Puts layers on a root file system, the later ones over the earlier ones, under what a snapshot has on top.

    above: (name, its RootFs). At a mount point of its own, such as the base image's /usr, a layer contributes its
    directory of that name.

    Raises InvalidRequest: an image of several mount points, or a snapshot, is no layer.
    """
    envs = dict(root.envs)
    overlays = {target: list(lower) for target, lower in root.overlays}
    for name, layer in above:
        if len(layer.overlays) != 1 or layer.plain or layer.binds:
            raise InvalidRequest(
                f"layers: {name!r} cannot lie on another image: it is the host's own or a snapshot; "
                "images.import_directory, import_oci and build_debian make layers"
            )
        envs |= layer.envs
        for target, lowers in overlays.items():
            sub = "" if target == "/" else target
            new = [_inside(lower, sub) for lower in layer.overlays[0][1]]
            at = root.plain.get(target, 0)
            lowers[at:at] = [lower for lower in new if lower is not None]
    return replace(
        root,
        overlays=tuple((target, tuple(lowers)) for target, lowers in overlays.items()),
        envs=envs,
    )


def _inside(lower: str, sub: str) -> str | None:
    if is_layer(lower):
        return f"{lower}#{sub}" if sub else lower
    return linux.below(lower, sub)


# -- keeping and removing
# ----------------------------------------------------------------------------------------------------


def seal(directory: Path, *, state: StateDir) -> list[str]:
    """Turns a finished root directory into a layer: its name, the directory gone. Raises as `make_image`."""
    image = make_image(directory, state=state)
    remove_tree(str(directory))
    return [image.name]


def of_record(name: str, record: dict[str, Any], *, state: StateDir) -> tuple[str, ...]:
    """The paths of the layers an image's record names, the top one first. Raises ImageError when one is gone."""
    place = layers_directory(state)
    for layer in record["layers"]:
        if not NAME.fullmatch(layer) or not (place / layer).exists():
            raise ImageError(f"image {name!r} lacks its layer {layer[:12]}: import it again")
    return tuple(str(place / layer) for layer in record["layers"])


def remove_unused(state: StateDir) -> int:
    """Removes layers that no image names, and unfinished ones. Returns how many; 0 while somebody builds.

    What is mounted stays readable for those who have it. Images made for machines (erofs.layer_image) stay as long
    as somebody asked for them within 30 days.
    """
    place = layers_directory(state)
    fd = os.open(place / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _remove_unused(place, _used(state))
    except BlockingIOError:
        return 0
    finally:
        os.close(fd)


def _used(state: StateDir) -> set[str]:
    used: set[str] = set()
    for path in state.images.glob("*/image.json"):
        with contextlib.suppress(OSError, ValueError):
            used |= set(json.loads(path.read_text(encoding="utf-8")).get("layers", ()))
    for link in (layers_directory(state) / "by-tree").glob("*"):
        if time.time() - link.lstat().st_mtime < _CACHED_DAYS * 86400:
            used.add(os.readlink(link) + ".erofs")
        else:
            link.unlink()
    return used


def _remove_unused(place: Path, used: set[str]) -> int:
    count = 0
    for path in list(place.iterdir()):
        stale = path.name.startswith((".building-", ".removing-"))
        if stale and time.time() - path.lstat().st_mtime < _STALE_S:
            continue
        if not stale and (path.name in used or not NAME.fullmatch(path.name)):
            continue
        if path.is_dir():
            doomed = path
            if not stale:  # renamed first: a layer is whole or not there
                doomed = place / f".removing-{os.getpid()}-{path.name}"
                os.rename(path, doomed)
            remove_tree(str(doomed))
        else:
            path.unlink(missing_ok=True)
        count += 1
    return count


def layer_events(*, state: StateDir | None = None) -> list[dict[str, Any]]:
    """What happened to remote layers on this host, oldest first: {'time', 'event', 'layer', 'detail', ...}.

    Events: corrupt (a chunk was refused), unreachable (a store gave nothing), full (no room for chunks), complete,
    loader (the loader itself). A read that failed inside a sandbox (EIO) has its cause here.
    """
    return read_events(str(layers_directory(state or StateDir.from_environment())))
