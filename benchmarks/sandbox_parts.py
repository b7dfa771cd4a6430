"""What benchmarks/sandbox.py measures of each kind of sandbox. Every function returns seconds, or bytes a second, by
name; kinds and peers take turns, round by round, so that a change of the host's load meets all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import random
import subprocess
import sys
import time
import tty
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_peers import Measure, timed

from rorqual.sandbox import AsyncSandbox, AsyncWarmPool
from rorqual.sandbox.errors import SandboxError
from rorqual.sandbox.images import remove_image

MB = 1 << 20
FILE_BYTES = 64 * MB
Samples = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One sort of sandbox: `create`'s arguments. share: how often it is measured, of all rounds."""

    options: Mapping[str, Any]
    share: float = 1.0
    big: Mapping[str, Any] = field(default_factory=dict)
    """More arguments where a file of 64 MB has to fit."""


def kinds(edge: str) -> dict[str, Kind]:
    small: dict[str, Any] = {"memory_mb": 256, "disk_mb": 128, "timeout": 3600.0, "edge": "local"}
    big = {"memory_mb": 768, "disk_mb": 256}
    return {
        "container (crun)": Kind(options=small | {"runtime": "crun"}, big=big),
        "container (runc)": Kind(options=small | {"runtime": "runc"}, big=big),
        "container (gVisor)": Kind(options=small | {"runtime": "runsc"}, share=0.25, big=big),
        "container through an edge": Kind(options=small | {"edge": edge, "runtime": "crun"}, big=big),
        "microvm": Kind(options=small | {"substrate": "microvm"}, share=0.15, big=big),
    }


