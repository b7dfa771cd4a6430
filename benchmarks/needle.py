"""Does a model of this architecture find a needle in a million tokens, and what does that take?

Question: a record `KEY k1 k2 VALUE v1 v2 v3 v4` stands somewhere in 2^20 tokens of filler, among hundreds of records
with other keys; asked `ASK k1 k2 VALUE` at the end, does the model answer v1 v2 v3 v4, from depth 10, 50 and 90%?
In what time and memory?
Peer: the same model without its compressed branches (its window reaches 75 tokens): one guess in 64^4.
Physical bound: CSA scores every index key for every token, 2^40 / 8 products of a query and a key a layer.
`train` makes the model: short sequences whose pages stand anywhere below 2^20 (`Model.train_pass`, `positions`), HCA
diluted as if the skipped pages were there, and the cache formats simulated in the last stage (docs/long-context.md).

    python benchmarks/needle.py train [--out runs/needle]        # resumes; about 35 minutes of one core
    python benchmarks/needle.py run --context 1048576 [--model DIR] [--runner native|torch]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine.layout import CacheLayout
from rorqual.engine.native_runner import native_runner
from rorqual.engine.pool import PagePool
from rorqual.engine.sequence import PagedSequence, Paging
from rorqual.engine.torch_runner import TorchRunner
from rorqual.model import AttentionMode, Config, Model, cost
from rorqual.model.weights import ModelWeights
from rorqual.rl import saves, sft
from rorqual.rl.optim import OptimConfig, Optimizers

ROOT = Path(__file__).parent.parent
KEY, VALUE, ASK = 2, 3, 4
SYMBOLS = 64
KEYS, VALUES, FILLER = range(16, 16 + SYMBOLS), range(80, 80 + SYMBOLS), range(256, 512)
RECORD = 8
"""Tokens of a record and of a question with its answer."""
LONGEST = 1 << 20
PAGE = 128
DEPTHS = (0.1, 0.5, 0.9)
DISTRACTOR_EVERY = 4096
MARK = 1 << 14
"""Tokens between two timings of a prefill."""
MODEL = Path(__file__).parent / "data" / "needle"
RESULT = Path(__file__).parent / "results" / "needle.json"

CONFIG = Config.preset("tiny").replace(
    vocab_size=512,
    compress_ratios=(0, 0, 4, 128, 4),  # the first five layers of Flash
    rope_factor=16.0,
    original_seq_len=65536,
    index_topk=64,
    num_nextn_predict_layers=0,
    max_position_embeddings=LONGEST,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Some steps of one shape of batch."""

    steps: int
    length: int
    batch: int
    records: int
    """Most records and questions in a sequence, together."""
    fewest: int = 0
    """Least of them, if not as many as `records`: each sequence draws its number."""
    sparse: bool
    """CSA through its top-k; False: every visible entry."""
    quant: bool
    """The packed formats simulated, gradients straight through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Stages under one learning-rate schedule."""

    stages: tuple[Stage, ...]
    decay_share: float
    rate: float = 1.0
    """Factor on the learning rates."""
    sharpen: float = 1.0
    """Before the first step: CSA entries' norm weights times this. Logits are at most sqrt(D) times those, too little
    to tell a record from dozens that share half its key, and AdamW would take thousands of steps to raise them."""
    first_weight: float = 1.0
    """Weight in the loss of an answer's first token: the others follow from it."""


ROUNDS = (
    Round(
        stages=(
            Stage(steps=500, length=256, batch=16, records=16, sparse=False, quant=False),
            Stage(steps=250, length=1024, batch=4, records=48, sparse=True, quant=False),
            Stage(steps=150, length=4096, batch=1, records=128, sparse=True, quant=True),
        ),
        decay_share=0.3,
    ),
    Round(
        stages=(
            Stage(steps=230, length=256, batch=16, records=28, fewest=8, sparse=False, quant=False),
            Stage(steps=80, length=1024, batch=4, records=112, fewest=16, sparse=True, quant=True),
            Stage(steps=50, length=4096, batch=1, records=448, fewest=64, sparse=True, quant=True),
        ),
        decay_share=0.45,
        sharpen=1.8,
        first_weight=5.0,
    ),
    Round(
        stages=(Stage(steps=90, length=4096, batch=1, records=448, fewest=64, sparse=True, quant=True),),
        decay_share=0.7,
        rate=0.4,
    ),
)


