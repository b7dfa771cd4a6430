"""Routed experts on demand: whole experts read from disk into a bounded number of slots, least recently used out.

An expert is read by several threads at once with pread, past the page cache where the file system allows it
(O_DIRECT), else dropped from it after the read: faults through a mapping would come 4 KiB at a time, and the budget
would be counted twice. Every slot is as large as the largest expert; the memory held is slots * slot bytes, never more
than the budget. An expert's bytes are those of the file, so it does not matter to a result where they lie.
Owns slots, reads and counters. Never knows what the bytes mean: packed.py does. spec/engines.md 8.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from rorqual.model.errors import CheckpointError

__all__ = ["ExpertCache", "ExpertStats", "Key", "Reads", "Region"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")
Key = tuple[int, int]
"""(layer, expert)"""
Reads = Literal["direct", "drop", "cached"]
"""`direct`: O_DIRECT, or `drop` where that is refused; `drop`: the pages leave the page cache after the read;
`cached`: they stay in it."""
PAGE = 4096
"""Reads begin and end at multiples of it, as O_DIRECT wants."""
PIECE = 4 << 20
"""Bytes one thread reads at a time."""
MERGE_GAP = 64 << 10
"""Regions that lie no further apart are read together."""


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes of a file."""

    file: Path
    begin: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStats:
    """Counters since the cache was made, but for the last three."""

    hits: int
    """Experts that were in a slot, or on their way there."""
    misses: int
    prefetched: int
    """Reads that `prefetch` began."""
    prefetch_hits: int
    """Hits on experts that nothing but `prefetch` had brought."""
    overflow: int
    """Experts that found no slot in a call that asked for more than there are; counted in `misses` too."""
    evictions: int
    bytes_read: int
    """Bytes that reads asked the file system for; `overflow` experts are not among them."""
    wait_seconds: float
    """Time in which a call waited for reads."""
    slots: int
    slot_bytes: int
    held_bytes: int
    """Memory of all slots that have been used."""


@dataclass(slots=True)
class _Read:
    """A stretch of a file and where in a slot it goes."""

    file: Path
    begin: int
    """Multiple of PAGE."""
    nbytes: int
    """Up to the next multiple of PAGE, which may lie behind the end of the file."""
    need: int
    """Bytes that must arrive."""
    at: int
    """Offset in the slot."""


@dataclass(slots=True)
class _Entry(Generic[_T]):
    """An expert in a slot."""

    slot: mmap.mmap
    futures: list[Future[None]]
    prefetched: bool
    value: _T | None = None
    """None until its reads are done."""


