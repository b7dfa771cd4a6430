"""What does coming back to a conversation cost, from memory and from disk, and what is kept for it?

Question: a prompt of 64k tokens is known; how long until the next turn's first token, by window strategy?
Peer: llama.cpp often feeds such a prompt again in full (spec/engines.md 4.1, 9); the rate printed as `feed` says what
that would take here. Bound: from memory a copy of one snapshot; from disk one read of the pages.
Model: random weights, true row formats (584 and 68 bytes), 6 layers of 3 kinds, packed cache. Pages hold random bytes
of the format: no time depends on what they say. Files are in the page cache (warm); times are wall clock.

    python benchmarks/cache.py [--tokens 65536] [--repeats 5] [--json benchmarks/results/cache.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rorqual.engine import Engine
from rorqual.engine.layout import PAGE_TOKENS, CacheLayout
from rorqual.engine.sequence import replay_tokens
from rorqual.engine.snapshot import Snapshot, snapshot_bytes
from rorqual.engine.store import PageStore, StoreConfig, WindowStrategy
from rorqual.model import Config, Model
from rorqual.model.quant import pack_entry, pack_index_key

CONFIG = Config(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    head_dim=512,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    compress_ratios=(0, 4, 128, 4, 128, 4),
    index_n_heads=32,
    index_topk=512,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    num_hash_layers=0,
    hc_mult=2,
    max_position_embeddings=1 << 20,
)
TURN = 1024
"""Tokens of a turn, when the conversation is written turn by turn."""


def random_page(layout: CacheLayout, seed: int) -> np.ndarray:
    """A page of well-formed entries and keys."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for layer in layout.layers:
        if layer.ratio:
            rows = torch.randn(layer.page_rows, CONFIG.head_dim, generator=generator)
            parts.append(pack_entry(rows, rope_dim=CONFIG.qk_rope_head_dim).flatten())
        if layer.overlap:
            keys = torch.randn(layer.page_rows, CONFIG.index_head_dim, generator=generator)
            parts.append(pack_index_key(keys).flatten())
    return torch.cat(parts).numpy()


def fill(engine: Engine, count: int) -> tuple[list[int], list[int], dict[int, Snapshot]]:
    """Token ids, pages and a snapshot at every turn's end and every 2048 tokens: what a conversation leaves."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, count).tolist()
    pool, layout = engine.pool, engine.pool.layout
    pages = pool.take_pages(count // PAGE_TOKENS)
    templates = [random_page(layout, seed) for seed in range(8)]
    for number, page in enumerate(pages):
        pool.write_page(page, templates[number % 8])
    with torch.no_grad():
        sequence = engine.open(ids[:300])  # honest rings to copy
    rings = Snapshot.take(layout, pool.slab(sequence.paged.slab), 256).data
    sequence.close()
    snapshots = {}
    for position in range(PAGE_TOKENS, count + 1, PAGE_TOKENS):
        size = snapshot_bytes(layout, position)
        snapshots[position] = Snapshot(
            position, rings[:size] if size <= len(rings) else np.resize(rings, size)
        )
    return ids, pages, snapshots


def timed(action: Any, repeats: int) -> tuple[dict[str, Any], Any]:
    """Medians in ms of wall clock and of this process's CPU, all wall times, and the last result.

    One run before does not count. Under load the CPU figure is the one to compare.
    """
    action()
    wall, cpu, result = [], [], None
    for _ in range(repeats):
        start, began = time.perf_counter(), time.process_time()
        result = action()
        wall.append((time.perf_counter() - start) * 1e3)
        cpu.append((time.process_time() - began) * 1e3)
    figures = {"ms": statistics.median(wall), "cpu_ms": statistics.median(cpu)}
    return {**figures, "all_ms": [round(t, 3) for t in wall]}, result


def first_token(engine: Engine, ids: list[int]) -> tuple[int, int]:
    """The next turn up to its first logits; tokens reused and replayed."""
    assert engine.prefixes is not None
    before = engine.prefixes.statistics().replayed_tokens
    sequence = engine.begin(ids)
    reused = sequence.length
    sequence.append(ids[reused:])
    sequence.close()
    return reused, engine.prefixes.statistics().replayed_tokens - before


def load(engine: Engine, ids: list[int]) -> None:
    """Brings the prefix from disk to memory, and no further: pages, checksums, snapshot, replay."""
    assert engine.prefixes is not None
    engine.prefixes.clear()
    engine.begin(ids).close()


def run(tokens: int, repeats: int) -> dict[str, Any]:
    """All figures."""
    model = Model(CONFIG, mtp=False).initialize(0).eval()
    options: dict[str, Any] = {"kv_bytes": 4 << 30, "cache_format": "packed", "prefill_chunk": 512}
    engine = Engine(model, **options)
    layout, prefixes = engine.pool.layout, engine.prefixes
    assert prefixes is not None
    ids, pages, snapshots = fill(engine, tokens)
    ask = [*ids, 5, 6, 7, 8]  # the next turn
    out: dict[str, Any] = {"tokens": tokens, "runner": type(engine.runner).__name__, "strategies": {}}
    out["bytes_per_token"] = layout.page_bytes / PAGE_TOKENS
    out["snapshot_bytes"] = len(snapshots[tokens].data)
    out["replay_tokens_without_snapshot"] = replay_tokens(layout)

    prefixes.insert_pages(ids, pages, snapshots=[snapshots[tokens]])
    first, (reused, replayed) = timed(lambda: first_token(engine, ask), repeats)
    restore, _ = timed(lambda: engine.begin(ask).close(), repeats)
    out["memory"] = {"restore": restore, "first_token": first, "reused": reused, "replayed": replayed}

    sequence = engine.begin(ask)
    start = time.perf_counter()
    sequence.append([1] * 512)
    out["feed_tokens_per_s"] = 512 / (time.perf_counter() - start)
    sequence.close()

    for strategy in WindowStrategy:
        with tempfile.TemporaryDirectory() as directory:
            with PageStore(
                StoreConfig(directory=directory, window=strategy), layout, fingerprint=engine.fingerprint()
            ) as store:
                started = time.perf_counter()
                for end in range(TURN, tokens + 1, TURN):
                    every = range(end - TURN + PAGE_TOKENS, end + 1, PAGE_TOKENS)
                    given = (
                        [snapshots[p] for p in every] if strategy is WindowStrategy.FULL else [snapshots[end]]
                    )
                    last = end == tokens  # as an engine that closes
                    store.put(ids[:end], pages, pool=engine.pool, snapshots=given, last=last)
                seconds = time.perf_counter() - started
                kept = store.statistics()
            restarted = Engine(model, **options, store=directory, window=strategy)
            assert restarted.prefixes is not None

            def come_back(restarted: Engine = restarted) -> tuple[int, int]:
                assert restarted.prefixes is not None
                restarted.prefixes.clear()  # memory is that of a new process; the file stays open
                return first_token(restarted, ask)

            first, (reused, replayed) = timed(come_back, repeats)
            restarted.prefixes.clear()
            restore, _ = timed(partial(load, restarted, ask), repeats)
            restarted.close()
            out["strategies"][strategy.value] = {
                "file_bytes_per_token": kept.file_bytes / tokens,
                "written_over_new": kept.written_bytes / kept.new_page_bytes,
                "snapshots": kept.snapshots,
                "write_ms_per_turn": seconds / (tokens // TURN) * 1e3,
                "restore": restore,
                "first_token": first,
                "reused": reused,
                "replayed": replayed,
            }
    engine.pool.drop_pages(pages)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    result = run(arguments.tokens // TURN * TURN, arguments.repeats)
    result["host"] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": load,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
