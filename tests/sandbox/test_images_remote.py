"""Remote layers: what comes is checked, what fails says why, what was fetched is kept, whoever dies."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rorqual.sandbox import ImageError, ImageRejected, InvalidRequest
from rorqual.sandbox.images import (
    fetch,
    fetched,
    import_directory,
    layer_events,
    publish,
    remote,
    remove_image,
)
from rorqual.sandbox.images.erofs import layers_directory
from rorqual.sandbox.images.layers import in_private_mounts, usable
from rorqual.sandbox.keeper import linux
from rorqual.sandbox.loader.chunks import BadChunk, LayerCache, pack_table, pack_trace, parse_table
from rorqual.sandbox.loader.fetch import Fetcher
from rorqual.sandbox.loader.remote import RemoteError
from rorqual.sandbox.state import StateDir
from tests.sandbox.layer_server import Store, serve

pytestmark = pytest.mark.skipif(not usable(), reason="needs root, mkfs.erofs and a kernel with EROFS")
CHUNK = 64 << 10


def content(number: int) -> bytes:
    """Every third file compresses well."""
    source = random.Random(number)
    return source.randbytes(100_000 + 30_000 * number) if number % 3 else b"%d " % number * 40_000


@pytest.fixture(scope="module")
def store(state: StateDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with one image, `files`, and no trace of it on this host."""
    place = tmp_path_factory.mktemp("store")
    tree = tmp_path_factory.mktemp("tree")
    for number in range(10):
        (tree / f"f{number}").write_bytes(content(number))
    import_directory(tree, name="files", at="/opt/files")
    reference = publish("files", place, chunk_bytes=CHUNK)
    (place / "reference").write_text(reference)
    remove_image("files")
    yield place


@pytest.fixture
def server(store: Path) -> Iterator[Store]:
    with serve(store) as running:
        yield running


@pytest.fixture
def layer(server: Store, state: StateDir) -> Iterator[str]:
    """The directory of the remote layer, nothing of it fetched."""
    info = remote(server.url, "files", deadline_s=1.0, attempts=2)
    (name,) = json.loads((state.images / "files/image.json").read_text())["layers"]
    assert info.origin == "remote" and fetched("files").here == 0
    yield str(layers_directory(state) / name)
    remove_image("files")


def plain(store: Path, directory: str) -> bytes:
    """The layer's data as the store has it, read without the code under test but for the table's format."""
    record = json.loads(Path(directory, "layer.json").read_text())
    blob = (store / record["blob"]).read_bytes()
    raw = Path(directory, "table").read_bytes()
    out = b""
    size = int.from_bytes(raw[16:24], "little")
    for at in range(24, len(raw), 44):
        offset, stored = (
            int.from_bytes(raw[at + 32 : at + 40], "little"),
            int.from_bytes(raw[at + 40 : at + 44], "little"),
        )
        piece = blob[offset : offset + stored]
        out += piece if stored == min(CHUNK, size - len(out)) else zlib.decompress(piece)
    return out


class Reports(list[tuple[str, dict[str, Any]]]):
    def __call__(self, event: str, **fields: Any) -> None:
        self.append((event, fields))

    def names(self) -> list[str]:
        return [event for event, _ in self]


def opened(layer: str, reports: Reports) -> closing[Fetcher]:
    return closing(Fetcher(layer, report=reports))


# -- reading
# ----------------------------------------------------------------------------------------------------


def test_reads_fetch_what_they_touch_and_nothing_else(layer: str, server: Store, store: Path) -> None:
    want = plain(store, layer)
    with opened(layer, Reports()) as fetcher:
        assert fetcher.ready(CHUNK * 3, 10) is None
        assert fetcher.read(CHUNK * 3 + 5, CHUNK) == want[CHUNK * 3 + 5 : CHUNK * 4 + 5]
        assert fetcher.cache.count_here() == 2 and len(server.ranges) == 1
        assert fetcher.ready(CHUNK * 3, 2 * CHUNK) == want[CHUNK * 3 : CHUNK * 5]
        assert fetcher.read(0, len(want)) == want
    assert fetched("files").here == fetched("files").chunks


