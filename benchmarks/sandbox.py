"""What does a sandbox cost: to make, to use, to stop and to copy, for each kind, beside what else runs here?

Kinds: container with crun, runc and gVisor, container through an edge (Unix socket), microVM (QEMU, emulated where
no KVM boots a guest), function; taken from a warm pool. Peers in the same run, in turns with them: the bare OCI
runtimes on the same root file system, `runc exec`, bubblewrap, podman, and fork+exec on the host as the floor. What is
not installed or refuses to run here is named as not run, with its reason. Bounds: the floors of spec/sandbox.md 0,
which were measured on a quiet machine of this kind, stand beside; so do the goals that were set for this machine.

    python benchmarks/sandbox.py [--only create,trip,files,echo,state] [--rounds 20] [--out FILE]

Under five minutes on two quiet cores. Writes the JSON and, with all parts, a plot beside it. A busy machine raises all
figures; its load is in the file, and the ratios are those of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sandbox_parts as parts
from sandbox_host import RESULTS, facts, spread
from sandbox_peers import Peers

FLOORS_MS = {
    "create": {
        "fork+exec": 1.0,
        "bwrap --unshare-all": 7.1,
        "crun run": 10.7,
        "runc run": 30.1,
        "runsc run": 150.0,
        "microvm": 2300.0,
    },
    "trip": {"fork+exec": 1.0, "runc exec": 22.5, "container (gVisor)": 31.0, "function call": 3.1},
    "echo": {"microvm": 4.5},
    "snapshot": {"microvm": 91.0, "container (gVisor)": 73.0},
    "restore to first command": {"microvm": 146.0, "container (gVisor)": 171.0},
}
"""p50 of spec/sandbox.md 0: what the kernel, the runtime or the monitor needs alone."""
GOALS_MS = {
    "create": {
        "container (crun)": 25.0,
        "container (runc)": 45.0,
        "taken from a warm pool": 5.0,
        "microvm": 3000.0,
    },
    "trip": {"container (crun)": 1.5, "container (runc)": 1.5, "function call": 4.0},
    "restore to first command": {"microvm": 300.0},
}
"""p50 that was asked for."""


def table(title: str, samples: parts.Samples) -> dict[str, Any]:
    """Rows in milliseconds, with floor, goal and ratio to our container with crun where there are such."""
    base = samples.get("container (crun)")
    rows: dict[str, Any] = {}
    for name, values in samples.items():
        rows[name] = row = spread(values)
        if base is not None:
            row["x_container"] = round(statistics.median(values) / statistics.median(base), 2)
        for key, known in (("floor", FLOORS_MS), ("goal", GOALS_MS)):
            if name in known.get(title, {}):
                row[key] = known[title][name]
    return rows


def rates(samples: parts.Samples) -> dict[str, Any]:
    """MB/s, 10^6 bytes."""
    return {
        name: {
            "median": round(statistics.median(values) / 1e6, 1),
            "min": round(min(values) / 1e6, 1),
            "max": round(max(values) / 1e6, 1),
            "n": len(values),
        }
        for name, values in samples.items()
    }


def show(title: str, rows: dict[str, Any]) -> None:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"\n{title:<40}" + "".join(f"{column:>12}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<40}" + "".join(f"{row.get(column, ''):>12}" for column in columns))


async def measure(wanted: list[str], rounds: int, place: Path, edge: str) -> dict[str, Any]:
    """The document's tables."""
    document: dict[str, Any] = {"not_run": {}, "seconds": {}}
    found = await parts.usable(parts.kinds(edge), document["not_run"])
    peers = await asyncio.to_thread(Peers, place)
    document["not_run"] = peers.not_run | document["not_run"]
    peers.not_run = document["not_run"]
    try:
        make, live = peers.create(), peers.live()
        for part in wanted:
            start = time.perf_counter()
            if part == "create":
                document["create_ms"] = table(part, await parts.create(found, make, rounds))
            elif part == "trip":
                document["round_trip_ms"] = table(part, await parts.round_trips(found, live, rounds))
            elif part == "files":
                count = max(2, rounds // 5)
                document["files_mb_per_s"] = rates(await parts.files(found, live, count))
            elif part == "echo":
                document["pty_echo_ms"] = table(part, await parts.echoes(found, rounds * 5))
            else:
                states = await parts.states(found, live, rounds)
                document["state_ms"] = {name: table(name, samples) for name, samples in states.items()}
            document["seconds"][part] = round(time.perf_counter() - start, 1)
    finally:
        peers.close()
    return document


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("create", "trip", "files", "echo", "state")
    parser.add_argument("--only", default=",".join(names), help="comma-separated: " + ", ".join(names))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "sandbox.json")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    document = {"question": "what does a sandbox cost: to make, to use, to stop, to copy?"} | facts()
    document["rounds"] = options.rounds
    with tempfile.TemporaryDirectory(prefix="rq-bench-", ignore_cleanup_errors=True) as name:
        os.environ["RORQUAL_STATE"] = f"{name}/state"
        os.environ.pop("RORQUAL_EDGE", None)
        with contextlib.ExitStack() as stack:
            edge = stack.enter_context(parts.Edge(Path(name)))
            document |= asyncio.run(measure(wanted, options.rounds, Path(name), edge.address))
    document["load_at_end"] = [round(value, 2) for value in os.getloadavg()]
    print(
        f"{document['cpu']}, {document['cpus']} CPUs, Linux {document['kernel']}, "
        f"load {document['load_at_start'][0]} to {document['load_at_end'][0]}"
    )
    for key in ("create_ms", "round_trip_ms", "pty_echo_ms", "files_mb_per_s"):
        if key in document:
            show(key, document[key])
    for key, rows in document.get("state_ms", {}).items():
        show(f"{key}, ms", rows)
    for key, reason in document["not_run"].items():
        print(f"not run: {key}: {reason}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if len(wanted) == len(names):
        import sandbox_plot  # matplotlib is loaded when there is something to draw

        sandbox_plot.draw(document, options.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
