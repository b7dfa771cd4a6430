"""Shelf: what the server's stores keep beside the cache files, in one SQLite file, so that a restart forgets nothing.

Rows of (store, name, value) in the order they were put. What is written belongs to one model and tokenizer: another
one's rows are dropped. A damaged file is set aside and a new one begun; a disk that refuses is told once, and memory
goes on without it. 0600: it holds conversations. Thread-safe.                               (decision 0020)
Owns bytes. What a row means is its store's matter.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

__all__ = ["FILE_NAME", "Shelf"]

log = logging.getLogger(__name__)

FILE_NAME = "conversations.sqlite"
VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS about (version INTEGER NOT NULL, fingerprint BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    place INTEGER PRIMARY KEY AUTOINCREMENT, store TEXT NOT NULL, name BLOB NOT NULL, value BLOB NOT NULL,
    UNIQUE (store, name)
);
"""


class Shelf:
    """One file, which `fingerprint` names the model and tokenizer of. Raises OSError when it cannot be made."""

    def __init__(self, path: str | Path, *, fingerprint: bytes) -> None:
        self.path = Path(path)
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._told = False
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._db: sqlite3.Connection | None = self._open()
        except sqlite3.DatabaseError as error:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            log.warning("%s is damaged (%s): it is now %s, and a new one begins", self.path, error, aside)
            for ending in ("-wal", "-shm"):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
            os.replace(self.path, aside)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        os.close(
            os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )  # its journals inherit the mode
        db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing; a loss of power the last rows
            db.executescript(SCHEMA)
            about = db.execute("SELECT version, fingerprint FROM about").fetchone()
            if about != (VERSION, self._fingerprint):
                if about is not None:
                    log.warning("%s holds another model's conversations: they are dropped", self.path)
                db.execute("DELETE FROM items")
                db.execute("DELETE FROM about")
                db.execute("INSERT INTO about VALUES (?, ?)", (VERSION, self._fingerprint))
            db.execute(
                "SELECT count(*), sum(length(value)) FROM items"
            ).fetchone()  # reads every page of the table
        except BaseException:
            db.close()
            raise
        return db

    def items(self, store: str) -> list[tuple[bytes, bytes]]:
        """(name, value) of a store, the oldest first."""
        rows = self._run("SELECT name, value FROM items WHERE store = ? ORDER BY place", [(store,)])
        return [(bytes(name), bytes(value)) for name, value in rows]

    def put(self, store: str, name: bytes, value: bytes) -> None:
        """Keeps a value under a name, as the youngest of its store."""
        self._run(
            "INSERT OR REPLACE INTO items (store, name, value) VALUES (?, ?, ?)", [(store, name, value)]
        )

    def drop(self, store: str, names: Iterable[bytes]) -> None:
        """Forgets names."""
        self._run("DELETE FROM items WHERE store = ? AND name = ?", [(store, name) for name in names])

    def _run(self, statement: str, rows: list[tuple[object, ...]]) -> list[tuple[bytes, bytes]]:
        with self._lock:
            if self._db is None or not rows:
                return []
            try:
                if len(rows) == 1:
                    return self._db.execute(statement, rows[0]).fetchall()
                self._db.execute("BEGIN")
                try:
                    self._db.executemany(statement, rows)
                finally:
                    self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if not self._told:
                    log.warning("%s: %s; conversations stay in memory alone", self.path, error)
                    self._told = True
            return []

    def close(self) -> None:
        """Closes the file. Idempotent."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None
