"""Brings chunks of one remote layer here: on demand, ahead of demand, each once.

Owns who fetches what: a chunk that is being fetched is waited for, neighbours that are missing come in one request,
what has arrived is checked before anybody sees a byte of it. A chunk that is not what the table says is refused, asked
for once more, and then an error. Every error is an event. Standard library only; thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from rorqual.sandbox.loader.chunks import BadChunk, LayerCache, pack_trace
from rorqual.sandbox.loader.remote import Remote, RemoteError, open_remote

RUN_BYTES = 4 << 20
"""Most bytes of one request."""
PREFETCHERS = 4
_BACKOFF_S = 0.2
_TRACE_S = 1.0
Report = Callable[..., None]
"""report(event, **fields)"""


def _identity(directory: str) -> tuple[int, int]:
    info = os.stat(directory)
    return info.st_dev, info.st_ino


class Fetcher:
    """One layer's chunks. Close it."""

    def __init__(self, directory: str, *, report: Report) -> None:
        self.cache = LayerCache(directory)
        self._identity = _identity(directory)
        record = self.cache.record
        self.name = os.path.basename(directory).removesuffix(".lazy")
        self.remote: Remote = open_remote(str(record["url"]))
        self._blob = str(record["blob"])
        self._deadline_s = float(str(record["deadline_s"]))
        self._attempts = int(str(record["attempts"]))
        self._report = report
        self._lock = threading.Lock()
        self._running: dict[int, Future[bytes]] = {}
        self._touched = bytearray(self.cache.table.count)
        self._order: list[int] = []
        self._record_trace = not os.path.exists(f"{directory}/trace")
        self._written = 0
        self._saved = time.monotonic()
        self._full = False
        self._complete = False
        self.fetched_bytes = 0
        """Bytes that came from the store."""
        self.fetched_chunks = 0
        self.stopping = False

    def close(self) -> None:
        self.stopping = True
        self.save_trace()
        self.remote.close()
        self.cache.close()

    def current(self) -> bool:
        """Whether its directory is still the one of this name."""
        with contextlib.suppress(OSError):
            return _identity(self.cache.directory) == self._identity
        return False

    # -- reading
    # ------------------------------------------------------------------------------------------------

    def ready(self, offset: int, size: int) -> bytes | None:
        """The bytes when all of them are here, else None."""
        cache = self.cache
        first, last = offset // cache.table.chunk_bytes, (offset + size - 1) // cache.table.chunk_bytes
        if not self._complete:
            for index in range(first, last + 1):
                if not cache.here(index):
                    return None
            if self._record_trace:
                self._touch(first, last)
        return cache.read(offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes, fetched where they are not here. Raises RemoteError or BadChunk."""
        table = self.cache.table
        first, last = offset // table.chunk_bytes, (offset + size - 1) // table.chunk_bytes
        self._touch(first, last)
        fresh = self.bring(range(first, last + 1))
        parts = []
        for index in range(first, last + 1):
            start = max(offset, index * table.chunk_bytes)
            end = min(offset + size, index * table.chunk_bytes + table.length(index))
            if index in fresh:
                base = index * table.chunk_bytes
                parts.append(fresh[index][start - base : end - base])
            else:
                parts.append(self.cache.read(start, end - start))
        return b"".join(parts)

    def bring(self, wanted: range | list[int]) -> dict[int, bytes]:
        """Makes chunks be here. Returns those that were not, since a full disk may not have kept them."""
        waiting: dict[int, Future[bytes]] = {}
        mine: list[int] = []
        with self._lock:
            for index in wanted:
                if index in self._running:
                    waiting[index] = self._running[index]
                elif not self.cache.here(index):
                    mine.append(index)
                    self._running[index] = Future()
        found: dict[int, bytes] = {}
        failure: Exception | None = None
        for run in self._runs(mine):
            if failure is None:
                try:
                    found.update(self._fetch_run(run))
                except (RemoteError, BadChunk, OSError) as error:
                    failure = error
            for index in run:
                with self._lock:
                    future = self._running.pop(index)
                if index in found:
                    future.set_result(found[index])
                else:
                    future.set_exception(failure or RemoteError("not fetched"))
        if failure is not None:
            raise failure
        for index, other in waiting.items():
            found[index] = other.result()
        return found

    def _runs(self, indices: list[int]) -> list[list[int]]:
        """Groups whose stored bytes lie side by side in the blob, each one request."""
        runs: list[list[int]] = []
        end = -1
        for index in indices:
            _, offset, stored = self.cache.table.entry(index)
            run = runs[-1] if runs else []
            if run and offset == end and offset + stored - self.cache.table.entry(run[0])[1] <= RUN_BYTES:
                run.append(index)
            else:
                runs.append([index])
            end = offset + stored
        return runs

    def _fetch_run(self, run: list[int]) -> dict[int, bytes]:
        table = self.cache.table
        _, start, _ = table.entry(run[0])
        _, offset, stored = table.entry(run[-1])
        size = offset + stored - start
        corrupt = 0
        for attempt in range(1, self._attempts + 1):
            try:
                data = self.remote.read(self._blob, offset=start, size=size, deadline_s=self._deadline_s)
                with self._lock:
                    self.fetched_bytes += len(data)
                found = {}
                for index in run:
                    _, offset, stored = table.entry(index)
                    found[index] = table.unpack(index, data[offset - start : offset - start + stored])
                break
            except BadChunk as error:
                self._report("corrupt", layer=self.name, url=self.remote.url, detail=str(error))
                corrupt += 1
                if corrupt > 1 or attempt == self._attempts:
                    raise
            except RemoteError as error:
                if error.lasting or attempt == self._attempts or self.stopping:
                    self._report("unreachable", layer=self.name, url=self.remote.url, detail=str(error))
                    raise
                time.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        with self._lock:
            self.fetched_chunks += len(found)
        for index, chunk in found.items():
            if not self.cache.store(index, chunk) and not self._full:
                self._full = True
                self._report("full", layer=self.name, detail=f"{self.cache.directory}: no room for chunks")
        return found

    # -- ahead of demand
    # ------------------------------------------------------------------------------------------------

    def prefetch(self, order: list[int], *, threads: int = PREFETCHERS) -> list[threading.Thread]:
        """Starts to fetch these chunks, in this order, beside the demand. A failure ends it: demand reports it."""
        pending = iter(self._batches(order))
        lock = threading.Lock()

        def work() -> None:
            while not self.stopping:
                with lock:
                    batch = next(pending, None)
                if batch is None:
                    return
                try:
                    self.bring(batch)
                except (RemoteError, BadChunk, OSError):
                    return

        started = [
            threading.Thread(target=work, name="rorqual-prefetch", daemon=True) for _ in range(threads)
        ]
        for thread in started:
            thread.start()
        return started

    def _batches(self, order: list[int]) -> list[list[int]]:
        """Ascending neighbours together, up to a request's size."""
        most = max(1, RUN_BYTES // 4 // self.cache.table.chunk_bytes)
        batches: list[list[int]] = []
        for index in order:
            if batches and batches[-1][-1] + 1 == index and len(batches[-1]) < most:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def settle(self) -> bool:
        """Called now and then: saves the trace; True when the layer is complete, its data on the disk."""
        self.save_trace()
        if not self._complete and self.cache.complete():
            self.cache.seal()
            self._complete = True
            self._report("complete", layer=self.name, bytes=self.cache.size_bytes)
        return self._complete

    # -- trace
    # ------------------------------------------------------------------------------------------------

    def _touch(self, first: int, last: int) -> None:
        for index in range(first, last + 1):
            if not self._touched[index]:
                self._touched[index] = 1
                self._order.append(index)

    def save_trace(self) -> None:
        """Writes the order of first touches of the run that records it, as it grows."""
        if not self._record_trace or len(self._order) == self._written:
            return
        order = list(self._order)
        temporary = f"{self.cache.directory}/trace.{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                file.write(pack_trace(order))
            os.rename(temporary, f"{self.cache.directory}/trace")
            self._written = len(order)
        except OSError as error:
            self._report("full", layer=self.name, detail=f"the trace cannot be written: {error}")

    def statistics(self) -> dict[str, Any]:
        return {
            "chunks": self.cache.table.count,
            "here": self.cache.count_here(),
            "fetched_chunks": self.fetched_chunks,
            "fetched_bytes": self.fetched_bytes,
        }
