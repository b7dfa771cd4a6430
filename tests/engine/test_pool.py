"""Pages and slabs: counts, sharing, copies, limits, and memory that costs nothing until touched."""

import gc
import os
import resource
import sys

import numpy as np
import pytest

from rorqual.engine import CacheFull
from rorqual.engine.layout import CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.model import Config

LAYOUT = CacheLayout(Config.preset("tiny"), "packed")


def _pool(pages=8, slabs=2):
    return PagePool(LAYOUT, kv_bytes=pages * LAYOUT.page_bytes + slabs * LAYOUT.slab_bytes)


def _fill(pool, page, seed):
    data = np.random.default_rng(seed).integers(0, 256, LAYOUT.page_bytes, dtype=np.uint8)
    pool.write_page(page, data)
    return data


def test_a_page_reads_back_what_was_written_and_pages_do_not_overlap():
    pool = _pool()
    pages = pool.take_pages(4)
    written = [_fill(pool, page, seed) for seed, page in enumerate(pages)]
    for page, data in zip(pages, written, strict=True):
        assert np.array_equal(pool.read_page(page), data)
    layer = next(n for n, layer in enumerate(LAYOUT.layers) if layer.overlap)
    offset = sum(each.entries_page + each.keys_page for each in LAYOUT.layers[:layer])
    size = LAYOUT.layers[layer].entries_page
    assert np.array_equal(pool.entries(layer)[pages[2]].ravel(), written[2][offset : offset + size])
    address = pool.entries_address(layer) + pages[2] * size
    assert address == pool.entries(layer)[pages[2]].ctypes.data
    with pytest.raises(ValueError, match="a page is"):
        pool.write_page(pages[0], written[0][:-1])


def test_the_last_reference_frees_a_page():
    pool = _pool()
    pages = pool.take_pages(3)
    pool.share_pages(pages[:2])
    pool.drop_pages(pages)
    pool.check_integrity([pages[:2]])
    assert pool.statistics().pages == 2
    pool.drop_pages(pages[:2])
    pool.check_integrity([])
    assert pool.used_bytes == 0


def test_a_shared_page_is_copied_for_its_writer_and_an_own_one_is_not():
    pool = _pool()
    (page,) = pool.take_pages(1)
    data = _fill(pool, page, 1)
    assert pool.own_page(page) == page
    pool.share_pages([page])
    copy = pool.own_page(page)
    assert copy != page and np.array_equal(pool.read_page(copy), data)
    pool.check_integrity([[page], [copy]])


def test_more_than_the_budget_is_refused_with_numbers_before_anything_changes():
    pool = _pool(pages=4, slabs=1)
    pool.take_slab()
    pool.take_pages(3)
    with pytest.raises(CacheFull, match="raise kv_bytes") as caught:
        pool.take_pages(2)
    assert caught.value.need == 2 * LAYOUT.page_bytes and caught.value.limit == pool.kv_bytes
    assert pool.statistics().pages == 3
    pool.take_pages(1)
    pool.check_integrity()


def test_room_is_asked_for_before_it_is_refused():
    pool = _pool(pages=4, slabs=0)
    kept = pool.take_pages(4)
    asked = []

    def reclaim(need):
        asked.append(need)
        if not kept:
            return False
        pool.drop_pages([kept.pop()])
        return True

    pool.reclaim = reclaim
    assert len(pool.take_pages(2)) == 2
    assert asked == [2 * LAYOUT.page_bytes, LAYOUT.page_bytes]


def test_pages_and_slabs_have_free_lists_of_their_own():
    pool = _pool()
    slab = pool.take_slab()
    pages = pool.take_pages(5)
    pool.drop_pages(pages)
    pool.check_integrity([], slabs=[slab])
    other = pool.take_slab()
    assert other != slab
    pool.drop_slab(slab)
    assert pool.take_slab() == slab
    pool.check_integrity([], slabs=[slab, other])


def test_a_charge_lasts_as_long_as_its_holder():
    class Holder:
        pass

    pool, holder = _pool(), Holder()
    pool.charge(holder, 1000)
    assert pool.used_bytes == 1000
    del holder
    gc.collect()
    assert pool.used_bytes == 0


def test_untouched_pages_cost_nothing_and_freed_bulk_goes_back():
    pool = PagePool(LAYOUT, kv_bytes=1 << 32)
    before = _resident()
    pages = pool.take_pages(2000)
    data = np.ones(LAYOUT.page_bytes, dtype=np.uint8)
    assert _resident() - before < 8 << 20
    for page in pages:
        pool.write_page(page, data)
    touched = len(pages) * LAYOUT.page_bytes
    assert _resident() - before > touched // 2
    pool.drop_pages(pages)
    assert _resident() - before < touched // 4


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_more_than_the_system_maps_is_one_clear_error():
    with pytest.raises(CacheFull, match="lower kv_bytes"):
        PagePool(LAYOUT, kv_bytes=1 << 60)
    with pytest.raises(ValueError, match="kv_bytes is 0"):
        PagePool(LAYOUT, kv_bytes=0)


def test_damage_is_found():
    pool = _pool()
    pages = pool.take_pages(3)
    with pytest.raises(AssertionError, match="references"):
        pool.check_integrity([pages[:2]])
    pool._free_pages.append(pages[0])
    with pytest.raises(AssertionError, match="free and referenced"):
        pool.check_integrity()


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux accounts for address space")
def test_pools_larger_than_memory_do_not_keep_a_process_from_forking():
    pools = [PagePool(LAYOUT, kv_bytes=1 << 38) for _ in range(4)]
    child = os.fork()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    assert len(pools) == 4
