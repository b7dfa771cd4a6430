"""Builds an image as a chain of layers, each an EROFS image of what one step changed; equal chains are shared.

A step is unpacked through an overlay on the steps below it, so that links resolve as they will in the sandbox and the
kernel writes the whiteouts. <state>/layers/by-chain/<64 hex> says which layer a chain made before, by the chain id of
the OCI image specification (config.md), so images on one base share its layers. Root only. Owns the overlay of the
build and the records of chains; unpack.py and oci.py own what a step does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox.errors import ImageError, ImageRejected
from rorqual.sandbox.images.erofs import layers_directory, make_image, mount_erofs
from rorqual.sandbox.images.layers import in_private_mounts
from rorqual.sandbox.images.unpack import Tally
from rorqual.sandbox.keeper import linux
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import StateDir

_STAGE = "/mnt"
_OPAQUE = "trusted.overlay.opaque"
_OVERLAY = "trusted.overlay."


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One layer to be."""

    identity: str
    """What it does, as a digest: an OCI diff id, or the name and version of our own step."""
    apply: Callable[[str], None]
    """Does it in the directory it is given. Raises ImageRejected."""


def build(steps: Sequence[Step], building: Path, *, tally: Tally, source: str, state: StateDir) -> list[str]:
    """Makes the layers of these steps, the first one lowest; returns their names, the top one first.

    building: an empty directory for scratch, on a file system that can be an overlay's upper. tally: what the steps
    count; a step that was made before adds what it counted then.

    Raises:
        ImageRejected: a step says so, or it cannot become a layer. HostUnfit: no mkfs.erofs.
    """
    return in_private_mounts(lambda: _build(steps, building, tally, source, state))


def _build(steps: Sequence[Step], building: Path, tally: Tally, source: str, state: StateDir) -> list[str]:
    linux.mount("tmpfs", _STAGE, fstype="tmpfs", data="size=4m,mode=700")
    place = layers_directory(state)
    (place / "by-chain").mkdir(mode=0o700, exist_ok=True)
    names: list[str] = []
    mounted: list[str] = []
    chain = ""
    for number, step in enumerate(steps):
        text = f"{chain} {step.identity}" if chain else step.identity
        chain = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if chain else step.identity
        known = place / "by-chain" / hashlib.sha256(chain.encode()).hexdigest()
        name = _known(known, place, tally)
        if name is None:
            before = tally.size_bytes, tally.entries
            upper = building / f"upper{number}"
            upper.mkdir(mode=0o755)
            _unpack(step, upper, building / f"work{number}", mounted, source=source)
            try:
                name = make_image(upper, state=state).name
            except ImageError as error:
                raise ImageRejected(source, f"it cannot become a layer: {error}") from error
            remove_tree(str(upper))
            record = {
                "layer": name,
                "size": tally.size_bytes - before[0],
                "entries": tally.entries - before[1],
            }
            _write(known, json.dumps(record))
        names.insert(0, name)
        if number < len(steps) - 1:
            target = f"{_STAGE}/{number}"
            os.mkdir(target)
            mount_erofs(str(place / name), target)
            mounted.insert(0, target)
    return names


def _unpack(step: Step, upper: Path, work: Path, below: list[str], *, source: str) -> None:
    if not below:
        step.apply(str(upper))
        return
    work.mkdir()
    merged = f"{_STAGE}/merged"
    with contextlib.suppress(FileExistsError):
        os.mkdir(merged)
    data = f"lowerdir={':'.join(below)},upperdir={upper},workdir={work},redirect_dir=nofollow,metacopy=off,index=off"
    linux.mount("overlay", merged, fstype="overlay", data=data)
    try:
        step.apply(merged)
    finally:
        linux.umount(merged)
        remove_tree(str(work))
    try:
        _strip(str(upper))
    except OSError as error:
        raise ImageRejected(source, f"its files cannot be made a layer: {error.strerror}") from error


def _strip(upper: str) -> None:
    """Takes away what the overlay notes for itself; whiteouts and opaque marks stay."""
    stack = [upper]
    while stack:
        path = stack.pop()
        for mark in os.listxattr(path, follow_symlinks=False):
            if mark.startswith(_OVERLAY) and mark != _OPAQUE:
                os.removexattr(path, mark, follow_symlinks=False)
        if os.path.isdir(path) and not os.path.islink(path):
            stack += [entry.path for entry in os.scandir(path)]


def _known(path: Path, place: Path, tally: Tally) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(path.read_text(encoding="utf-8"))
        name: str = record["layer"]
        if (place / name).is_file():
            tally.size_bytes += record["size"]
            tally.entries += record["entries"]
            return name
    return None


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    temporary.write_text(text, encoding="utf-8")
    os.rename(temporary, path)
