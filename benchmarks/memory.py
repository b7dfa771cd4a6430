"""How much memory does a full million-token cache take at V4-Pro and V4-Flash dimensions?

A pool of 8192 pages of 128 tokens (2^20 tokens) and one slab is allocated in the engine's packed format and every byte
of it is written, in a process of its own; the growth of that process's resident memory stands beside what the format
says (spec/model.md 3.2), beside the GQA8-bf16 and V3.2 caches by their formulas, and beside what llama.cpp and ds4 keep
per token (spec/engines.md 2.3, by their own figures; not run here). Physical bound: the format itself; goal: within 1%.

    python benchmarks/memory.py [--context 1048576] [--presets pro flash] [--out benchmarks/results/memory.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.engine.layout import CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.model import Config, cost

ROOT = Path(__file__).resolve().parents[1]
OTHERS = {"llama.cpp": {"flash": 6880}, "ds4": {"flash": 13800}}
"""Bytes a token, spec/engines.md 2.3."""


def resident() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def fill(preset: str, context: int) -> dict[str, Any]:
    """Allocates and fills the cache of one sequence; runs in its own process."""
    config = Config.preset(preset)
    layout = CacheLayout(config, "packed")
    held = layout.held_bytes(context)
    pool = PagePool(layout, kv_bytes=held)
    before, start = resident(), time.perf_counter()
    pages = slice(0, len(pool.take_pages(layout.pages(context))))  # a fresh pool hands them out in order
    slab = pool.take_slab()
    row = np.random.default_rng(0).integers(0, 255, layout.entry_bytes, dtype=np.uint8)
    for number, layer in enumerate(layout.layers):
        if layer.entries_page:
            pool.entries(number)[pages] = row
        if layer.keys_page:
            pool.keys(number)[pages] = row[: layout.key_bytes]
    pool.slab(slab)[:] = 1
    seconds, grown = time.perf_counter() - start, resident() - before
    assert pool.statistics().used_bytes == held
    kv = cost.kv_bytes(config, context=context)
    return {
        "preset": preset,
        "context": context,
        "format_bytes": kv,
        "held_bytes": held,
        "slab_bytes": layout.slab_bytes,
        "resident_growth_bytes": grown,
        "resident_to_held": round(grown / held, 5),
        "resident_to_format": round(grown / kv, 5),
        "bytes_per_token": round(kv / context, 1),
        "fill_seconds": round(seconds, 2),
        "v32_bytes": cost.kv_bytes(cost.V32, context=context),
        "gqa8_bytes": cost.kv_bytes(cost.gqa8_bf16(config.num_hidden_layers), context=context),
        "others_bytes_per_token": {name: by[preset] for name, by in OTHERS.items() if preset in by},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=1 << 20)
    parser.add_argument("--presets", nargs="+", default=["pro", "flash"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(fill(args.one, args.context)))
        return
    rows = []
    for preset in args.presets:
        command = [sys.executable, __file__, "--one", preset, "--context", str(args.context)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout)
        rows.append(row)
        print(
            f"{preset}: {row['context']} tokens: format {row['format_bytes'] / 1e9:.3f} GB, resident "
            f"{row['resident_growth_bytes'] / 1e9:.3f} GB ({100 * (row['resident_to_format'] - 1):+.2f}%), "
            f"V3.2 {row['v32_bytes'] / 1e9:.1f} GB ({100 * row['format_bytes'] / row['v32_bytes']:.2f}%), "
            f"GQA8-bf16 {row['gqa8_bytes'] / 1e9:.0f} GB ({100 * row['format_bytes'] / row['gqa8_bytes']:.2f}%)"
        )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    document = {
        "question": "resident memory of a full cache at V4-Pro and V4-Flash dimensions, bytes",
        "command": f"python benchmarks/memory.py --context {args.context} --presets {' '.join(args.presets)}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "results": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
