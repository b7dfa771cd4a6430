"""How long does one decode step of the embedded model take, in torch and in the native library?

Peer, in the same run, taking turns block by block: the torch path of the same model on the same kind of state.
Physical bounds, printed beside: the step's multiply-adds at a core's fp32 GEMM rate, and the bytes of the weights it
must read at a core's read bandwidth from a buffer of that size; both measured here, by torch, on one thread, in CPU
time. The step's bound is the larger of the two. Random weights: a step does the same work whatever they are.
Each step is timed on its own, in wall and in CPU time (of all threads): on a busy machine the wall time of the longer,
torch, step holds more of the others' work, so that there the CPU times, their ratio and the share of the bound count.

    python benchmarks/decode_step.py [--rounds 7] [--threads 2] [--out benchmarks/results/decode_step.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rorqual.kernels import cpu_status
from rorqual.model import Config, Model
from rorqual.model.native_step import NativeStep

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 8, 32, 96)
POSITION = 300


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def best(work: Callable[[], Any], repeats: int) -> float:
    work()
    samples = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        samples.append(time.process_time() - start)
    return min(samples)


def peaks(weight_bytes: int) -> tuple[float, float]:
    """One core's fp32 multiply-adds per second in a GEMM, and bytes per second read from a buffer like the weights."""
    torch.set_num_threads(1)
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    macs = 768**3 / best(lambda: a @ b, 12)
    buffer = torch.ones(weight_bytes // 4)
    return macs, weight_bytes / best(buffer.sum, 30)


def step_cost(model: Model, position: int) -> tuple[float, Callable[[int], int]]:
    """Multiply-adds of one row's step at `position`, and the bytes of weights that a step of B rows reads at most."""
    config = model.config
    routed = sum(
        p.numel() for name, p in model.named_parameters() if ".experts." in name and "mtp" not in name
    )
    dense = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".experts." not in name and not name.startswith(("mtp", "embed"))
    )
    share = config.num_experts_per_tok / config.n_routed_experts
    attention = 0
    for layer, ratio in enumerate(config.compress_ratios):
        keys = min(position + 1, config.sliding_window)
        if ratio:
            seen = (position + 1) // ratio
            csa = config.kind(layer) == "csa"
            keys += min(seen, config.index_topk) if csa else seen
            attention += seen * config.index_n_heads * config.index_head_dim if csa else 0
        attention += 2 * keys * config.num_attention_heads * config.head_dim
    return dense + routed * share + attention, lambda rows: int(4 * (dense + routed * min(1.0, rows * share)))


def states(model: Model, batch: int) -> Any:
    """A state of `batch` different rows that hold POSITION tokens (random rows: their values do not matter)."""
    ids = torch.randint(
        0, model.config.vocab_size, (min(batch, 8), POSITION), generator=torch.Generator().manual_seed(0)
    )
    state = model.new_state(len(ids))
    with torch.no_grad():
        model.extend(ids, state)
    return state.select(torch.arange(batch) % len(ids))


def measure(model: Model, batch: int, *, rounds: int, native: NativeStep) -> dict[str, Any]:
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), generator=torch.Generator().manual_seed(1))
    samples: dict[str, list[tuple[float, float]]] = {"torch": [], "native": []}
    start = states(model, batch)
    rows = torch.arange(batch)
    logits = {}
    for number in range(rounds + 1):  # the first round warms up
        for name, step, repeats in (("torch", None, 3), ("native", native, 12)):
            model.native_step = step
            state = start.select(rows)
            with torch.no_grad():
                logits[name] = model.extend(ids, state)
                for _ in range(repeats):
                    wall, cpu = time.perf_counter(), time.process_time()
                    model.extend(ids, state)
                    spent = (time.perf_counter() - wall, time.process_time() - cpu)
                    if number:
                        samples[name].append(spent)
    out: dict[str, Any] = {
        "batch": batch,
        "max_logit_difference": float((logits["torch"] - logits["native"]).abs().max()),
    }
    for name, values in samples.items():
        ordered = sorted(wall for wall, _ in values)
        out[name] = {
            "step_ms": round(statistics.median(ordered) * 1e3, 4),
            "step_ms_min": round(ordered[0] * 1e3, 4),
            "step_ms_p90": round(ordered[len(ordered) * 9 // 10] * 1e3, 4),
            "cpu_ms": round(statistics.median(cpu for _, cpu in values) * 1e3, 4),
            "ms_per_token": round(statistics.median(ordered) * 1e3 / batch, 4),
            "n": len(ordered),
        }
    out["ratio"] = round(out["torch"]["step_ms"] / out["native"]["step_ms"], 1)
    out["ratio_of_cpu_time"] = round(out["torch"]["cpu_ms"] / out["native"]["cpu_ms"], 1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decode_step.json")
    args = parser.parse_args()
    status = cpu_status()
    if not status.available:
        raise SystemExit(status.reason)
    model = Model(Config.preset("tiny"), mtp=False).initialize(0).eval()
    load_before = os.getloadavg()
    macs_per_row, weight_bytes = step_cost(model, POSITION)
    peak_macs, peak_bytes = peaks(weight_bytes(1))
    torch.set_num_threads(args.threads)
    results = []
    print(f"{cpu_name()}, {args.threads} threads, native level {status.level}")
    print(f"load average before: {load_before[0]:.1f}; nice {os.nice(0)}")
    print(
        f"GEMM {peak_macs / 1e9:.1f} G multiply-adds/s, read {peak_bytes / 1e9:.1f} GB/s, measured in this run"
    )
    for batch in BATCHES:
        result = measure(model, batch, rounds=args.rounds, native=NativeStep())
        bound = max(batch * macs_per_row / peak_macs, weight_bytes(batch) / peak_bytes) * 1e3
        result["bound_cpu_ms"] = round(bound, 4)
        result["share_of_bound"] = round(bound / result["native"]["cpu_ms"], 3)
        results.append(result)
        print(
            f"batch {batch:3d}: torch {result['torch']['step_ms']:8.3f} ms a step, "
            f"native {result['native']['step_ms']:7.3f} "
            f"({result['native']['ms_per_token']:.3f} a token), ratio {result['ratio']:.1f} "
            f"(CPU time {result['ratio_of_cpu_time']:.1f}), "
            f"bound {bound:.3f} ms, share {result['share_of_bound']:.2f}"
        )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    document = {
        "question": "decode step of the embedded model, torch and native, ms",
        "command": f"python benchmarks/decode_step.py --rounds {args.rounds} --threads {args.threads}",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "level": status.level,
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "nice": os.nice(0),
        "note": "busy machine: wall times hold others' work, CPU times count"
        if load_before[0] > 0.3
        else "quiet",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "model": "Config.preset('tiny'), fp32, random weights",
        "position": POSITION,
        "multiply_adds_per_row": int(macs_per_row),
        "peak_multiply_adds_per_s": peak_macs,
        "peak_read_bytes_per_s": peak_bytes,
        "results": results,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
