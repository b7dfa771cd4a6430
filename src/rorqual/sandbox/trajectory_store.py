"""The trajectory log's table and its synchronous row operations. One row per command, file write, lifecycle
change.

Owns the SQL. Imports sqlite3 alone, since the keeper appends the end of a sandbox after its client's death.
WAL with synchronous=NORMAL: a committed row survives kill -9 of every process, and a power cut may take the
last commits; a power cut takes the sandboxes too (docs/decisions/0004-trajectory-durability.md).
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from typing import Any

FORMAT = 2
"""PRAGMA user_version of the file. 2 added `input`: what a command was fed, what a file was written with."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trajectory (
  sandbox TEXT NOT NULL,
  seq     INTEGER NOT NULL,
  kind    TEXT NOT NULL,
  request TEXT NOT NULL,
  started REAL NOT NULL,
  result  TEXT,
  stdout  BLOB,
  stderr  BLOB,
  ended   REAL,
  input   BLOB,
  PRIMARY KEY (sandbox, seq)
) WITHOUT ROWID;
"""


def _write_ahead(connection: sqlite3.Connection, *, patience: float = 10.0) -> None:
    """Switches to WAL. SQLite's own busy timeout does not cover this: two processes that open a new file at once
    collide. Raises sqlite3.OperationalError when it stays locked for `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def connect(path: str) -> sqlite3.Connection:
    """Opens (and makes) a log. Raises sqlite3.Error, or ValueError when a newer version wrote it."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    connection = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in range(FORMAT + 1):
            raise ValueError(
                f"{path}: trajectory format {version}, this version reads {FORMAT}; update rorqual"
            )
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint=4000")
        if version < FORMAT:
            _upgrade(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _upgrade(connection: sqlite3.Connection) -> None:
    """Makes the table, or gives an older one what it lacks. Two processes may come here at once."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(_SCHEMA)
        columns = {row[1] for row in connection.execute("PRAGMA table_info(trajectory)")}
        if "input" not in columns:
            connection.execute("ALTER TABLE trajectory ADD COLUMN input BLOB")
        connection.execute(f"PRAGMA user_version={FORMAT}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def begin(
    connection: sqlite3.Connection, *, sandbox: str, kind: str, request: dict[str, Any], input: bytes = b""
) -> int:
    """Adds an intent, returns its sequence number (1, 2, ... per sandbox). Inside the caller's
    transaction."""
    row = connection.execute(
        "INSERT INTO trajectory (sandbox, seq, kind, request, started, input) "
        "SELECT ?, COALESCE((SELECT MAX(seq) FROM trajectory WHERE sandbox = ?), 0) + 1, ?, ?, ?, ? "
        "RETURNING seq",
        (sandbox, sandbox, kind, json.dumps(request), time.time(), input or None),
    ).fetchone()
    return int(row[0])


def finish(
    connection: sqlite3.Connection,
    *,
    sandbox: str,
    seq: int,
    result: dict[str, Any],
    stdout: bytes,
    stderr: bytes,
) -> None:
    """Adds the result to an intent."""
    connection.execute(
        "UPDATE trajectory SET result = ?, stdout = ?, stderr = ?, ended = ? WHERE sandbox = ? AND seq = ?",
        (json.dumps(result), stdout, stderr, time.time(), sandbox, seq),
    )


def output_bytes(connection: sqlite3.Connection, *, sandbox: str) -> int:
    """Bytes printed by its commands that have ended."""
    row = connection.execute(
        "SELECT SUM(json_extract(result, '$.stdout_bytes') + json_extract(result, '$.stderr_bytes')) "
        "FROM trajectory WHERE sandbox = ? AND kind = 'command'",
        (sandbox,),
    ).fetchone()
    return int(row[0] or 0)


def append_end(path: str, *, sandbox: str, cause: str, detail: str) -> None:
    """One finished `ended` row, in its own connection."""
    connection = connect(path)
    try:
        connection.execute("BEGIN IMMEDIATE")
        seq = begin(connection, sandbox=sandbox, kind="ended", request={})
        result = {"cause": cause, "detail": detail}
        finish(connection, sandbox=sandbox, seq=seq, result=result, stdout=b"", stderr=b"")
        connection.execute("COMMIT")
    finally:
        connection.close()


def forget_before(path: str, moment: float) -> int:
    """Deletes the rows of sandboxes whose last row is older than `moment` (epoch seconds); returns how many
    rows."""
    connection = connect(path)
    try:
        cursor = connection.execute(
            "DELETE FROM trajectory WHERE sandbox IN "
            "(SELECT sandbox FROM trajectory GROUP BY sandbox HAVING MAX(started) < ?)",
            (moment,),
        )
        return cursor.rowcount
    finally:
        connection.close()