class ExpertCache(Generic[_T]):
    """Slots for experts. `regions` maps every key that may be asked for to the regions of its tensors.

    `build` makes what `load` returns from the tensors (uint8, one a region) of a key that has just been read;
    `check` judges it the first time and raises CheckpointError.
    Raises CheckpointError when `budget_bytes` holds fewer than `at_least` experts, or a file cannot be opened.
    """

    def __init__(
        self,
        regions: dict[Key, list[Region]],
        *,
        build: Callable[[Key, list[Tensor]], _T],
        check: Callable[[Key, _T], None],
        budget_bytes: int,
        at_least: int = 1,
        reads: Reads = "direct",
        threads: int = 8,
    ) -> None:
        self._plans = {key: _plan(wanted) for key, wanted in regions.items()}
        self._regions, self._build, self._check = regions, build, check
        self.slot_bytes = max((_need(plan) for plan, _ in self._plans.values()), default=PAGE)
        self.slots = min(budget_bytes // self.slot_bytes, len(regions))
        if self.slots < at_least:
            raise CheckpointError(
                f"{budget_bytes} bytes for experts hold {self.slots} of {self.slot_bytes} bytes each, a token needs "
                f"{at_least}: allow at least {at_least * self.slot_bytes}"
            )
        self._files = _Files({region.file for wanted in regions.values() for region in wanted}, reads=reads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rorqual-experts")
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, _Entry[_T]] = OrderedDict()
        """The least recently used first."""
        self._pinned: set[Key] = set()
        self._free: list[mmap.mmap] = []
        self._made = 0
        self._checked: set[Key] = set()
        self._counts = dict.fromkeys(
            ("hits", "misses", "prefetched", "prefetch_hits", "overflow", "evictions", "bytes_read"), 0
        )
        self._wait_seconds = 0.0

    def load(self, keys: Sequence[Key]) -> dict[Key, _T | None]:
        """What `build` made of every key; None where no slot is left for it.

        It stays valid until the next `load`. Raises CheckpointError when a read fails or `check` refuses; the
        cache then holds no part of the bad expert.
        """
        with self._lock:
            self._pinned.clear()
            found: dict[Key, _Entry[_T] | None] = dict.fromkeys(keys)
            for key in found:
                if (entry := self._entries.get(key)) is not None:
                    self._entries.move_to_end(key)
                    self._pinned.add(key)
                    self._counts["hits"] += 1
                    self._counts["prefetch_hits"] += entry.prefetched
                    entry.prefetched = False
                    found[key] = entry
            for key in [key for key, entry in found.items() if entry is None]:
                self._counts["misses"] += 1
                if (entry := self._begin(key, prefetched=False)) is None:
                    self._counts["overflow"] += 1
                    continue
                self._pinned.add(key)
                found[key] = entry
            begun = time.perf_counter()
            wait([future for entry in found.values() if entry is not None for future in entry.futures])
            self._wait_seconds += time.perf_counter() - begun
            for key, entry in found.items():
                if entry is not None:
                    self._finish(key, entry)
            return {key: None if entry is None else entry.value for key, entry in found.items()}

    def prefetch(self, keys: Sequence[Key]) -> None:
        """Begins to read experts that the next loads will ask for; fills at most half of the slots with them."""
        with self._lock:
            waiting = sum(entry.prefetched for entry in self._entries.values())
            for key in keys:
                if waiting >= self.slots // 2:
                    return
                if key not in self._entries and self._begin(key, prefetched=True) is not None:
                    self._counts["prefetched"] += 1
                    waiting += 1

    def stats(self) -> ExpertStats:
        """The counters."""
        with self._lock:
            return ExpertStats(
                **self._counts,
                wait_seconds=self._wait_seconds,
                slots=self.slots,
                slot_bytes=self.slot_bytes,
                held_bytes=self._made * self.slot_bytes,
            )

    def close(self) -> None:
        """Ends the threads and closes the files; tensors that are still held stay readable."""
        self._pool.shutdown(cancel_futures=True)
        self._files.close()
        self._entries.clear()
        self._free.clear()

    def _begin(self, key: Key, *, prefetched: bool) -> _Entry[_T] | None:
        """Gives `key` a slot and starts its reads; None when every slot is pinned or still being read."""
        slot = self._slot()
        if slot is None:
            return None
        plan, _ = self._plans[key]
        view = memoryview(slot)
        futures = [
            self._pool.submit(self._files.read, read, view[read.at : read.at + read.nbytes], part)
            for read in plan
            for part in range(0, read.nbytes, PIECE)
        ]
        self._counts["bytes_read"] += sum(min(read.nbytes, read.need) for read in plan)
        entry: _Entry[_T] = _Entry(slot, futures, prefetched)
        self._entries[key] = entry
        return entry

    def _slot(self) -> mmap.mmap | None:
        if self._free:
            return self._free.pop()
        if self._made < self.slots:
            self._made += 1
            slot = mmap.mmap(-1, self.slot_bytes)
            with suppress(OSError):  # a kernel without huge pages
                slot.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults at the first read
            return slot
        for key, entry in self._entries.items():
            if key not in self._pinned and all(future.done() for future in entry.futures):
                del self._entries[key]
                self._counts["evictions"] += 1
                return entry.slot
        return None

    def _finish(self, key: Key, entry: _Entry[_T]) -> None:
        """Sees that the reads of `entry` went well and its values are sound."""
        if entry.value is not None:
            return
        try:
            for future in entry.futures:
                future.result()
            whole = torch.frombuffer(entry.slot, dtype=torch.uint8)
            places = zip(self._plans[key][1], self._regions[key], strict=True)
            value = self._build(key, [whole[at : at + region.nbytes] for at, region in places])
            if key not in self._checked:
                self._check(key, value)
                self._checked.add(key)
        except BaseException:
            self._pinned.discard(key)
            del self._entries[key]
            self._free.append(entry.slot)
            raise
        entry.futures, entry.value = [], value


class _Files:
    """The open files, and how they are read."""

    def __init__(self, files: set[Path], *, reads: Reads) -> None:
        self._reads = reads
        self._descriptors: dict[Path, int] = {}
        for file in sorted(files):
            try:
                self._descriptors[file] = self._open(file)
            except OSError as error:
                self.close()
                raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from error

    def _open(self, file: Path) -> int:
        if self._reads == "direct":
            descriptor = -1
            try:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                os.preadv(descriptor, [mmap.mmap(-1, PAGE)], 0)  # some refuse at the first read only
                return descriptor
            except OSError as error:
                if descriptor >= 0:
                    os.close(descriptor)
                if error.errno != errno.EINVAL:
                    raise
                self._say_fallback(file)
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def _say_fallback(self, file: Path) -> None:
        self._reads = "drop"
        log.info(
            "the file system refuses O_DIRECT: experts are read through the page cache and dropped from it",
            extra={"file": str(file)},
        )

    def read(self, read: _Read, target: memoryview, part: int) -> None:
        """Reads the PIECE at `part` of `read` into its place in `target`. Raises CheckpointError."""
        descriptor = self._descriptors[read.file]
        end, need = min(part + PIECE, read.nbytes), min(part + PIECE, read.need)
        at = part
        while at < need:
            try:
                got = os.preadv(descriptor, [target[at:end]], read.begin + at)
            except OSError as error:
                raise CheckpointError(
                    f"{read.file}: reading {end - at} bytes at {read.begin + at} failed: {error.strerror}"
                ) from error
            if got == 0:
                raise CheckpointError(
                    f"{read.file} ends at {read.begin + at}, its header says it goes on: it was changed "
                    "while in use"
                )
            # O_DIRECT goes on at a multiple of the block only
            at = at + got if at + got >= need or self._reads != "direct" else at + got // PAGE * PAGE
        if self._reads == "drop":
            os.posix_fadvise(descriptor, read.begin + part, end - part, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _plan(regions: list[Region]) -> tuple[list[_Read], list[int]]:
    """The reads that bring `regions` into a slot, and each region's offset there."""
    order = sorted(range(len(regions)), key=lambda i: (regions[i].file, regions[i].begin))
    reads: list[_Read] = []
    places = [0] * len(regions)
    for i in order:
        region = regions[i]
        end = region.begin + region.nbytes
        last = reads[-1] if reads else None
        if last is None or last.file != region.file or region.begin > last.begin + last.need + MERGE_GAP:
            begin = region.begin // PAGE * PAGE
            last = _Read(region.file, begin, 0, 0, 0 if last is None else last.at + last.nbytes)
            reads.append(last)
        last.need = max(last.need, end - last.begin)
        last.nbytes = -(-last.need // PAGE) * PAGE
        places[i] = last.at + region.begin - last.begin
    return reads, places


def _need(plan: list[_Read]) -> int:
    return plan[-1].at + plan[-1].nbytes
