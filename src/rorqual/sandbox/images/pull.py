"""Uses an image of a layer store before it is here: its metadata now, its content when somebody reads it.

A store is a directory or an HTTP server, and is not trusted: a manifest is bounded, every part is checked against
the digest the manifest has for it before the kernel or a sandbox sees it, names in it are digests and nothing else.
`name@sha256:<digest>` fixes the manifest; a bare name takes what the store says it is. Owns the records of remote
layers (<state>/layers/<id>.lazy); loader/ fetches their chunks. Format: push.py and docs/sandbox-images.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import HostUnfit, ImageError, ImageRejected, InvalidRequest
from rorqual.sandbox.images import layers
from rorqual.sandbox.images.erofs import layers_directory
from rorqual.sandbox.images.push import FORMAT, layer_id
from rorqual.sandbox.images.store import ImageInfo, image_directory, install
from rorqual.sandbox.images.unpack import Bounds
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.loader.chunks import BadChunk, LayerCache, parse_table
from rorqual.sandbox.loader.events import EventLog
from rorqual.sandbox.loader.fetch import Fetcher
from rorqual.sandbox.loader.remote import Remote, RemoteError, open_remote
from rorqual.sandbox.state import StateDir

_JSON_BYTES = 1 << 20
_TABLE_BYTES = 64 << 20
_META_BYTES = 256 << 20
_TRACE_BYTES = 1 << 20
_HEX = re.compile(r"[0-9a-f]{64}")
_REFERENCE = re.compile(r"([^@]+)(?:@sha256:([0-9a-f]{64}))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """How much of a remote image is on this host."""

    chunks: int
    here: int
    bytes: int
    """Size of all its content."""


def remote(
    url: str,
    name: str,
    *,
    rename: str = "",
    eager: bool = False,
    prefetch: bool = True,
    deadline_s: float = 20.0,
    attempts: int = 3,
    bounds: Bounds | None = None,
    state: StateDir | None = None,
) -> ImageInfo:
    """Makes an image of a store one of this host; `create(image=name)` works at once, and reads fetch.

    url: http://, https:// or a directory. name: in the store, with `@sha256:<digest>` to take that and no other.
    rename: its name here. eager: fetch everything now. prefetch: fetch ahead what an earlier run touched, where the
    store or this host has recorded one. deadline_s, attempts: patience of one read; then the reader gets EIO, and
    `layer_events()` the cause.

    Raises:
        InvalidRequest: the URL or a name is not one.
        ImageError: the store does not answer, or lacks it.
        ImageRejected: what came is not what its digest says, malformed, too large or for another machine.
        HostUnfit: layers cannot be mounted here; import_oci and import_directory work without.
    """
    state = state or StateDir.from_environment()
    state.prepare()
    match = _REFERENCE.fullmatch(name)
    if match is None:
        raise InvalidRequest(f"name: {name!r} is not NAME or NAME@sha256:<64 hex digits>")
    image_directory(match[1], state=state)
    here = rename or match[1]
    image_directory(here, state=state)
    if not 0.1 <= deadline_s <= 3600 or not 1 <= attempts <= 100:
        raise InvalidRequest("deadline_s must be 0.1 to 3600 seconds, attempts 1 to 100")
    if not layers.usable():
        raise HostUnfit("remote layers need EROFS mounts, which only root may make.", fix="run as root")
    try:
        store = open_remote(url)
    except ValueError as error:
        raise InvalidRequest(f"url: {error}") from error
    bounds = bounds or Bounds()
    try:
        manifest, digest = _manifest(store, match[1], match[2], deadline_s)
        found = _checked(manifest, where=f"{url} {name}", bounds=bounds)
        with layers.kept(state):
            patience = {"deadline_s": deadline_s, "attempts": attempts, "prefetch": prefetch}
            names = [_attach(store, layer, patience, prefetch=prefetch, state=state) for layer in found]
            record = {
                "origin": "remote",
                "size_bytes": manifest["size_bytes"],
                "digest": digest,
                "envs": manifest["envs"],
                "layers": names,
                "url": url,
            }
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
            try:
                building.chmod(0o755)
                install(building, name=here, state=state, record=record)
            except BaseException:
                remove_tree(str(building))
                raise
    except RemoteError as error:
        raise ImageError(f"{name}: {error}") from error
    finally:
        store.close()
    if eager:
        fetch(here, state=state)
    return ImageInfo(name=here, origin="remote", size_bytes=manifest["size_bytes"], digest=digest)


def fetch(name: str, *, state: StateDir | None = None) -> Fetched:
    """Brings the whole content of a remote image here; afterwards it needs neither the store nor the loader.

    Raises ImageError: it is no remote image, or the store fails.
    """
    state = state or StateDir.from_environment()
    report = EventLog(str(layers_directory(state))).report
    for directory in _directories(name, state):
        with contextlib.closing(Fetcher(directory, report=report)) as fetcher:
            count = fetcher.cache.table.count
            for thread in fetcher.prefetch(list(range(count))):
                thread.join()
            try:
                fetcher.bring(range(count))  # what a prefetcher gave up on is an error here
            except (RemoteError, BadChunk) as error:
                raise ImageError(f"{name}: {error}") from error
            if not fetcher.settle():
                raise ImageError(f"{name}: there is no room for it in {directory}")
    return fetched(name, state=state)


def fetched(name: str, *, state: StateDir | None = None) -> Fetched:
    """How much of a remote image is here. Raises ImageError when it is no remote image."""
    state = state or StateDir.from_environment()
    chunks = here = size = 0
    for directory in _directories(name, state):
        with LayerCache(directory) as cache:
            chunks += cache.table.count
            here += cache.count_here()
            size += cache.size_bytes
    return Fetched(chunks=chunks, here=here, bytes=size)


def _directories(name: str, state: StateDir) -> list[str]:
    try:
        record = json.loads((image_directory(name, state=state) / "image.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = {}
    if record.get("origin") != "remote":
        raise ImageError(f"image {name!r} is not one of a store")
    return list(layers.of_record(name, record, state=state))


def _manifest(store: Remote, name: str, digest: str | None, deadline_s: float) -> tuple[dict[str, Any], str]:
    if digest is None:
        path = f"names/{name.replace(':', '@')}.json"
        pointer = _json(store.get(path, max_bytes=_JSON_BYTES, deadline_s=deadline_s), f"{store.url}/{path}")
        text = pointer.get("manifest")
        if not isinstance(text, str) or not text.startswith("sha256:") or not _HEX.fullmatch(text[7:]):
            raise ImageRejected(
                f"{store.url}/{path}", f"manifest {str(text)[:80]!r} is not sha256:<64 hex digits>"
            )
        digest = text[7:]
    path = f"manifests/{digest}.json"
    data = store.get(path, max_bytes=_JSON_BYTES, deadline_s=deadline_s)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ImageRejected(f"{store.url}/{path}", "the content has another digest")
    return _json(data, f"{store.url}/{path}"), f"sha256:{digest}"


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageRejected(where, f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ImageRejected(where, "a JSON object was expected")
    return document


def _checked(manifest: dict[str, Any], *, where: str, bounds: Bounds) -> list[dict[str, Any]]:
    """The layers of a manifest. Raises ImageRejected, which says what in it cannot be."""
    if manifest.get("format") != FORMAT:
        raise ImageRejected(
            where, f"format {str(manifest.get('format'))[:40]!r} is not read here ({FORMAT} is)"
        )
    if manifest.get("architecture") != platform.machine():
        raise ImageRejected(
            where, f"it is for {str(manifest.get('architecture'))[:40]!r}, this is {platform.machine()}"
        )
    envs = manifest.get("envs")
    if not isinstance(envs, dict) or not all(
        re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) and isinstance(value, str) and "\0" not in value
        for key, value in envs.items()
    ):
        raise ImageRejected(where, "envs is not a table of variables")
    _number(manifest, "size_bytes", bounds.max_bytes, where)
    found = manifest.get("layers")
    if not isinstance(found, list) or not 0 < len(found) <= bounds.max_layers:
        raise ImageRejected(where, f"a manifest must have 1 to {bounds.max_layers} layers")
    total = 0
    for layer in found:
        meta, table, data = (_part(layer, key, where) for key in ("meta", "table", "data"))
        if not isinstance(meta.get("sha256"), str) or not _HEX.fullmatch(meta["sha256"]):
            raise ImageRejected(where, "meta has no sha256 of 64 hex digits")
        _number(meta, "size", _META_BYTES, where)
        _number(table, "size", _TABLE_BYTES, where)
        _number(data, "size", bounds.max_bytes, where)
        total += _number(data, "bytes", bounds.max_bytes, where) + _number(meta, "bytes", _META_BYTES, where)
    if total > bounds.max_bytes + bounds.max_bytes // 4:
        raise ImageRejected(where, f"its layers are more than {bounds.max_bytes} bytes")
    return found


def _part(layer: Any, key: str, where: str) -> dict[str, Any]:
    part = layer.get(key) if isinstance(layer, dict) else None
    blob = part.get("blob") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(blob, str) or not _HEX.fullmatch(blob):
        raise ImageRejected(where, f"blob {str(blob)[:80]!r} is not 64 hex digits")
    return part


def _number(part: dict[str, Any], key: str, high: int, where: str) -> int:
    value = part.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise ImageRejected(where, f"{key} is {str(value)[:40]!r}, not a number up to {high}")
    return value


def _attach(
    store: Remote, layer: dict[str, Any], patience: dict[str, Any], *, prefetch: bool, state: StateDir
) -> str:
    """Makes <state>/layers/<id>.lazy, or renews what its record says of the store; returns its name."""
    name = layer_id(layer) + ".lazy"
    place = layers_directory(state) / name
    meta, table, data = layer["meta"], layer["table"], layer["data"]
    record = {"url": store.url, "blob": f"blobs/{data['blob']}", "blob_bytes": data["size"], **patience}
    trace = b""
    if prefetch and not (place / "trace").exists():
        with contextlib.suppress(RemoteError):  # most layers have none
            trace = store.get(
                f"traces/{layer_id(layer)}", max_bytes=_TRACE_BYTES, deadline_s=patience["deadline_s"]
            )
    if place.is_dir():
        _write(place / "layer.json", json.dumps(record).encode())
        if trace:
            _write(place / "trace", trace)
        return name
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=place.parent))
    try:
        image = _meta(store, meta, patience["deadline_s"])
        packed = _blob(store, table, patience["deadline_s"])
        try:
            parsed = parse_table(packed, blob_bytes=data["size"])
        except ValueError as error:
            raise ImageRejected(f"{store.url}/blobs/{table['blob']}", str(error)) from error
        if parsed.data_bytes != data["bytes"]:
            raise ImageRejected(
                store.url, f"its table is for {parsed.data_bytes} bytes, its manifest says {data['bytes']}"
            )
        for file, content in (("meta.erofs", image), ("table", packed), ("trace", trace)):
            if content or file != "trace":
                _write(building / file, content)
        _write(building / "layer.json", json.dumps(record).encode())
        os.rename(building, place)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        if not place.is_dir():  # otherwise another client was faster
            raise ImageError(f"{place}: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return name


def _blob(store: Remote, part: dict[str, Any], deadline_s: float) -> bytes:
    data = store.get(f"blobs/{part['blob']}", max_bytes=part["size"], deadline_s=deadline_s)
    if hashlib.sha256(data).hexdigest() != part["blob"]:
        raise ImageRejected(f"{store.url}/blobs/{part['blob']}", "the content has another digest")
    return data


def _meta(store: Remote, part: dict[str, Any], deadline_s: float) -> bytes:
    packed = _blob(store, part, deadline_s)
    where = f"{store.url}/blobs/{part['blob']}"
    try:
        data = zlib.decompressobj().decompress(packed, part["bytes"] + 1)
    except zlib.error as error:
        raise ImageRejected(where, f"not sound zlib: {error}") from error
    if len(data) != part["bytes"] or hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise ImageRejected(where, "unpacked, it is not what the manifest says")
    return data


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