@contextlib.contextmanager
def clock(samples: Samples, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    samples.setdefault(name, []).append(time.perf_counter() - start)


async def usable(found: Mapping[str, Kind], not_run: dict[str, str]) -> dict[str, Kind]:
    """Those that start here; the first start, with all that is loaded once, is not measured."""
    left = {}
    for name, kind in found.items():
        try:
            async with await AsyncSandbox.create(**kind.options) as sb:
                await sb.commands.run(["/bin/true"])
            left[name] = kind
        except SandboxError as error:
            not_run[name] = str(error)[:200]
    return left


def turns(rounds: int, share: float) -> set[int]:
    """The rounds in which something with this share is measured: at least three, evenly spread."""
    count = min(rounds, max(3, round(rounds * share)))
    return {round(number * rounds / count) for number in range(count)}


async def create(found: Mapping[str, Kind], peers: Mapping[str, Measure], rounds: int) -> Samples:
    """To the first command's answer. Shuffled anew each round: who comes first after which other is not the same."""
    samples: Samples = {}
    often = {name: turns(rounds, kind.share) for name, kind in found.items()}
    often["runsc run"] = turns(rounds, 0.25)
    dice = random.Random(1)
    pool = await AsyncWarmPool.create(size=2, runtime="crun", memory_mb=256, disk_mb=128)
    async with pool:
        for number in range(rounds):
            names = [*found, "function: a pool, to its first call", "taken from a warm pool", *peers]
            dice.shuffle(names)
            for name in names:
                if name in often and number not in often[name]:
                    continue
                await asyncio.sleep(0.05)  # what the one before has left to do in the background
                if name in peers:
                    samples.setdefault(name, []).append(peers[name]())
                    if name.startswith("podman"):  # whose cleanup is a process of its own
                        await asyncio.sleep(0.4)
                elif name in found:
                    with clock(samples, name):
                        sb = await AsyncSandbox.create(**found[name].options)
                        await sb.commands.run(["/bin/true"])
                    await sb.kill()
                elif name.startswith("function"):
                    with clock(samples, name):
                        fn = await AsyncSandbox.function(workers=1, edge="local")
                        await fn("1")
                    await fn.close()
                else:
                    while (await pool.statistics()).ready < 2:  # noqa: ASYNC110 -- the pool has no event for this
                        await asyncio.sleep(0.02)
                    with clock(samples, name):
                        sb = await pool.take()
                        await sb.commands.run(["/bin/true"])
                    await sb.kill()
                    while (await pool.statistics()).ready < 2:  # noqa: ASYNC110 -- its refill is no neighbour's load
                        await asyncio.sleep(0.02)
    return samples


@contextlib.asynccontextmanager
async def one_of_each(found: Mapping[str, Kind], *, big: bool = False) -> Any:
    """A live sandbox of each kind."""
    async with contextlib.AsyncExitStack() as stack:
        boxes = {}
        for name, kind in found.items():
            made = await AsyncSandbox.create(**kind.options | (kind.big if big else {}))
            boxes[name] = await stack.enter_async_context(made)
            await made.commands.run(["/bin/true"])
        yield boxes


async def round_trips(found: Mapping[str, Kind], live: Mapping[str, list[str]], rounds: int) -> Samples:
    """One command in a live sandbox."""
    samples: Samples = {}
    async with one_of_each(found) as boxes, await AsyncSandbox.function(workers=1, edge="local") as fn:
        await fn("1")
        for number in range(rounds):
            for name, sb in boxes.items():
                for _ in range(10 if name.startswith("container") else 2):
                    with clock(samples, name):
                        await sb.commands.run(["/bin/true"])
            for _ in range(10):
                with clock(samples, "function call"):
                    await fn("1")
            samples.setdefault("fork+exec", []).append(timed(["/bin/true"]))
            if "exec" in live and number % 2 == 0:
                samples.setdefault("runc exec", []).append(timed([*live["exec"], "/bin/true"]))
    return samples


async def files(found: Mapping[str, Kind], live: Mapping[str, list[str]], rounds: int) -> Samples:
    """Bytes a second of one file of 64 MB, to a sandbox (up) and from it (down)."""
    data = os.urandom(MB) * (FILE_BYTES // MB)
    rates: Samples = {}

    def note(name: str, start: float) -> None:
        rates.setdefault(name, []).append(FILE_BYTES / (time.perf_counter() - start))

    async with one_of_each(found, big=True) as boxes:
        for _ in range(rounds):
            for name, sb in boxes.items():
                start = time.perf_counter()
                await sb.files.write("/tmp/big", data)
                note(f"{name}, up", start)
                start = time.perf_counter()
                back = await sb.files.read("/tmp/big", format="bytes")
                note(f"{name}, down", start)
                assert back == data, name
                await sb.files.remove("/tmp/big")
            if "exec" in live:
                start = time.perf_counter()
                command = [*live["exec"], "sh", "-c", "cat > /dev/shm/big"]
                subprocess.run(command, input=data, check=True)  # noqa: ASYNC221
                note("runc exec cat, up", start)
                start = time.perf_counter()
                command = [*live["exec"], "sh", "-c", "cat /dev/shm/big; rm /dev/shm/big"]
                back = subprocess.run(command, capture_output=True, check=True).stdout  # noqa: ASYNC221
                note("runc exec cat, down", start)
                assert back == data
    return rates


async def echoes(found: Mapping[str, Kind], rounds: int) -> Samples:
    """A byte typed at a terminal until it is seen."""
    samples: Samples = {}
    async with one_of_each(found) as boxes:
        for name, sb in boxes.items():
            seen: asyncio.Queue[bytes] = asyncio.Queue()
            terminal = await sb.pty.create(cmd="stty raw -echo; echo on; exec cat", on_data=seen.put_nowait)
            text = b""
            while b"on" not in text:
                text += await seen.get()
            for number in range(rounds):
                with clock(samples, name):
                    await terminal.send_stdin(bytes([65 + number % 26]))
                    await seen.get()
            await terminal.kill()
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    with subprocess.Popen(["cat"], stdin=theirs, stdout=theirs) as process:  # noqa: ASYNC220
        os.close(theirs)
        for _ in range(rounds):
            with clock(samples, "a terminal of the host"):
                os.write(ours, b"x")
                os.read(ours, 1)
        process.kill()
    os.close(ours)
    return samples


async def states(found: Mapping[str, Kind], live: Mapping[str, list[str]], rounds: int) -> dict[str, Samples]:
    """Pause, resume, snapshot, restore, fork 1 to 8, of a sandbox that has written 8 MB in 200 files.

    A microVM's snapshot and fork have its memory and processes; those of a container are of its files.
    """
    names = ("pause", "resume", "snapshot", "restore to first command", "fork 1 to 8, all ready")
    samples: dict[str, Samples] = {name: {} for name in names}
    fill = "i=0; while [ $i -lt 200 ]; do head -c 40000 /dev/urandom > f$i; i=$((i+1)); done"
    often = {name: turns(rounds, max(kind.share, 0.2)) for name, kind in found.items()}
    async with one_of_each(found) as boxes:
        for sb in boxes.values():
            assert (await sb.commands.run(fill, timeout=300)).exit_code == 0
        for number in range(rounds):
            for name, sb in boxes.items():
                if number in often[name]:
                    await _state(
                        samples,
                        name,
                        sb,
                        found[name],
                        few=found[name].share < 1 or number in turns(rounds, 0.3),
                    )
            if "pause" in live:
                samples["pause"].setdefault("runc pause", []).append(timed(live["pause"]))
                samples["resume"].setdefault("runc resume", []).append(timed(live["resume"]))
    return samples


async def _state(samples: dict[str, Samples], name: str, sb: AsyncSandbox, kind: Kind, *, few: bool) -> None:
    with clock(samples["pause"], name):
        await sb.pause(reclaim=False)
    with clock(samples["resume"], name):
        await sb.resume()
    if not few:
        return
    with clock(samples["snapshot"], name):
        taken = await sb.snapshot()
    with clock(samples["restore to first command"], name):
        copy = await AsyncSandbox.create(**kind.options, image=taken)
        await copy.commands.run(["/bin/true"])
    await copy.kill()
    if kind.options["edge"] == "local":
        await asyncio.to_thread(remove_image, taken.name)
    with clock(samples["fork 1 to 8, all ready"], name):
        children = await sb.fork(count=8)
    await asyncio.gather(*[child.kill() for child in children])


class Edge:
    """A daemon on a Unix socket, with this process's state directory. A context manager."""

    def __init__(self, place: Path) -> None:
        self.address = f"unix:{place}/edge.sock"

    def __enter__(self) -> Edge:
        command = [sys.executable, "-m", "rorqual.cli", "edge", "--name", "bench", "--socket"]
        path = self.address.removeprefix("unix:")
        self._process = subprocess.Popen(
            [*command, path, "--audit-log", os.devnull], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        if "at unix:" not in line:
            raise SystemExit(f"the edge did not start: {line}{self._process.stderr.read()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60.0)
        assert self._process.stderr is not None
        self._process.stderr.close()
