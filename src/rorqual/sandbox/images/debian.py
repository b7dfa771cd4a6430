"""Builds an image from Debian packages with mmdebstrap, from the mirror and keys this host's apt uses."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rorqual.sandbox.errors import HostUnfit, InvalidRequest
from rorqual.sandbox.images import layers
from rorqual.sandbox.images.base import USER_ID
from rorqual.sandbox.images.programs import run_program
from rorqual.sandbox.images.store import ImageInfo, image_directory, install
from rorqual.sandbox.images.unpack import Root, furnish
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import StateDir

PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+)?")


def codename() -> str:
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise HostUnfit("this host's /etc/os-release names no Debian release; pass suite='bookworm'.")


def build_debian(
    name: str,
    *,
    packages: Sequence[str] = (),
    suite: str = "",
    mirror: str = "",
    timeout: float = 1800.0,
    state: StateDir | None = None,
) -> ImageInfo:
    """Builds a minimal Debian with these packages; `create(image=name)` then runs on it.

    suite: release name, by default the host's. mirror: a URL; by default what apt uses here, or
    deb.debian.org.

    Raises:
        InvalidRequest: a name is not one.
        HostUnfit: no mmdebstrap.
        ImageError: the build failed; the message ends with mmdebstrap's own words.
    """
    state = state or StateDir.from_environment()
    state.prepare()
    image_directory(name, state=state)
    wrong = [package for package in packages if not PACKAGE.fullmatch(package)]
    if wrong or not re.fullmatch(r"[a-z]*", suite):
        raise InvalidRequest(
            f"packages, suite: {wrong or suite!r}: not the name of a Debian package or release"
        )
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
    try:
        building.chmod(0o755)
        command = [
            "--quiet",
            "--variant=minbase",
            "--mode=" + ("root" if os.geteuid() == 0 else "unshare"),
            "--include=" + ",".join(packages),
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--format=directory",
            suite or codename(),
            str(building / "rootfs"),
        ]
        if not packages:
            command.remove("--include=")
        if mirror:
            command.append(mirror)
        run_program("mmdebstrap", command, package="mmdebstrap", about=name, timeout=timeout, lines=3)
        root = Root(str(building / "rootfs"), source=name)
        try:
            furnish(root, user_id=USER_ID)
        finally:
            root.close()
        size = sum(
            (Path(place) / file).lstat().st_size
            for place, _, files in os.walk(building / "rootfs")
            for file in files
        )
        record = {"origin": "debian", "size_bytes": size, "digest": "", "envs": {}}
        with layers.kept(state):
            if layers.usable():
                record["layers"] = layers.seal(building / "rootfs", state=state)
            install(building, name=name, state=state, record=record)
    except BaseException:
        remove_tree(str(building))
        raise
    return ImageInfo(name=name, origin="debian", size_bytes=size, digest="")
