"""What the loader has to say: <state>/layers/events.jsonl, one JSON object a line, bounded, newest last.

Events: corrupt (a chunk was refused), unreachable (a store did not answer), full (no room for chunks), complete (a
layer is whole), loader (the loader itself). Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import Any

FILE = "events.jsonl"
MAX_BYTES = 1 << 20
_REPEAT_S = 1.0


class EventLog:
    """Appends; at MAX_BYTES the log begins again, the older half kept as events.jsonl.old."""

    def __init__(self, layers: str) -> None:
        self._path = f"{layers}/{FILE}"
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], float] = {}

    def report(self, event: str, **fields: Any) -> None:
        """Never raises: an event that cannot be written is lost. Equal ones within a second count once."""
        key = (event, f"{fields.get('layer', '')} {fields.get('detail', '')}")
        with self._lock:
            now = time.monotonic()
            if now - self._last.get(key, -_REPEAT_S) < _REPEAT_S:
                return
            if len(self._last) > 1000:
                self._last.clear()
            self._last[key] = now
            line = json.dumps({"time": time.time(), "event": event, **fields}).encode()[:8192] + b"\n"
            with contextlib.suppress(OSError):
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                try:
                    os.write(fd, line)
                    if os.fstat(fd).st_size > MAX_BYTES:
                        os.rename(self._path, self._path + ".old")
                finally:
                    os.close(fd)


def read_events(layers: str) -> list[dict[str, Any]]:
    """The events of this store, oldest first; a line that was cut short is left out."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError), open(f"{layers}/{FILE}", "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                document = json.loads(line)
                if isinstance(document, dict):
                    found.append(document)
    return found
