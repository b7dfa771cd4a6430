"""PagePool: the memory of all sequences: pages of 128 tokens with reference counts, and slabs, in one mapping.

Layer-major: layer l's part of page p lies at `entries_address(l) + p * entries_page`, so a sequence that got its
pages in a row streams. The mapping is anonymous and untouched pages cost nothing; pages freed in bulk go back to the
system. Pages and slabs have free lists of their own, so that churn of one flushes nothing of the other (vLLM
#42948); one budget bounds both and whatever snapshots are charged to it.       (spec/engines.md 5, 7; decision 0010)
Owns bytes and counts. Never knows what a token is, nor which sequence holds what.
"""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.errors import CacheFull
from rorqual.engine.layout import CacheLayout

__all__ = ["PagePool", "PoolStatistics"]

OS_PAGE = mmap.PAGESIZE
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Address space of a pool is no promise of memory: with it counted, a process of a few engines cannot fork. Python 3.11
has no name for the flag."""
BULK_BYTES = 1 << 20
"""Freeing at least this much at once gives the memory back to the system; less is kept warm for the next page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatistics:
    """What a pool holds now, in units and in bytes."""

    pages: int
    shared_pages: int
    """Of these, referenced more than once."""
    slabs: int
    charged_bytes: int
    """Snapshots: each once, however many hold it."""
    used_bytes: int
    limit_bytes: int


