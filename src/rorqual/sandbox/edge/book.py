"""The edge's book: which sandboxes are its clients', for the edge that comes after a kill -9.

One SQLite file in the run directory, gone after a reboot as the sandboxes are, so nothing needs to reach the disk:
what a killed process wrote is in the page cache. A sandbox is entered before its client learns its id; one that
lives and is not in the book was never handed over.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox.errors import SandboxError


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sandbox of the book."""

    id: str
    owner: str
    """The client that asked for it, in its own words: for logs."""
    lease: float | None
    """Seconds without any client after which it ends; None: kept."""
    memory_mb: int


class Book:
    """The open file. `close` it."""

    def __init__(self, path: Path) -> None:
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=OFF")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS sandboxes (id TEXT PRIMARY KEY, owner TEXT NOT NULL, lease REAL, "
                "memory_mb INTEGER NOT NULL)"
            )
        except sqlite3.Error as error:
            raise SandboxError(f"cannot open the edge's book {path}: {error}") from error

    def enter(self, rows: list[Row]) -> None:
        """Adds all or none."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(
                "INSERT INTO sandboxes VALUES (?, ?, ?, ?)",
                [(row.id, row.owner, row.lease, row.memory_mb) for row in rows],
            )

    def strike(self, sandbox_id: str) -> None:
        """Removes one; nothing when it is not there."""
        self._connection.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))

    def rows(self) -> list[Row]:
        found = self._connection.execute("SELECT id, owner, lease, memory_mb FROM sandboxes").fetchall()
        return [Row(id=id_, owner=owner, lease=lease, memory_mb=mb) for id_, owner, lease, mb in found]

    def close(self) -> None:
        self._connection.close()
