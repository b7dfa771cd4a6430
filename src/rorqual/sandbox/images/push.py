"""Publishes an image of this host into a layer store, a directory that any web server with ranges can serve.

Store: names/<name>.json, manifests/<64 hex>.json, blobs/<64 hex>, traces/<64 hex>. Everything but names/ and traces/
is named by the SHA-256 of its bytes. Each layer becomes two parts: `meta`, an EROFS image without the files' content,
which a host fetches whole, and `data`, their content in chunks of 256 KiB, each compressed by itself if that makes it
smaller. Format: docs/sandbox-images.md. Owns writing; pull.py reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import zlib
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import HostUnfit, ImageError, ImageNotFound
from rorqual.sandbox.images import layers
from rorqual.sandbox.images.erofs import digest_of, layers_directory, run_mkfs
from rorqual.sandbox.images.store import image_directory, images, root_file_system
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.loader.chunks import CHUNK_BYTES, pack_table
from rorqual.sandbox.state import StateDir

FORMAT = "rorqual-image/1"
_FILE_CHUNK = 1 << 20
"""Files are laid out in pieces of this size in `data`; equal pieces are stored once."""


def publish(
    name: str,
    store: str | Path,
    *,
    compress: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
    state: StateDir | None = None,
) -> str:
    """Writes an image into a store and returns its reference, `name@sha256:<digest of the manifest>`.

    Whoever uses the reference gets these bytes and no others; whoever uses the bare name trusts the store. compress:
    zlib's level for the chunks, 0 keeps them as they are.

    Raises:
        ImageNotFound: no such image. ImageError: it is not made of layers (the host's own, a snapshot).
        HostUnfit: layers cannot be made or mounted here.
    """
    state = state or StateDir.from_environment()
    place = image_directory(name, state=state)
    root = root_file_system(name, state=state)
    if not place.is_dir():
        raise ImageNotFound(name, known=[info.name for info in images(state=state)])
    if len(root.overlays) != 1 or root.plain or root.binds:
        raise ImageError(
            f"image {name!r} cannot be published: it is a snapshot; import_directory makes a layer of files"
        )
    if not layers.usable():
        raise HostUnfit("layers cannot be made here.", fix="apt-get install erofs-utils, and run as root")
    target = Path(store)
    for part in ("names", "manifests", "blobs", "traces"):
        (target / part).mkdir(parents=True, exist_ok=True)
    record = json.loads((place / "image.json").read_text(encoding="utf-8"))
    with layers.kept(state):
        found = [
            _publish_layer(lower, target, compress=compress, chunk_bytes=chunk_bytes, state=state)
            for lower in root.overlays[0][1]
        ]
    manifest = {
        "format": FORMAT,
        "architecture": platform.machine(),
        "envs": dict(root.envs),
        "size_bytes": record["size_bytes"],
        "layers": found,
    }
    data = canonical(manifest)
    digest = hashlib.sha256(data).hexdigest()
    _put(target / "manifests" / f"{digest}.json", data)
    pointer = {"format": "rorqual-name/1", "manifest": f"sha256:{digest}"}
    _put(target / "names" / f"{place.name}.json", canonical(pointer))
    return f"{name}@sha256:{digest}"


def publish_trace(name: str, store: str | Path, *, state: StateDir | None = None) -> int:
    """Writes what a run of a remote image on this host has touched, in order, into its store.

    Other hosts then fetch those chunks ahead of demand. Returns how many chunks that are; 0 when none was recorded.

    Raises ImageError: the image did not come from a store.
    """
    state = state or StateDir.from_environment()
    count = 0
    place = image_directory(name, state=state)
    record = json.loads((place / "image.json").read_text(encoding="utf-8")) if place.is_dir() else {}
    if record.get("origin") != "remote":
        raise ImageError(f"image {name!r} did not come from a store, so no run of it was recorded")
    for layer in record["layers"]:
        with contextlib.suppress(FileNotFoundError):
            data = (layers_directory(state) / layer / "trace").read_bytes()
            (Path(store) / "traces").mkdir(parents=True, exist_ok=True)
            _put(Path(store) / "traces" / layer.removesuffix(".lazy"), data)
            count += len(data) // 4
    return count


def canonical(document: dict[str, Any]) -> bytes:
    """JSON whose bytes follow from its content."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def layer_id(layer: dict[str, Any]) -> str:
    """The name of a layer: the SHA-256 of its entry in the manifest, which holds the digests of its parts."""
    return hashlib.sha256(canonical(layer)).hexdigest()


def _publish_layer(
    lower: str, store: Path, *, compress: int, chunk_bytes: int, state: StateDir
) -> dict[str, Any]:
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=layers_directory(state)))
    try:
        (building / "mount").mkdir()
        meta, data = building / "meta", building / "data"

        def split() -> None:
            (directory,) = layers.mount_lowers([lower], str(building / "mount"), state=state)
            run_mkfs(Path(directory), str(meta), data=str(data), chunk_bytes=_FILE_CHUNK)

        layers.in_private_mounts(split)
        return {
            "meta": _pack_meta(meta, store),
            **_pack_data(data, building, store, compress=compress, chunk_bytes=chunk_bytes),
        }
    finally:
        remove_tree(str(building))


def _pack_meta(path: Path, store: Path) -> dict[str, Any]:
    plain = path.read_bytes()
    packed = zlib.compress(plain, 6)
    blob = _put_blob(packed, store)
    return {
        "blob": blob,
        "size": len(packed),
        "bytes": len(plain),
        "sha256": hashlib.sha256(plain).hexdigest(),
    }


def _pack_data(path: Path, building: Path, store: Path, *, compress: int, chunk_bytes: int) -> dict[str, Any]:
    entries: list[tuple[bytes, int, int]] = []
    offset = total = 0
    packed_path = building / "packed"
    with path.open("rb") as file, packed_path.open("wb") as out:
        while chunk := file.read(chunk_bytes):
            stored = zlib.compress(chunk, compress) if compress else chunk
            if len(stored) >= len(chunk):
                stored = chunk
            entries.append((hashlib.sha256(chunk).digest(), offset, len(stored)))
            out.write(stored)
            offset += len(stored)
            total += len(chunk)
    table = pack_table(entries, chunk_bytes=chunk_bytes, data_bytes=total)
    name = digest_of(packed_path)
    blob = store / "blobs" / name
    if not blob.exists():
        _move(packed_path, blob)
    return {
        "table": {"blob": _put_blob(table, store), "size": len(table)},
        "data": {"blob": name, "size": offset, "bytes": total},
    }


def _move(source: Path, target: Path) -> None:
    """Into the store, which may be another file system; whole or not there."""
    temporary = f"{target}.{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with source.open("rb") as file, open(temporary, "xb") as out:
            while data := file.read(1 << 20):
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _put_blob(data: bytes, store: Path) -> str:
    name = hashlib.sha256(data).hexdigest()
    if not (store / "blobs" / name).exists():
        _put(store / "blobs" / name, data)
    return name


def _put(path: Path, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
