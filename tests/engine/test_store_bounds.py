"""A store within its bounds: who goes, that the space comes back, compaction, budgets, pins; a restart agrees."""

import logging
import os

import numpy as np
import pytest

from rorqual.engine import EngineError, SequenceFileError
from rorqual.engine.engine import Engine
from rorqual.engine.layout import CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.engine.recordfile import RecordFile
from rorqual.engine.store import PageStore, StoreConfig, WindowStrategy
from rorqual.model import Config

MODEL = b"m" * 32
LAYOUT = CacheLayout(Config.preset("tiny").replace(vocab_size=97), "exact")
PAGE = LAYOUT.page_bytes + 552


def open_store(directory, *, clock=None, **options):
    options = {"window": WindowStrategy.ZERO, **options}
    clocks = {} if clock is None else {"clock": clock}
    return PageStore(StoreConfig(directory=directory, **options), LAYOUT, fingerprint=MODEL, **clocks)


@pytest.fixture(scope="module")
def pool():
    return PagePool(LAYOUT, kv_bytes=64 << 20)


@pytest.fixture
def put(pool):
    """`put(store, seed, pages)`: a conversation of so many pages, each filled with its own byte."""
    taken = {}

    def write(store, seed, pages=4, **options):
        while len(taken.setdefault(seed, [])) < pages:
            (page,) = pool.take_pages(1)
            pool.write_page(page, np.full(LAYOUT.page_bytes, 16 * seed + len(taken[seed]), dtype=np.uint8))
            taken[seed].append(page)
        return store.put(ids_of(seed, pages), taken[seed], pool=pool, **options)

    yield write
    for pages in taken.values():
        pool.drop_pages(pages)


def ids_of(seed, pages=4):
    return [(7 * n + seed) % 97 for n in range(128 * pages)]


def depth(store, seed, pages=4):
    return store.depth(ids_of(seed, pages)) // 128


def check(store, pool, seed, pages):
    """What is there is what was written."""
    loaded, _ = store.load(ids_of(seed, pages), pool=pool)
    assert len(loaded) == depth(store, seed, pages)
    for number, page in enumerate(loaded):
        assert (pool.read_page(page) == 16 * seed + number).all()
    pool.drop_pages(loaded)


def test_the_least_recently_used_goes_and_its_space_comes_back(tmp_path, pool, put):
    with open_store(tmp_path, limit_bytes=10 * PAGE) as store:
        for seed in (1, 2):
            put(store, seed)
        check(store, pool, 1, 4)  # a use
        put(store, 3)
        assert depth(store, 1) == 4 and depth(store, 3) == 4 and depth(store, 2) < 4
        assert store.live_bytes <= 10 * PAGE and store.statistics().evicted_pages > 0
        for seed in range(4, 14):
            put(store, seed)
        assert store.statistics().file_bytes > 3 * 10 * PAGE
        blocks = (tmp_path / "prefixes.rqk").stat().st_blocks * 512
        if not store._file._told_no_holes:  # else a start gives it back
            assert blocks < store.statistics().file_bytes / 2
        for seed in range(1, 14):
            check(store, pool, seed, 4)
        held = {seed: depth(store, seed) for seed in range(1, 14)}
    with open_store(tmp_path, limit_bytes=10 * PAGE) as store:
        assert {seed: depth(store, seed) for seed in range(1, 14)} == held
        assert store.live_bytes <= 10 * PAGE and store.statistics().damaged == 0
        for seed in range(1, 14):
            check(store, pool, seed, 4)


def test_opening_compacts_a_file_that_is_mostly_dead(tmp_path, pool, put, monkeypatch):
    monkeypatch.setattr("rorqual.engine.store.COMPACT_BYTES", 4 * PAGE)
    with open_store(tmp_path) as store:
        for seed in range(1, 8):
            put(store, seed)
            if seed < 6:
                assert store.discard(ids_of(seed)) == 4
        size = store.statistics().file_bytes
    whole = (tmp_path / "prefixes.rqk").read_bytes()
    monkeypatch.setattr(os, "replace", _refuse)
    with open_store(tmp_path) as store:  # it cannot be: nothing is lost
        assert depth(store, 6) == depth(store, 7) == 4
    monkeypatch.undo()
    monkeypatch.setattr("rorqual.engine.store.COMPACT_BYTES", 4 * PAGE)
    assert (tmp_path / "prefixes.rqk").read_bytes() == whole
    for _ in range(2):
        with open_store(tmp_path) as store:
            assert store.statistics().file_bytes < size / 3
            for seed in range(1, 8):
                assert depth(store, seed) == (4 if seed > 5 else 0)
                check(store, pool, seed, 4)
            with pytest.raises(SequenceFileError, match="in use by another process"):
                open_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["prefixes.rqk"]
    assert (tmp_path / "prefixes.rqk").stat().st_mode & 0o777 == 0o600


def _refuse(*_):
    raise OSError(28, "No space left on device")


