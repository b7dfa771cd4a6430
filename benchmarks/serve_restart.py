"""How soon does a conversation go on after the server was restarted, or killed, beside a cold prefill of its history?

Real `rorqual serve --kv-disk` processes over the needle model (benchmarks/data/needle: 5 layers, positions to 2^20),
packed. For each length: the first turn is prefilled cold and answered; the server ends (SIGTERM, or SIGKILL
right after the answer); a new process over the same directory gets the next turn (history, answer, 32 new tokens).
Beside it a server with an empty directory gets the same request: the cold prefill that was spared. Time to first token
is from sending the request to the first event of the stream; the start of the process is told apart. Bound: what lies
on disk is read and copied once (bytes over the disk's rate); a kill adds the replay of a window a layer.

    python benchmarks/serve_restart.py [--lengths 8192 65536 262144] [--repeat 3] [--output ...]

The repeats of a length are interleaved (cold, restarted, killed). Cold prefills of 2^18 tokens take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from rorqual.chat import train_bpe

ROOT = Path(__file__).resolve().parents[1]
NEEDLE = ROOT / "benchmarks/data/needle"
ANSWER_TOKENS, NEW_TOKENS = 8, 32


class Server:
    """One process."""

    def __init__(self, process: subprocess.Popen[str], url: str, start_s: float) -> None:
        self.process, self.url, self.start_s = process, url, start_s

    def ask(self, prompt: list[int], *, max_tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
        """Seconds to the first event and to the end, the answer's text, what was found in the cache."""
        body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        begun, first, text, cache = time.perf_counter(), 0.0, "", {}
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json=body, timeout=3600, trust_env=False
        ) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                first = first or time.perf_counter() - begun
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(f"the server said {chunk['error']}")
                text += chunk["choices"][0]["text"]
                cache = (chunk.get("x_v4") or {}).get("cache") or cache
        return {"first_s": first, "whole_s": time.perf_counter() - begun, "text": text, "cache": cache}

    def end(self, sig: int) -> float:
        """Ends it; seconds that it took."""
        begun = time.perf_counter()
        self.process.send_signal(sig)
        self.process.communicate()
        return time.perf_counter() - begun


@contextmanager
def serving(model: Path, disk: Path, *, window: str, kv: str) -> Iterator[Server]:
    argv = [sys.executable, "-m", "rorqual.cli", "serve", str(model), "--model-name", "m", "--port", "0",
            "--cache-format", "packed", "--kv-bytes", kv, "--kv-disk", str(disk), "--kv-window", window]  # fmt: skip
    begun = time.perf_counter()
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"(http://\S+)/v1", said)
        if found is None:
            raise SystemExit(f"the server did not start: {said}{process.stderr.read()}")
        yield Server(process, found[1], time.perf_counter() - begun)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def measure(model: Path, length: int, *, repeat: int, window: str, kv: str) -> dict[str, Any]:
    """All three ways for one length."""
    rng = random.Random(length)
    prompt = [0, *rng.choices(range(2, 500), k=length - 1)]
    new = rng.choices(range(2, 500), k=NEW_TOKENS)
    rows: dict[str, list[dict[str, Any]]] = {"cold": [], "restarted": [], "killed": []}
    with tempfile.TemporaryDirectory() as place:
        disk, empty = Path(place, "kv"), Path(place, "empty")
        with serving(model, disk, window=window, kv=kv) as server:
            first = server.ask(prompt)
            server.end(signal.SIGKILL)
        after_kill = shutil.copytree(disk, Path(place, "killed"))
        with serving(model, disk, window=window, kv=kv) as server:
            server.ask(prompt)  # from disk: what a kill did not let it write is written at the end
            closing_s = server.end(signal.SIGTERM)
        after_end = shutil.copytree(disk, Path(place, "ended"))
        turn = [*prompt, *new]
        texts = set()
        for _ in range(repeat):
            for way, source in (("cold", None), ("restarted", after_end), ("killed", after_kill)):
                shutil.rmtree(empty, ignore_errors=True)
                if source is not None:
                    shutil.copytree(source, empty)
                with serving(model, empty, window=window, kv=kv) as server:
                    said = server.ask(turn)
                    rows[way].append({"start_s": server.start_s, **said})
                    texts.add(said["text"])
        size = sum(file.stat().st_size for file in after_end.iterdir())
    cold = statistics.median(row["first_s"] for row in rows["cold"])
    return {
        "tokens": length,
        "first_turn_s": round(first["first_s"], 3),
        "closing_s": round(closing_s, 3),
        "disk_mb": round(size / 2**20, 1),
        "same_answer": len(texts) == 1,
        **{
            way: {
                "first_token_s": [round(row["first_s"], 4) for row in found],
                "median_s": round(statistics.median(row["first_s"] for row in found), 4),
                "start_s": round(statistics.median(row["start_s"] for row in found), 2),
                "cache": found[-1]["cache"],
                "times_faster_than_cold": round(cold / statistics.median(row["first_s"] for row in found), 1),
            }
            for way, found in rows.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 13, 1 << 16, 1 << 18])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--window", default="periodic")
    parser.add_argument("--kv-bytes", default="2g")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/serve_restart.json")
    options = parser.parse_args()
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as place:
        model = Path(place, "needle")
        shutil.copytree(NEEDLE, model)
        train_bpe([], vocab_size=300).save(model)
        rows = []
        for length in options.lengths:
            rows.append(
                measure(model, length, repeat=options.repeat, window=options.window, kv=options.kv_bytes)
            )
            print(json.dumps(rows[-1]), flush=True)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    report = {
        "window": options.window,
        "rows": rows,
        "host": {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
                 "load_before": load_before, "load_after": os.getloadavg()},
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
    }  # fmt: skip
    options.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
