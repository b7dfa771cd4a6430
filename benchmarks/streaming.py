"""How fast does a model decode that is larger than its memory, and what share of the disk's speed is that?

The checkpoint: two layers of V4-Flash at true dimensions (CSA with hash routing, HCA with scores; 256 experts each, FP4
experts, FP8 linears), vocabulary 4096, random: 7.2 GB. The process runs in a memory cgroup of a third of that, page
cache included. Modes, in turn:
  direct   experts by O_DIRECT into the slots
  cached   the same reads through the page cache of the cgroup, which then has no room for the other weights
  mapped   no limit, all experts mapped: what the machine gives without a disk
Bound of the reads: bytes of experts missed in a token over the rate at which as many threads read random whole experts
with O_DIRECT and do nothing else, measured in the same process before and after the tokens. `reads_share`: that bound
over the time in which the step waited for experts (more than 1 where a hash layer's experts, known beforehand, were
read while the step computed). `share`: the bound and the arithmetic (the step's time without that wait) over the whole.
`cpu_seconds_per_token` does not depend on what else the machine does.
Random routing is the worst case: a trained router repeats itself. Logits must be the same to the bit in every mode.

    python benchmarks/streaming.py [--directory build/streaming] [--tokens 24] [--repeats 2] [--threads 2]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "streaming.json"
GROUPS = Path("/sys/fs/cgroup/memory")
MODES = ("direct", "cached", "mapped")
READ_THREADS = 8
WARM_UP = 14
"""Tokens before the measured ones."""


def checkpoint(directory: Path) -> None:
    """Writes the checkpoint, or goes on writing it, or finds it there."""
    from rorqual.model import Config
    from rorqual.model.synth import synth

    if (directory / "config.json").exists():
        return
    config = Config.preset("flash").replace(
        num_hidden_layers=2,
        compress_ratios=(4, 128),
        num_hash_layers=1,
        vocab_size=4096,
        num_nextn_predict_layers=0,
    )
    begun = time.perf_counter()
    done = synth(directory, config, seed=0)
    seconds = time.perf_counter() - begun
    print(f"synth: {done.data_bytes / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)


def drop_cache(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_rate(directory: Path, *, seconds: float) -> float:
    """Bytes a second of random whole experts, by O_DIRECT and READ_THREADS threads: reads and nothing else."""
    import mmap
    from concurrent.futures import ThreadPoolExecutor

    expert = 13_369_344 // 4096 * 4096
    files = [
        (os.open(file, os.O_RDONLY | os.O_DIRECT), file.stat().st_size)
        for file in directory.glob("*.safetensors")
    ]
    draw, piece = random.Random(time.time_ns()), 4 << 20
    buffers = [mmap.mmap(-1, piece) for _ in range(READ_THREADS)]

    def read(task: tuple[int, int, int]) -> int:
        number, descriptor, at = task
        return os.preadv(descriptor, [buffers[number % READ_THREADS]], at)

    total, begun = 0, time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        while time.perf_counter() - begun < seconds:  # six experts at a time, as a layer asks for them
            tasks = []
            for _ in range(6):
                descriptor, size = draw.choice(files)
                start = draw.randrange((size - expert) // 4096) * 4096
                tasks += [
                    (len(tasks) + i, descriptor, start + at) for i, at in enumerate(range(0, expert, piece))
                ]
            total += sum(pool.map(read, tasks))
    elapsed = time.perf_counter() - begun
    for descriptor, _ in files:
        os.close(descriptor)
    return total / elapsed


def child(arguments: argparse.Namespace) -> None:
    import torch

    from rorqual.engine import Engine
    from rorqual.model.packed import PackedWeights
    from rorqual.model.weights import Expert

    torch.set_num_threads(arguments.threads)
    directory, mode = Path(arguments.directory), arguments.child
    waits: list[float] = []

    class Timed(PackedWeights):
        """Counts the time a step spends on getting its experts."""

        def load_experts(self, layer: int, ids: Sequence[int]) -> list[Expert]:
            begun = time.perf_counter()
            out = super().load_experts(layer, ids)
            waits.append(time.perf_counter() - begun)
            return out

    mapped = mode == "mapped"
    before = None if mapped else disk_rate(directory, seconds=1.5)
    weights = Timed(
        directory,
        expert_bytes=None if mapped else arguments.budget,
        reads="direct" if mode == "direct" else "cached",
        threads=READ_THREADS,
    )
    engine = Engine(weights, kv_bytes=64 << 20, cache_format="packed", prefill_chunk=8, prefix_cache=False)
    draw = random.Random(1)
    prompt = [draw.randrange(4096) for _ in range(16)]
    sequence = engine.open(prompt)
    digest, times = hashlib.sha256(), []
    start, cpu = None, 0.0
    for step in range(WARM_UP + arguments.tokens):
        if step == WARM_UP:  # all slots have been filled once
            start, cpu = weights.expert_stats(), time.process_time()
            waits.clear()
            times.clear()
        logits = sequence.logits
        assert logits is not None
        digest.update(logits.numpy().tobytes())
        # not the argmax: random weights soon repeat themselves, and with them their experts
        token = int(torch.topk(logits[0], 64).indices[draw.randrange(64)])
        begun = time.perf_counter()
        sequence.append([token])
        times.append(time.perf_counter() - begun)
    end, cpu = weights.expert_stats(), time.process_time() - cpu
    waited = sum(waits) / arguments.tokens
    out: dict[str, Any] = {
        "mode": mode,
        "runner": type(engine.runner).__name__,
        "seconds_per_token": statistics.mean(times),
        "median_seconds": statistics.median(times),
        "cpu_seconds_per_token": cpu / arguments.tokens,
        "arithmetic_seconds_per_token": statistics.mean(times) - waited,
        "logits_sha256": digest.hexdigest(),
    }
    if start is not None and end is not None:
        count = arguments.tokens
        hits, misses = end.hits - start.hits, end.misses - start.misses
        missed = (end.bytes_read - start.bytes_read) / count
        out |= {
            "bytes_read_per_token": missed,
            "hit_rate": (hits - (end.prefetch_hits - start.prefetch_hits)) / (hits + misses),
            "prefetched_per_token": (end.prefetched - start.prefetched) / count,
            "wait_seconds_per_token": waited,
            "slots": end.slots,
            "held_bytes": end.held_bytes,
            "overflow": end.overflow - start.overflow,
        }
        weights.close()
        rates = [before, disk_rate(directory, seconds=1.5)]
        rate = statistics.mean(rate for rate in rates if rate)
        out |= {
            "disk_bytes_per_second": rates,
            "bound_seconds_per_token": missed / rate,
            "reads_share": missed / rate / waited,
            "share": (missed / rate + out["arithmetic_seconds_per_token"]) / out["seconds_per_token"],
        }
    print(json.dumps(out))


def run_child(arguments: argparse.Namespace, mode: str, limit: int, budget: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", mode]
    command += ["--directory", str(arguments.directory), "--tokens", str(arguments.tokens)]
    command += ["--threads", str(arguments.threads), "--budget", str(budget)]
    group = GROUPS / f"rorqual-bench-{uuid.uuid4().hex[:8]}"
    load = os.getloadavg()[0]
    if mode == "mapped":
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        peak = None
    else:
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text(str(limit))
            shell = ["sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh", *command]
            done = subprocess.run(shell, capture_output=True, text=True, check=False)
            peak = int((group / "memory.max_usage_in_bytes").read_text())
        finally:
            group.rmdir()
    if done.returncode:
        sys.exit(f"{mode}: {done.stderr.strip()[-2000:]}")
    return {**json.loads(done.stdout), "mode": mode, "cgroup_peak_bytes": peak, "load_before": load}


def machine() -> dict[str, Any]:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    import torch

    return {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "streaming")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int, default=0)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    if not os.access(GROUPS, os.W_OK):
        sys.exit("needs root and the memory cgroup (v1) at /sys/fs/cgroup/memory")
    checkpoint(arguments.directory)
    from rorqual.model.inspection import inspect

    found = inspect(arguments.directory)
    limit = found.file_bytes // 3
    budget = limit - found.resident_bytes - (600 << 20)  # what Python, torch and the cache take
    rows = []
    for repeat in range(arguments.repeats):
        for mode in MODES:
            drop_cache(arguments.directory)
            row = run_child(arguments, mode, limit, budget)
            rows.append(row | {"repeat": repeat})
            print(json.dumps(rows[-1]), file=sys.stderr)
    same = len({row["logits_sha256"] for row in rows}) == 1
    summary = {}
    for mode in MODES:
        own = [row for row in rows if row["mode"] == mode]
        summary[mode] = {
            name: statistics.mean(row[name] for row in own)
            for name in (
                *("seconds_per_token", "cpu_seconds_per_token", "arithmetic_seconds_per_token"),
                *("wait_seconds_per_token", "bytes_read_per_token", "hit_rate", "reads_share", "share"),
            )
            if name in own[0]
        } | {"tokens_per_second": 1 / statistics.mean(row["seconds_per_token"] for row in own)}
    document = {
        "question": "decode speed of a model three times larger than its memory, as a share of the disk's",
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine(),
        "checkpoint": {
            "file_bytes": found.file_bytes,
            "resident_bytes": found.resident_bytes,
            "expert_bytes": found.expert_bytes,
            "layers": found.schedule,
        },
        "memory_limit_bytes": limit,
        "expert_budget_bytes": budget,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
        "same_logits_in_every_mode": same,
        "summary": summary,
        "rows": rows,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    if not same:
        sys.exit("the modes disagree: logits differ")


if __name__ == "__main__":
    main()
