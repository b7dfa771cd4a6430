"""The trajectory log: every command, file write and lifecycle change of a sandbox, numbered, in order.

`begin` returns once the intent is committed, so a command never runs before its row is durable; `finish` adds
the result and does not wait. One writer thread per file commits whatever has queued up in one transaction
(group commit); `note` adds what changes nothing (a read), intent and result in one, without waiting. What is stored
is bounded: the first and last HALF_KEPT bytes of each stream, INPUT_BYTES of what went in. Owns the thread;
trajectory_store.py owns the SQL.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.sandbox import trajectory_store as store
from rorqual.sandbox.errors import TrajectoryError

HALF_KEPT = 512 << 10
"""Bytes of output kept from either end of a stream."""
INPUT_BYTES = 1 << 20
"""Bytes kept of what a command was fed or a file was written with; more is not kept at all, its sha256 is."""
REQUEST_BYTES = 64 << 10
"""A request's texts are cut to this many characters in the log; `cut` then has the sha256 of the whole."""
_BATCH = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryEntry:
    """One row of the log."""

    seq: int
    kind: str
    """'created', 'command', 'pty', 'stdin', 'kill', 'write', 'make_dir', 'remove', 'rename', 'read', 'list', 'stat',
    'set_timeout', 'pause', 'resume', 'snapshot', 'commit', 'fork', 'ended'."""
    request: dict[str, Any]
    result: dict[str, Any] | None
    """None: it was begun and its end is not known (still running, or the client died)."""
    stdout: bytes
    """Bounded: see HALF_KEPT. `result['stdout_cut']` tells whether the middle is missing."""
    stderr: bytes
    input: bytes
    """What the command was fed, or the file written with; b'' when it is over INPUT_BYTES."""
    started: float
    ended: float | None


def bounded(data: bytes) -> tuple[bytes, bool]:
    """Head and tail of `data`, and whether something was left out."""
    if len(data) <= 2 * HALF_KEPT:
        return data, False
    return data[:HALF_KEPT] + data[-HALF_KEPT:], True


