"""How many live, idle sandboxes does one host hold, what does each cost, and what if 500 are asked for at once?

    python benchmarks/density.py [--only containers,functions,microvms,storm] [--count N] [--out FILE]

containers: made until --share of the memory is used (or --count), 16 at a time; then each answers a command, which
proves that all of them live; then all are killed. functions: workers of 64 to a pool, each of which answers a call.
microvms: forks of one, each with a kernel of its own (what they share they share). storm: --storm creates at once.
Memory is measured three ways. The host's: MemAvailable before and after, which counts everything, the kernel's part,
keeper and client included, and what other programs did meanwhile (the load is printed). The processes': proportional
set size of agents, keeper and client. The cgroups': what the limits see (pages of the host's /usr are charged to
whoever read them first).
Goal: 1,500 containers on 24 GiB, 6 MB each. Physical bound: the kernel's own part of seven namespaces, an overlay of
four layers, nine cgroups and one small process. Peer: none keeps so many on one host that runs here; the published
density of DSec is 3,200 containers or 800 machines a node, on other hardware.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sandbox_host import RESULTS, facts, meminfo, spread

from rorqual.sandbox import AsyncSandbox
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.keeper.client import own_keeper
from rorqual.sandbox.state import StateDir

AT_ONCE = 16
OPTIONS: dict[str, Any] = {"memory_mb": 256, "disk_mb": 64, "timeout": 7200.0}
GOAL = {"containers": 1500, "mb_each": 6.0}
KERNEL = ("Slab", "SUnreclaim", "KernelStack", "PageTables", "Percpu", "AnonPages", "Shmem")


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def pss_kb(pids: Iterable[int]) -> int:
    """Sum of the proportional set sizes of processes, in KiB; those that are gone count nothing."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def records() -> list[dict[str, Any]]:
    """Of the live sandboxes of this state directory."""
    places = StateDir.from_environment().sandboxes.glob("*/record.json")
    return [json.loads(path.read_text(encoding="utf-8")) for path in places]


def cgroup_mb(rows: Sequence[dict[str, Any]]) -> float | None:
    """What the memory cgroups of sandboxes are charged, MiB."""
    points = cgroups.hierarchies()
    for controller, name in (("memory", "memory.usage_in_bytes"), ("unified", "memory.current")):
        if controller in points:
            paths = [Path(f"{points[controller]}{row['cgroup']}/{name}") for row in rows if row["cgroup"]]
            return round(sum(int(path.read_text()) for path in paths if path.is_file()) / (1 << 20), 1)
    return None


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        found += [int(child), *descendants(int(child))]
    return found


def memory_each(before: dict[str, int], count: int) -> dict[str, Any]:
    """Of `count` sandboxes that are live now."""
    now, rows = meminfo(), records()
    keeper = own_keeper(StateDir.from_environment())._process
    assert keeper is not None
    agents = pss_kb(pid for row in rows for pid in (row["init_pid"], *descendants(row["init_pid"])))
    used = before["MemAvailable"] - now["MemAvailable"]
    return {
        "host_mb": used,
        "host_mb_each": round(used / count, 2),
        "kernel_mb": {name: now[name] - before[name] for name in KERNEL},
        "pss_mb": {
            "agents": round(agents / 1024, 1),
            "keeper": round(pss_kb([keeper.pid]) / 1024, 1),
            "client": round(pss_kb([os.getpid()]) / 1024, 1),
        },
        "pss_kb_each": round(agents / count, 1),
        "cgroup_mb": cgroup_mb(rows),
        "client_fds": len(os.listdir("/proc/self/fd")),
        "keeper_fds": len(os.listdir(f"/proc/{keeper.pid}/fd")),
    }


async def many(count: int, work: Callable[[int], Awaitable[float]], *, at_once: int) -> list[float]:
    """`work(0)` to `work(count - 1)`, some at once; what each returns."""
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> float:
        async with gate:
            return await work(number)

    return await asyncio.gather(*[one(number) for number in range(count)])


