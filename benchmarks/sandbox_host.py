"""What the sandbox benchmarks say of the machine, and how they tell a distribution (sandbox.py, density.py)."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


def first_line(command: Sequence[str]) -> str:
    """Of what a program prints; 'not installed'."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return ((done.stdout or done.stderr).splitlines() or ["?"])[0]
    return "not installed"


def meminfo() -> dict[str, int]:
    """/proc/meminfo in MiB."""
    found = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) >> 10
    return found


def facts() -> dict[str, Any]:
    """The machine, its load, what it runs; to be taken at the start."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"),
        "cpus": os.cpu_count(),
        "memory_mb": meminfo()["MemTotal"],
        "kernel": platform.release(),
        "load_at_start": [round(value, 2) for value in os.getloadavg()],
        "nice": os.nice(0),
        "python": sys.version.split()[0],
        "versions": {
            name: first_line([path, "--version"])
            for name, path in {
                "crun": "crun",
                "runc": "/usr/sbin/runc",
                "runsc": "runsc",
                "bwrap": "bwrap",
                "podman": "podman",
                "qemu": "qemu-system-x86_64",
            }.items()
        },
        "commit": first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: p50, p90, p99, min, max, n."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 3)

    return {
        "p50": round(statistics.median(ordered) * 1e3, 3),
        "p90": at(0.9),
        "p99": at(0.99),
        "min": at(0.0),
        "max": at(1.0),
        "n": len(ordered),
    }
