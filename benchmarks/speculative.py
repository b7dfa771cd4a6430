"""What does the MTP head's drafting give the embedded model: acceptance, tokens a call, time?

Peer, in the same run, turn by turn: plain decoding of the same prompts with the same seeds; the tokens are checked to
be the same. Prompts: every place of held-out expert traces where the model begins to write. `forced` drafts at every
call; `paced` as users get it, with drafting off while the clock is against it, so that it may cost its probes and no
more. Bound: with acceptance a and drafts d at no cost, 1 + a + ... + a^d tokens a call.

    python benchmarks/speculative.py [--traces 20] [--out benchmarks/results/speculative.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import rorqual
from rorqual.chat import Tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.speculative import Pace, Speculation
from rorqual.rl import samples, traces

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"before RL": "embedded", "after RL": "embedded/rl"}


def prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Ids up to each place where the model begins to write."""
    out = []
    for trace in itertools.islice(traces.stream("test", seed=11, style="expert"), count):
        batch = samples.batch([samples.encode(trace, tokenizer)], pad_id=2, multiple=1)
        ids, mask = batch.ids[0].tolist(), batch.mask[0].tolist()
        out += [ids[:at] for at in range(1, len(ids)) if mask[at] and not mask[at - 1]]
    return out


def generate(
    engine: Engine, asked: list[list[int]], temperature: float, stop: int
) -> tuple[list[Any], float]:
    """All answers, and the seconds of generating (prefill left out)."""
    answers, seconds = [], 0.0
    for number, ids in enumerate(asked):
        sequence = engine.open(ids)
        params = SamplingParams(temperature=temperature, seed=number, max_tokens=120, stop_ids=(stop,))
        start = time.perf_counter()
        answers.append([(event.token_id, event.logprob) for event in sequence.generate(params)])
        seconds += time.perf_counter() - start
        sequence.close()
    return answers, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "speculative.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    natural = Pace.drafts
    rows = []
    for name, directory in MODELS.items():
        path = Path(rorqual.__file__).parent / directory
        tokenizer = Tokenizer.from_file(path)
        asked = prompts(tokenizer, args.traces)
        stop = Engine(path).config.eos_token_id
        for temperature in (0.0, 1.0):
            engines = {drafts: Engine(path, kv_bytes=1 << 27, drafts=drafts) for drafts in (0, 1, 2, 3)}
            for engine in engines.values():
                generate(engine, asked[:3], temperature, stop)
                engine.speculation = Speculation()
            for drafts in (1, 2, 3):
                for mode in ("forced", "paced"):
                    Pace.drafts = (lambda self: True) if mode == "forced" else natural  # type: ignore[method-assign]
                    engine = engines[drafts]
                    engine.speculation = Speculation()
                    plain, plain_seconds = generate(engines[0], asked, temperature, stop)
                    drafted, seconds = generate(engine, asked, temperature, stop)
                    again, more = generate(engines[0], asked, temperature, stop)
                    assert plain == drafted == again, "drafts changed a token"
                    figures = engine.speculation
                    rows.append(
                        {
                            "model": name,
                            "temperature": temperature,
                            "drafts": drafts,
                            "mode": mode,
                            "tokens": figures.tokens,
                            "acceptance": round(figures.acceptance, 4),
                            "tokens_per_call": round(figures.tokens_per_call, 3),
                            "plain_ms_per_token": round((plain_seconds + more) / 2 / figures.tokens * 1e3, 4),
                            "ms_per_token": round(seconds / figures.tokens * 1e3, 4),
                            "gain": round((plain_seconds + more) / 2 / seconds, 3),
                        }
                    )
                    row = rows[-1]
                    print(
                        f"{name:10s} T={temperature} drafts {drafts} {mode:6s}: acceptance "
                        f"{row['acceptance']:.3f}, {row['tokens_per_call']:.2f} tokens a call, gain {row['gain']:.2f}"
                    )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    document = {
        "question": "acceptance and gain of drafting with the MTP head, embedded model",
        "command": f"python benchmarks/speculative.py --traces {args.traces} --threads {args.threads}",
        "date": time.strftime("%Y-%m-%d"),
        "load_average_after": os.getloadavg(),
        "commit": commit.stdout.strip(),
        "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
