"""Makes, uses and kills sandboxes in a row, with random kill -9 of clients and of the edge, and looks for what is left.

    python scripts/soak.py --count 10000 --directory /tmp/soak [--out benchmarks/results/soak.json]

Two lanes at once: a client of the SDK alone, and one that speaks to a real edge (scripts/soak_client.py says what they
do). Every --check-every sandboxes both stand still, and everything named in soak_check.py is looked for: what is left
after 20 s is a leak. The last part of the run (--steady) is without kills, so that one edge, one keeper and one client
live long enough to see whether their memory and descriptors grow.
The log, soak.jsonl in the directory, has a line for all that happened; the same command goes on where it stopped.
Ctrl-C or SIGTERM ends it after the sandboxes that are under way, with a report of what was done.
Exit code 0: nothing failed, nothing was left, nothing grew; 1 otherwise; the JSON says what.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import soak_check

from rorqual.sandbox import prune
from rorqual.sandbox.state import StateDir

ROOT = Path(__file__).resolve().parents[1]
CLIENT = Path(__file__).with_name("soak_client.py")
OUTCOMES = ("ok", "cut", "killed", "failed")
QUIET_S = 20.0
"""How long a check waits: a lease (2 s), a keeper's own end, an edge that adopts."""
PATIENCE_S = 120.0


