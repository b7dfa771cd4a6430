"""Supervised warm start: trains a V4 model from scratch on synthetic traces of the task families.

Owns the recipe: tokenizer, data stream, losses (next token on the model's own tokens, MTP, indexer), schedule,
checkpoints and resume. What a trace says is traces.py's; how a batch is cut is samples.py's.
The indexer starts dense: first every visible entry is attended to and it learns to rank, then its top-k decides
(spec/rl.md 6).
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rorqual.chat import Tokenizer, train_bpe
from rorqual.model import AttentionMode, Config, Model, checkpoint
from rorqual.model.moe import MoE
from rorqual.rl import samples, saves, traces
from rorqual.rl.errors import TrainError
from rorqual.rl.optim import OptimConfig, Optimizers
from rorqual.rl.samples import Batch

__all__ = ["SFTConfig", "losses", "run", "schedule"]

POOL = 256
"""Traces sorted by length together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTConfig:
    """The recipe of the embedded model."""

    steps: int = 2200
    batch_tokens: int = 2048
    """Padded tokens per step."""
    seed: int = 0
    style: str = "weak"
    """Demonstrations: `weak` (mostly wrong at decisions, on purpose) or `expert`."""
    vocab_size: int = 1024
    corpus: int = 3000
    """Conversations the tokenizer is trained on."""
    dense_share: float = 0.5
    """Share of the steps in which CSA attends to every visible entry."""
    warmup: int = 50
    decay_share: float = 0.3
    hide_csa: float = 0.2
    """Share of steps in which CSA's entries are hidden, so that HCA learns to carry what it can."""
    hide_hca: float = 0.1
    """Share of steps in which HCA's entries are hidden."""
    mtp_weight: float = 0.2
    index_weight: float = 1.0
    balance_speed: float = 1e-3
    """Step of the routing bias towards balanced experts."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint_every: int = 100
    init: str | None = None
    """Model directory to start from (the extra-SFT control); None: from scratch."""


def schedule(step: int, *, steps: int, warmup: int, decay_share: float) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay to 0.05 over the last `decay_share`."""
    rising = min(1.0, (step + 1) / max(warmup, 1))
    falling = (steps - step) / max(steps * decay_share, 1)
    return rising * max(0.05, min(1.0, falling))


def hidden_kinds(config: SFTConfig, step: int) -> frozenset[str]:
    """Which compressed branch a step hides: a function of (seed, step)."""
    draw = random.Random(f"{config.seed}|hide|{step}").random()
    if draw < config.hide_csa:
        return frozenset({"csa"})
    return frozenset({"hca"}) if draw < config.hide_csa + config.hide_hca else frozenset()


def losses(model: Model, batch: Batch, *, mode: AttentionMode, config: SFTConfig) -> dict[str, torch.Tensor]:
    """`loss` (cross-entropy on masked-in tokens), `mtp`, `index`, and their weighted `total`."""
    out = model.train_pass(batch.ids, mode=mode, mtp=True)
    target = batch.mask[:, 1:]
    loss = F.cross_entropy(model.logits(out.hidden[:, :-1][target]), batch.ids[:, 1:][target])
    mtp = loss.new_zeros(())
    if out.mtp_hidden is not None:
        later = batch.mask[:, 2:]
        mtp = F.cross_entropy(model.logits(out.mtp_hidden[:, :-1][later]), batch.ids[:, 2:][later])
    total = loss + config.mtp_weight * mtp + config.index_weight * out.index_loss
    return {"loss": loss, "mtp": mtp, "index": out.index_loss, "total": total}


@torch.no_grad()
def balance(model: Model, speed: float) -> None:
    """Moves each routing bias towards under-used experts (aux-loss-free balancing, spec/model.md 6.3)."""
    for module in model.modules():
        if isinstance(module, MoE) and module.load is not None and not module.gate.hashed:
            load = module.load.float()
            module.gate.bias.add_(torch.sign(load.mean() - load), alpha=speed)


def batches(tokenizer: Tokenizer, config: SFTConfig, *, skip: int = 0) -> Iterator[Batch]:
    """The endless batch stream; `skip` batches are passed over without being built into tensors needlessly."""
    passed = 0
    for pool in itertools.count():
        stream = traces.stream("train", seed=config.seed, style=config.style, start=pool * POOL)
        encoded = [samples.encode(trace, tokenizer) for trace in itertools.islice(stream, POOL)]
        cut = samples.batches(
            encoded,
            pad_id=2,
            tokens=config.batch_tokens,
            pool=POOL,
            seed=config.seed,
            multiple=16,
            first_pool=pool,
        )
        for batch in cut:
            if passed >= skip:
                yield batch
            passed += 1