def test_many_readers_at_once_fetch_each_chunk_once(layer: str, server: Store, store: Path) -> None:
    want = plain(store, layer)
    server.delay_s = 0.05
    with opened(layer, Reports()) as fetcher, ThreadPoolExecutor(8) as pool:
        for data in pool.map(lambda _: fetcher.read(0, 5 * CHUNK), range(8)):
            assert data == want[: 5 * CHUNK]
        assert fetcher.fetched_chunks == 5
    asked = sorted(server.ranges)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(asked))


def test_two_processes_may_fill_one_layer(layer: str, store: Path) -> None:
    want = plain(store, layer)
    with opened(layer, Reports()) as one, opened(layer, Reports()) as two, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(each.read, 0, len(want)) for each in (one, two)]
        assert [answer.result() for answer in answers] == [want, want]
        assert one.cache.complete() and two.cache.complete()
        assert one.cache.read(0, len(want)) == want


def test_the_order_of_touches_is_recorded_and_the_next_cold_host_fetches_it_ahead(
    layer: str, server: Store, store: Path, state: StateDir
) -> None:
    with opened(layer, Reports()) as fetcher:
        for index in (7, 3, 4, 3, 0):
            fetcher.read(index * CHUNK, 1)
    assert Path(layer, "trace").read_bytes() == pack_trace([7, 3, 4, 0])
    for name in ("data", "present"):
        Path(layer, name).unlink()
    server.ranges.clear()
    with opened(layer, Reports()) as fetcher:
        for thread in fetcher.prefetch(fetcher.cache.trace()):
            thread.join()
        assert fetcher.cache.count_here() == 4
        assert len(server.ranges) == 3  # 3 and 4 lie side by side
        assert fetcher.ready(7 * CHUNK, 1) is not None


def test_fetching_all_makes_the_store_needless(layer: str, server: Store, store: Path) -> None:
    want = plain(store, layer)
    assert fetch("files").here == fetched("files").chunks
    assert Path(layer, "complete").exists()
    assert Path(layer, "data").read_bytes() == want
    server.fault = "down"
    assert fetch("files").here == fetched("files").chunks


# -- a store that misbehaves
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "says", "event"),
    [
        ("corrupt", BadChunk, "another hash|incorrect|invalid", "corrupt"),
        ("ignore", RemoteError, "ignores ranges", "unreachable"),
        ("shifted", RemoteError, "were asked for", "unreachable"),
        ("short", RemoteError, "bytes came|IncompleteRead", "unreachable"),
        ("drip", RemoteError, "not there after 1 s", "unreachable"),
        ("drip-head", RemoteError, "not there after 1 s", "unreachable"),
        ("down", RemoteError, "Remote end closed|reset", "unreachable"),
    ],
)
def test_a_store_that_misbehaves_is_refused_in_time_and_forgiven_when_it_behaves(
    fault: str, error: type[Exception], says: str, event: str, layer: str, server: Store, store: Path
) -> None:
    reports = Reports()
    server.fault = fault
    with opened(layer, reports) as fetcher:
        with pytest.raises(error, match=says):
            fetcher.read(CHUNK, 100)
        assert event in reports.names()
        assert fetcher.cache.count_here() == 0
        server.fault = ""
        assert fetcher.read(CHUNK, 100) == plain(store, layer)[CHUNK : CHUNK + 100]


def test_a_store_that_stumbles_once_is_asked_again(layer: str, server: Store, store: Path) -> None:
    reports = Reports()
    server.fault = "down"
    with opened(layer, reports) as fetcher:
        real = fetcher.remote.read

        def second_time(*args: Any, **options: Any) -> bytes:
            try:
                return real(*args, **options)
            finally:
                server.fault = ""

        fetcher.remote.read = second_time  # type: ignore[method-assign]
        assert fetcher.read(0, 10) == plain(store, layer)[:10]
    assert reports == []


def test_a_full_disk_serves_what_it_cannot_keep(
    server: Store, layer: str, store: Path, tmp_path: Path
) -> None:
    want = plain(store, layer)
    small = tmp_path / "small"
    small.mkdir()

    def read() -> tuple[bytes, int, list[str]]:
        linux.mount("tmpfs", str(small), fstype="tmpfs", data="size=1m")
        place = shutil.copytree(layer, small / "layer.lazy", ignore=shutil.ignore_patterns("data"))
        reports = Reports()
        with opened(str(place), reports) as fetcher:
            data = fetcher.read(0, len(want))
            again = fetcher.read(0, len(want))
            assert data == again
            return data, fetcher.cache.count_here(), reports.names()

    data, here, events = in_private_mounts(read)
    assert data == want
    assert 0 < here < len(want) // CHUNK
    assert events == ["full"]


