"""The event log: everything a run did, append-only. The prompt, the view and the RL sample are projections of
it.

One JSONL file per run; a line is one event with a CRC-32 over the rest of the line:
    {"seq": 3, "kind": "tool.intent", "time": 1764000000.123, "data": {...}, "crc": "0a1b2c3d"}
Owns writing, reading and projecting. An intent is on disk before its effect, a result before it is used
(fsync); a torn last line is what kill -9 leaves and is dropped on read, damage anywhere else is an error.
The file is locked (flock) while its run lives, so a reader can tell a running run from a dead one.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rorqual.agent.errors import EventLogError

__all__ = ["DURABLE", "KINDS", "Event", "EventLog", "LoadedLog", "Outcome", "project", "read_log"]

Outcome = str
"""`submitted`, `answered`, `step_limit`, `token_limit`, `loop`, `model_error`, `sandbox_error` or
`interrupted`."""

KINDS = frozenset(
    {
        "run.start",  # run, model, tools, system, budget, sandbox
        "goal",  # text
        "model.request",  # step, messages
        "model.response",  # reasoning, content, tool_calls, usage, finish_reason, ids if any
        "tool.intent",  # call, name, arguments, key
        "tool.result",  # call, name, key, text, failed, details, digest, seconds [, blocked, answer]
        "guard.verdict",  # guard, action [, call, count, text]
        "budget",  # step, usage
        "error",  # where, error, recovered [, text]
        "run.end",  # outcome, answer, error, steps, usage
    }
)
DURABLE = frozenset({"run.start", "goal", "model.response", "tool.intent", "tool.result", "run.end"})
"""Kinds that are on disk when `append` returns."""

_CRC_TAIL = len(',"crc":"00000000"}')
MAX_LINE = 64 << 20
"""Bytes of one event; a longer line is damage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened. `seq` counts from 0; events that are only for display have `seq` -1 and no
    line."""

    seq: int
    kind: str
    time: float
    """Seconds since the epoch."""
    data: Mapping[str, Any]


def encode(event: Event) -> bytes:
    """The line of `event`, newline included."""
    body = {"seq": event.seq, "kind": event.kind, "time": event.time, "data": event.data}
    try:
        raw = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except (
        UnicodeEncodeError
    ):  # a lone surrogate, from a model's arguments: only the escaped spelling is UTF-8
        raw = json.dumps(body, separators=(",", ":")).encode()
    return raw[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(raw)


def decode(line: bytes) -> Event:
    """The event of one line without its newline. Raises ValueError for anything that `encode` did not
    write."""
    if len(line) < _CRC_TAIL or not line.endswith(b'"}') or not line[-_CRC_TAIL:].startswith(b',"crc":"'):
        raise ValueError("no checksum at its end")
    raw = line[:-_CRC_TAIL] + b"}"
    if zlib.crc32(raw) != int(line[-10:-2], 16):
        raise ValueError("checksum differs")
    body = json.loads(raw)
    return Event(seq=body["seq"], kind=body["kind"], time=body["time"], data=body["data"])


class EventLog:
    """Appends events to a file, or to memory only (`path=None`). A context manager; `close` is idempotent."""

    def __init__(self, path: Path | None = None, *, on_event: Callable[[Event], None] | None = None) -> None:
        self.path = path
        self._on_event = on_event
        self._events: list[Event] = []
        self._fd = -1
        if path is not None:
            self._fd = _open_locked(path)
            try:
                loaded = read_log(path)
                self._events = list(loaded.events)
                if loaded.torn_bytes:  # what kill -9 left: never a complete event, so nobody has acted on it
                    os.ftruncate(self._fd, loaded.good_bytes)
            except BaseException:
                self.close()
                raise

    @property
    def events(self) -> tuple[Event, ...]:
        """All events so far, in order."""
        return tuple(self._events)

    def append(self, kind: str, **data: Any) -> Event:
        """Write one event; it is durable on return if its kind is in `DURABLE`. Raises EventLogError (full
        disk, ...)."""
        assert kind in KINDS, kind
        event = Event(seq=len(self._events), kind=kind, time=round(time.time(), 6), data=data)
        if self._fd >= 0:
            self._write(encode(event), durable=kind in DURABLE)
        self._events.append(event)
        if self._on_event is not None:
            self._on_event(event)
        return event

    def show(self, kind: str, **data: Any) -> None:
        """Tell `on_event` something that is not part of the record (streamed deltas, output as it comes)."""
        if self._on_event is not None:
            self._on_event(Event(seq=-1, kind=kind, time=time.time(), data=data))

    def _write(self, line: bytes, *, durable: bool) -> None:
        start = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._fd, view) :]
            if durable:
                os.fsync(self._fd)
        except OSError as error:
            # A half line would hide every later event from readers: take it back before saying that it
            # failed.
            os.ftruncate(self._fd, start)
            raise EventLogError(f"{self.path}: cannot write the event log: {error.strerror}") from error

    def close(self) -> None:
        """Release the file; the log can be read and reopened."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_locked(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)  # it holds prompts
    except OSError as error:
        raise EventLogError(f"{path}: cannot open the event log: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if new:
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except BlockingIOError:
        os.close(fd)
        raise EventLogError(f"{path}: another process is writing this run") from None
    except OSError as error:
        os.close(fd)
        raise EventLogError(f"{path}: cannot lock the event log: {error.strerror}") from error
    return fd


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedLog:
    """A log as read from disk."""

    events: tuple[Event, ...]
    good_bytes: int
    """Length of the intact part."""
    torn_bytes: int
    """Bytes of an unfinished last line (0 after a clean end)."""
    live: bool
    """Another process holds the log: the run is still going."""


def read_log(path: Path) -> LoadedLog:
    """Read a run's log. A torn last line is left out; raises EventLogError if the file is missing or damaged
    before."""
    try:
        with path.open("rb") as file:
            live = _is_locked(file.fileno())
            raw = file.read()
    except OSError as error:
        raise EventLogError(f"{path}: cannot read the event log: {error.strerror}") from error
    events: list[Event] = []
    good = 0
    while good < len(raw):
        end = raw.find(b"\n", good)
        line = raw[good : end if end >= 0 else len(raw)]
        try:
            if end < 0 or len(line) > MAX_LINE:
                raise ValueError("unfinished line")
            event = decode(line)
            if event.seq != len(events):
                raise ValueError(f"event {event.seq} where {len(events)} was due")
        except (ValueError, KeyError, TypeError) as error:
            if end < 0 or end + 1 == len(raw):
                break
            raise EventLogError(
                f"{path}: line {len(events) + 1} is damaged ({error}) and others follow it: "
                "restore the file from a copy"
            ) from error
        events.append(event)
        good = end + 1
    return LoadedLog(events=tuple(events), good_bytes=good, torn_bytes=len(raw) - good, live=live)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def project(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The conversation as OpenAI-shaped messages: a pure function of the log, and append-only like it.

    Tools are not part of it: they are fixed per run (`run.start`) and go beside the messages.
    """
    messages: list[dict[str, Any]] = []
    for event in events:
        data = event.data
        if event.kind == "run.start" and data.get("system"):
            messages.append({"role": "system", "content": data["system"]})
        elif event.kind == "goal":
            messages.append({"role": "user", "content": data["text"]})
        elif event.kind == "model.response":
            message: dict[str, Any] = {"role": "assistant", "content": data["content"]}
            if data.get("reasoning"):
                message["reasoning_content"] = data["reasoning"]
            if data.get("tool_calls"):
                message["tool_calls"] = data["tool_calls"]
            messages.append(message)
        elif event.kind == "tool.result":
            messages.append({"role": "tool", "tool_call_id": data["call"], "content": data["text"]})
        elif event.kind in ("guard.verdict", "error") and data.get("text"):
            messages.append({"role": "user", "content": data["text"]})
    return messages