class Log:
    """One log file and its writer thread. Use `open_log`: one per file in a process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = store.connect(str(path))
        except (sqlite3.Error, OSError, ValueError) as error:
            raise TrajectoryError(f"cannot open the trajectory log {path}: {error}") from error
        self._open = True
        self._busy = threading.Lock()
        """Held while SQLite works; a fork waits for it, and leaves nothing of SQLite's open in the child."""
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._failed = ""
        self._thread = threading.Thread(target=self._write, name="rorqual-trajectory", daemon=True)
        self._thread.start()

    async def begin(self, *, sandbox: str, kind: str, request: dict[str, Any], input: bytes = b"") -> int:
        """Adds an intent; returns its number when it is durable. Raises TrajectoryError."""
        request, input = logged(request), input if len(input) <= INPUT_BYTES else b""
        future = self._submit(
            lambda: store.begin(self._connection, sandbox=sandbox, kind=kind, request=request, input=input)
        )
        seq: int = await asyncio.wrap_future(future)
        return seq

    def finish(
        self, *, sandbox: str, seq: int, result: dict[str, Any], stdout: bytes = b"", stderr: bytes = b""
    ) -> None:
        """Adds a result, in order, without waiting. A failure shows at the next `begin`."""
        out, out_cut = bounded(stdout)
        err, err_cut = bounded(stderr)
        if out_cut or err_cut:
            result = result | {"stdout_cut": out_cut, "stderr_cut": err_cut}
        self._submit(
            lambda: store.finish(
                self._connection, sandbox=sandbox, seq=seq, result=result, stdout=out, stderr=err
            )
        )

    def note(
        self, *, sandbox: str, kind: str, request: dict[str, Any], result: dict[str, Any], stdout: bytes = b""
    ) -> None:
        """Adds what has happened and changed nothing, in order, without waiting."""
        out, cut = bounded(stdout)
        if cut:
            result = result | {"stdout_cut": True}
        request = logged(request)

        def work() -> None:
            seq = store.begin(self._connection, sandbox=sandbox, kind=kind, request=request)
            store.finish(self._connection, sandbox=sandbox, seq=seq, result=result, stdout=out, stderr=b"")

        self._submit(work)

    async def flush(self) -> None:
        """Returns when everything before it is committed."""
        await asyncio.wrap_future(self._submit(lambda: None))

    def read(self, sandbox: str, *, after: int = 0) -> list[TrajectoryEntry]:
        """Every row of a sandbox with a number above `after`, in order. Reads through its own connection."""
        try:
            with self._busy:
                connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=10.0)
                try:
                    rows = connection.execute(
                        "SELECT seq, kind, request, result, stdout, stderr, started, ended, input "
                        "FROM trajectory WHERE sandbox = ? AND seq > ? ORDER BY seq",
                        (sandbox, after),
                    ).fetchall()
                finally:
                    connection.close()
        except sqlite3.Error as error:
            raise TrajectoryError(f"cannot read the trajectory log {self.path}: {error}") from error
        return [
            TrajectoryEntry(
                seq=seq,
                kind=kind,
                request=json.loads(request),
                result=None if result is None else json.loads(result),
                stdout=stdout or b"",
                stderr=stderr or b"",
                started=started,
                ended=ended,
                input=fed or b"",
            )
            for seq, kind, request, result, stdout, stderr, started, ended, fed in rows
        ]

    async def output_bytes(self, sandbox: str) -> int:
        """Bytes printed by its commands that have ended, kept or not."""
        work = self._submit(lambda: store.output_bytes(self._connection, sandbox=sandbox))
        count: int = await asyncio.wrap_future(work)
        return count

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self._failed:
            future.set_exception(
                TrajectoryError(f"the trajectory log {self.path} cannot be written: {self._failed}")
            )
        else:
            self._queue.put((work, future))
        return future

    def _write(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < _BATCH:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            jobs = [item for item in batch if item is not None]
            try:
                with self._busy:
                    values = self._commit([work for work, _ in jobs])
            except (sqlite3.Error, OSError, ValueError) as error:
                # A full disk or a lost file: the log is the promise, so nothing may run without it from here
                # on.
                self._failed = str(error)
                failure = TrajectoryError(f"the trajectory log {self.path} cannot be written: {error}")
                for _, future in jobs:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(failure)
            else:
                for (_, future), value in zip(jobs, values, strict=True):
                    if future.set_running_or_notify_cancel():
                        future.set_result(value)
            if len(jobs) < len(batch) or self._failed:
                self._drain()
                with self._busy:
                    self._connection.close()
                    self._open = False
                return

    def _commit(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        """In one transaction. Raises sqlite3.Error, OSError, ValueError; then nothing of it is there."""
        if not self._open:  # a fork closed it
            self._connection = store.connect(str(self.path))
            self._open = True
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            values = [work() for work in works]
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return values

    def let_go(self) -> None:
        """Before a fork: waits for SQLite, and closes it; the next write opens it again. See `resume`."""
        self._busy.acquire()
        if self._open:
            self._connection.close()
            self._open = False

    def resume(self) -> None:
        """After the fork, in the parent."""
        self._busy.release()

    def _drain(self) -> None:
        self._failed = self._failed or "it was closed"
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if item is not None and item[1].set_running_or_notify_cancel():
                text = f"the trajectory log {self.path} cannot be written: {self._failed}"
                item[1].set_exception(TrajectoryError(text))

    def close(self) -> None:
        """Commits what is queued and closes the file. Idempotent."""
        self._queue.put(None)
        self._thread.join(timeout=10.0)


def logged(request: dict[str, Any]) -> dict[str, Any]:
    """The request as it is written: long texts cut, with a digest of the whole."""
    long = {
        key: hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
        for key, value in request.items()
        if isinstance(value, str) and len(value) > REQUEST_BYTES
    }
    if not long:
        return request
    cut = {key: value[:REQUEST_BYTES] if key in long else value for key, value in request.items()}
    return cut | {"cut": long}


_logs: dict[Path, Log] = {}
_lock = threading.Lock()


def open_log(path: Path) -> Log:
    """This process's log for the file, opened when it is not. Raises TrajectoryError."""
    path = path.absolute()
    with _lock:
        log = _logs.get(path)
        if log is None or log._failed or not log._thread.is_alive():
            log = _logs[path] = Log(path)
        return log


def close_all() -> None:
    """Commits and closes every log of this process."""
    with _lock:
        logs = list(_logs.values())
        _logs.clear()
    for log in logs:
        log.close()


_forking: list[Log] = []


def _before_fork() -> None:
    """SQLite keeps its locks of a file in the process: a child with a copy of them takes itself for their holder."""
    _lock.acquire()
    _forking[:] = _logs.values()
    for log in _forking:
        log.let_go()


def _after_fork_in_parent() -> None:
    for log in _forking:
        log.resume()
    _forking.clear()
    _lock.release()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _logs.clear()
    _forking.clear()


atexit.register(close_all)
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)