async def answers(boxes: Sequence[AsyncSandbox]) -> dict[str, Any]:
    """One command to each; raises AssertionError when one does not answer as it must."""

    async def ask(number: int) -> float:
        start = time.perf_counter()
        result = await boxes[number].commands.run(f"echo {number}")
        assert result.stdout == f"{number}\n", result
        return time.perf_counter() - start

    start = time.perf_counter()
    times = await many(len(boxes), ask, at_once=AT_ONCE)
    return {
        "answered": len(times),
        "answer_s": round(time.perf_counter() - start, 2),
        "answer_ms": spread(times),
    }


async def killed(boxes: Sequence[AsyncSandbox]) -> dict[str, Any]:
    start = time.perf_counter()

    async def end(number: int) -> float:
        begun = time.perf_counter()
        await boxes[number].kill()
        return time.perf_counter() - begun

    await many(len(boxes), end, at_once=AT_ONCE)
    spent = time.perf_counter() - start
    return {"kill_s": round(spent, 2), "kills_per_s": round(len(boxes) / spent, 1)}


async def containers(count: int, share: float) -> dict[str, Any]:
    async with await AsyncSandbox.create(**OPTIONS) as first:  # what is loaded once
        await first.commands.run(["/bin/true"])
    before = meminfo()
    floor = max((1.0 - share) * before["MemTotal"], 1024)
    boxes: list[AsyncSandbox] = []
    times: list[float] = []
    curve: list[dict[str, Any]] = []
    stopped = "--count"

    async def one(_: int) -> float:
        start = time.perf_counter()
        boxes.append(await AsyncSandbox.create(**OPTIONS))
        return time.perf_counter() - start

    begun = mark = time.perf_counter()
    while not count or len(boxes) < count:
        if (free := meminfo()["MemAvailable"]) < floor:
            stopped = f"{share:.0%} of the memory"
            break
        try:
            times += await many(min(AT_ONCE, count - len(boxes) if count else AT_ONCE), one, at_once=AT_ONCE)
        except Exception as error:  # the limit that this host sets: it is the result
            stopped = f"{type(error).__name__}: {error}"
            break
        if len(boxes) // 96 > len(curve):
            now = time.perf_counter()
            curve.append(
                {
                    "live": len(boxes),
                    "used_mb": before["MemAvailable"] - free,
                    "create_ms_p50": spread(times[-96:])["p50"],
                    "creates_per_s": round(96 / (now - mark), 1),
                }
            )
            mark = now
            say(json.dumps(curve[-1]))
    spent = time.perf_counter() - begun
    say(f"{len(boxes)} live after {spent:.0f} s: {stopped}")
    report = {
        "live": len(boxes),
        "stopped_by": stopped,
        "create_s": round(spent, 2),
        "creates_per_s": round(len(boxes) / spent, 1),
        "create_ms": spread(times),
        "memory": memory_each(before, len(boxes)),
        "curve": curve,
    }
    try:
        report |= await answers(boxes)
    finally:
        report |= await killed(boxes)
    await asyncio.sleep(1.0)
    report["not_given_back_mb"] = before["MemAvailable"] - meminfo()["MemAvailable"]
    return report


