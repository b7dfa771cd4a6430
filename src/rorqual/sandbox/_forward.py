"""The part of a trajectory that a restarted client goes through again: what it asks must be what it had asked.

A call takes its row here before it does anything. Rows are taken in order; those of calls that were under way at the
same time may be taken in any order. What two requests must have in common is IDENTITY: not a deadline, which a client
may compute from the clock. What happened by itself (`created`, `ended`, a resume by a call) is not asked again.
Owns the matching and the texts; _async/commands.py and files.py turn rows into results. Spec: sandbox.md 1.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from rorqual.sandbox.errors import TrajectoryMismatch, UnknownOutcome
from rorqual.sandbox.trajectory import TrajectoryEntry, logged

IDENTITY: Mapping[str, tuple[str, ...]] = {
    "command": ("cmd", "list", "cwd", "user", "envs", "input_sha256", "cut"),
    "pty": ("cmd", "cwd", "user", "cut"),
    "stdin": ("id", "input_sha256", "eof"),
    "kill": ("command", "signal"),
    "write": ("path", "sha256", "mode", "append", "owner"),
    "make_dir": ("path", "owner"),
    "remove": ("path", "recursive"),
    "rename": ("old", "new"),
    "read": ("path",),
    "list": ("path",),
    "stat": ("path",),
    "network": ("policy",),
    "set_memory": ("memory_mb",),
    "set_timeout": (),
    "pause": (),
    "resume": (),
    "snapshot": (),
    "commit": ("image",),
    "fork": ("count",),
    "screen": ("type", "key", "move", "click", "drag", "scroll", "at", "count", "button"),
}


def digest(data: bytes) -> str:
    """sha256, in hex."""
    return hashlib.sha256(data).hexdigest()


class Forward:
    """What is left of the log of one sandbox."""

    def __init__(self, sandbox_id: str, entries: Iterable[TrajectoryEntry]) -> None:
        self.sandbox_id = sandbox_id
        self._left = [entry for entry in entries if not _by_itself(entry)]
        self._given_up: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._left)

    def take(self, kind: str, request: Mapping[str, Any]) -> TrajectoryEntry | None:
        """The row of this call; None at the end of the log. Raises TrajectoryMismatch, and stays where it is."""
        asked = {"kind": kind, **_identity(kind, logged(dict(request)))}
        before: list[TrajectoryEntry] = []
        for place, entry in enumerate(self._left):
            if any(_was_over(other, entry.started) for other in before):
                break
            if {"kind": entry.kind, **_identity(entry.kind, entry.request)} == asked:
                return self._left.pop(place)
            before.append(entry)
        if not self._left:
            return None
        if asked in self._given_up:  # its outcome is unknown, and the caller wants it to be run
            self._given_up.remove(asked)
            return None
        head = self._left[0]
        raise TrajectoryMismatch(
            self.sandbox_id,
            seq=head.seq,
            expected={"kind": head.kind, **_identity(head.kind, head.request)},
            asked=asked,
        )

    def unknown(self, entry: TrajectoryEntry, detail: str, *, running: int | None = None) -> UnknownOutcome:
        """The error for a row whose outcome nobody can tell; from here on the same may be asked once more, live."""
        self._given_up.append({"kind": entry.kind, **_identity(entry.kind, entry.request)})
        out, err, _ = head(entry)
        return UnknownOutcome(
            self.sandbox_id,
            seq=entry.seq,
            kind=entry.kind,
            request=entry.request,
            detail=detail,
            running=running,
            stdout=out.decode("utf-8", "replace"),
            stderr=err.decode("utf-8", "replace"),
        )


def head(entry: TrajectoryEntry) -> tuple[bytes, bytes, bool]:
    """stdout and stderr from their start, as far as the log has them without a gap; whether something is missing."""
    result = entry.result or {}
    cut = (bool(result.get("stdout_cut")), bool(result.get("stderr_cut")))
    out, err = (
        data[: len(data) // 2] if gap else data
        for data, gap in zip((entry.stdout, entry.stderr), cut, strict=True)
    )
    return out, err, any(cut)


def _identity(kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
    return {key: request[key] for key in IDENTITY.get(kind, ()) if request.get(key) is not None}


def _by_itself(entry: TrajectoryEntry) -> bool:
    return entry.kind not in IDENTITY or (entry.kind == "resume" and entry.request.get("by") == "call")


def _was_over(entry: TrajectoryEntry, moment: float) -> bool:
    """Whether the call had returned by then, so that what came later was asked later."""
    if entry.request.get("background"):  # it returns at once, and its row is finished when it ends
        return True
    return entry.ended is not None and entry.ended <= moment
