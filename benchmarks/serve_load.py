"""Does the server stay right and its memory flat under clients of mixed lengths that come, go and hang up? How fast?

A real `rorqual serve` process, with a cache too small for all conversations and a disk behind it. Each client walks
through conversations turn by turn, over `/v1/completions` (token ids) and `/v1/chat/completions`, streamed and whole;
some requests it gives up, half-way through a stream or while it waits. What every answer must be was computed before,
by an engine in this process, one sequence at a time: seeds make it deterministic, batching may not change a byte.
Reported: answers that were right, wrong or lost (none may be), first token and between tokens p50 and p99 as the
clients see them, the server's resident memory over time, cache figures of /metrics.

    python benchmarks/serve_load.py [--minutes 10] [--clients 64] [--model DIR] [--output benchmarks/results/...]

Clients and server share the machine; its load is part of the figures. No peer in this run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rorqual import chat
from rorqual.engine import Engine, SamplingParams
from rorqual.serve.answer import ChatAnswer, RawAnswer

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "src/rorqual/embedded/rl"
WORDS = (
    "the",
    "whale",
    "looks",
    "into",
    "box",
    "and",
    "finds",
    "a",
    "blue",
    "stone",
    "or",
    "nothing",
    "at",
    "all",
)
HANG_UP = 0.15
"""Share of the requests that are given up."""


@dataclass
class Turn:
    """One request and what must come of it."""

    path: str
    body: dict[str, Any]
    text: str
    reasoning: str = ""


@dataclass
class Load:
    """What clients saw."""

    right: int = 0
    hung_up: int = 0
    refused: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    cached: Counter[str] = field(default_factory=Counter)
    rss: list[tuple[float, int]] = field(default_factory=list)


def conversations(directory: Path, *, count: int, seed: int = 0) -> list[list[Turn]]:
    """Conversations of three turns, lengths from a few tokens to half the context, and their answers."""
    tokenizer, engine = chat.Tokenizer.from_file(directory), Engine(directory, kv_bytes=1 << 30)
    limit, vocab = engine.config.max_position_embeddings, tokenizer.vocab_size
    rng = random.Random(seed)
    longest = min(limit // 2, 2500)
    sizes = (
        [(8, 60), (60, 400), (400, 1200), (1200, longest)]
        if longest > 1300
        else [(8, 60), (60, longest // 2)]
    )
    plain = [token for token in range(vocab) if not tokenizer.is_special(token)]
    out = []
    for number in range(count):
        low, high = sizes[number % len(sizes)] if rng.random() < 0.8 else sizes[0]
        if number % 3:
            out.append(_raw(engine, tokenizer, rng, plain, rng.randint(low, high)))
        else:
            out.append(_chat(engine, tokenizer, rng, rng.randint(low, high)))
    engine.close()
    return out


def _params(rng: random.Random, tokenizer: chat.Tokenizer) -> tuple[SamplingParams, dict[str, Any]]:
    asked = {
        "seed": rng.randrange(1 << 30),
        "temperature": rng.choice([0, 1]),
        "max_tokens": rng.randint(4, 40),
    }
    return SamplingParams(stop_ids=(tokenizer.eos_id,), **asked), asked


def _raw(
    engine: Engine, tokenizer: chat.Tokenizer, rng: random.Random, plain: list[int], size: int
) -> list[Turn]:
    ids, turns = [tokenizer.bos_id, *rng.choices(plain, k=size)], []
    for _ in range(3):
        params, asked = _params(rng, tokenizer)
        answer = RawAnswer(tokenizer)
        for event in engine.generate(ids, params):
            answer.push(event.token_id, event.finish_reason)
        turns.append(Turn("/v1/completions", {"prompt": list(ids), **asked}, answer.text))
        ids = [*ids, *answer.ids, *rng.choices(plain, k=rng.randint(1, 60))]
    return turns


def _chat(engine: Engine, tokenizer: chat.Tokenizer, rng: random.Random, size: int) -> list[Turn]:
    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    messages = [{"role": "system", "content": words(max(size // 3, 4))}]
    turns = []
    for _ in range(3):
        messages.append({"role": "user", "content": words(rng.randint(3, 30))})
        params, asked = _params(rng, tokenizer)
        ids = tokenizer.encode_segments(chat.render_segments(messages, thinking_mode="thinking"))
        answer = ChatAnswer(tokenizer, thinking=True, tools=[])
        for event in engine.generate(ids, params):
            answer.push(event.token_id, event.finish_reason)
            if answer.finished:
                break
        said = answer.message
        turn = Turn(
            "/v1/chat/completions",
            {"messages": list(messages), **asked},
            said.content,
            said.reasoning_content,
        )
        turns.append(turn)
        messages.append({"role": "assistant", "content": said.content})
    return turns


class Client:
    """One of many; what it does follows from its seed."""

    def __init__(self, http: httpx.AsyncClient, load: Load, model: str, seed: int) -> None:
        self.http, self.load, self.model, self.rng = http, load, model, random.Random(seed)

    async def run(self, all_turns: list[list[Turn]], until: float) -> None:
        while time.monotonic() < until:
            for turn in self.rng.choice(all_turns):
                if time.monotonic() < until:
                    await self.ask(turn)
                if self.rng.random() < 0.05:
                    await asyncio.sleep(self.rng.random())

    async def ask(self, turn: Turn) -> None:
        stream, leave = self.rng.random() < 0.6, self.rng.random() < HANG_UP
        body = {"model": self.model, "stream": stream, **turn.body}
        begun = time.monotonic()
        try:
            if leave and not stream:
                await self._give_up(turn, body)
            elif stream:
                await self._stream(turn, body, leave=leave)
            else:
                answer = await self.http.post(turn.path, json=body)
                self._whole(turn, answer)
        except httpx.HTTPError as error:
            self.load.lost.append(
                f"{turn.path} after {time.monotonic() - begun:.1f} s: {type(error).__name__} {error}"
            )

    async def _give_up(self, turn: Turn, body: dict[str, Any]) -> None:
        task = asyncio.create_task(self.http.post(turn.path, json=body))
        done, _ = await asyncio.wait({task}, timeout=self.rng.random() * 0.5)
        if done:
            self._whole(turn, task.result())
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.load.hung_up += 1

    def _whole(self, turn: Turn, answer: httpx.Response) -> None:
        if answer.status_code == 429:
            self.load.refused += 1
        elif answer.status_code != 200:
            self.load.lost.append(f"{answer.status_code} {answer.text[:200]}")
        else:
            said = answer.json()
            choice = said["choices"][0]
            message = choice.get("message") or {}
            text = message.get("content") if message else choice["text"]
            self._check(turn, text or "", message.get("reasoning_content") or "", said)

    def _check(self, turn: Turn, text: str, reasoning: str, said: dict[str, Any]) -> None:
        if (text, reasoning) == (turn.text, turn.reasoning):
            self.load.right += 1
        else:
            self.load.wrong.append({"expected": [turn.text, turn.reasoning], "got": [text, reasoning]})
        if cache := said.get("x_v4", {}).get("cache"):
            self.load.cached[cache["reason"]] += 1
            self.load.cached[f"from {cache['tier']}"] += 1

    async def _stream(self, turn: Turn, body: dict[str, Any], *, leave: bool) -> None:
        chunks_left = self.rng.randint(0, 12) if leave else -1
        text, reasoning, last, over, cache = "", "", time.monotonic(), False, {}
        first = True
        async with self.http.stream("POST", turn.path, json=body) as answer:
            if answer.status_code == 429:
                self.load.refused += 1
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    over = True
                    break
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.load.lost.append(f"in a stream: {chunk['error']}")
                    return
                now = time.monotonic()
                (self.load.first_token if first else self.load.between).append(now - last)
                last, first = now, False
                cache = chunk.get("x_v4") or cache
                for choice in chunk["choices"]:
                    delta = choice.get("delta", choice)
                    text += delta.get("content") or delta.get("text") or ""
                    reasoning += delta.get("reasoning_content") or ""
                if chunks_left == 0:
                    self.load.hung_up += 1
                    return
                chunks_left -= 1
        if over:
            self._check(turn, text, reasoning, {"x_v4": cache})
        else:
            self.load.lost.append("a stream ended without [DONE]")


async def drive(
    url: str, model: str, turns: list[list[Turn]], *, clients: int, seconds: float, pid: int
) -> Load:
    """Runs the clients; the server's resident memory is read twice a second."""
    load, until = Load(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients * 2, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as http:
        working = [
            asyncio.create_task(Client(http, load, model, n).run(turns, until)) for n in range(clients)
        ]
        begun = time.monotonic()
        while any(not task.done() for task in working):
            load.rss.append((round(time.monotonic() - begun, 1), resident(pid)))
            await asyncio.sleep(0.5)
        await asyncio.gather(*working)
        metrics = (await http.get("/metrics")).text
        waited = time.monotonic()
        while (
            not re.search(r"num_requests_running\{[^}]*\} 0\.0", metrics) and time.monotonic() - waited < 30
        ):
            await asyncio.sleep(0.1)
            metrics = (await http.get("/metrics")).text
        if not re.search(r"num_requests_running\{[^}]*\} 0\.0", metrics):
            load.lost.append("requests are still running half a minute after the last client left")
    return load


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    text = Path(f"/proc/{pid}/status").read_text("ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) << 10


def spread(times: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(times)
    if not ordered:
        return {}
    at = {name: ordered[min(int(len(ordered) * share), len(ordered) - 1)] for name, share in
          (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}  # fmt: skip
    return {**{name: round(value * 1e3, 1) for name, value in at.items()}, "count": len(ordered)}


def run(directory: Path, *, clients: int, seconds: float, count: int, kv: str = "48m") -> dict[str, Any]:
    """The whole of it: answers, server, load; the report."""
    turns = conversations(directory, count=count)
    with tempfile.TemporaryDirectory() as place:
        argv = [sys.executable, "-m", "rorqual.cli", "serve", str(directory), "--model-name", "m", "--port", "0",
                "--kv-bytes", kv, "--kv-disk", f"{place}/kv", "--kv-disk-bytes", "64m"]  # fmt: skip
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            try:
                said = server.stderr.readline()
                found = re.search(r"(http://\S+)/v1", said)
                if found is None:
                    raise SystemExit(f"the server did not start: {said}")
                load = asyncio.run(
                    drive(found[1], "m", turns, clients=clients, seconds=seconds, pid=server.pid)
                )
                metrics = httpx.get(f"{found[1]}/metrics", trust_env=False).text
                disk = sum(file.stat().st_blocks * 512 for file in Path(place, "kv").iterdir())
            finally:
                server.terminate()
                server.communicate()
    half = [size for at, size in load.rss if at > seconds / 2]
    before = [size for at, size in load.rss if seconds / 4 < at <= seconds / 2]
    kept = ("preemptions", "prefix_lookups_total", "prefix_cache", "generation_tokens_total", "prompt_tokens_total",
            "requests_aborted_total", "requests_rejected")  # fmt: skip
    figures = [
        line for line in metrics.splitlines() if not line.startswith("#") and any(k in line for k in kept)
    ]
    return {
        "clients": clients,
        "seconds": seconds,
        "conversations": count,
        "answers": {
            "right": load.right,
            "wrong": len(load.wrong),
            "lost": len(load.lost),
            "hung_up": load.hung_up,
            "refused": load.refused,
        },
        "first_wrong": load.wrong[:3],
        "first_lost": load.lost[:3],
        "first_token_ms": spread(load.first_token),
        "between_tokens_ms": spread(load.between),
        "resident_mb": {
            "second_quarter_max": round(max(before, default=0) / 2**20, 1),
            "second_half_max": round(max(half, default=0) / 2**20, 1),
            "growth": round(max(half, default=0) / max(max(before, default=1), 1) - 1, 4),
            "each_30_s": [[at, round(size / 2**20, 1)] for at, size in load.rss[::60]],
        },
        "disk_mb": round(disk / 2**20, 1),
        "cache": dict(load.cached),
        "metrics": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--conversations", type=int, default=90)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--kv-bytes", default="48m")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/serve_load.json")
    options = parser.parse_args()
    load_before = os.getloadavg()
    report = run(
        options.model,
        clients=options.clients,
        seconds=60 * options.minutes,
        count=options.conversations,
        kv=options.kv_bytes,
    )
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    report |= {
        "host": {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
                 "load_before": load_before, "load_after": os.getloadavg()},
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
    }  # fmt: skip
    options.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(
        json.dumps(
            {key: report[key] for key in ("answers", "first_token_ms", "between_tokens_ms", "resident_mb")}
        )
    )
    if report["answers"]["wrong"] or report["answers"]["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