class Journal:
    """The log: appended to at each event, read at a restart."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.rows.append(json.loads(line))
                except ValueError:  # the line that was being written when it was killed
                    continue
        self.counts = Counter(self._sort(row) for row in self.rows)
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n" if torn else "")
        self._lock = threading.Lock()

    def add(self, event: str, **fields: Any) -> None:
        row = {"event": event, "t": round(time.time(), 3), **fields}
        with self._lock:
            self.rows.append(row)
            self.counts[self._sort(row)] += 1
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    @staticmethod
    def _sort(row: dict[str, Any]) -> str:
        return str(row.get("outcome") or row["event"])

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == event]

    def close(self) -> None:
        self._file.close()


class Edge:
    """The daemon; `kill9` starts the next one at once."""

    def __init__(self, directory: Path) -> None:
        self.address = f"unix:{directory}/edge.sock"
        self._log = directory / "edge.log"
        self.made = 0
        self.start()

    def start(self) -> None:
        path = self.address.removeprefix("unix:")
        command = [sys.executable, "-m", "rorqual.cli", "edge", "--name", "soak", "--socket", path]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--audit-log", os.devnull],
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.made = 0
        deadline = time.monotonic() + 60.0
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the edge did not start: {self._log.read_text()[-500:]}")
            time.sleep(0.05)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5.0)
            sock.connect(self.address.removeprefix("unix:"))
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return b" 200 " in sock.recv(100)
        return False

    def kill9(self) -> None:
        self.end(signal.SIGKILL)
        self.start()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=60.0)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


class Lane:
    """One client after the other. `run` has it do some numbers; a kill leaves a few of them undone."""

    def __init__(self, name: str, journal: Journal, rng: random.Random, edge: Edge | None) -> None:
        self.name, self.journal, self.rng, self.edge = name, journal, rng, edge
        self.client: subprocess.Popen[str] | None = None
        self.made = 0
        self.pace = 0.1
        """Seconds that one sandbox takes: a kill comes within that time."""

    def _client(self) -> subprocess.Popen[str]:
        if self.client is None:
            address = [self.edge.address] if self.edge is not None else []
            self.client = subprocess.Popen(
                [sys.executable, str(CLIENT), *address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is ours
            )
            self.made = 0
        return self.client

    def run(self, numbers: list[int], *, kill: str) -> list[int]:
        """kill: '', 'client' or 'edge', while it is at them. Returns those that a kill kept from being begun."""
        client = self._client()
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(" ".join(map(str, numbers)) + "\n")
        client.stdin.flush()
        patience = threading.Timer(PATIENCE_S, client.kill)
        patience.start()
        undone, strike = list(numbers), self.rng.randrange(len(numbers)) if kill else -1
        answers = self._answers(client.stdout)
        while True:
            if len(numbers) - len(undone) == strike:
                time.sleep(self.rng.uniform(0.0, self.pace))
                strike = -1
                if kill == "client":
                    client.kill()
                elif self.edge is not None:
                    self.edge.kill9()
                self.journal.add("kill", what=kill, lane=self.name, near=undone[0])
            if (row := next(answers, None)) is None:
                break
            undone.remove(row["number"])
            self.journal.add("made", lane=self.name, **row)
            self.made += 1
            if row["outcome"] == "ok":
                self.pace = 0.9 * self.pace + 0.1 * min(row["s"], 1.0)
            if self.edge is not None:
                self.edge.made += 1
        patience.cancel()
        if kill == "client" or undone:
            self.close(signal.SIGKILL)
        if undone:
            outcome = "killed" if kill == "client" else "failed"
            why = "" if kill == "client" else "its client died or gave no answer"
            row = {"number": undone.pop(0), "kind": "", "outcome": outcome, "s": 0.0, "why": why}
            self.journal.add("made", lane=self.name, **row)
        return undone

    def _answers(self, stream: TextIO) -> Iterator[dict[str, Any]]:
        while line := stream.readline():
            if line == "\n":
                return
            try:
                yield json.loads(line)
            except ValueError:  # cut off by its death
                return

    def close(self, number: int = signal.SIGTERM) -> None:
        if self.client is None:
            return
        client, self.client = self.client, None
        assert client.stdin is not None and client.stdout is not None
        if number == signal.SIGKILL:
            client.kill()
        with contextlib.suppress(BrokenPipeError):
            client.stdin.close()
        client.wait(timeout=60.0)
        client.stdout.close()


class Soak:
    """The run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        directory: Path = options.directory
        directory.mkdir(parents=True, exist_ok=True)
        os.environ["RORQUAL_STATE"] = str(directory / "state")
        os.environ.pop("RORQUAL_EDGE", None)
        os.environ.pop("RORQUAL_EDGE_TOKEN", None)
        self.state = StateDir.from_environment()
        self.journal = Journal(directory / "soak.jsonl")
        over = {row["number"] for row in self.journal.of("made")}
        self.pending = [number for number in range(options.count) if number not in over]
        self.done = options.count - len(self.pending)
        self.begun_at = self.done
        self.begun = time.monotonic()
        self.rng = random.Random(options.seed + self.done)
        self.edge = Edge(directory)
        self.lanes = [
            Lane("sdk", self.journal, random.Random(self.rng.random()), None),
            Lane("edge", self.journal, random.Random(self.rng.random()), self.edge),
        ]
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        self.journal.add("start", at=self.done, count=options.count, load=os.getloadavg(), pid=os.getpid())

    def stop(self, *_: object) -> None:
        """Ends after the sandboxes that are under way, with a check and a report of what was done."""
        self.stopping = True

    def run(self) -> int:
        options = self.options
        try:
            self.check()
            while self.pending and not self.stopping:
                numbers, self.pending = (
                    self.pending[: options.check_every],
                    self.pending[options.check_every :],
                )
                calm = self.done >= (1.0 - options.steady) * options.count
                halves = [numbers[0::2], numbers[1::2]]
                threads = [
                    threading.Thread(target=self.lane, args=(lane, half, calm))
                    for lane, half in zip(self.lanes, halves, strict=True)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                counts = self.journal.counts
                self.done = sum(counts[outcome] for outcome in OUTCOMES)
                self.check()
        finally:
            for lane in self.lanes:
                lane.close()
            code = self.edge.end(signal.SIGTERM)
        self.journal.add("stop", edge=code)
        report = self.report()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        self.journal.close()
        print(json.dumps({key: report[key] for key in ("verdict", "made", "outcomes", "kills", "growth")}))
        return 0 if report["verdict"] == "clean" else 1

    def lane(self, lane: Lane, numbers: list[int], calm: bool) -> None:
        while numbers and not self.stopping:
            size = min(len(numbers), lane.rng.randint(2, 12))
            chunk, numbers = numbers[:size], numbers[size:]
            kill, dice = "", lane.rng.random()
            if not calm and dice < size / self.options.kill_every:
                kill = "client"
            elif not calm and lane.edge is not None and dice < 2.0 * size / self.options.kill_every:
                kill = "edge"
            numbers = lane.run(chunk, kill=kill) + numbers
            self.progress()

    def check(self) -> None:
        """Waits until nothing is left, or says what is."""
        known = {self.edge.process.pid: "edge"} | {
            lane.client.pid: f"client {lane.name}" for lane in self.lanes if lane.client is not None
        }
        deadline = time.monotonic() + QUIET_S
        cleared = 0
        while True:
            found = soak_check.look(self.state, set(known))
            left = soak_check.leaks(found)
            if not left or time.monotonic() > deadline:
                break
            if left == [f"images: {name}" for name in found["images"]]:
                # Of a client that was killed in its snapshot: it goes when the next one starts, here or by prune().
                cleared += prune(state=self.state).images
            time.sleep(0.25)
        roles = dict(known)
        for pid, owner in sorted(found["keepers"].items()):
            name = f"keeper of {known[owner]}"
            roles[pid] = name if name not in roles.values() else f"nudge of {known[owner]}"
        made = {"edge": self.edge.made} | {f"client {lane.name}": lane.made for lane in self.lanes}
        sizes = [
            {"role": role, "pid": pid, "made": made[role.partition(" of ")[2] or role]}
            | soak_check.process(pid)
            for pid, role in roles.items()
        ]
        self.journal.add(
            "check",
            done=self.done,
            left=left,
            cleared=cleared,
            processes=sizes,
            trajectory_bytes=sum(
                path.stat().st_size for path in self.state.root.glob("trajectory.db*") if path.is_file()
            ),
            load=os.getloadavg()[0],
            waited_s=round(QUIET_S - (deadline - time.monotonic()), 2),
        )

    def progress(self) -> None:
        counts = self.journal.counts
        done = sum(counts[outcome] for outcome in OUTCOMES)
        rate = (done - self.begun_at) / max(0.001, time.monotonic() - self.begun)
        width = 30 * done // self.options.count
        left = sum(len(row["left"]) for row in self.journal.of("check"))
        sys.stderr.write(
            f"\r[{'#' * width}{'.' * (30 - width)}] {done}/{self.options.count} {rate:.1f}/s, "
            f"{counts['kill']} kills, {counts['failed']} failed, {left} left "
        )
        sys.stderr.flush()

    def report(self) -> dict[str, Any]:
        made, checks = self.journal.of("made"), self.journal.of("check")
        outcomes = Counter(row["outcome"] for row in made)
        left = [line for row in checks for line in row["left"]]
        grew = soak_check.growth(checks)
        clean = not left and not outcomes["failed"] and not any(row["leak"] for row in grew)
        cut = [row["why"].partition("(")[0] for row in made if row["outcome"] == "cut"]
        commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        loads = [row["load"] for row in checks]
        return {
            "question": "what do sandboxes leave on a host whose edge and clients are killed at random?",
            "verdict": "clean" if clean else "not clean",
            "asked": self.options.count,
            "made": len(made),
            "outcomes": dict(outcomes),
            "sandboxes_in_the_log": len(soak_check.ids(self.state)),
            "by_kind": dict(Counter(row["kind"] for row in made if row["kind"])),
            "by_lane": {
                lane.name: dict(Counter(row["outcome"] for row in made if row["lane"] == lane.name))
                for lane in self.lanes
            },
            "cut_by": dict(Counter(cut)),
            "failed": [row for row in made if row["outcome"] == "failed"][:50],
            "kills": dict(Counter(row["what"] for row in self.journal.of("kill"))),
            "checks": len(checks),
            "left_behind": left[:100],
            "half_made_snapshots_cleared_by_prune": sum(row["cleared"] for row in checks),
            "longest_wait_for_quiet_s": max(row["waited_s"] for row in checks),
            "growth": grew,
            "trajectory_bytes_per_sandbox": round(checks[-1]["trajectory_bytes"] / max(1, len(made))),
            "seconds": round(sum(_spells(self.journal.rows)), 1),
            "load_1min": {"min": min(loads), "max": max(loads)},
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip(),
            "seed": self.options.seed,
        }


def _spells(rows: list[dict[str, Any]]) -> Iterator[float]:
    """Seconds of each start of the run, from its first row to its last."""
    starts = [index for index, row in enumerate(rows) if row["event"] == "start"]
    for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield rows[end - 1]["t"] - rows[begin]["t"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument(
        "--directory", type=Path, required=True, help="state, sockets and log; goes on with what is there"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/soak.json")
    parser.add_argument("--check-every", type=int, default=250)
    parser.add_argument(
        "--kill-every", type=int, default=60, help="sandboxes of a lane between two kills, on average"
    )
    parser.add_argument("--steady", type=float, default=0.25, help="part of the run, its last, without kills")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.count < 1 or options.check_every < 2 or options.kill_every < 1:
        parser.error("--count and --kill-every must be at least 1, --check-every at least 2")
    if not 0.0 <= options.steady <= 1.0:
        parser.error("--steady must be between 0 and 1")
    sys.exit(Soak(options).run())


if __name__ == "__main__":
    main()
