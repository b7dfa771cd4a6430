"""Cgroups of a sandbox, read and removed by hand: v1 hierarchies and v2, whichever the host mounts.

The OCI runtime creates them (it knows every limit's file); this file finds, reads and removes them, so that
the end of a sandbox costs no runtime call. Path: <hierarchy>/rorqual-<sandbox id>, without a common parent:
removing one would race with the next launch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time


def hierarchies(mountinfo: str = "/proc/self/mountinfo") -> dict[str, str]:
    """Maps a controller's name ('memory', 'pids', ..., 'unified' for v2) to its mount point."""
    found: dict[str, str] = {}
    with open(mountinfo, encoding="utf-8") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            fstype, _, options = right.split(" ", 2)
            point = left.split(" ")[4]
            if fstype == "cgroup2":
                found["unified"] = point
            elif fstype == "cgroup":
                for option in options.strip().split(","):
                    if option not in ("rw", "ro"):
                        found[option.removeprefix("name=")] = point
    return found


def directories(path: str) -> list[str]:
    """Every existing cgroup directory of `path` ('/rorqual-<id>')."""
    places = {point + path for point in hierarchies().values()}
    return sorted(place for place in places if os.path.isdir(place))


class OomCounter:
    """How many processes of the cgroup the memory limit has killed; 0 when unknown. Finds its file once."""

    def __init__(self, path: str) -> None:
        points = hierarchies() if path else {}
        self._files = [
            f"{points[key]}{path}/{name}"
            for key, name in (("memory", "memory.oom_control"), ("unified", "memory.events"))
            if key in points
        ]

    def read(self) -> int:
        for name in self._files:
            with contextlib.suppress(OSError, ValueError), open(name, encoding="ascii") as file:
                for line in file:
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        return 0


def kill_all(path: str) -> None:
    """SIGKILL to every process of the cgroup, until none is left or a second has passed."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        pids: set[int] = set()
        for place in directories(path):
            with contextlib.suppress(OSError), open(place + "/cgroup.procs", encoding="ascii") as file:
                pids.update(int(line) for line in file)
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def remove(path: str) -> list[str]:
    """Removes the cgroup everywhere, children first. Returns the directories that would not go."""
    stuck: list[str] = []
    for place in directories(path):
        for here, _, _ in os.walk(place, topdown=False):
            for attempt in range(50):
                try:
                    os.rmdir(here)
                    break
                except FileNotFoundError:
                    break
                except OSError:  # EBUSY: the last process is not yet reaped
                    if attempt == 49:
                        stuck.append(here)
                    time.sleep(0.002)
    return stuck