async def functions(workers: int) -> dict[str, Any]:
    """Pools of 64 workers: a zygote and 64 prepared calls each."""
    pool = 64
    async with await AsyncSandbox.function(workers=1) as first:
        await first("1")
    before = meminfo()
    made = []
    start = time.perf_counter()
    try:
        for _ in range(max(1, workers // pool)):
            made.append(await AsyncSandbox.function(workers=pool))
        count = len(made) * pool

        async def ask(number: int) -> float:
            begun = time.perf_counter()
            result = await made[number // pool]("args[0]", number)
            assert result.value == number, result
            return time.perf_counter() - begun

        await many(count, ask, at_once=count)  # every worker has prepared its next call
        ready = time.perf_counter() - start
        await asyncio.sleep(1.0)
        report = {"pools": len(made), "workers": count, "ready_s": round(ready, 2)}
        report["memory"] = memory_each(before, count)
        start = time.perf_counter()
        times = await many(count, ask, at_once=count)
        spent = time.perf_counter() - start
        report |= {
            "answered": len(times),
            "calls_per_s": round(count / spent, 1),
            "answer_ms": spread(times),
        }
    finally:
        for fn in made:
            await fn.close()
    return report


async def microvms(count: int) -> dict[str, Any]:
    async with await AsyncSandbox.create(substrate="microvm", memory_mb=128, timeout=3600.0) as parent:
        await parent.commands.run(["/bin/true"])
        info = await parent.info()
        before = meminfo()
        start = time.perf_counter()
        boxes: list[AsyncSandbox] = []
        try:
            while len(boxes) < count:
                boxes += await parent.fork(count=min(8, count - len(boxes)))
                say(f"{len(boxes)} microVMs, {before['MemAvailable'] - meminfo()['MemAvailable']} MB")
            spent = time.perf_counter() - start
            report = {
                "live": len(boxes),
                "vmm": info.runtime,
                "accelerator": info.accelerator,
                "fork_s_each": round(spent / count, 3),
            }
            report["memory"] = memory_each(before, count)
            report |= await answers(boxes)
            report["memory_after_a_command"] = memory_each(before, count)
        finally:
            await killed(boxes)
    return report


async def storm(count: int) -> dict[str, Any]:
    """All asked for in one moment, each until its first command has answered."""
    created: list[float] = []
    boxes: list[AsyncSandbox] = []
    start = time.perf_counter()

    async def one(_: int) -> float:
        boxes.append(sb := await AsyncSandbox.create(**OPTIONS))
        created.append(time.perf_counter() - start)
        result = await sb.commands.run(["/bin/echo", "up"])
        assert result.stdout == "up\n", result
        return time.perf_counter() - start

    done = await asyncio.gather(*[one(number) for number in range(count)], return_exceptions=True)
    spent = time.perf_counter() - start
    failures = [repr(item)[:200] for item in done if isinstance(item, BaseException)]
    times = [item for item in done if not isinstance(item, BaseException)]
    report = {
        "asked": count,
        "failures": len(failures),
        "first_failures": failures[:5],
        "all_ready_s": round(spent, 2),
        "ready_per_s": round(len(times) / spent, 1),
        "created_ms": spread(created) if created else None,
        "first_command_ms": spread(times) if times else None,
    }
    return report | await killed(boxes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("containers", "functions", "microvms", "storm")
    parser.add_argument("--only", default=",".join(parts), help="comma-separated: " + ", ".join(parts))
    parser.add_argument("--count", type=int, default=0, help="containers; 0: until --share")
    parser.add_argument("--share", type=float, default=0.8, help="of the memory that may be in use")
    parser.add_argument("--workers", type=int, default=256, help="of functions")
    parser.add_argument("--microvms", type=int, default=24)
    parser.add_argument("--storm", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS / "density.json")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(parts):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(parts)}")
    if not 0.05 <= options.share <= 0.95:
        parser.error("--share must be between 0.05 and 0.95")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    document: dict[str, Any] = {
        "question": "how many live idle sandboxes does this host hold, and what does each cost?"
    }
    document |= facts() | {"goal": GOAL}
    if options.out.is_file():  # parts that are not asked for stay as they were measured
        before = json.loads(options.out.read_text(encoding="utf-8"))
        document |= {part: before[part] for part in parts if part in before and part not in wanted}
    runs = {
        "containers": lambda: containers(options.count, options.share),
        "functions": lambda: functions(options.workers),
        "microvms": lambda: microvms(options.microvms),
        "storm": lambda: storm(options.storm),
    }
    for part in wanted:
        load = os.getloadavg()[0]
        row = asyncio.run(runs[part]())
        row["load"] = [round(load, 2), round(os.getloadavg()[0], 2)]
        document[part] = row | {"commit": document["commit"]}
        say(f"{part}: {json.dumps({k: v for k, v in document[part].items() if k != 'curve'})}")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
