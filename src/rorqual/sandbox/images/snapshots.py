"""Snapshots as images: <state>/images/<name>/{image.json, lease, <layers>}, on top of the image the sandbox ran on.

image.json has `parent` (an image's name), `parent_layers` (those of `create(layers=...)`) and `stack`: per layer, the
top one first, pairs of a mount point and a directory. A fork's layers are the same under a hidden name,
`.fork-<12 hex digits>`, and go with their last user (keeper/leases.py). Owns the format; the keeper's child writes the
layers (keeper/layers.py).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import ImageError, ImageRejected
from rorqual.sandbox.images.base import RootFs
from rorqual.sandbox.keeper import layers, leases
from rorqual.sandbox.state import StateDir

FORK_NAME = re.compile(re.escape(leases.FORK_PREFIX) + "[0-9a-f]{12}")
MAX_LAYERS = 64
"""Layers of one sandbox: the kernel's bound is 500, and a page for their paths."""


def read(place: Path) -> dict[str, Any]:
    """The record of one image. Raises ImageRejected when it is not readable."""
    try:
        record: dict[str, Any] = json.loads((place / "image.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageRejected(place.name, f"its image.json cannot be read: {error}") from error
    return record


def parents(state: StateDir) -> dict[str, tuple[str, ...]]:
    """Snapshot -> the images it is built on, forks in use included."""
    found = {}
    for path in state.images.glob("*/image.json") if state.images.is_dir() else ():
        name = path.parent.name
        if not name.startswith(".") or FORK_NAME.fullmatch(name):
            record = read(path.parent)
            if "parent" in record:
                found[name.replace("@", ":")] = (record["parent"], *record.get("parent_layers", ()))
    return found


def on_top(name: str, place: Path, record: dict[str, Any], parent: RootFs) -> RootFs:
    """The root file system of a snapshot.

    Raises:
        ImageRejected: its image has no such mount point any more, or too many layers lie on each other.
    """
    targets = [target for target, _ in parent.overlays]
    above: dict[str, list[str]] = {target: [] for target in targets}
    for layer in record["stack"]:
        for target, directory in layer:
            if target not in above:
                raise ImageRejected(
                    name, f"it has files in {target}, which its image {record['parent']!r} lacks now"
                )
            above[target].append(str(place / directory))
    plain = {target: len(above[target]) + parent.plain.get(target, 0) for target in targets}
    if max(plain.values(), default=0) > MAX_LAYERS:
        raise ImageRejected(
            name, f"more than {MAX_LAYERS} snapshots lie on each other: start again from an image"
        )
    return RootFs(
        overlays=tuple((target, (*above[target], *lower)) for target, lower in parent.overlays),
        binds=parent.binds,
        envs=parent.envs,
        notes=(*(note for note in parent.notes if not note.startswith("files from")), _note(record)),
        plain=plain,
        id_base=record["id_base"],
        leases=(str(place / leases.FILE), *parent.leases),
    )


def _note(record: dict[str, Any]) -> str:
    return f"files from a snapshot of {record['sandbox']}; no process and no memory was carried over"


def finish(
    building: Path, *, report: dict[str, Any], source: dict[str, Any], fork: bool, state: StateDir
) -> dict[str, Any]:
    """The record for image.json of a copied snapshot. Layers of forks below it, which will go, are copied in.

    source: the sandbox's record. Raises ImageRejected, OSError.
    """
    (building / "copied.json").unlink()
    stack = [report["layers"]]
    parent, size = source["image"], report["size_bytes"]
    below = list(source.get("layers", ()))
    budget = layers.Budget(max_bytes=1 << 62, max_entries=1 << 62)  # bounded when they were taken
    while not fork and FORK_NAME.fullmatch(parent):
        record = read(state.images / parent)
        for number, layer in enumerate(record["stack"]):
            copied = []
            for target, directory in layer:
                copy = f"{len(stack)}.{number}.{directory}"
                _copy(state.images / parent / directory, building / copy, budget)
                copied.append([target, copy])
            stack.append(copied)
        parent, below = record["parent"], [*record.get("parent_layers", ()), *below]
    return {
        "origin": "snapshot",
        "size_bytes": size + budget.size_bytes,
        "entries": report["entries"] + budget.entries,
        "digest": "",
        "envs": {},
        "parent": parent,
        "parent_layers": below,
        "stack": stack,
        "id_base": source["id_base"],
        "sandbox": source["id"],
    }


def _copy(source: Path, target: Path, budget: layers.Budget) -> None:
    target.mkdir(0o700)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    here, there = os.open(source, flags), os.open(target, flags)
    try:
        layers.copy_tree(here, there, budget=budget)
    except layers.LayerRefused as error:
        raise ImageError(f"{source}: {error}") from error
    finally:
        os.close(here)
        os.close(there)