def record(draw: random.Random, taken: dict[tuple[int, int], list[int]]) -> tuple[tuple[int, int], list[int]]:
    """A key that is not in `taken`, three times in ten with a half that is, and its value."""
    while True:
        first, second = draw.choice(KEYS), draw.choice(KEYS)
        if taken and draw.random() < 0.3:
            near = draw.choice(list(taken))
            first, second = (near[0], second) if draw.random() < 0.5 else (first, near[1])
        if (first, second) not in taken:
            return (first, second), [draw.choice(VALUES) for _ in range(4)]


def sequence(draw: random.Random, *, length: int, records: int) -> tuple[list[int], list[int]]:
    """Ids of a training sequence, and for each whether it is part of an answer (0 or 1)."""
    cuts = sorted(draw.randint(0, length - RECORD * records) for _ in range(records))
    held: dict[tuple[int, int], list[int]] = {}
    ids: list[int] = []
    mask: list[int] = []
    for number, cut in enumerate(cuts):
        gap = cut - (cuts[number - 1] if number else 0)
        ids += draw.choices(FILLER, k=gap)
        mask += [0] * gap
        if held and draw.random() < 0.5:
            key = draw.choice(list(held))
            ids += [ASK, *key, VALUE, *held[key]]
            mask += [0, 0, 0, 0, 1, 1, 1, 1]
        else:
            key, value = record(draw, held)
            held[key] = value
            ids += [KEY, *key, VALUE, *value]
            mask += [0] * RECORD
    gap = length - len(ids)
    return ids + draw.choices(FILLER, k=gap), mask + [0] * gap


