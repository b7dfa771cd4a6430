"""Prefixes and sequences on disk: written once, and what kills, full disks and flipped bits do to them."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from rorqual.engine import SequenceFileError
from rorqual.engine.layout import CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.engine.prefix import PrefixTree
from rorqual.engine.sequence import PagedSequence, replay_tokens
from rorqual.engine.sequence_file import load_file, save_file
from rorqual.engine.snapshot import Snapshot, snapshot_bytes
from rorqual.engine.store import PageStore, StoreConfig, WindowStrategy
from rorqual.model import Config

MODEL = b"m" * 32
BOUND = {"exact": 2e-5, "packed": 2e-3}


def _store(directory, paging, **options):
    clock = {"clock": options.pop("clock")} if "clock" in options else {}
    if "strategy" in options:
        options["window"] = options.pop("strategy")
    config = StoreConfig(directory=directory, **options)
    return PageStore(config, paging.pool.layout, fingerprint=MODEL, **clock)


def _put(store, sequence):
    snapshots = tuple(sequence.snapshots.values())
    return store.put(sequence.token_ids, sequence.pages, pool=sequence.pool, snapshots=snapshots)


def _reopen(store, paging, ids):
    """A sequence that goes on from what the store holds of `ids`, in another process's memory."""
    tree = PrefixTree(paging.pool)
    pages, snapshots = store.load(ids, pool=paging.pool)
    tree.insert_pages(ids, pages, snapshots=snapshots)
    paging.pool.drop_pages(pages)
    return tree.open(paging, ids)


@pytest.mark.parametrize("strategy", list(WindowStrategy))
def test_a_restart_goes_on_from_disk(make_paging, opened, plain, prompt, cache_format, strategy, tmp_path):
    first, ids = make_paging(cache_format), prompt(300)
    with _store(tmp_path, first, strategy=strategy) as store:
        _put(store, opened(first, ids)[0])
    second = make_paging(cache_format)
    with _store(tmp_path, second, strategy=strategy) as store:
        sequence, match = _reopen(store, second, ids)
        # The tiny model's snapshot outweighs a tenth of two pages: periodic writes none yet.
        expected = 0 if strategy is WindowStrategy.FULL else replay_tokens(second.pool.layout)
        assert (match.tokens, match.replay) == (256, expected)
    logits = sequence.append(ids[256:])
    torch.testing.assert_close(logits, plain(ids, cache_format), atol=BOUND[cache_format], rtol=0)


def test_a_turn_writes_its_new_pages_alone(paging, opened, prompt, tmp_path):
    with _store(tmp_path, paging, strategy=WindowStrategy.ZERO) as store:
        sequence, _ = opened(paging, prompt(300))
        first = _put(store, sequence)
        assert _put(store, sequence) == 0
        sequence.append(prompt(100, seed=1))
        second = _put(store, sequence)
        assert store.statistics().pages == 3 and abs(first - 2 * second) < 100
        assert (tmp_path / "prefixes.rqk").stat().st_size == store.statistics().file_bytes
        assert (tmp_path / "prefixes.rqk").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("turn", [512, 1000, 10_000])
def test_bytes_written_stay_below_a_tenth_more_than_the_new_tokens_at_real_dimensions(turn, tmp_path):
    config = Config.preset("flash").replace(num_hidden_layers=4, compress_ratios=(0, 128, 4, 4))
    layout = CacheLayout(config, "packed")
    total = 30_000
    pool = PagePool(layout, kv_bytes=256 << 20)
    pages = pool.take_pages(layout.pages(total))
    ids = [random.Random(0).randrange(1000) for _ in range(total)]
    snapshots = {}
    for at in range(128, total + 1, 128):
        snapshots[at] = Snapshot(at, np.zeros(snapshot_bytes(layout, at), dtype=np.uint8))
    with PageStore(StoreConfig(directory=tmp_path), layout, fingerprint=MODEL) as store:
        for end in range(turn, total + 1, turn):
            last = end // 128 * 128
            store.put(ids[:end], pages, pool=pool, snapshots=[snapshots[last]])
            assert store.statistics().written_bytes <= 1.1 * store.statistics().new_page_bytes
        store.put(ids[:end], pages, pool=pool, snapshots=[snapshots[last]], last=True)
        statistics = store.statistics()
        new = layout.page_bytes * (max(range(turn, total + 1, turn)) // 128)
        assert statistics.new_page_bytes == new
        assert statistics.written_bytes <= 1.1 * new
        assert statistics.snapshots >= 1


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 200, 256, 257])
def test_a_saved_sequence_goes_on_exactly_where_it_was(
    make_paging, opened, prompt, cache_format, length, tmp_path
):
    paging, path = make_paging(cache_format), tmp_path / "a.seq"
    sequence, logits = opened(paging, prompt(length))
    save_file(path, sequence, fingerprint=MODEL, logits=logits.numpy())
    other = make_paging(cache_format)
    loaded, again = load_file(path, other, fingerprint=MODEL)
    assert loaded.token_ids == sequence.token_ids and loaded.replayed == 0
    assert np.array_equal(again, logits.numpy().ravel())
    for part in (prompt(3, seed=1), prompt(140, seed=2)):
        assert torch.equal(loaded.append(part), sequence.append(part))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.seq"]
    loaded.close()
    other.pool.check_integrity([], slabs=[])


