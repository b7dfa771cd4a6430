"""What sandboxes of one state directory have left on this host. Owns the looking, and what of it is a leak.

Everything is found by name: ids from the trajectory log (a row is there before its sandbox is), the state's two
directories, and the environment of processes. So other sandboxes on the host, tests' among them, do not disturb it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.state import StateDir

WARM = 100
"""Sandboxes after which a process has all it will keep; growth is counted from there."""
GROWTH_KB = 3000
"""More per 1,000 sandboxes is a leak: an edge's memory moves by some hundred KB from check to check."""
_GROUP = re.compile(r"/rorqual-(sb-[a-z0-9-]+)")


def ids(state: StateDir) -> set[str]:
    """Every sandbox there ever was."""
    if not state.trajectory.is_file():
        return set()
    with contextlib.closing(sqlite3.connect(f"file:{state.trajectory}?mode=ro", uri=True)) as log:
        return {name for (name,) in log.execute("SELECT DISTINCT sandbox FROM trajectory")}


def unended(state: StateDir) -> list[str]:
    """Sandboxes that started and of which the log does not say how they ended."""
    if not state.trajectory.is_file():
        return []
    question = """SELECT sandbox FROM trajectory WHERE kind = 'created' AND ended IS NOT NULL
                  AND result NOT LIKE '%"error"%'
                  AND sandbox NOT IN (SELECT sandbox FROM trajectory WHERE kind = 'ended')"""
    with contextlib.closing(sqlite3.connect(f"file:{state.trajectory}?mode=ro", uri=True)) as log:
        return [name for (name,) in log.execute(question)]


def _below(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir()) if place.is_dir() else []


def _processes() -> Iterator[tuple[int, Path]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name), Path("/proc", name)


def process(pid: int) -> dict[str, int]:
    """Memory (its own part of what is shared) in KiB, and open descriptors; {} when it is gone."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        pss = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return {"pss_kb": pss, "fds": len(os.listdir(f"/proc/{pid}/fd"))}
    return {}


def look(state: StateDir, known: set[int]) -> dict[str, Any]:
    """Leftovers, by sort, as words; empty lists on a clean host. To be asked while no sandbox lives.

    known: processes that may live (their keepers may, too).
    """
    names = ids(state)
    points = set(cgroups.hierarchies().values())
    left = {f"/rorqual-{name}" for name in names}
    groups = [
        point + "/" + entry
        for point in points
        for entry in os.listdir(point)
        if entry.startswith("rorqual-") and "/" + entry in left
    ]
    marker = f"RORQUAL_STATE={state.root}".encode()
    strangers, keepers = [], {}
    for pid, place in _processes():
        with contextlib.suppress(OSError):
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            environment = (place / "environ").read_bytes().split(b"\0")
            inside = (place / "cgroup").read_text()
            if names.intersection(_GROUP.findall(inside)):
                strangers.append(f"{pid} in a sandbox's cgroup: {command[-200:]}")
            elif marker in environment and pid not in known and pid != os.getpid():
                owner = command.split()[-2:] if str(state.keepers) in command else []
                if len(owner) == 2 and owner[1].isdigit() and int(owner[1]) in known:
                    keepers[pid] = int(owner[1])
                else:
                    strangers.append(f"{pid}: {command[-200:]}")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    own_keepers = {name for name in _below(state.keepers) if name.partition("-")[0].isdigit()}
    return {
        "processes": sorted(strangers),
        "keepers": keepers,
        "cgroups": sorted(groups),
        "mounts": [line for line in mounts if str(state.run) in line or str(state.root) in line],
        "sandboxes": _below(state.sandboxes),
        "keeper_directories": sorted(
            name for name in own_keepers if int(name.partition("-")[0]) not in known
        ),
        "images": [name for name in _below(state.images) if not name.startswith(".base-")],
        "unended": unended(state),
    }


LEAKS = ("processes", "cgroups", "mounts", "sandboxes", "keeper_directories", "images", "unended")


def leaks(found: dict[str, Any]) -> list[str]:
    """What of `look` must not be there, one line each."""
    return [f"{sort}: {item}" for sort in LEAKS for item in found[sort]]


def growth(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each process that was seen at least twice after WARM sandboxes: memory per 1,000 sandboxes, and descriptors.

    Least squares over its checks; a process that made fewer than 400 after WARM is told and not judged.
    """
    seen: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for check in checks:
        for row in check["processes"]:
            if row["made"] >= WARM and "pss_kb" in row:
                seen.setdefault((row["role"], row["pid"]), []).append(row)
    found = []
    for (role, _), rows in seen.items():
        spread = rows[-1]["made"] - rows[0]["made"]
        if len(rows) < 2 or not spread:
            continue
        middle = sum(row["made"] for row in rows) / len(rows)
        level = sum(row["pss_kb"] for row in rows) / len(rows)
        over = sum((row["made"] - middle) * (row["pss_kb"] - level) for row in rows)
        slope = 1000.0 * over / sum((row["made"] - middle) ** 2 for row in rows)
        fds = [row["fds"] for row in rows]
        judged = spread >= 400
        found.append(
            {
                "role": role,
                "sandboxes": spread,
                "pss_kb": [rows[0]["pss_kb"], rows[-1]["pss_kb"]],
                "kb_per_1000": round(slope, 1),
                "fds": [fds[0], fds[-1]],
                "judged": judged,
                "leak": judged and (slope > GROWTH_KB or fds[-1] > fds[0] + 4),
            }
        )
    return sorted(found, key=lambda row: -row["sandboxes"])[:12]
