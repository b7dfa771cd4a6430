"""How fast are completions parsed and conversations rendered?

    python benchmarks/parser.py [--sglang DIR] [--output benchmarks/results/parser.json]

`parse` on whole completions (MB/s), `StreamParser` token by token (microseconds a token of four characters, by text
and by trusted pieces), `render` on a conversation of 40 tool turns (MB/s), and what a constraint's mask costs.
Peer: SGLang's DeepSeekV4Detector (`detect_and_parse`, `parse_streaming_increment`) on the same texts, in a process
of its own; DIR holds an unpacked `sglang` package and a virtual environment `.venv` with what it imports. It reads what
follows `</think>`; ours reads the reasoning, too, and the ratio of whole texts is taken on the part that both read.
Bound: one search over the text, `str.find` of an absent character, measured beside.
Times are CPU times of the process (`time.process_time`), the best of several rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

D = "｜DSML｜"
EOS = "<｜end▁of▁sentence｜>"
WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "def", "return", "import", "self"),
    *("None", "if", "x", "<", "3", "and", "y", ">", "4:"),
    "print(f'{a}')",
    "\n\n    for i in range(10):\n",
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "content": {"type": "string"},
                    "count": {"type": "integer"},
                    "options": {"type": "object"},
                },
                "required": ["path"],
            },
        },
    }
    for name in ("write_file", "run", "search")
]
PEER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.deepseekv4_detector import DeepSeekV4Detector
asked = json.loads(sys.stdin.readline())
tools = [Tool(**tool) for tool in asked["tools"]]
def best(work, rounds, times):
    found = 9e9
    for _ in range(rounds):
        begun = time.process_time()
        for _ in range(times):
            result = work()
        found = min(found, (time.process_time() - begun) / times)
    return found, result
answers = {}
for name, text in asked["texts"].items():
    def read():
        return DeepSeekV4Detector().detect_and_parse(text, tools)
    whole, result = best(read, asked["rounds"], asked["times"][name])
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    def stream():
        detector = DeepSeekV4Detector()
        return [detector.parse_streaming_increment(piece, tools) for piece in pieces]
    streamed, _ = best(stream, min(3, asked["rounds"]), max(1, asked["times"][name] // 20))
    answers[name] = {"whole": whole, "stream": streamed, "calls": len(result.calls)}
print(json.dumps(answers))
"""


def prose(chance: random.Random, size: int) -> str:
    words, length = [], 0
    while length < size:
        words.append(chance.choice(WORDS))
        length += len(words[-1]) + 1
    return " ".join(words)


def completion(chance: random.Random, *, reasoning: int, content: int, value: int, calls: int) -> str:
    def call() -> str:
        options = json.dumps({"a": [1, 2, 3], "b": prose(chance, 100)})
        return (
            f'<{D}invoke name="write_file">\n<{D}parameter name="path" string="true">/src/a.py</{D}parameter>\n'
            f'<{D}parameter name="content" string="true">{prose(chance, value)}</{D}parameter>\n'
            f'<{D}parameter name="count" string="false">3</{D}parameter>\n'
            f'<{D}parameter name="options" string="false">{options}</{D}parameter>\n</{D}invoke>\n'
        )

    block = f"\n\n<{D}tool_calls>\n{''.join(call() for _ in range(calls))}</{D}tool_calls>{EOS}"
    return f"{prose(chance, reasoning)}</think>{prose(chance, content)}{block}"


def best(work: Callable[[], Any], *, rounds: int, times: int) -> float:
    """Seconds of CPU time of one call."""
    found = float("inf")
    for _ in range(rounds):
        begun = time.process_time()
        for _ in range(times):
            work()
        found = min(found, (time.process_time() - begun) / times)
    return found


