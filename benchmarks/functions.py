"""What does a stateless call cost, from the SDK's call to its value?

Peers in the same run, interleaved: a cold `python3 -c` in bubblewrap with the same namespaces, a cold plain one, and
(the floor) fork, unshare and wait of a bare Python. Bound: spec/sandbox.md, 0 (zygote fork and unshare p50 3.1 ms).

    python benchmarks/functions.py [--calls 300] [--workers 2] [--output benchmarks/results/functions.json]

Serial latency is from the synchronous `Function`, calls a second from `AsyncFunction` with `workers` calls at once.
Prints the host's load: figures of a busy machine are upper bounds, and only their ratios say much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rorqual.sandbox import AsyncSandbox, Sandbox
from rorqual.sandbox.host import find_program

PYTHON = "/usr/bin/python3"
BWRAP = ["--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib",
         "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # fmt: skip
_FLOOR = """
import ctypes, os, sys, time
libc, times = ctypes.CDLL(None), []
for _ in range(int(sys.argv[1])):
    begun = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        libc.unshare(0x20000000 | 0x00020000 | 0x08000000)
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        os._exit(0)
    os.waitpid(pid, 0)
    times.append((time.perf_counter() - begun) * 1e3)
print(times)
"""


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1e3


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {
        "n": len(times),
        "min": round(ordered[0], 3),
        "p50": round(statistics.median(ordered), 3),
        "p99": round(p99, 3),
    }


def command(argv: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


async def throughput(workers: int, seconds: float) -> dict[str, float]:
    """Calls a second with `workers` calls at once, and CPU seconds that the whole machine spent on each."""
    async with await AsyncSandbox.function(workers=workers) as fn:
        await asyncio.gather(*[fn("1") for _ in range(workers * 2)])
        done = 0
        end = time.perf_counter() + seconds

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < end:
                result = await fn("1")
                assert result.value == 1, result
                done += 1

        begun = time.perf_counter()
        await asyncio.gather(*[caller() for _ in range(workers)])
        spent = time.perf_counter() - begun
    return {"workers": workers, "calls": done, "calls_per_s": round(done / spent, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/functions.json")
    options = parser.parse_args()
    load_before = os.getloadavg()
    times: dict[str, list[float]] = {
        "call": [],
        "inside": [],
        "cold plain": [],
        "cold bwrap": [],
        "floor": [],
    }
    bwrap = find_program("bwrap")
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        with Sandbox.function(workers=1, trajectory=Path(place) / "log.db") as fn:
            start_ms = (time.perf_counter() - begun) * 1e3
            for _ in range(20):
                fn("1")
            for _ in range(10):
                for _ in range(options.calls // 10):
                    begun = time.perf_counter()
                    result = fn("1")
                    times["call"].append((time.perf_counter() - begun) * 1e3)
                    times["inside"].append(result.seconds * 1e3)
                times["cold plain"] += [timed(command([PYTHON, "-I", "-c", "1"])) for _ in range(3)]
                if bwrap:
                    cold = command([bwrap, *BWRAP, PYTHON, "-I", "-c", "1"])
                    times["cold bwrap"] += [timed(cold) for _ in range(3)]
                count = str(options.calls // 30)
                floor = subprocess.run([PYTHON, "-I", "-c", _FLOOR, count], check=True, capture_output=True)
                times["floor"] += json.loads(floor.stdout)
        rate = asyncio.run(throughput(options.workers, options.seconds))
    rows = {name: summary(values) for name, values in times.items() if values}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report = {
        "milliseconds": rows,
        "ratio_to_cold_bwrap": round(rows["cold bwrap"]["p50"] / rows["call"]["p50"], 2) if bwrap else None,
        "first_call_ready_ms": round(start_ms, 1),
        "throughput": rate,
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "commit": commit,
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(
            f"{name:12} p50 {row['p50']:8.2f} ms   p99 {row['p99']:8.2f} ms   min {row['min']:8.2f} ms   n {row['n']}"
        )
    print(f"throughput   {rate['calls_per_s']} calls/s with {options.workers} at once")
    print(f"load before {load_before}, after {report['load_after']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
