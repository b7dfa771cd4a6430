"""Imports an OCI image layout or archive as an image of this host. The archive is untrusted.

Accepts a directory (image layout) or an uncompressed tar of one (`skopeo copy ... oci-archive:x.tar`,
`buildah push`, `docker save` of Docker 25 and newer); registry.py fetches from registries. Every blob is checked
against its digest before it is used, every layer against its diff id while it is unpacked (OCI image-spec:
image-layout.md, manifest.md, config.md). Unpacking: unpack.py; layers: chain.py.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import platform
import re
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from rorqual.sandbox.errors import ImageRejected
from rorqual.sandbox.images import layers as stacks
from rorqual.sandbox.images.base import USER_ID
from rorqual.sandbox.images.chain import Step, build
from rorqual.sandbox.images.store import ImageInfo, image_directory, install
from rorqual.sandbox.images.unpack import FURNISH_VERSION, Bounds, Root, Tally, furnish, unpack_layer
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import StateDir

JSON_BYTES = 4 << 20
"""Longest index, manifest or configuration."""
_MEMBERS = 4096
"""Most entries of an archive around the blobs."""
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
_GZIP = ("+gzip", ".gzip")


class Layout:
    """The files of an image layout, by name, from a directory or a tar."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] | None = None
        if path.is_dir():
            return
        try:
            self._places = {}
            with tarfile.open(path, "r:") as archive:
                while (member := archive.next()) is not None:
                    if member.isreg():
                        self._places[member.name.removeprefix("./")] = (member.offset_data, member.size)
                    if len(self._places) > _MEMBERS:
                        raise ImageRejected(str(path), f"more than {_MEMBERS} files around the blobs")
        except FileNotFoundError as error:
            raise ImageRejected(str(path), "no such file or directory") from error
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            hint = " (it is gzip: gunzip it first)" if _magic(path) == b"\x1f\x8b" else ""
            raise ImageRejected(str(path), f"not an OCI archive: {error}{hint}") from error

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """(stream, size) of one file. Raises ImageRejected when it is not there or is not a plain file."""
        if self._places is None:
            try:
                fd = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise ImageRejected(str(self.path), f"{name}: {error.strerror}") from error
            with os.fdopen(fd, "rb") as file:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode):
                    raise ImageRejected(str(self.path), f"{name} is not a plain file")
                yield file, info.st_size
            return
        if name not in self._places:
            raise ImageRejected(str(self.path), f"{name} is missing")
        offset, size = self._places[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            yield cast(IO[bytes], _Slice(file, size)), size

    def document(self, name: str) -> Any:
        with self.open(name) as (file, size):
            if size > JSON_BYTES:
                raise ImageRejected(str(self.path), f"{name}: {size} bytes of JSON (at most {JSON_BYTES})")
            data = file.read(JSON_BYTES + 1)
        return self.parse(data, name)

    def parse(self, data: bytes, name: str) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ImageRejected(str(self.path), f"{name} is not JSON: {error}") from error

    def blob_document(self, descriptor: Any) -> dict[str, Any]:
        """A JSON blob, its digest checked."""
        name, digest = self.blob(descriptor)
        with self.open(name) as (file, size):
            if size > JSON_BYTES:
                raise ImageRejected(str(self.path), f"{digest}: {size} bytes of JSON (at most {JSON_BYTES})")
            data = file.read(JSON_BYTES + 1)
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise ImageRejected(str(self.path), f"{digest}: the content has another digest")
        document = self.parse(data, digest)
        if not isinstance(document, dict):
            raise ImageRejected(str(self.path), f"{digest}: a JSON object was expected")
        return document

    def blob(self, descriptor: Any) -> tuple[str, str]:
        """(file name, digest) of a descriptor."""
        digest = descriptor.get("digest") if isinstance(descriptor, dict) else None
        match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if match is None or not isinstance(digest, str):
            raise ImageRejected(str(self.path), f"digest {str(digest)[:80]!r} is not sha256:<64 hex digits>")
        return f"blobs/sha256/{match[1]}", digest

    def check_blob(self, descriptor: Any) -> str:
        """Reads a blob once to check its digest; returns its file name."""
        name, digest = self.blob(descriptor)
        with self.open(name) as (file, size):
            if descriptor.get("size") not in (None, size):
                raise ImageRejected(
                    str(self.path), f"{digest}: {size} bytes, the manifest says {descriptor['size']}"
                )
            found = hashlib.sha256()
            while data := file.read(1 << 20):
                found.update(data)
        if f"sha256:{found.hexdigest()}" != digest:
            raise ImageRejected(str(self.path), f"{digest}: the content has another digest")
        return name


class _Slice:
    """A bounded read-only view of an open file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int = -1) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        data = self._file.read(size)
        self._left -= len(data)
        return data


class _Hashed:
    """A stream whose content is hashed as it is read."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self.digest.update(data)
        return data


def _magic(path: Path) -> bytes:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(2)
    return b""


def _manifest(layout: Layout) -> tuple[dict[str, Any], str]:
    """The manifest for this machine, through at most two indexes, and its digest."""
    index = layout.document("index.json")
    for _ in range(3):
        entries = index.get("manifests") if isinstance(index, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ImageRejected(str(layout.path), "index.json names no manifest")
        wanted = _ARCHES.get(platform.machine(), platform.machine())
        fitting = []
        for entry in entries:
            where = entry.get("platform") if isinstance(entry, dict) else None
            if not isinstance(where, dict) or (where.get("architecture"), where.get("os")) == (
                wanted,
                "linux",
            ):
                fitting.append(entry)
        if not fitting:
            raise ImageRejected(str(layout.path), f"no manifest for linux/{wanted}")
        document = layout.blob_document(fitting[0])
        if "layers" in document:
            return document, layout.blob(fitting[0])[1]
        index = document
    raise ImageRejected(str(layout.path), "indexes inside indexes inside indexes")


def import_oci(
    path: str | Path, *, name: str, bounds: Bounds | None = None, state: StateDir | None = None
) -> ImageInfo:
    """Imports an image; `create(image=name)` then runs on it.

    bounds: most bytes, entries and layers it may have, unpacked.

    Raises:
        ImageRejected: malformed, hostile, for another machine, or too large. Nothing of it is kept.
        InvalidRequest: the name is not one.
    """
    state = state or StateDir.from_environment()
    state.prepare()
    image_directory(name, state=state)
    bounds = bounds or Bounds()
    layout = Layout(Path(path))
    manifest, digest = _manifest(layout)
    layers = manifest["layers"]
    if not isinstance(layers, list) or not 0 < len(layers) <= bounds.max_layers:
        raise ImageRejected(str(path), f"a manifest must have 1 to {bounds.max_layers} layers")
    config = layout.blob_document(manifest.get("config"))
    rootfs = config.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
        raise ImageRejected(str(path), "the configuration names another number of layers than the manifest")
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
    try:
        building.chmod(0o755)
        tally = Tally()
        steps = [
            _step(layout, descriptor, diff_id, tally, bounds=bounds)
            for descriptor, diff_id in zip(layers, diff_ids, strict=True)
        ]
        steps.append(
            Step(identity=f"furnish:{FURNISH_VERSION}:{USER_ID}", apply=partial(_furnish, str(path)))
        )
        with stacks.kept(state):
            record: dict[str, Any] = {}
            try:
                if stacks.usable():
                    record["layers"] = build(steps, building, tally=tally, source=str(path), state=state)
                else:
                    (building / "rootfs").mkdir(mode=0o755)
                    for step in steps:
                        step.apply(str(building / "rootfs"))
            except OSError as error:
                raise ImageRejected(str(path), f"cannot be unpacked here: {error}") from error
            if tally.size_bytes > bounds.max_bytes or tally.entries > bounds.max_entries:
                raise ImageRejected(
                    str(path), f"more than {bounds.max_bytes} bytes or {bounds.max_entries} entries"
                )
            record |= {
                "origin": "oci",
                "size_bytes": tally.size_bytes,
                "digest": digest,
                "envs": _environment(config),
            }
            install(building, name=name, state=state, record=record)
    except BaseException:
        remove_tree(str(building))
        stacks.remove_unused(state)  # the layers below the one that was refused
        raise
    return ImageInfo(name=name, origin="oci", size_bytes=tally.size_bytes, digest=digest)


def _step(layout: Layout, descriptor: Any, diff_id: Any, tally: Tally, *, bounds: Bounds) -> Step:
    """One layer, its blob's digest checked."""
    name = layout.check_blob(descriptor)
    if not isinstance(diff_id, str) or not _DIGEST.fullmatch(diff_id):
        raise ImageRejected(str(layout.path), f"diff id {str(diff_id)[:80]!r} is not sha256:<64 hex digits>")

    def apply(place: str) -> None:
        root = Root(place, source=str(layout.path))
        try:
            _layer(layout, name, descriptor, diff_id, root, tally, bounds=bounds)
        finally:
            root.close()

    return Step(identity=diff_id, apply=apply)


def _furnish(source: str, place: str) -> None:
    root = Root(place, source=source)
    try:
        furnish(root, user_id=USER_ID)
    finally:
        root.close()


def _layer(
    layout: Layout,
    name: str,
    descriptor: Any,
    diff_id: str,
    root: Root,
    tally: Tally,
    *,
    bounds: Bounds,
) -> None:
    source = f"{layout.path} {descriptor['digest'][:19]}"
    kind = descriptor.get("mediaType")
    if not isinstance(kind, str) or "zstd" in kind:
        raise ImageRejected(source, f"layers of type {str(kind)[:80]!r} are not read: use gzip or plain tar")
    with layout.open(name) as (raw, _):
        packed = kind.endswith(_GZIP)
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb")) if packed else raw
        hashed = _Hashed(stream)
        try:
            unpack_layer(cast(IO[bytes], hashed), root, tally, source=source, bounds=bounds)
            padding = 0
            while data := hashed.read(1 << 20):  # the diff id covers what follows the last entry, too
                padding += len(data)
                if padding > 64 << 20:
                    raise ImageRejected(source, "more than 64 MiB after the end of the tar stream")
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ImageRejected(source, f"not sound gzip: {error}") from error
    if f"sha256:{hashed.digest.hexdigest()}" != diff_id:
        raise ImageRejected(source, "unpacked, it has another digest than the configuration says (diff id)")


def _environment(config: dict[str, Any]) -> dict[str, str]:
    """The image's variables; what is not NAME=value is left out."""
    inner = config.get("config")
    entries = inner.get("Env") if isinstance(inner, dict) else None
    result = {}
    for entry in entries if isinstance(entries, list) else []:
        match = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=([^\0]*)", entry) if isinstance(entry, str) else None
        if match and len(entry) < 32768:
            result[match[1]] = match[2]
    return result