def run_peer(directory: Path, texts: dict[str, str], times: dict[str, int], rounds: int) -> dict[str, Any]:
    asked = {"texts": texts, "times": times, "rounds": rounds, "tools": TOOLS}
    command = [str(directory / ".venv/bin/python"), "-c", PEER, str(directory)]
    done = subprocess.run(
        command, input=json.dumps(asked) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure_masks() -> dict[str, Any]:
    """Microseconds of one mask inside a value and inside a tag, with the embedded vocabulary."""
    import numpy as np

    from rorqual.chat import Constrainer, Tokenizer

    tokenizer = Tokenizer.from_file(Path(__file__).parents[1] / "src/rorqual/embedded")
    begun = time.process_time()
    constrainer = Constrainer(tokenizer)
    constraint = constrainer.constraint(thinking=False, tools=TOOLS)
    prepared = time.process_time() - begun
    mark, mask = tokenizer.token_id(D), np.zeros(constrainer.words, np.int32)
    costs: dict[str, Any] = {"vocabulary": tokenizer.vocab_size, "prepare_ms": prepared * 1e3}
    parts = ["\n\n<", None, "tool_calls>\n<", None, 'invoke name="run">\n<', None]
    for part in [*parts, 'parameter name="path" string="true">']:
        for token in [mark] if part is None else tokenizer.encode_text(part):
            constraint.push(token)
        if part is None or part.startswith("parameter"):
            kind = "tag_us" if part is None else "value_us"
            costs[kind] = best(lambda: constraint.fill(mask), rounds=5, times=500) * 1e6
    return costs


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--sglang", type=Path)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--output", type=Path, default=Path("benchmarks/results/parser.json"))
    options = arguments.parse_args()

    from rorqual.chat import StreamParser, parse, render

    chance = random.Random(1)
    shapes = {"small": (600, 200, 80, 1), "typical": (3000, 300, 1500, 2), "large": (20000, 1000, 20000, 3)}
    texts = {
        name: completion(chance, reasoning=r, content=c, value=v, calls=n)
        for name, (r, c, v, n) in shapes.items()
    }
    times = {name: max(1, 1_000_000 // len(text)) for name, text in texts.items()}
    tails = {name: text.partition("</think>")[2] for name, text in texts.items()}
    peer = run_peer(options.sglang, tails, times, options.rounds) if options.sglang else {}
    results: dict[str, Any] = {}
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}"
    )
    for name, text in texts.items():
        size, tail = len(text.encode()), tails[name]
        rounds, often = options.rounds, times[name]
        whole = best(partial(parse, text, tools=TOOLS), rounds=rounds, times=often)
        same = best(partial(parse, tail, tools=TOOLS, thinking_mode="chat"), rounds=rounds, times=often)
        scan = best(partial(text.find, "\udb99"), rounds=rounds, times=often)
        pieces = [text[i : i + 4] for i in range(0, len(text), 4)]

        def stream(pieces: list[str] = pieces, *, trusted: bool = False) -> None:
            parser = StreamParser(tools=TOOLS)
            for piece in pieces:
                parser.push_piece(piece, special=False) if trusted else parser.push(piece)
            parser.close()

        few = max(1, times[name] // 20)
        pushed = best(stream, rounds=options.rounds, times=few) / len(pieces)
        row: dict[str, Any] = {
            "bytes": size,
            "parse_mb_s": size / whole / 1e6,
            "scan_mb_s": size / scan / 1e6,
            "stream_us_a_token": pushed * 1e6,
        }
        line = f"{name:8} {size:7} bytes: parse {row['parse_mb_s']:6.1f} MB/s,"
        line += f" stream {row['stream_us_a_token']:.2f} us a token"
        if name in peer:
            assert peer[name]["calls"] == shapes[name][3], "the peer found other calls"
            tail_pieces = len(range(0, len(tail), 4))
            row["sglang_parse_mb_s"] = len(tail.encode()) / peer[name]["whole"] / 1e6
            row["sglang_stream_us_a_token"] = peer[name]["stream"] / tail_pieces * 1e6
            row["parse_ratio"] = peer[name]["whole"] / same
            row["stream_ratio"] = row["sglang_stream_us_a_token"] / row["stream_us_a_token"]
            line += (
                f" | SGLang {row['sglang_parse_mb_s']:.1f} MB/s ({row['parse_ratio']:.1f}x),"
                f" {row['sglang_stream_us_a_token']:.1f} us ({row['stream_ratio']:.1f}x)"
            )
        print(line)
        results[name] = row
    history: list[dict[str, Any]] = [{"role": "user", "content": prose(chance, 500)}]
    for turn in range(40):
        arguments_text = json.dumps(
            {"path": f"/src/{turn}.py", "content": prose(chance, 1500), "count": turn}
        )
        call = {
            "id": f"c{turn}",
            "type": "function",
            "function": {"name": "write_file", "arguments": arguments_text},
        }
        history.append(
            {
                "role": "assistant",
                "reasoning_content": prose(chance, 800),
                "content": "",
                "tool_calls": [call],
            }
        )
        history.append({"role": "tool", "tool_call_id": f"c{turn}", "content": prose(chance, 1500)})
    rendered = len(render(history, tools=TOOLS).encode())
    seconds = best(lambda: render(history, tools=TOOLS), rounds=options.rounds, times=10)
    results["render"] = {"bytes": rendered, "mb_s": rendered / seconds / 1e6}
    print(f"render   {rendered:7} bytes of 40 tool turns: {results['render']['mb_s']:.1f} MB/s")
    results["mask"] = measure_masks()
    print(
        f"mask     {results['mask']['tag_us']:.1f} us in a tag, {results['mask']['value_us']:.1f} us in a value"
    )
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "python": sys.version.split()[0],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