def test_a_spilled_sequence_comes_back_exactly(make_paging, opened, prompt, cache_format, tmp_path):
    paging = make_paging(cache_format)
    with _store(tmp_path, paging) as store:
        sequence, _ = opened(paging, prompt(290))
        twin = sequence.fork()
        store.spill("a", sequence)
        sequence.close()
        back = store.unspill("a", paging)
        assert back.replayed == 0
        assert torch.equal(back.append([1, 2]), twin.append([1, 2]))
        with pytest.raises(SequenceFileError, match="no sequence 'b'"):
            store.unspill("b", paging)


def test_files_of_others_are_refused(paging, opened, prompt, tmp_path):
    sequence, _ = opened(paging, prompt(200))
    with _store(tmp_path, paging) as store:
        _put(store, sequence)
        with pytest.raises(SequenceFileError, match="in use by another process"):
            _store(tmp_path, paging)
    with pytest.raises(SequenceFileError, match="another model"):
        PageStore(StoreConfig(directory=tmp_path), paging.pool.layout, fingerprint=b"x" * 32)
    (tmp_path / "prefixes.rqk").write_bytes(b"SQLite format 3\0" * 100)
    with pytest.raises(SequenceFileError, match="not a saved sequence or cache file"):
        _store(tmp_path, paging)
    assert (tmp_path / "prefixes.rqk").read_bytes().startswith(b"SQLite")  # and are not touched
    (tmp_path / "file").touch()
    with pytest.raises(SequenceFileError, match="cannot be made"):
        _store(tmp_path / "file", paging)


def test_a_file_cut_anywhere_holds_what_was_whole(make_paging, opened, prompt, tmp_path):
    paging, ids = make_paging("packed"), prompt(400)
    with _store(tmp_path, paging, strategy=WindowStrategy.FULL) as store:
        sequence, _ = opened(paging, ids)
        ends = [store.statistics().file_bytes]
        for length in (128, 256, 384):
            store.put(ids[:length], sequence.pages, pool=paging.pool)
            ends.append(store.statistics().file_bytes)
    whole = (tmp_path / "prefixes.rqk").read_bytes()
    cuts = {0, 1, 40, 63, *(e + d for e in ends for d in (-1, 0, 1, 39, 40, 41, 700) if e + d >= 0)}
    for cut in sorted(cuts):
        (tmp_path / "prefixes.rqk").write_bytes(whole[:cut])
        with _store(tmp_path, paging) as store:
            assert store.depth(ids) == 128 * max(sum(end <= cut for end in ends) - 1, 0)
            _put(store, sequence)  # and goes on from there
            assert store.depth(ids) == 384
        with _store(tmp_path, paging) as store:
            pages, _ = store.load(ids, pool=paging.pool)
            for mine, theirs in zip(pages, sequence.pages, strict=False):
                assert np.array_equal(paging.pool.read_page(mine), paging.pool.read_page(theirs))
            paging.pool.drop_pages(pages)


def test_a_flipped_bit_anywhere_is_an_error_or_a_miss_never_another_page(
    make_paging, opened, prompt, tmp_path
):
    paging, ids = make_paging("packed"), prompt(300)
    sequence, logits = opened(paging, ids)
    with _store(tmp_path, paging, strategy=WindowStrategy.FULL) as store:
        _put(store, sequence)
    save_file(tmp_path / "a.seq", sequence, fingerprint=MODEL, logits=logits.numpy())
    random_ = random.Random(0)
    for name in ("prefixes.rqk", "a.seq"):
        whole = (tmp_path / name).read_bytes()
        places = [*range(0, 110), *(random_.randrange(len(whole)) for _ in range(60))]
        for place in places:
            torn = bytearray(whole)
            torn[place] ^= 1 << random_.randrange(8)
            (tmp_path / name).write_bytes(torn)
            try:
                if name == "a.seq":
                    loaded, _ = load_file(tmp_path / name, paging, fingerprint=MODEL)
                    assert loaded.token_ids == ids
                    pages = list(loaded.pages)
                    loaded.close()
                else:
                    with _store(tmp_path, paging) as store:
                        pages, snapshots = store.load(ids, pool=paging.pool)
                        for snapshot in snapshots:
                            assert np.array_equal(snapshot.data, sequence.snapshots[256].data)
                        paging.pool.drop_pages(pages)
            except SequenceFileError:
                continue
            whole_pages = min(len(pages), 2)
            for mine, theirs in zip(pages[:whole_pages], sequence.pages, strict=False):
                assert np.array_equal(paging.pool.read_page(mine), paging.pool.read_page(theirs))
    paging.pool.check_integrity([sequence.pages], slabs=[sequence.slab])


