"""How long from asking for a sandbox to its first command's answer, and how long is one command's round trip?

Peers, in the same run, interleaved round by round: the bare OCI runtimes (`crun run`, `runc run`, `runc exec`) on the
same root file system, bubblewrap with every namespace, podman with the same root (`--rootfs ...:O`), and fork+exec on
the host as the floor. A peer that is not installed, or refuses to run here, is named as not run, with its reason.
Physical bound: the host's own fork+exec (a command must do one), and the kernel's work for seven namespaces, four
overlays and nine cgroups (a create must do it; bubblewrap does the namespaces alone).

    python benchmarks/sandbox.py [--rounds 40] [--storm 96] [--out benchmarks/results/sandbox.json]
    python benchmarks/sandbox.py --only-pause [--rounds 20] [--out benchmarks/results/sandbox_pause.json]
    python benchmarks/sandbox.py --only-pool [--rounds 20] [--out benchmarks/results/sandbox_pool.json]

The second form measures pause, resume, disk snapshot and disk fork alone; no peer runs in it. The third: create, and
take from a warm pool, to the first command, beside `crun run` and gVisor where they are installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rorqual.sandbox import AsyncSandbox, AsyncWarmPool, Sandbox
from rorqual.sandbox.images import remove_image, root_file_system
from rorqual.sandbox.state import StateDir

ROOT = Path(__file__).resolve().parents[1]
Measure = Callable[[], float]


def timed(command: list[str], **options: Any) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    return time.perf_counter() - start


def first_line(command: list[str]) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return ((done.stdout or done.stderr).splitlines() or ["?"])[0]
    return "not installed"


def spread(samples: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(samples)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3  # noqa: E731
    return {
        "p50": round(statistics.median(ordered) * 1e3, 3),
        "p90": round(at(0.9), 3),
        "p99": round(at(0.99), 3),
        "min": round(ordered[0] * 1e3, 3),
        "n": len(ordered),
    }


class Peers:
    """The other ways to run /bin/true isolated; each is tried once, and left out with its reason when it fails."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.not_run: dict[str, str] = {}
        base = dict(root_file_system("base", state=StateDir.from_environment()).overlays)
        self.rootfs = place / "rootfs"
        shutil.copytree(base["/"][0], self.rootfs, symlinks=True)
        self.unified = "/sys/fs/cgroup/unified" if os.path.ismount("/sys/fs/cgroup/unified") else ""

    def create(self) -> dict[str, Measure]:
        found: dict[str, Measure] = {"fork+exec": lambda: timed(["/bin/true"])}
        for name in ("crun", "runc"):
            if (path := shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")) is None:
                self.not_run[f"{name} run"] = "not installed"
                continue
            script = self.bundle(name, path)
            self.offer(found, f"{name} run", [*script])
        if shutil.which("bwrap"):
            binds = [
                "--ro-bind",
                "/usr",
                "/usr",
                "--symlink",
                "usr/bin",
                "/bin",
                "--symlink",
                "usr/lib64",
                "/lib64",
            ]
            binds += ["--symlink", "usr/lib", "/lib", "--proc", "/proc", "--dev", "/dev"]
            self.offer(found, "bwrap --unshare-all", ["bwrap", "--unshare-all", *binds, "/bin/true"])
        else:
            self.not_run["bwrap --unshare-all"] = "not installed"
        if shutil.which("podman"):
            (self.rootfs / "usr").rmdir()
            (self.rootfs / "usr").mkdir()
            # Not crun: podman cannot take /sys/fs/cgroup/unified away from it on a hybrid host.
            runtime = ["--runtime", "runc"] if self.unified else []
            root = [
                *runtime,
                "--root",
                str(self.place / "podman"),
                "--runroot",
                str(self.place / "podman-run"),
            ]
            options = [
                "--network=none",
                "--memory=512m",
                "--pids-limit=256",
                "--ulimit=nofile=1024:1024",
                "--ulimit=nproc=1024:1024",
                "--cgroup-manager=cgroupfs",
            ]
            command = ["podman", *root, options[-1], "run", "--rm", *options[:-1], "-v", "/usr:/usr:ro"]
            self.offer(found, "podman run", [*command, "--rootfs", str(self.rootfs), "/bin/true"])
        else:
            self.not_run["podman run"] = "not installed"
        return found

    def offer(self, found: dict[str, Measure], name: str, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.not_run[name] = (done.stderr.strip().splitlines() or ["?"])[-1][:200]
        else:
            found[name] = lambda: timed(command)

    def bundle(self, name: str, path: str) -> list[str]:
        """A container with the runtime's own default configuration, on the host's /usr."""
        place = self.place / name
        place.mkdir()
        subprocess.run([path, "spec"], cwd=place, check=True)
        config = json.loads((place / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": ["/bin/true"]}
        config["root"] = {"path": str(self.rootfs), "readonly": True}
        config["mounts"].append(
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}
        )
        config["linux"]["resources"] = {"memory": {"limit": 512 << 20}, "pids": {"limit": 256}}
        (place / "config.json").write_text(json.dumps(config))
        run = f"{path} --root {place}/state run --bundle {place} bench-{name}"
        if (
            self.unified and name == "crun"
        ):  # crun refuses hybrid hosts otherwise; the unshare is part of the price
            return ["unshare", "-m", "sh", "-c", f"umount {self.unified}; exec {run}"]
        return ["sh", "-c", f"exec {run}"]


def ours_create() -> tuple[float, float]:
    """Seconds until create() returned, and until the first command's answer."""
    start = time.perf_counter()
    sb = Sandbox.create()
    created = time.perf_counter() - start
    assert sb.commands.run(["/bin/true"]).exit_code == 0
    first = time.perf_counter() - start
    sb.kill()
    return created, first


async def storm(count: int) -> dict[str, float]:
    """`count` sandboxes at once: as RL opens them."""
    start = time.perf_counter()
    boxes = await asyncio.gather(*[AsyncSandbox.create(memory_mb=256, disk_mb=64) for _ in range(count)])
    created = time.perf_counter() - start
    start = time.perf_counter()
    results = await asyncio.gather(*[sb.commands.run(["/bin/true"]) for sb in boxes])
    ran = time.perf_counter() - start
    assert all(result.exit_code == 0 for result in results)
    start = time.perf_counter()
    await asyncio.gather(*[sb.kill() for sb in boxes])
    return {
        "count": count,
        "create_all_s": round(created, 3),
        "creates_per_s": round(count / created, 1),
        "one_command_each_s": round(ran, 3),
        "kill_all_s": round(time.perf_counter() - start, 3),
    }


async def round_trips(rounds: int) -> list[float]:
    async with await AsyncSandbox.create() as sb:
        await sb.commands.run(["/bin/true"])
        samples = []
        for _ in range(rounds):
            start = time.perf_counter()
            await sb.commands.run(["/bin/true"])
            samples.append(time.perf_counter() - start)
        return samples


def exec_peers(peers: Peers, rounds: int) -> dict[str, list[float]]:
    """`runc exec` into a container that runs; fork+exec on the host."""
    samples = {"fork+exec": [timed(["/bin/true"]) for _ in range(rounds)]}
    place = peers.place / "runc"
    path = shutil.which("runc", path=os.environ["PATH"] + ":/usr/sbin")
    if not place.is_dir() or path is None:
        return samples
    config = json.loads((place / "config.json").read_text())
    config["process"]["args"] = ["/bin/sleep", "1000"]
    (place / "config.json").write_text(json.dumps(config))
    runc = [path, "--root", str(place / "state")]
    devnull = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*runc, "run", "--detach", "--bundle", str(place), "bench-exec"], check=True, **devnull)
    try:
        samples["runc exec"] = [timed([*runc, "exec", "bench-exec", "/bin/true"]) for _ in range(rounds)]
    finally:
        subprocess.run([*runc, "delete", "--force", "bench-exec"], check=True)
    return samples


async def pauses(rounds: int) -> dict[str, list[float]]:
    """Seconds of pause, resume, snapshot and fork of a sandbox that has written 8 MB in 200 files."""
    samples: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def clock(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        samples.setdefault(name, []).append(time.perf_counter() - start)

    async with await AsyncSandbox.create(memory_mb=256, disk_mb=64) as sb:
        await sb.commands.run("for i in $(seq 200); do head -c 40000 /dev/urandom > f$i; done", timeout=300)
        for _ in range(rounds):
            with clock("pause (no reclaim)"):
                await sb.pause(reclaim=False)
            with clock("resume"):
                await sb.resume()
            with clock("pause with reclaim"):
                await sb.pause()
            with clock("a command in a paused sandbox"):
                await sb.commands.run(["/bin/true"])
        for _ in range(max(3, rounds // 5)):
            with clock("snapshot of 8 MB in 200 files"):
                taken = await sb.snapshot()
            with clock("create from the snapshot"):
                copy = await AsyncSandbox.create(memory_mb=256, disk_mb=64, image=taken)
            await copy.kill()
            await asyncio.to_thread(remove_image, taken.name)
            with clock("fork 1 to 8, all ready"):
                children = await sb.fork(count=8)
            await asyncio.gather(*[child.kill() for child in children])
    return samples


def only_pause(rounds: int, out: Path) -> None:
    load = os.getloadavg()
    table = {name: spread(values) for name, values in asyncio.run(pauses(rounds)).items()}
    for name, row in table.items():
        print(f"{name:<36}{row['p50']:>10.2f}{row['p90']:>10.2f}{row['min']:>10.2f}{row['n']:>6}")
    document = {
        "question": "pause, resume, disk snapshot and disk fork of a container, in milliseconds",
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "load_at_start": load,
        "nice": os.nice(0),
        "commit": first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "pause_ms": table,
    }
    out.write_text(json.dumps(document, indent=2) + "\n")


async def pools(rounds: int, peers: dict[str, Measure]) -> dict[str, list[float]]:
    """Seconds to the first command's answer, interleaved; the pool is full before each take."""
    samples: dict[str, list[float]] = {}
    options = {"memory_mb": 256, "disk_mb": 64}
    runsc = shutil.which("runsc") is not None

    def clock(name: str, start: float) -> None:
        samples.setdefault(name, []).append(time.perf_counter() - start)

    async with await AsyncWarmPool.create(size=2, **options) as pool:
        for _ in range(rounds):
            while (await pool.statistics()).ready < 2:  # noqa: ASYNC110 -- the pool has no event for its callers
                await asyncio.sleep(0.02)
            start = time.perf_counter()
            sb = await pool.take(envs={"A": "1"})
            clock("take from a pool", start)
            await sb.commands.run(["/bin/true"])
            clock("take from a pool to first command", start)
            await sb.kill()
            kinds = {"create to first command": "", "create to first command (gVisor)": "runsc"}
            for name, runtime in kinds.items():
                if runtime and not runsc:
                    continue
                start = time.perf_counter()
                sb = await AsyncSandbox.create(runtime=runtime, **options)
                await sb.commands.run(["/bin/true"])
                clock(name, start)
                await sb.kill()
            for name, measure in peers.items():
                samples.setdefault(name, []).append(measure())
    return samples


def only_pool(rounds: int, out: Path) -> None:
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="rq-bench-") as name:
        found = Peers(Path(name)).create()
        peers = {key: found[key] for key in ("crun run", "fork+exec") if key in found}
        table = {key: spread(values) for key, values in asyncio.run(pools(rounds, peers)).items()}
    base = table["create to first command"]["p50"]
    for key, row in table.items():
        print(
            f"{key:<36}{row['p50']:>10.2f}{row['p90']:>10.2f}{row['min']:>10.2f}{row['p50'] / base:>8.2f} x create"
        )
    document = {
        "question": "milliseconds from asking for a container to its first command, made and taken from a pool",
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "load_at_start": load,
        "nice": os.nice(0),
        "commit": first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "first_command_ms": table,
    }
    out.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--storm", type=int, default=96)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sandbox.json")
    parser.add_argument("--only-pause", action="store_true")
    parser.add_argument("--only-pool", action="store_true")
    args = parser.parse_args()
    if args.only_pool:
        only_pool(args.rounds, args.out)
        return
    if args.only_pause:
        only_pause(args.rounds, args.out)
        return
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="rq-bench-") as name, contextlib.ExitStack() as stack:
        # podman keeps its storage directory mounted onto itself
        overlay = ["umount", "-l", f"{name}/podman/overlay"]
        stack.callback(subprocess.run, overlay, stderr=subprocess.DEVNULL, check=False)
        peers = Peers(Path(name))
        measures = peers.create()
        samples: dict[str, list[float]] = {"rorqual create": [], "rorqual create to first command": []}
        ours_create()
        for measure in measures.values():
            measure()
        for _ in range(args.rounds):
            created, first = ours_create()
            samples["rorqual create"].append(created)
            samples["rorqual create to first command"].append(first)
            for key, measure in measures.items():
                samples.setdefault(key, []).append(measure())
        create = {key: spread(values) for key, values in samples.items()}
        trips = {"rorqual commands.run (async)": asyncio.run(round_trips(args.rounds * 10))}
        with Sandbox.create() as sb:
            sync = []
            for _ in range(args.rounds * 10):
                start = time.perf_counter()
                sb.commands.run(["/bin/true"])
                sync.append(time.perf_counter() - start)
            trips["rorqual commands.run (sync)"] = sync
        trips |= exec_peers(peers, args.rounds)
        subprocess.run(
            ["umount", "-R", "-l", str(Path(name) / "podman")], stderr=subprocess.DEVNULL, check=False
        )
    round_trip = {key: spread(values) for key, values in trips.items()}
    storms = asyncio.run(storm(args.storm))
    print(f"{cpu}, {os.cpu_count()} CPUs, Linux {platform.release()}, load {load[0]:.1f}")
    for title, table, base in (
        ("create and run /bin/true", create, "rorqual create to first command"),
        ("one command in a live sandbox", round_trip, "rorqual commands.run (async)"),
    ):
        print(f"\n{title:<36}{'p50 ms':>10}{'p90':>10}{'p99':>10}{'min':>10}{'x ours':>10}")
        for key, row in table.items():
            ratio = row["p50"] / table[base]["p50"]
            print(
                f"{key:<36}{row['p50']:>10.2f}{row['p90']:>10.2f}{row['p99']:>10.2f}{row['min']:>10.2f}{ratio:>10.2f}"
            )
    for key, reason in peers.not_run.items():
        print(f"not run: {key}: {reason}")
    print(f"\nat once: {storms}")
    commit = first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    document = {
        "question": "create to first command, and command round trip, in milliseconds",
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "load_at_start": load,
        "python": sys.version.split()[0],
        "versions": {
            tool: first_line([tool, "--version"]) for tool in ("crun", "/usr/sbin/runc", "bwrap", "podman")
        },
        "commit": commit,
        "rounds": args.rounds,
        "create_ms": create,
        "round_trip_ms": round_trip,
        "storm": storms,
        "not_run": peers.not_run,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
