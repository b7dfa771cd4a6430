"""Cgroups of a sandbox, read and removed by hand: v1 hierarchies and v2, whichever the host mounts.

The OCI runtime creates those of containers (it knows every limit's file), `make` those of machines; this file finds,
reads and removes them, so that the end of a sandbox costs no runtime call. Path: <hierarchy>/rorqual-<sandbox id>,
without a common parent: removing one would race with the next launch. It also freezes one, and gives back what memory
the kernel can spare.
Sources: cgroup-v1/freezer-subsystem.rst, cgroup-v1/memory.rst, cgroup-v2.rst of the kernel's documentation.
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


_PF_KTHREAD = 0x00200000
_STOPPED = (["do_freezer_trap"], ["get_signal"])
"""Where a thread sleeps that the freezer has stopped; compilers make one function of the two."""


def _words(path: str) -> list[str]:
    with open(path, encoding="ascii") as file:
        return file.read().split()


class Freezer:
    """Stops and continues every process of the cgroup. Finds its file once; `available` when there is one."""

    def __init__(self, path: str) -> None:
        points = hierarchies() if path else {}
        places = [
            (f"{points[key]}{path}", name, stop, go)
            for key, name, stop, go in (
                ("freezer", "freezer.state", "FROZEN", "THAWED"),
                ("unified", "cgroup.freeze", "1", "0"),
            )
            if key in points
        ]
        self._place, self._name, self._stop, self._go = next(
            (place for place in places if os.path.exists(f"{place[0]}/{place[1]}")), ("", "", "", "")
        )

    @property
    def available(self) -> bool:
        return bool(self._place)

    def freeze(self) -> None:
        """Asks for it; `frozen` tells when the last process has stopped. Raises OSError."""
        self._write(self._stop)

    def thaw(self) -> None:
        """Raises OSError."""
        self._write(self._go)

    def frozen(self) -> bool:
        """Whether no process runs any more. Raises OSError."""
        name = "freezer.state" if self._name == "freezer.state" else "cgroup.events"
        with open(f"{self._place}/{name}", encoding="ascii") as file:
            words = file.read().split()
        if words == ["FROZEN"] or "frozen 1" in " ".join(words):
            return True
        return self._name == "cgroup.freeze" and self._all_but_kernel_threads()

    def _all_but_kernel_threads(self) -> bool:
        """KVM before Linux 6.14 puts a kernel thread into the cgroup of each VMM. It never freezes, so the cgroup never
        says that it has: then each thread of a process is looked at, whether the freezer is what it sleeps in."""
        found = False
        try:
            for pid in _words(f"{self._place}/cgroup.procs"):
                with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                    flags = int(file.read().rpartition(")")[2].split()[6])
                if flags & _PF_KTHREAD:
                    found = True
                elif any(
                    _words(f"{entry.path}/wchan")[:1] not in _STOPPED
                    for entry in os.scandir(f"/proc/{pid}/task")
                ):
                    return False
        except (FileNotFoundError, ProcessLookupError):  # one ended meanwhile: the next look tells
            return False
        return found

    def _write(self, text: str) -> None:
        with open(f"{self._place}/{self._name}", "w", encoding="ascii") as file:
            file.write(text)


def can_freeze() -> bool:
    """Whether this host has a freezer that this user may use for a new sandbox."""
    points = hierarchies()
    place = points.get("freezer") or (points.get("unified") if "memory" not in points else None)
    return place is not None and os.geteuid() == 0 and os.access(place, os.W_OK)


def thaw(path: str) -> None:
    """In a v1 freezer not even SIGKILL reaches a frozen process before this."""
    freezer = Freezer(path)
    if freezer.available:
        with contextlib.suppress(OSError):
            freezer.thaw()


def memory_used(path: str) -> int:
    """Bytes charged to the cgroup now; 0 when unknown."""
    points = hierarchies() if path else {}
    for key, name in (("memory", "memory.usage_in_bytes"), ("unified", "memory.current")):
        with (
            contextlib.suppress(OSError, ValueError),
            open(f"{points.get(key, '')}{path}/{name}", encoding="ascii") as file,
        ):
            return int(file.read())
    return 0


def reclaim(path: str) -> bool:
    """Asks the kernel to take back what the cgroup can do without: clean file pages, swap where it has some.

    False where the kernel offers no way. Blocks for as long as the kernel tries.
    """
    points = hierarchies()
    for key, name, text in (
        ("memory", "memory.force_empty", "0"),
        ("unified", "memory.reclaim", str(memory_used(path))),
    ):
        file = f"{points[key]}{path}/{name}" if key in points else ""
        if file and os.path.exists(file):
            # EAGAIN, EBUSY: it took what it could, and that was not all
            with contextlib.suppress(OSError), open(file, "w", encoding="ascii") as handle:
                handle.write(text)
            return True
    return False


def make_slots(path: str, count: int, *, memory: int, pids: int, cpu: float) -> list[str]:
    """Makes `count` cgroups below that of a live sandbox, each with these limits; returns their paths. Needs root.

    memory in bytes, cpu in CPUs. They go with the sandbox's cgroup (`remove`).
    Raises OSError.
    """
    slots = [f"{path}/call{number}" for number in range(count)]
    points = hierarchies()
    v2 = "memory" not in points
    if v2:  # a cgroup with children that are limited may hold no process itself
        top = points["unified"] + path
        os.makedirs(top + "/zygote", exist_ok=True)
        with open(top + "/cgroup.procs", encoding="ascii") as file:
            for pid in file.read().split():
                _write(top + "/zygote/cgroup.procs", pid)
        _write(top + "/cgroup.subtree_control", "+memory +pids +cpu")
    for slot in slots:
        _limit(points, slot, memory=memory, pids=pids, cpu=cpu)
    return slots


def make(path: str, *, memory: int | None, pids: int | None, cpu: float | None) -> None:
    """Makes the cgroup of a machine, with these limits (None: none), and a freezer. Needs root.

    memory in bytes, cpu in CPUs. `join` moves a process in. Raises OSError.
    """
    points = hierarchies()
    if "memory" not in points:
        with contextlib.suppress(OSError):  # systemd has done it, or another sandbox
            _write(points["unified"] + "/cgroup.subtree_control", "+memory +pids +cpu")
    for controller in _needed(points):
        os.makedirs(points[controller] + path, exist_ok=True)
    _limit(points, path, memory=memory, pids=pids, cpu=cpu)


def join(path: str, pid: int) -> None:
    """Moves a process into a cgroup of `make`. Raises OSError."""
    points = hierarchies()
    for place in {points[name] + path for name in _needed(points)}:
        _write(place + "/cgroup.procs", str(pid))


def _needed(points: dict[str, str]) -> list[str]:
    names = ("memory", "pids", "cpu", "cpuacct", "freezer") if "memory" in points else ("unified",)
    return [name for name in names if name in points]


def _limit(
    points: dict[str, str], path: str, *, memory: int | None, pids: int | None, cpu: float | None
) -> None:
    """Makes the cgroup where it is missing and writes its limits."""
    period = 100_000
    quota = None if cpu is None else max(1000, int(cpu * period))
    if "memory" in points:
        limits: dict[str, int | str | None] = {
            "memory/memory.limit_in_bytes": memory,
            "memory/memory.memsw.limit_in_bytes": memory,  # the sum with swap: no swap
            "pids/pids.max": pids,
            "cpu/cpu.cfs_period_us": None if quota is None else period,
            "cpu/cpu.cfs_quota_us": quota,
        }
    else:
        limits = {
            "unified/memory.max": memory,
            "unified/pids.max": pids,
            "unified/cpu.max": None if quota is None else f"{quota} {period}",
        }
    for key, value in limits.items():
        controller, _, name = key.partition("/")
        place = points[controller] + path
        os.makedirs(place, exist_ok=True)
        if value is not None and ("memsw" not in name or os.path.exists(f"{place}/{name}")):
            _write(f"{place}/{name}", str(value))


def join_slot(slot: str, pid: int) -> None:
    """Moves a process into a cgroup of `make_slots`. Raises OSError."""
    points = hierarchies()
    controllers = ("memory", "pids", "cpu") if "memory" in points else ("unified",)
    for place in {points[name] + slot for name in controllers}:
        _write(place + "/cgroup.procs", str(pid))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def kill_all(path: str) -> None:
    """SIGKILL to every process of the cgroup, until none is left or a second has passed."""
    thaw(path)
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
