"""Reaps what dead keepers left behind, and forgets what is old. Every first start of a process reaps.

A keeper holds a lock on its directory while it lives (the kernel drops it at any kind of death), so a
directory whose lock is free belongs to a dead one: its sandboxes are killed by process id and start time and
by cgroup, their cgroups and directories removed, their end logged with cause `infra`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.sandbox import trajectory_store
from rorqual.sandbox.keeper import cgroups, leases
from rorqual.sandbox.keeper.main import remove_directory
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import StateDir

_STALE_BUILD_S = 6 * 3600
_STALE_START_S = 60
_STALE_LEASE_S = 10.0
"""A snapshot's maker takes its lease right after it has made the directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What was removed."""

    sandboxes: tuple[str, ...]
    keepers: int
    images: int
    """Unfinished builds, skeletons of older base images, and layers that no image names."""
    rows: int
    """Rows of the trajectory log."""


_reaped: set[StateDir] = set()
_lock = threading.Lock()


def reap_once(state: StateDir) -> None:
    """Reaps at this process's first use of a state directory."""
    with _lock:
        if state in _reaped:
            return
        reap(state)
        _remove_forks(state)
        _reaped.add(state)


def reap(state: StateDir) -> tuple[tuple[str, ...], int]:
    """Ends the sandboxes of dead keepers of this user, whatever their state directory was.

    Returns the sandboxes' ids, and how many keepers were dead.
    """
    gone: list[str] = []
    dead = 0
    for run in sorted(state.run.parent.iterdir()) if state.run.parent.is_dir() else []:
        names, count = _reap_run(run)
        gone += names
        dead += count
    return tuple(gone), dead


def _reap_run(run: Path) -> tuple[list[str], int]:
    gone: list[str] = []
    dead: list[tuple[Path, int]] = []
    keepers, sandboxes = run / "keepers", run / "sandboxes"
    for directory in keepers.iterdir() if keepers.is_dir() else []:
        try:
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # it starts just now, or died before it had a lock
            _remove_stale(directory)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead.append((directory, lock))
        except OSError:
            os.close(lock)
    try:
        names = {str(directory) for directory, _ in dead}
        for place in list(sandboxes.iterdir()) if sandboxes.is_dir() else []:
            record = _read(place)
            if record is None:  # its keeper died between two steps
                _remove_stale(place)
            elif record["keeper"] in names or not os.path.isdir(record["keeper"]):
                if not place.exists():  # a keeper ended in order meanwhile: its own directory goes last
                    continue
                _end(place, record)
                gone.append(place.name)
    finally:
        for directory, lock in dead:
            remove_tree(str(directory))
            os.close(lock)
    return gone, len(dead)


def _remove_stale(place: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - place.stat().st_mtime > _STALE_START_S:
            remove_tree(str(place))


def _read(place: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((place / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def _start_time(pid: int) -> str:
    """When the process started, in the kernel's ticks; '' when it is gone (a zombie is)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _launched_meanwhile(place: Path) -> tuple[int, str]:
    """The agent that a runtime started after its keeper had died: (pid, start time), or (0, '')."""
    try:
        pid = int((place / "init.pid").read_text(encoding="ascii"))
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/.rorqual/guest\0"):
            return pid, _start_time(pid)
    except (OSError, ValueError):
        pass
    return 0, ""


def _end(place: Path, record: dict[str, Any]) -> None:
    pid, start = int(record["init_pid"]), record["init_start"]
    if not pid:
        pid, start = _launched_meanwhile(place)
    if pid and start and _start_time(pid) == start:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
        cgroups.thaw(record["cgroup"])
        deadline = time.monotonic() + 5.0
        while _start_time(pid) == start and time.monotonic() < deadline:
            time.sleep(0.01)
    if record["cgroup"]:
        cgroups.kill_all(record["cgroup"])
        cgroups.remove(record["cgroup"])
    remove_directory(str(place), record["userns"])
    if not os.path.exists(record["trajectory"]):
        return
    with contextlib.suppress(sqlite3.Error, OSError, ValueError):
        trajectory_store.append_end(
            record["trajectory"], sandbox=record["id"], cause="infra", detail="its keeper was killed"
        )


def _remove_forks(state: StateDir) -> int:
    """Layers of forks whose last user was killed, and snapshots whose maker was: their leases are free."""
    removed = 0
    for place in state.images.glob(f"{leases.FORK_PREFIX}*") if state.images.is_dir() else ():
        removed += leases.remove_unused(str(place))
    for lease in state.images.glob(f".building-*/{leases.FILE}") if state.images.is_dir() else ():
        with contextlib.suppress(OSError):  # finished meanwhile
            if time.time() - lease.stat().st_mtime > _STALE_LEASE_S:
                removed += leases.remove_unused(str(lease.parent))
    return removed


def prune(*, keep_days: float | None = None, state: StateDir | None = None) -> Pruned:
    """Removes everything that nobody uses: orphans of dead clients, unfinished images, old base skeletons.

    keep_days: also forget the trajectories of sandboxes whose last row is older than this; None keeps them
    all.
    """
    state = state or StateDir.from_environment()
    sandboxes, keepers = reap(state)
    removed = _remove_forks(state)
    if state.images.is_dir():
        skeletons = sorted(state.images.glob(".base-*"), key=lambda path: path.stat().st_mtime)
        doomed = [*state.images.glob(".building-*"), *state.images.glob(".removing-*")]
        live = any(state.sandboxes.iterdir()) if state.sandboxes.is_dir() else False
        for place in [*doomed, *([] if live else skeletons[:-1])]:
            if place in doomed and time.time() - place.stat().st_mtime < _STALE_BUILD_S:
                continue
            remove_tree(str(place))
            removed += 1
        from rorqual.sandbox.images import layers  # the images' room is loaded when it is first needed

        removed += layers.remove_unused(state)
    rows = 0
    if keep_days is not None and state.trajectory.is_file():
        rows = trajectory_store.forget_before(str(state.trajectory), time.time() - keep_days * 86400)
    return Pruned(sandboxes=sandboxes, keepers=keepers, images=removed, rows=rows)