def test_a_damaged_page_is_a_miss_that_is_counted_and_written_anew(make_paging, opened, prompt, tmp_path):
    paging, ids = make_paging("packed"), prompt(300)
    sequence, _ = opened(paging, ids)
    with _store(tmp_path, paging, strategy=WindowStrategy.ZERO) as store:
        _put(store, sequence)
    raw = bytearray((tmp_path / "prefixes.rqk").read_bytes())
    raw[-5] ^= 1  # in the second page
    (tmp_path / "prefixes.rqk").write_bytes(raw)
    with _store(tmp_path, paging, strategy=WindowStrategy.ZERO) as store:
        pages, _ = store.load(ids, pool=paging.pool)
        assert len(pages) == 1 and store.statistics().damaged == 1
        assert store.depth(ids) == 128
        _put(store, sequence)
        assert store.depth(ids) == 256
        paging.pool.drop_pages(pages)
        assert len(store.load(ids, pool=paging.pool)[0]) == 2


def test_a_full_disk_loses_nothing_in_memory_and_leaves_the_file_whole(
    make_paging, opened, plain, prompt, tmp_path
):
    paging, ids = make_paging("packed"), prompt(400)
    sequence, _ = opened(paging, ids)
    with _store(tmp_path, paging, strategy=WindowStrategy.ZERO) as store:
        store.put(ids[:128], sequence.pages, pool=paging.pool)
        size = store.statistics().file_bytes
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (size + 100, hard)
        )  # as a full disk: the write stops half-way
        try:
            with pytest.raises(SequenceFileError, match="cannot be written"):
                _put(store, sequence)
            with pytest.raises(SequenceFileError, match="cannot be written"):
                store.spill("a", sequence)
            with pytest.raises(SequenceFileError, match="cannot be written"):
                save_file(tmp_path / "a.seq", sequence, fingerprint=MODEL)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [entry.name for entry in tmp_path.iterdir()] == ["prefixes.rqk"]
        assert store.statistics().file_bytes == (tmp_path / "prefixes.rqk").stat().st_size == size
        torch.testing.assert_close(sequence.append([1]), plain([*ids, 1], "packed"), atol=2e-3, rtol=0)
        _put(store, sequence)  # there is room again
        assert store.depth(ids) == 384


def test_a_limit_stops_writing_and_says_so_once(make_paging, opened, prompt, tmp_path, caplog):
    paging = make_paging("packed")
    sequence, _ = opened(paging, prompt(400))
    with _store(tmp_path, paging, limit_bytes=4000) as store:
        assert _put(store, sequence) == 0 and _put(store, sequence) == 0
        assert sum("full" in record.message for record in caplog.records) == 1
        with pytest.raises(SequenceFileError, match="limit of 4000"):
            store.spill("a", sequence)


WRITER = """
import sys, numpy as np
from rorqual.engine.layout import CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.engine.store import PageStore, StoreConfig
from rorqual.model import Config
layout = CacheLayout(Config.preset("tiny"), "packed")
pool = PagePool(layout, kv_bytes=1 << 30)
ids = list(range(128)) * 4000
pages = []
with PageStore(StoreConfig(directory=sys.argv[1]), layout, fingerprint=b"m" * 32) as store:
    print("open", flush=True)
    for n in range(4000):
        pages += pool.take_pages(1)
        pool.write_page(pages[-1], np.full(layout.page_bytes, n % 251, dtype=np.uint8))
        store.put(ids[: 128 * (n + 1)], pages, pool=pool)
        print(n, flush=True)
"""


def test_kill_minus_nine_while_writing_keeps_every_page_that_was_reported(tmp_path):
    layout = CacheLayout(Config.preset("tiny"), "packed")
    ids = list(range(128)) * 4000
    reported = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        with process.stdout:
            for _ in range(reported + 20):
                process.stdout.readline()
            time.sleep(random.random() / 50)  # anywhere inside a write
            process.send_signal(signal.SIGKILL)
            done = [line for line in process.stdout.read().split() if line.isdigit()]
        process.wait()
        pool = PagePool(layout, kv_bytes=1 << 30)
        with PageStore(StoreConfig(directory=tmp_path), layout, fingerprint=MODEL) as store:
            depth = store.depth(ids) // 128
            assert depth >= (int(done[-1]) + 1 if done else reported + 18)
            pages, _ = store.load(ids, pool=pool)
            assert len(pages) == depth and store.statistics().damaged == 0
            for number, page in enumerate(pages):
                assert (pool.read_page(page) == number % 251).all()
        reported = depth


def test_a_sequence_that_is_empty_is_saved_too(paging, tmp_path):
    with PagedSequence(paging) as sequence:
        save_file(tmp_path / "a.seq", sequence, fingerprint=MODEL)
        loaded, logits = load_file(tmp_path / "a.seq", paging, fingerprint=MODEL)
        assert loaded.length == 0 and logits is None
