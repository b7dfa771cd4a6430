"""The root of a machine, as EROFS images that it gets as read-only block devices.

An image of the store: one EROFS image a layer (images/erofs.py), the same files that containers mount. `base`: the
host's own essential Debian packages and Python, by the package manager's lists, under the skeleton that containers get
(images/base.py); made once for a set of package versions, offline, in the cache: guests/base-<16 hex digits>.erofs.
Unlike a container's base it is a copy: a guest cannot be shown the host's /usr.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.sandbox import images
from rorqual.sandbox.errors import HostUnfit, ImageError, Unsupported
from rorqual.sandbox.images import erofs
from rorqual.sandbox.images.base import base_image
from rorqual.sandbox.images.layers import disk_image, is_layer
from rorqual.sandbox.images.store import BASE_NAMES
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import StateDir, cache_dir

SEEDS = ("python3", "procps", "ca-certificates", "libpam-modules", "mount", "netbase")
"""Beside the essential packages, those of these that are installed, with all that they depend on."""
VERSION = 1
"""Part of the base image's name: a change of what goes into it makes a new one."""
MAX_LAYERS = 16
_SKIPPED = re.compile(r"/usr/share/(doc|man|info|locale|lintian|bug|menu|zoneinfo)/")


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineRoot:
    """What a machine's root is made of."""

    layers: tuple[Path, ...]
    """EROFS images, the top one first."""
    envs: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def machine_root(image: str, *, layers: Sequence[str] = (), state: StateDir) -> MachineRoot:
    """The root of an image of the store, with these images on top of it, the later over the earlier.

    Raises:
        ImageNotFound, InvalidRequest: as `images.root_file_system`.
        Unsupported: a container's snapshot, whose files belong to host ids.
        HostUnfit: no mkfs.erofs; `base` on a host that is not Debian.
    """
    if image in BASE_NAMES and not layers:
        return MachineRoot(
            layers=(base_layer(state=state),),
            notes=("base is a copy of this host's essential packages and Python, not of all of its /usr",),
        )
    root = images.root_file_system(image, layers=layers, state=state)
    if root.leases:
        raise Unsupported(
            f"image={image!r}",
            reason="it is a container's snapshot, on host directories that a machine cannot see",
            available=["images.import_oci", "images.build_debian", "a snapshot of a machine"],
        )
    if len(root.overlays) != 1 or root.overlays[0][0] != "/":
        raise Unsupported(
            f"image={image!r}",
            reason="it shows directories of this host, which a machine cannot see",
            available=["images.import_oci", "images.build_debian"],
        )
    lowers = root.overlays[0][1]
    if len(lowers) > MAX_LAYERS:
        raise ImageError(f"{image}: {len(lowers)} layers, and a machine takes at most {MAX_LAYERS}")
    found = []
    for lower in lowers:
        if not is_layer(lower):
            found.append(erofs.layer_image(lower, state=state))
        elif (whole := disk_image(lower, state=state)) is not None:
            found.append(whole)
        else:
            raise Unsupported(
                f"image={image!r}",
                reason="it is not all on this host, and a machine's disk must be",
                available=["substrate='container'", "images.fetch(name) before"],
            )
    return MachineRoot(layers=tuple(found), envs=root.envs, notes=root.notes)


def base_layer(*, state: StateDir, cache: Path | None = None) -> Path:
    """The base image's only layer, made when missing: some seconds and 120 MB, once for a set of package versions.

    Raises:
        HostUnfit: no dpkg, or no mkfs.erofs.
    """
    packages = _packages()
    skeleton = Path(base_image(state.images).overlays[0][1][0])
    parts = [
        str(VERSION),
        skeleton.parent.name,
        *(f"{name}={version}" for name, version in sorted(packages.items())),
    ]
    name = f"base-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}{erofs.SUFFIX}"
    place = (cache or cache_dir()) / "guests"
    place.mkdir(parents=True, exist_ok=True)
    target = place / name
    if target.is_file():
        return target
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=place))
    try:
        building.chmod(0o755)
        tree = building / "tree"
        shutil.copytree(skeleton, tree, symlinks=True)
        for path in sorted(_files(packages)):
            _copy(path, tree)
        erofs.run_mkfs(tree, str(building / name))
        os.chmod(building / name, 0o644)  # a VMM may run as another user
        os.rename(building / name, target)
    finally:
        remove_tree(str(building))
    return target


def _dpkg(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["dpkg-query", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostUnfit(
            f"the base image of machines is made of this host's Debian packages, and dpkg-query fails: {error}. "
            "Use an image of images.import_oci or images.build_debian."
        ) from error
    return done.stdout


def _packages() -> dict[str, str]:
    """Name -> version of every installed package that goes into the base image."""
    installed: dict[str, tuple[str, str]] = {}
    provided: dict[str, str] = {}
    wanted = []
    names = ("Package", "Essential", "Version", "db:Status-Abbrev", "Pre-Depends", "Depends", "Provides")
    fields = "\\t".join(f"${{{name}}}" for name in names) + "\\n"
    for line in _dpkg("-W", "-f", fields).splitlines():
        name, essential, version, status, first, second, provides = line.split("\t")
        if not status.startswith("ii"):
            continue
        installed[name] = (version, f"{first}, {second}")
        for other in re.findall(r"[a-z0-9][a-z0-9+.-]+", re.sub(r"\([^)]*\)", "", provides)):
            provided.setdefault(other, name)
        if essential == "yes" or name in SEEDS:
            wanted.append(name)
    if not wanted:
        raise HostUnfit("the base image of machines needs a Debian host: dpkg knows no essential package.")
    found: dict[str, str] = {}
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        version, needs = installed[name]
        found[name] = version
        for need in needs.split(","):
            for choice in need.split("|"):
                other = re.sub(r"[:(\[].*", "", choice).strip()
                other = other if other in installed else provided.get(other, "")
                if other:
                    wanted.append(other)
                    break
    return found


def _files(packages: Mapping[str, str]) -> set[str]:
    """The host's files that go in: those of the packages below /usr, what was compiled of them, their alternatives."""
    found: set[str] = set()
    real: dict[str, str] = {}
    for line in _dpkg("-L", *sorted(packages)).splitlines():
        if not line.startswith("/") or line == "/.":
            continue
        place, _, name = line.rpartition("/")
        if place not in real:
            real[place] = os.path.realpath(place)
        path = f"{real[place]}/{name}"
        if path.startswith("/usr/") and not _SKIPPED.match(path + "/"):
            found.add(path)
    for path in list(found):
        if path.endswith(".py"):  # compiling every module anew costs an emulated machine seconds
            place, _, name = path.rpartition("/")
            with contextlib.suppress(OSError):
                stem = name.removesuffix(".py") + "."
                found |= {
                    f"{place}/__pycache__/{entry}"
                    for entry in os.listdir(f"{place}/__pycache__")
                    if entry.startswith(stem)
                }
    for place in ("/usr/bin", "/usr/sbin"):
        for entry in os.scandir(place):
            alternative = entry.is_symlink() and os.readlink(entry.path).startswith("/etc/alternatives/")
            if alternative and os.path.realpath(entry.path) in found:
                found.add(entry.path)
    return found


def _copy(path: str, tree: Path) -> None:
    """One file, link or directory; devices and what is gone meanwhile stay out."""
    target = str(tree) + path
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink(os.readlink(path), target)
    elif os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif os.path.isfile(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with contextlib.suppress(PermissionError):
            shutil.copyfile(path, target)
            shutil.copystat(path, target)