def test_a_killed_loader_leaves_a_cache_that_the_next_one_goes_on_with(
    layer: str, server: Store, store: Path
) -> None:
    server.delay_s = 0.05
    code = (
        "import sys; from rorqual.sandbox.loader.fetch import Fetcher\n"
        "f = Fetcher(sys.argv[1], report=print)\n"
        f"for i in range(f.cache.table.count): f.read(i * {CHUNK}, 1)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", code, layer])
    deadline = time.monotonic() + 30
    while len(server.ranges) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before = fetched("files").here
    assert 3 <= before < fetched("files").chunks
    want = plain(store, layer)
    server.ranges.clear()
    with opened(layer, Reports()) as fetcher:
        assert fetcher.read(0, len(want)) == want
        assert fetcher.fetched_chunks == fetcher.cache.table.count - before


def test_after_a_reboot_what_was_kept_is_looked_at_before_it_is_used(layer: str, store: Path) -> None:
    want = plain(store, layer)
    with opened(layer, Reports()) as fetcher:
        fetcher.read(0, 4 * CHUNK)
    with Path(layer, "present").open("r+b") as file:
        file.write(b"another boot")
    with Path(layer, "data").open("r+b") as file:  # what a power failure can do
        file.seek(2 * CHUNK)
        file.write(bytes(CHUNK))
    with opened(layer, Reports()) as fetcher:
        assert fetcher.read(0, 4 * CHUNK) == want[: 4 * CHUNK]
        assert fetcher.fetched_chunks == 1


# -- what a store says of itself
# ----------------------------------------------------------------------------------------------------