def test_a_damaged_record_is_left_behind_by_compaction(tmp_path, pool, put):
    with open_store(tmp_path) as store:
        for seed in (1, 2):
            put(store, seed)
        at = store._index.path(ids_of(1), "")[2].record.at
    raw = bytearray((tmp_path / "prefixes.rqk").read_bytes())
    raw[at + 5] ^= 4
    (tmp_path / "prefixes.rqk").write_bytes(raw)
    with open_store(tmp_path) as store:
        store.compact()
        assert (depth(store, 1), depth(store, 2)) == (2, 4) and store.statistics().damaged == 1
        for seed in (1, 2):
            check(store, pool, seed, 4)
        put(store, 1)
        check(store, pool, 1, 4)
        assert depth(store, 1) == 4


def test_what_is_pinned_stays_whatever_the_limit(tmp_path, pool, put, caplog):
    with open_store(tmp_path, limit_bytes=9 * PAGE) as store:
        put(store, 1)
        pin = store.pin(ids_of(1))
        for seed in range(2, 8):
            put(store, seed)
        assert depth(store, 1) == 4
        assert store.discard(ids_of(1)) == 0
        other = store.pin(ids_of(7))
        assert put(store, 8, 12) > 0 and depth(store, 8, 12) == 1  # as much as there is room for
        store.unpin(pin)
        store.unpin(other)
        put(store, 9)
        put(store, 10)
        assert depth(store, 1) < 4
        assert sum("full" in record.message for record in caplog.records) <= 1


def test_bytes_a_second_are_bounded_and_the_rest_follows(tmp_path, put):
    now = [100.0]
    with open_store(tmp_path, bytes_per_second=PAGE // 10, clock=lambda: now[0]) as store:
        put(store, 1, 12)
        assert depth(store, 1, 12) in (5, 6)  # a minute's worth at first
        assert store.statistics().deferred_pages >= 6
        assert put(store, 1, 12) == 0
        now[0] += 20
        put(store, 1, 12)
        assert depth(store, 1, 12) in (7, 8)
        put(store, 1, 12, last=True)
        assert depth(store, 1, 12) == 12
        now[0] += 1
        assert put(store, 2) == 0
    for field in ("limit_bytes", "bytes_per_second"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            StoreConfig(directory=tmp_path, **{field: 0})


def test_later_syncs_lose_nothing_but_with_the_power(tmp_path, pool, put, caplog, monkeypatch):
    with open_store(tmp_path, sync="later") as store:
        for seed in range(1, 6):
            put(store, seed)
        store.compact()
        put(store, 6)

        def refuse(self):
            raise SequenceFileError("no")

        monkeypatch.setattr(RecordFile, "sync", refuse)
        put(store, 7)
    assert any("loss of power" in record.message for record in caplog.records)
    monkeypatch.undo()
    with open_store(tmp_path) as store:
        for seed in range(1, 8):
            check(store, pool, seed, 4)
            assert depth(store, seed) == 4


def test_a_file_system_without_holes_is_told_once(tmp_path, pool, put, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)

    class Libc:
        def __init__(self, *_, **__):
            pass

        @staticmethod
        def fallocate(*_):
            return -1

    monkeypatch.setattr("rorqual.engine.recordfile.ctypes.CDLL", Libc)
    with open_store(tmp_path) as store:
        for seed in (1, 2):
            put(store, seed)
            store.discard(ids_of(seed))
    assert sum("makes no holes" in record.message for record in caplog.records) == 1
    with open_store(tmp_path) as store:
        assert depth(store, 1) == depth(store, 2) == 0


def test_an_engine_locates_checkpoints_and_discards(engine, prompt, tmp_path):
    config = StoreConfig(directory=tmp_path, bytes_per_second=1)  # nothing is written by itself
    one = Engine(engine.model, prefill_chunk=64, store=config)
    ids = prompt(300)
    sequence = one.open(ids, space="a")
    one.keep(sequence.paged, space="a", frontiers=(300,))
    place = one.locate(ids, space="a")
    assert (place.live, place.memory, place.disk) == (256, 300, 0)
    assert place.page_bytes == 2 * one.pool.layout.page_bytes
    sequence.close()
    assert one.locate(ids, space="a").live == 0 and one.locate(ids, space="b").memory == 0
    assert one.checkpoint(ids, space="a") == 256
    pinned = one.pin(ids, space="a")
    one.discard(ids, space="a")
    assert one.locate(ids, space="a").disk == one.locate(ids, space="a").memory - 44 == 256
    one.unpin(pinned)
    one.discard(ids, space="a")
    place = one.locate(ids, space="a")
    assert (place.memory, place.disk) == (0, 0)
    one.close()
    with pytest.raises(EngineError, match="nothing on disk"):
        engine.checkpoint(ids)


def test_a_damaged_header_is_a_new_beginning(tmp_path, pool, put, caplog):
    with open_store(tmp_path) as store:
        put(store, 1)
    path = tmp_path / "prefixes.rqk"
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(raw)
    with open_store(tmp_path) as store:
        assert depth(store, 1) == 0
        put(store, 1)
        check(store, pool, 1, 4)
    assert (tmp_path / "prefixes.rqk.damaged").read_bytes() == raw
    assert sum("a new one begins" in record.message for record in caplog.records) == 1