class PagePool:
    """Pages and slabs for `kv_bytes` in all. Thread-safe. Raises CacheFull when the system refuses the mapping.

    `reclaim(bytes)` is called, without the lock, when something does not fit: whoever sets it frees what nobody uses
    and returns whether anything was freed.
    """

    def __init__(self, layout: CacheLayout, *, kv_bytes: int) -> None:
        if kv_bytes < 1:
            raise ValueError(f"kv_bytes is {kv_bytes}, expected a positive number")
        self.layout, self.kv_bytes = layout, kv_bytes
        # A model without compressed layers has pages of no bytes: bound their number by what their tokens may be.
        most = kv_bytes // layout.page_bytes if layout.page_bytes else 1 << 20
        self.page_capacity = min(most, np.iinfo(np.int32).max)
        self.slab_capacity = kv_bytes // layout.slab_bytes
        at, self._entries_at, self._keys_at = 0, list[int](), list[int]()
        for layer in layout.layers:
            for places, size in ((self._entries_at, layer.entries_page), (self._keys_at, layer.keys_page)):
                places.append(at)
                at += -(-size * self.page_capacity // OS_PAGE) * OS_PAGE
        self._slabs_at = at
        size = max(at + self.slab_capacity * layout.slab_bytes, 1)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, size, flags=flags)
        except (OSError, OverflowError) as error:
            raise CacheFull(
                f"the system refuses {size} bytes of address space for a cache of {kv_bytes} bytes ({error}): "
                "lower kv_bytes, or raise the limit (ulimit -v)",
                need=size,
                limit=kv_bytes,
            ) from error
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self._address = int(self._bytes.ctypes.data)
        self.reclaim: Callable[[int], bool] | None = None
        self._references = np.zeros(self.page_capacity, dtype=np.int32)
        self._free_pages: list[int] = []
        self._free_slabs: list[int] = []
        self._fresh_page = self._fresh_slab = 0  # everything from here on was never handed out
        self._slabs_used: set[int] = set()
        self._charged = 0
        self._lock = threading.RLock()
        self._dropped: deque[tuple[Sequence[int], int, int]] = deque()

    # --- addresses and views

    def entries_address(self, layer: int) -> int:
        """Address of page 0's entries of `layer`; 0 where the layer has none."""
        return self._address + self._entries_at[layer] if self.layout.layers[layer].entries_page else 0

    def keys_address(self, layer: int) -> int:
        """Address of page 0's index keys of `layer`; 0 where the layer has none."""
        return self._address + self._keys_at[layer] if self.layout.layers[layer].keys_page else 0

    def slab_address(self, slab: int) -> int:
        """Address of slab `slab`."""
        return self._address + self._slabs_at + slab * self.layout.slab_bytes

    def entries(self, layer: int) -> NDArray[np.uint8]:
        """Entries of `layer`: uint8 view [pages, rows a page, entry_bytes]."""
        return self._rows(self._entries_at[layer], layer, self.layout.entry_bytes)

    def keys(self, layer: int) -> NDArray[np.uint8]:
        """Index keys of `layer`: uint8 view [pages, rows a page, key_bytes]."""
        return self._rows(self._keys_at[layer], layer, self.layout.key_bytes)

    def _rows(self, at: int, layer: int, width: int) -> NDArray[np.uint8]:
        shape = (self.page_capacity, self.layout.layers[layer].page_rows, width)
        return self._bytes[at : at + shape[0] * shape[1] * width].reshape(shape)

    def slab(self, slab: int) -> NDArray[np.uint8]:
        """The bytes of one slab, a view."""
        at = self._slabs_at + slab * self.layout.slab_bytes
        return self._bytes[at : at + self.layout.slab_bytes]

    def slabs(self) -> NDArray[np.uint8]:
        """All slabs: uint8 view [slabs, slab_bytes]."""
        return self._bytes[self._slabs_at :][: self.slab_capacity * self.layout.slab_bytes].reshape(
            self.slab_capacity, self.layout.slab_bytes
        )

    def _parts(self, page: int) -> Iterable[NDArray[np.uint8]]:
        for number, layer in enumerate(self.layout.layers):
            for at, size in (
                (self._entries_at[number], layer.entries_page),
                (self._keys_at[number], layer.keys_page),
            ):
                if size:
                    yield self._bytes[at + page * size : at + (page + 1) * size]

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """A copy of a page over all layers, uint8 [page_bytes]: per layer its entries, then its keys."""
        parts = list(self._parts(page))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)

    def write_page(self, page: int, data: NDArray[np.uint8]) -> None:
        """The reverse of `read_page`. Raises ValueError for another size."""
        if len(data) != self.layout.page_bytes:
            raise ValueError(f"a page is {self.layout.page_bytes} bytes, got {len(data)}")
        at = 0
        for part in self._parts(page):
            part[:] = data[at : at + len(part)]
            at += len(part)

    # --- pages

    @property
    def used_bytes(self) -> int:
        """Bytes held of `kv_bytes`."""
        with self._lock:
            self._drain()
            pages = self._fresh_page - len(self._free_pages)
            return (
                pages * self.layout.page_bytes
                + len(self._slabs_used) * self.layout.slab_bytes
                + self._charged
            )

    def take_pages(self, count: int) -> list[int]:
        """`count` pages with one reference each; what they hold is undefined. Raises CacheFull; then none is taken."""
        if count <= 0:
            return []
        self._make_room(count * self.layout.page_bytes, f"{count} pages", pages=count)
        with self._lock:
            again = min(count, len(self._free_pages))
            taken = [self._free_pages.pop() for _ in range(again)]
            taken += range(self._fresh_page, self._fresh_page + count - again)
            self._fresh_page += count - again
            self._references[taken] = 1
            return taken

    def share_pages(self, pages: Sequence[int]) -> None:
        """One reference more for each of `pages`."""
        with self._lock:
            index = np.asarray(pages, dtype=np.int64)
            assert (self._references[index] > 0).all(), "a free page cannot be shared"
            np.add.at(self._references, index, 1)

    def drop_pages(self, pages: Sequence[int]) -> None:
        """One reference less for each; the last one frees the page, and bulk goes back to the system."""
        if not len(pages):
            return
        with self._lock:
            index = np.asarray(pages, dtype=np.int64)
            assert (self._references[index] > 0).all(), "a free page cannot be dropped"
            np.subtract.at(self._references, index, 1)
            freed = np.unique(index[self._references[index] == 0])
            self._free_pages.extend(freed[::-1].tolist())
            if len(freed) * self.layout.page_bytes >= BULK_BYTES:
                self._give_back(freed)

    def references(self, page: int) -> int:
        """How many hold `page`."""
        return int(self._references[page])

    def own_page(self, page: int) -> int:
        """`page` itself when its only holder asks, else a copy, for the asker's reference to it. Raises CacheFull."""
        with self._lock:
            if self._references[page] == 1:
                return page
        copy = self.copy_page(page)
        self.drop_pages([page])
        return copy

    def copy_page(self, page: int) -> int:
        """A page of its own that holds what `page` does. Raises CacheFull."""
        (copy,) = self.take_pages(1)
        for source, target in zip(self._parts(page), self._parts(copy), strict=True):
            target[:] = source
        return copy

    def _give_back(self, freed: NDArray[np.int64]) -> None:
        """Tells the system that runs of freed pages hold nothing."""
        starts = np.flatnonzero(np.diff(freed, prepend=-2) != 1)
        for first, last in zip(freed[starts], freed[[*(starts[1:] - 1), len(freed) - 1]], strict=True):
            for number, layer in enumerate(self.layout.layers):
                for at, size in (
                    (self._entries_at[number], layer.entries_page),
                    (self._keys_at[number], layer.keys_page),
                ):
                    begin = -(-(at + int(first) * size) // OS_PAGE) * OS_PAGE
                    end = (at + (int(last) + 1) * size) // OS_PAGE * OS_PAGE
                    if end > begin:
                        self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    # --- slabs and charges

    def take_slab(self) -> int:
        """A slab; what it holds is undefined (rings need no clearing). Raises CacheFull."""
        self._make_room(self.layout.slab_bytes, "a slab", slabs=1)
        with self._lock:
            if self._free_slabs:
                slab = self._free_slabs.pop()
            else:
                slab, self._fresh_slab = self._fresh_slab, self._fresh_slab + 1
            self._slabs_used.add(slab)
            return slab

    def drop_slab(self, slab: int) -> None:
        """Frees a slab."""
        with self._lock:
            self._slabs_used.remove(slab)
            self._free_slabs.append(slab)

    def charge(self, holder: object, count: int) -> None:
        """Counts `count` bytes against the budget for as long as `holder` (a snapshot) lives. Raises CacheFull."""
        self._make_room(count, "a snapshot")
        with self._lock:
            self._charged += count
        weakref.finalize(holder, self.drop_later, charged=count).atexit = False

    def drop_later(self, pages: Sequence[int] = (), slab: int = -1, *, charged: int = 0) -> None:
        """Frees what a lost object held, at the next call. For finalizers: takes no lock."""
        self._dropped.append((pages, slab, charged))

    def _drain(self) -> None:
        while self._dropped:
            pages, slab, charged = self._dropped.popleft()
            self.drop_pages(pages)
            if slab >= 0:
                self.drop_slab(slab)
            self._charged -= charged

    def _make_room(self, need: int, what: str, *, pages: int = 0, slabs: int = 0) -> None:
        while True:
            used = self.used_bytes
            with self._lock:
                fits = (
                    used + need <= self.kv_bytes
                    and pages <= len(self._free_pages) + self.page_capacity - self._fresh_page
                    and slabs <= len(self._free_slabs) + self.slab_capacity - self._fresh_slab
                )
            if fits:
                return
            if self.reclaim is None or not self.reclaim(max(need - (self.kv_bytes - used), 1)):
                raise CacheFull(
                    f"no room for {what} ({need} bytes): {used} of {self.kv_bytes} bytes of cache are in use; "
                    "close sequences or raise kv_bytes",
                    need=need,
                    limit=self.kv_bytes,
                )

    # --- inspection

    def statistics(self) -> PoolStatistics:
        """What is held now."""
        with self._lock:
            used = self.used_bytes
            return PoolStatistics(
                pages=self._fresh_page - len(self._free_pages),
                shared_pages=int((self._references[: self._fresh_page] > 1).sum()),
                slabs=len(self._slabs_used),
                charged_bytes=self._charged,
                used_bytes=used,
                limit_bytes=self.kv_bytes,
            )

    def check_integrity(
        self, holders: Iterable[Sequence[int]] | None = None, *, slabs: Iterable[int] | None = None
    ) -> None:
        """Raises AssertionError unless every page is either free or referenced, and nothing is free twice.

        `holders`: the pages of everyone who holds any; then references are exactly theirs. `slabs`: likewise.
        """
        with self._lock:
            self._drain()
            free = set(self._free_pages)
            assert len(free) == len(self._free_pages), "a page is free twice"
            assert all(0 <= page < self._fresh_page for page in free), "a page is free that never was taken"
            held = set(np.flatnonzero(self._references[: self._fresh_page]).tolist())
            assert (self._references >= 0).all() and not self._references[self._fresh_page :].any()
            assert not held & free, f"pages {sorted(held & free)} are free and referenced"
            assert held | free == set(range(self._fresh_page)), "a page is neither free nor referenced"
            if holders is not None:
                counts = Counter(page for pages in holders for page in pages)
                real = {page: int(self._references[page]) for page in held}
                assert counts == real, f"references {real}, holders {dict(counts)}"
            free_slabs = set(self._free_slabs)
            assert len(free_slabs) == len(self._free_slabs) and not free_slabs & self._slabs_used
            assert free_slabs | self._slabs_used == set(range(self._fresh_slab)), "a slab is lost"
            if slabs is not None:
                assert sorted(slabs) == sorted(self._slabs_used), "a slab is held by nobody, or by two"