def stretch(draw: random.Random, length: int) -> list[int]:
    """Positions of `length` tokens: up to 8 jumps of whole pages, to an end drawn evenly in its logarithm."""
    pages = -(-length // PAGE)
    last = int(math.exp(draw.uniform(math.log(pages), math.log(LONGEST // PAGE))))
    spare = max(last - pages, 0)
    jumps = min(draw.randint(1, 8), pages)
    at = sorted(draw.sample(range(pages), jumps))
    cuts = sorted(draw.randint(0, spare) for _ in range(jumps))
    out: list[int] = []
    for page in range(pages):
        passed = sum(place <= page for place in at)
        base = (page + (cuts[passed - 1] if passed else 0)) * PAGE
        out += range(base, base + PAGE)
    return out[:length]


def batch(stage: Stage, step: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, answer mask and positions, [B, T] each: a function of (seed, step)."""
    draw = random.Random(f"needle|{seed}|{step}")
    rows = []
    for _ in range(stage.batch):
        records = draw.randint(stage.fewest, stage.records) if stage.fewest else stage.records
        rows.append(sequence(draw, length=stage.length, records=records))
    positions = [stretch(draw, stage.length) for _ in rows]
    ids, mask = (torch.tensor(part) for part in zip(*rows, strict=True))
    return ids, mask.bool(), torch.tensor(positions)


def train(out: Path, *, minutes: float | None) -> None:
    """Trains into `out`, going on from its checkpoint; leaves a loadable model there."""
    out.mkdir(parents=True, exist_ok=True)
    model = Model(CONFIG).initialize(0)
    optimizers = Optimizers(model, OptimConfig())
    progress = saves.load(out, model, optimizers) or {"step": 0, "tokens": 0, "cpu_seconds": 0.0}
    step, tokens, spent = progress["step"], progress["tokens"], progress["cpu_seconds"]
    total = sum(stage.steps for part in ROUNDS for stage in part.stages)
    started = time.process_time()
    while step < total:
        part, stage, begun = place(step)
        if step == begun and part.sharpen != 1:
            sharpen(model, part.sharpen)
        quantise(model, stage.quant)
        ids, mask, positions = batch(stage, step)
        mode = AttentionMode(sparse=stage.sparse, index_loss=True, fill_skips=True)
        result = model.train_pass(ids, mode=mode, positions=positions)
        target, wanted = mask[:, 1:], ids[:, 1:][mask[:, 1:]]
        logits = model.logits(result.hidden[:, :-1][target])
        weight = torch.where(torch.arange(len(wanted)) % 4 == 0, part.first_weight, 1.0)
        loss = (F.cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum()
        (loss + result.index_loss).backward()  # type: ignore[no-untyped-call]
        length = sum(stage.steps for stage in part.stages)
        factor = sft.schedule(step - begun, steps=length, warmup=50, decay_share=part.decay_share)
        norm = optimizers.step(part.rate * factor)
        sft.balance(model, 1e-3)
        step, tokens = step + 1, tokens + ids.numel()
        row: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "cpu_seconds": spent + time.process_time() - started,
            "loss": float(loss.detach()),
            "index": float(result.index_loss.detach()),
            "right": right(logits, wanted),
            "grad_norm": norm,
            "length": stage.length,
        }
        over = minutes is not None and row["cpu_seconds"] - spent > 60 * minutes
        if step % 10 == 0:
            saves.append_line(out / "train.jsonl", row)
        if step % 50 == 0 or step == total or over:
            kept = {name: row[name] for name in ("step", "tokens", "cpu_seconds")}
            saves.save(out, model, optimizers, kept)
        if over:
            return
    facts = {"recipe": "needle", "rounds": [asdict(part) for part in ROUNDS], "tokens": tokens}
    sft.finish(out, model, facts)


def place(step: int) -> tuple[Round, Stage, int]:
    """The round and stage that step `step` belongs to, and the round's first step."""
    end = 0
    for part in ROUNDS:
        begun = end
        for stage in part.stages:
            end += stage.steps
            if step < end:
                return part, stage, begun
    raise ValueError(f"the recipe has {end} steps, not {step}")


def right(logits: Tensor, wanted: Tensor) -> list[float]:
    """Share of answers whose 1st, 2nd, 3rd, 4th token is right."""
    return (logits.argmax(-1) == wanted).view(-1, 4).float().mean(0).tolist()


@torch.no_grad()
def sharpen(model: Model, factor: float) -> None:
    """Scales the entries of the CSA layers."""
    for layer in model.layers:
        if layer.attn.kind == "csa":
            layer.attn.compressor.norm.weight.mul_(factor)


def quantise(model: Model, on: bool) -> None:
    """Switches the simulated cache formats of a model."""
    for module in model.modules():
        if hasattr(module, "simulate_quant"):
            module.simulate_quant = on  # type: ignore[assignment]


# --- run


@dataclass(frozen=True, kw_only=True, slots=True)
class Haystack:
    """A context and the records that are asked for."""

    ids: list[int]
    places: list[int]
    """First token of each record asked for."""
    records: list[tuple[tuple[int, int], list[int]]]
    distractors: int


def haystack(context: int, *, seed: int) -> Haystack:
    """`context` tokens less room for a question: a record at each of DEPTHS, others every DISTRACTOR_EVERY tokens."""
    draw, length = random.Random(f"haystack|{seed}"), context - 2 * RECORD
    ids = draw.choices(FILLER, k=length)
    held: dict[tuple[int, int], list[int]] = {}
    asked = [int(depth * length) + draw.randrange(8) for depth in DEPTHS]
    others = range(DISTRACTOR_EVERY // 2, length - RECORD, DISTRACTOR_EVERY)
    free = [place + draw.randrange(256) for place in others]
    free = [place for place in free if all(abs(place - one) > 2 * RECORD for one in asked)]
    records = []
    for place in (*asked, *free):
        key, value = record(draw, held)
        held[key] = value
        ids[place : place + RECORD] = [KEY, *key, VALUE, *value]
        records.append((key, value))
    return Haystack(ids=ids, places=asked, records=records[: len(asked)], distractors=len(free))


def ask_whole(model: Model, hay: Haystack) -> list[list[int]]:
    """Answers by one full pass without a cache, formats simulated; the right answers are fed in between."""
    ids = list(hay.ids)
    for key, value in hay.records:
        ids += [ASK, *key, VALUE, *value]
    ids += [0] * (-len(ids) % PAGE)
    with torch.no_grad():
        hidden = model.train_pass(torch.tensor([ids]), mode=AttentionMode()).hidden[0]
    starts = [len(hay.ids) + RECORD * n + 3 for n in range(len(hay.records))]
    return [model.logits(hidden[at : at + 4]).argmax(-1).tolist() for at in starts]


def ask(sequence: PagedSequence, key: tuple[int, int]) -> tuple[list[int], float]:
    """The greedy answer on a fork of `sequence`, and the seconds it took."""
    began, answer = time.perf_counter(), list[int]()
    with sequence.fork() as twin:
        logits = twin.append([ASK, *key, VALUE])
        while logits is not None:
            answer.append(int(logits[0].argmax()))
            if len(answer) == 4:
                break
            logits = twin.append(answer[-1:])
    return answer, time.perf_counter() - began


def run(directory: Path, context: int, *, runner: str, threads: int, seed: int, chunk: int) -> dict[str, Any]:
    """Prefills a haystack once, asks for each record on a fork; time, memory and answers."""
    model = Model.from_pretrained(directory, simulate_quant=True)
    config = model.config
    if not 64 * PAGE <= context <= config.max_position_embeddings:
        raise SystemExit(
            f"--context is {context}: this model takes {64 * PAGE} to {config.max_position_embeddings}"
        )
    hay = haystack(context, seed=seed)
    facts: dict[str, Any] = {
        "context": context,
        "runner": runner,
        "distractors": hay.distractors,
        "threads": threads,
        "load_before": os.getloadavg()[0],
    }
    base, began, spent = peak_bytes(), time.perf_counter(), time.process_time()
    if runner == "whole":
        answers = ask_whole(model, hay)
        facts |= {"seconds": time.perf_counter() - began}
        asking = [None] * len(answers)
    else:
        layout = CacheLayout(config, "packed")
        spare = 64 * layout.slab_bytes * (2 + context // 2048 // 32) + 64 * layout.page_bytes
        pool = PagePool(layout, kv_bytes=layout.held_bytes(context) + spare)
        runs: Any = TorchRunner(model, pool)
        if runner == "native":
            runs = native_runner(ModelWeights(model), pool, simulate_quant=True, threads=threads)
            if runs is None:
                raise SystemExit("the native runner is not available here: rorqual doctor says why")
            facts["level"] = runs.level
        paging = Paging(pool=pool, runner=runs, prefill_chunk=chunk, snapshot_tokens=1 << 16)
        with PagedSequence(paging) as sequence:
            marks = []
            for first in range(0, len(hay.ids), MARK):
                sequence.append(hay.ids[first : first + MARK], logits="none")
                marks.append({"tokens": sequence.length, "seconds": time.perf_counter() - began})
                print(json.dumps(marks[-1]), file=sys.stderr, flush=True)
            facts |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
            answers, asking = [], []
            for key, _ in hay.records:
                answer, seconds = ask(sequence, key)
                answers.append(answer)
                asking.append(seconds)
            content = layout.content_bytes(sequence.length)
            facts |= {
                "marks": marks[:: max(len(marks) // 16, 1)],
                "cache_bytes_by_format": content,
                "cache_bytes_by_cost": cost.kv_bytes(config, context=sequence.length),
                "pool_bytes_held": pool.statistics().used_bytes,
                "gqa8_bf16_bytes": 2 * 8 * config.head_dim * 2 * config.num_hidden_layers * sequence.length,
            }
    facts |= {"peak_rss_bytes": peak_bytes(), "rss_before_bytes": base}
    facts["tokens_per_second"] = len(hay.ids) / facts["seconds"]
    facts["answers"] = [
        {
            "depth": depth,
            "place": place,
            "right": answer == value,
            "answer": answer,
            "value": value,
            "seconds": took,
        }
        for depth, place, (_, value), answer, took in zip(
            DEPTHS, hay.places, hay.records, answers, asking, strict=True
        )
    ]
    return facts


def peak_bytes() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep(facts: dict[str, Any]) -> None:
    """Adds a run to RESULT, in the place of one of the same context, runner and seed."""
    facts |= {
        "host": platform.processor() or platform.machine(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
        ).stdout.strip(),
    }
    names = ("context", "runner", "seed")
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    runs = [old for old in runs if any(old[name] != facts[name] for name in names)]
    runs = sorted([*runs, facts], key=lambda one: [str(one[name]).zfill(8) for name in names])
    RESULT.write_text(json.dumps({"question": "needles in a long context", "runs": runs}, indent=1) + "\n")


def cpu_name() -> str:
    """Of /proc/cpuinfo, or what platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    trains = commands.add_parser("train")
    trains.add_argument("--out", type=Path, default=ROOT / "runs" / "needle")
    trains.add_argument("--minutes", type=float, default=None)
    runs = commands.add_parser("run")
    runs.add_argument("--model", type=Path, default=MODEL)
    runs.add_argument("--context", type=int, default=LONGEST)
    runs.add_argument("--runner", choices=("native", "torch", "whole"), default="native")
    runs.add_argument("--threads", type=int, default=1)
    runs.add_argument("--chunk", type=int, default=512)
    runs.add_argument("--seed", type=int, default=0)
    runs.add_argument("--keep", action="store_true", help="add the figures to benchmarks/results/needle.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "train":
        train(options.out, minutes=options.minutes)
        return
    facts = run(
        options.model,
        options.context,
        runner=options.runner,
        threads=options.threads,
        seed=options.seed,
        chunk=options.chunk,
    )
    facts["seed"] = options.seed
    if options.keep:
        keep(facts)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
