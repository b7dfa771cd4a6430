"""What a sandbox uses, read on the host: its cgroup, or its processes where it has none. Nothing is asked inside.

Owns the files and their units. Sources: cgroup-v1/cpuacct.rst, memory.rst, pids.rst; cgroup-v2.rst; proc(5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.records import Metrics

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def measure(record: Mapping[str, Any], *, output_bytes: int) -> Metrics:
    """Of the sandbox with this record. A file that is not there gives None for what it would tell."""
    path, pid = record["cgroup"], record["init_pid"]
    points = cgroups.hierarchies() if path else {}

    def number(*files: tuple[str, str], key: str = "") -> int | None:
        for controller, name in files:
            if controller in points:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    return _field(f"{points[controller]}{path}/{name}", key)
        return None

    nanoseconds = number(("cpuacct", "cpuacct.usage"))
    microseconds = number(("unified", "cpu.stat"), key="usage_usec") if nanoseconds is None else None
    memory = number(("memory", "memory.usage_in_bytes"), ("unified", "memory.current"))
    pids = number(("pids", "pids.current"), ("unified", "pids.current"))
    cpu = None
    if nanoseconds is not None:
        cpu = nanoseconds / 1e9
    elif microseconds is not None:
        cpu = microseconds / 1e6
    if cpu is None or memory is None or pids is None:
        seen = list(_processes(pid))
        cpu = sum(ticks for ticks, _ in seen) / _TICK if cpu is None else cpu
        memory = sum(pages for _, pages in seen) * _PAGE if memory is None else memory
        pids = len(seen) if pids is None else pids
    received, sent = _network(pid)
    return Metrics(
        cpu_seconds=cpu,
        memory_bytes=memory,
        memory_peak_bytes=number(("memory", "memory.max_usage_in_bytes"), ("unified", "memory.peak")),
        memory_limit_bytes=record["memory_mb"] << 20,
        pids=pids,
        oom_kills=cgroups.OomCounter(path).read() if path else None,
        disk_bytes=_disk(pid)
        if record["disk_mb"] is not None and record["substrate"] == "container"
        else None,
        output_bytes=output_bytes,
        network_received_bytes=received,
        network_sent_bytes=sent,
    )


def _field(file: str, key: str) -> int:
    with open(file, encoding="ascii") as lines:
        if not key:
            return int(lines.read())
        return next(int(line.split()[1]) for line in lines if line.split()[0] == key)


def _processes(first: int) -> Iterator[tuple[int, int]]:
    """(clock ticks with those of dead children, resident pages) of a process and what descends from it."""
    waiting = [first]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                    waiting += [int(child) for child in file.read().split()]
            yield sum(int(field) for field in fields[11:15]), int(fields[21])


def _disk(pid: int) -> int | None:
    """Bytes in its writable layer, a file system of its own."""
    with contextlib.suppress(OSError):
        seen = os.statvfs(f"/proc/{pid}/root")
        return (seen.f_blocks - seen.f_bfree) * seen.f_frsize
    return None


def _network(pid: int) -> tuple[int | None, int | None]:
    """Bytes received and sent by the sandbox; None when it has no interface but lo.

    A machine is behind `tap0` of its monitor's namespace, whose directions are the other way round.
    """
    found: dict[str, tuple[int, int]] = {}
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        open(f"/proc/{pid}/net/dev", encoding="ascii") as file,
    ):
        for line in list(file)[2:]:
            name, _, rest = line.partition(":")
            numbers = [int(field) for field in rest.split()]
            found[name.strip()] = (numbers[0], numbers[8])
    if os.path.exists(f"/proc/{pid}/ns/net") and _same_namespace(pid):
        return None, None  # rootless or a machine without one: these are the host's
    if "tap0" in found:
        return found["tap0"][1], found["tap0"][0]
    return found.get("eth0", (None, None))


def _same_namespace(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
    return True