@torch.no_grad()
def held_out(
    model: Model, batch: Batch, *, sparse: bool = True, without: frozenset[str] = frozenset()
) -> dict[str, float]:
    """Loss, token accuracy and share of traces predicted without a slip, on expert traces of the test split."""
    model.eval()
    out = model.train_pass(batch.ids, mode=AttentionMode(sparse=sparse, without=without))
    target, ids = batch.mask[:, 1:], batch.ids[:, 1:]
    logits = model.logits(out.hidden[:, :-1])
    right = logits.argmax(-1) == ids
    whole = (right | ~target).all(1).float().mean()
    loss = F.cross_entropy(logits[target], ids[target])
    model.train()
    return {"loss": float(loss), "accuracy": float(right[target].float().mean()), "whole": float(whole)}


def test_batch(tokenizer: Tokenizer, *, count: int = 64, seed: int = 1) -> Batch:
    """Expert traces of the test split, as one batch."""
    stream = itertools.islice(traces.stream("test", seed=seed, style="expert"), count)
    return samples.batch([samples.encode(trace, tokenizer) for trace in stream], pad_id=2, multiple=16)


def run(
    out: Path,
    config: SFTConfig,
    *,
    model_config: Config | None = None,
    seconds: float | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Model:
    """Trains into directory `out`, resuming from its checkpoint; leaves a loadable model there and returns it.

    `seconds` ends the run early (a control of equal wall time). `stop` is asked after every step; once it says True the
    run ends with a checkpoint of that step and writes no model. Raises TrainError for a foreign checkpoint or recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = out / "tokenizer.json"
    if config.init is not None:
        tokenizer = Tokenizer.from_file(config.init)
        model = Model.from_pretrained(config.init)
    else:
        if tokenizer_path.exists():
            tokenizer = Tokenizer.from_file(tokenizer_path)
        else:
            tokenizer = train_bpe(samples.corpus(config.corpus), vocab_size=config.vocab_size)
        base = model_config or Config.preset("tiny")
        model = Model(base.replace(vocab_size=tokenizer.vocab_size)).initialize(config.seed)
    tokenizer.save(tokenizer_path)
    optimizers = Optimizers(model, config.optim)
    progress = saves.load(out, model, optimizers) or {"step": 0, "tokens": 0, "seconds": 0.0}
    recipe = _recipe(config)
    held = progress.get("config", recipe)
    if held != recipe:
        differ = ", ".join(sorted(name for name in recipe if held.get(name) != recipe[name]))
        raise TrainError(f"{out} holds a run with another {differ}: use another --out, or --fresh")
    log = out / "sft.jsonl"
    first, tokens, before = int(progress["step"]), int(progress["tokens"]), float(progress["seconds"])
    probe = test_batch(tokenizer)
    model.train()
    started = time.monotonic()
    stream = batches(tokenizer, config, skip=first)
    step = first
    while step < config.steps:
        batch = next(stream)
        sparse = config.init is not None or step >= config.steps * config.dense_share
        mode = AttentionMode(sparse=sparse, index_loss=True, without=hidden_kinds(config, step))
        parts = losses(model, batch, mode=mode, config=config)
        parts["total"].backward()  # type: ignore[no-untyped-call]
        factor = schedule(step, steps=config.steps, warmup=config.warmup, decay_share=config.decay_share)
        norm = optimizers.step(factor)
        balance(model, config.balance_speed)
        tokens += int(batch.lengths.sum())
        step += 1
        elapsed = before + time.monotonic() - started
        over = seconds is not None and elapsed >= seconds
        row: dict[str, Any] = {
            name: float(value.detach()) for name, value in parts.items() if name != "total"
        }
        row |= {"step": step, "tokens": tokens, "seconds": elapsed, "grad_norm": norm, "sparse": sparse}
        last = step == config.steps or over
        stopped = not last and stop is not None and stop()
        due = step % config.checkpoint_every == 0 or last
        if due or stopped:
            state = {"step": step, "tokens": tokens, "seconds": elapsed, "config": recipe}
            if due:
                row["held_out"] = held_out(model, probe, sparse=sparse)
            saves.save(out, model, optimizers, state)
            if due:
                saves.append_line(log, row)
        if on_step is not None:
            on_step(row)
        if stopped:
            return model.eval()
        if over:
            break
    finish(out, model, {"recipe": "sft", "config": asdict(config), "steps": step, "tokens": tokens})
    return model.eval()


def _recipe(config: SFTConfig) -> dict[str, Any]:
    """What must not change between a run and its resumption, as JSON types: all but how long and how often."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return {name: value for name, value in plain.items() if name not in ("steps", "checkpoint_every")}


def finish(out: Path, model: Model, facts: dict[str, Any]) -> None:
    """Writes the model (BF16; FP32 where the official checkpoint has it) and what made it."""
    exact = ("attn_sink", ".ape", "gate.bias", "_fn", "_base", "_scale")
    state = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() and not name.endswith(exact) else tensor
        for name, tensor in model.official_state().items()
    }
    checkpoint.save(out, model.config, state, metadata={"made_by": f"rorqual train {facts['recipe']}"})
    saves.write_json(out / "training.json", facts)