def _spoiled(store: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the store whose manifest was changed, its digests made right again."""
    shutil.copytree(store, place)
    pointer = json.loads((place / "names/files.json").read_text())
    manifest = json.loads((place / f"manifests/{pointer['manifest'][7:]}.json").read_text())
    change(manifest)
    data = json.dumps(manifest).encode()
    digest = hashlib.sha256(data).hexdigest()
    (place / f"manifests/{digest}.json").write_bytes(data)
    (place / "names/files.json").write_text(json.dumps({"manifest": f"sha256:{digest}"}))
    return place


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *way, last = path.split(".")
        here: Any = manifest
        for step in way:
            here = here[int(step)] if step.isdigit() else here[step]
        here[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("format", "rorqual-image/9"), "is not read here"),
        (_set("architecture", "pdp11"), "it is for 'pdp11'"),
        (_set("envs", {"A=B": "c"}), "not a table of variables"),
        (_set("envs", ["A"]), "not a table of variables"),
        (_set("layers", []), "1 to 128 layers"),
        (_set("layers", [7]), "64 hex digits"),
        (_set("layers.0.data.blob", "../../../../etc/shadow"), "64 hex digits"),
        (_set("layers.0.meta.blob", "/etc/passwd"), "64 hex digits"),
        (_set("layers.0.meta.sha256", "0" * 63), "64 hex digits"),
        (_set("layers.0.meta.sha256", "0" * 64), "not what the manifest says"),
        (_set("layers.0.meta.bytes", 100), "not what the manifest says"),
        (_set("layers.0.meta.bytes", 1 << 40), "not a number up to"),
        (_set("layers.0.data.bytes", 5), "its table is for"),
        (_set("layers.0.data.bytes", 1 << 50), "not a number up to"),
        (_set("layers.0.data.size", 1000), "cannot be"),
        (_set("layers.0.data.size", True), "not a number"),
        (_set("size_bytes", -1), "not a number"),
        (_set("layers.0.table.size", 1 << 40), "not a number up to"),
    ],
)
def test_a_manifest_that_lies_is_refused_and_nothing_is_kept(
    change: Callable[[dict[str, Any]], None], says: str, store: Path, state: StateDir, tmp_path: Path
) -> None:
    place = _spoiled(store, tmp_path / "store", change)
    before = set(layers_directory(state).iterdir())
    with pytest.raises(ImageRejected, match=says):
        remote(str(place), "files", rename="liar")
    assert not (state.images / "liar").exists()
    assert set(layers_directory(state).iterdir()) <= before | {layers_directory(state) / "lock"}


def test_a_pinned_reference_takes_that_image_and_no_other(store: Path, tmp_path: Path) -> None:
    reference = (store / "reference").read_text()
    place = _spoiled(store, tmp_path / "store", _set("envs", {"EVIL": "1"}))
    assert remote(str(place), reference, rename="pinned").digest == reference.partition("@")[2]
    remove_image("pinned")
    digest = reference.partition(":")[2]
    (place / f"manifests/{digest}.json").write_bytes(b"{}")
    with pytest.raises(ImageRejected, match="another digest"):
        remote(str(place), reference, rename="pinned")


def test_a_blob_that_was_swapped_is_refused_before_the_kernel_sees_it(store: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(store, tmp_path / "store"))
    pointer = json.loads((place / "names/files.json").read_text())
    manifest = json.loads((place / f"manifests/{pointer['manifest'][7:]}.json").read_text())
    (place / "blobs" / manifest["layers"][0]["meta"]["blob"]).write_bytes(zlib.compress(bytes(9999)))
    with pytest.raises(ImageRejected, match="another digest"):
        remote(str(place), "files")


@pytest.mark.parametrize(
    ("url", "name", "error", "says"),
    [
        ("ftp://host/x", "files", InvalidRequest, "is not a store"),
        ("http://user@host/x", "files", InvalidRequest, "is not a store"),
        ("relative/path", "files", InvalidRequest, "is not a store"),
        ("/nowhere", "files", ImageError, "No such file"),
        ("http://127.0.0.1:9", "files", ImageError, "refused"),
        ("/nowhere", "../x", InvalidRequest, "not an image name"),
        ("/nowhere", "files@sha256:12", InvalidRequest, "64 hex digits"),
    ],
)
def test_a_wrong_store_or_name_is_one_clear_line(
    url: str, name: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        remote(url, name, deadline_s=5.0)
    assert "\n" not in str(caught.value)


def test_a_pipe_or_a_directory_in_a_store_is_refused_and_not_waited_for(store: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(store, tmp_path / "store"))
    pointer = place / "names/files.json"
    pointer.unlink()
    os.mkfifo(pointer)
    with pytest.raises(ImageError, match="not a plain file"):
        remote(str(place), "files")
    pointer.unlink()
    pointer.mkdir()
    with pytest.raises(ImageError, match="not a plain file"):
        remote(str(place), "files")


def test_a_chunk_that_unpacks_to_more_than_its_length_is_refused() -> None:
    bomb = zlib.compress(bytes(100 << 20))
    data = pack_table([(bytes(32), 0, len(bomb))], chunk_bytes=256 << 10, data_bytes=256 << 10)
    with pytest.raises(BadChunk, match="another hash"):
        parse_table(data, blob_bytes=1 << 20).unpack(0, bomb)


@pytest.mark.parametrize("seed", range(3))
def test_a_table_of_random_bytes_is_read_or_refused_and_never_lies_outside_its_blob(seed: int) -> None:
    source = random.Random(seed)
    sound = pack_table([(bytes(32), 0, 10), (bytes(32), 10, 10)], chunk_bytes=4096, data_bytes=8192)
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        try:
            table = parse_table(bytes(data[: source.randint(0, len(data))]), blob_bytes=20)
        except ValueError:
            continue
        for index in range(table.count):
            _, offset, stored = table.entry(index)
            assert offset + stored <= 20 and stored <= table.length(index)


def test_a_layer_directory_that_was_tampered_with_is_an_error_not_a_crash(layer: str) -> None:
    Path(layer, "layer.json").write_text("{}")
    with pytest.raises((ValueError, KeyError)):
        LayerCache(layer)
    Path(layer, "layer.json").write_text('{"blob_bytes": -1}')
    with pytest.raises(ValueError, match="blob_bytes"):
        LayerCache(layer)


def test_events_are_kept_for_the_user(layer: str, server: Store) -> None:
    server.fault = "corrupt"
    with pytest.raises(ImageError, match="chunk"):
        fetch("files")
    found = [event for event in layer_events() if event["event"] == "corrupt" and event["url"] == server.url]
    assert found and "chunk" in found[0]["detail"]
    assert threading.active_count() < 50 and os.path.isdir(layer)
