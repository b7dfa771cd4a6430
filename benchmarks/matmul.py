"""How near are the native matrix kernels to the machine: memory's rate with one row, the multiply-adds with many?

Peer: torch's linear (oneDNN) on the same fp32 and bf16 weights, in turn with ours. Bounds, measured in the same run by
machine_peak.cpp: bytes read once from memory, and FMA or vdpbf16ps from registers (docs/kernels.md, spec/engines.md 3).
One thread, CPU time, the best of some runs: on a busy machine neither other processes' time nor most of their noise
counts, but the cache misses that they cause do. Command:

    OMP_NUM_THREADS=1 python benchmarks/matmul.py [--quick] [--level avx512_bf16]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import cpu_status, matmul_cpu

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "matmul.json"
MEMORY = 96 << 20  # bytes of weights read per product: three times the L3 of the machines we know
READS = ((1, 4096), (8, 4096), (8, 16384), (8, 65536))  # ways to read it; the bound is the fastest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, nothing written")
    parser.add_argument("--level", default=cpu_status().level)
    args = parser.parse_args()
    torch.set_num_threads(1)
    peaks = measure_peaks()
    report: dict[str, Any] = {
        "cpu": cpu_name(),
        "load_before": os.getloadavg(),
        "level": args.level,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "peaks": peaks,
        "one_row": [],
        "many_rows": [],
    }
    print(f"{report['cpu']}, level {args.level}, load {report['load_before'][0]:.1f}")
    print("peaks of one core: " + ", ".join(f"{name} {value:.1f}" for name, value in peaks.items()))
    for width in (768, 4096) if args.quick else (768, 1536, 2048, 4096):
        for kind in ("f32", "bf16", "fp8", "fp4"):
            report["one_row"].append(one_row(kind, width, args.level, peaks))
    for width in (512,) if args.quick else (512, 2048, 4096):
        for rows in (16, 64, 512):
            for kind in ("f32", "bf16", "fp8", "fp4"):
                report["many_rows"].append(many_rows(kind, width, rows, args.level, peaks))
    report["load_after"] = os.getloadavg()
    if not args.quick:
        RESULT.write_text(json.dumps(report, indent=1) + "\n")


def one_row(kind: str, width: int, level: str, peaks: dict[str, float]) -> dict[str, Any]:
    """Weights beyond every cache, one row of activations."""
    size = {"f32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 17 / 32}[kind]
    weight, scale = make(kind, int(MEMORY / size / width), width)
    took = alternate(kind, torch.randn(1, width), weight, scale, level, repeats=7)
    total = (weight.nbytes + (0 if scale is None else scale.nbytes)) * 1e-9
    line: dict[str, Any] = {
        "kind": kind,
        "k": width,
        "gb_s": {name: total / min(t) for name, t in took.items()},
    }
    line["share_of_read"] = line["gb_s"]["native"] / peaks["read GB/s"]
    line["median_over_best"] = statistics.median(took["native"]) / min(took["native"])
    print(
        f"1 row, {kind} k={width}: {rates(line['gb_s'])} GB/s, {line['share_of_read']:.2f} of the read bound"
    )
    return line


def many_rows(kind: str, width: int, rows: int, level: str, peaks: dict[str, float]) -> dict[str, Any]:
    """768 outputs, as a slice of a model's matrix."""
    weight, scale = make(kind, 768, width)
    took = alternate(kind, torch.randn(rows, width), weight, scale, level, repeats=15)
    flops = 2e-9 * rows * 768 * width
    line: dict[str, Any] = {"kind": kind, "k": width, "rows": rows}
    line["gflop_s"] = {name: flops / min(t) for name, t in took.items()}
    bound = peaks["dot GFLOP/s" if kind != "f32" and level == "avx512_bf16" else "fma GFLOP/s"]
    line["share_of_peak"] = line["gflop_s"]["native"] / bound
    print(
        f"{rows} rows, {kind} k={width}: {rates(line['gflop_s'])} GFLOP/s, {line['share_of_peak']:.2f} of peak"
    )
    return line


def rates(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


def alternate(
    kind: Any, x: Tensor, weight: Tensor, scale: Tensor | None, level: str, *, repeats: int
) -> dict[str, list[float]]:
    """CPU seconds of each repeat of ours and torch's, in turn; torch has no product for fp8 and fp4."""
    calls: dict[str, Callable[[], object]] = {
        "native": lambda: matmul_cpu(x, weight, scale, kind=kind, level=level)
    }
    if scale is None:
        peer_x = x.to(weight.dtype)
        calls["torch"] = lambda: torch.nn.functional.linear(peer_x, weight)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            took[name].append(time.thread_time() - start)
    return {name: times[1:] for name, times in took.items()}  # the first one touches the memory


def make(kind: str, outputs: int, width: int) -> tuple[Tensor, Tensor | None]:
    if kind in ("f32", "bf16"):
        return torch.rand(outputs, width).to(torch.float32 if kind == "f32" else torch.bfloat16), None
    codes = torch.randint(0, 100, (outputs, width if kind == "fp8" else width // 2), dtype=torch.uint8)
    shape = (-(-outputs // 128), -(-width // 128)) if kind == "fp8" else (outputs, -(-width // 32))
    return codes, torch.randint(118, 124, shape, dtype=torch.uint8)


def measure_peaks() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        library = f"{place}/peak.so"
        subprocess.run(
            ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", str(HERE / "machine_peak.cpp"), "-o", library],
            check=True,
        )
        native = ctypes.CDLL(library)
    for name in ("peak_fma256", "peak_fma512", "peak_dot512", "peak_read"):
        getattr(native, name).restype = ctypes.c_double
    native.peak_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    levels = cpu_status().levels
    fma = native.peak_fma512 if "avx512" in levels else native.peak_fma256
    memory = torch.randint(0, 256, (MEMORY,), dtype=torch.uint8)
    rounds = ctypes.c_int64(2_000_000)
    peaks = {
        "read GB/s": max(
            native.peak_read(memory.data_ptr(), MEMORY, streams, run)
            for streams, run in READS
            for _ in range(5)
        ),
        "fma GFLOP/s": max(fma(rounds) for _ in range(5)),
    }
    if "avx512_bf16" in levels:
        peaks["dot GFLOP/s"] = max(native.peak_dot512(rounds) for _ in range(5))
    return peaks


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
