"""GRPO in real sandboxes: groups of episodes, graded on the host, one policy step per wave.

Owns the recipe `hop-recover`: which tasks are drawn, the update, held-out evaluation, checkpoints, resume. Every draw
is a function of (seed, step), so a resumed run goes on as if it had not stopped.   (spec/rl.md 5.2, 5.4, 7)
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rorqual.chat import Tokenizer
from rorqual.engine import Engine
from rorqual.model import AttentionMode, Model
from rorqual.rl import saves, sft, tasks
from rorqual.rl.episodes import Episode, Request, RolloutConfig, SandboxPool, rollout
from rorqual.rl.errors import TrainError
from rorqual.rl.evaluation import evaluate
from rorqual.rl.losses import group_advantages, policy_loss, token_log_probs
from rorqual.rl.optim import OptimConfig, Optimizers

__all__ = ["RECIPES", "GRPOConfig", "control", "draw", "run", "update"]

EVAL_SEED = 1_000_003
"""Sampling seed of evaluations, apart from every training seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig:
    """One recipe. Tasks are drawn by weight over (family, depth)."""

    mixture: tuple[tuple[str, int, float], ...]
    """(family, depth, weight)."""
    steps: int = 40
    prompts: int = 12
    """Tasks per step."""
    group_size: int = 8
    """Episodes per task."""
    seed: int = 0
    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    micro_tokens: int = 4096
    """Padded tokens per forward pass of the update."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(use_muon=False, adam_lr=7e-4, weight_decay=0.0)
    )
    warmup: int = 2
    eval_every: int = 10
    eval_per_depth: int = 10
    eval_families: tuple[str, ...] = ("hop-recover",)
    final_per_depth: int = 50
    checkpoint_every: int = 5
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


RECIPES: dict[str, GRPOConfig] = {
    "hop-recover": GRPOConfig(mixture=tuple(("hop-recover", depth, 1.0) for depth in (1, 2, 3, 4))),
    # Meant to follow hop-recover: enough of it to keep what was learned, the rest for what comes next.
    "mixed": GRPOConfig(
        mixture=(
            *(("hop-recover", depth, 0.6) for depth in (1, 2, 3, 4)),
            *(("calc-tool", depth, 2.0) for depth in (1, 2, 3)),
        ),
        eval_families=("hop-recover", "calc-tool"),
    ),
}


def draw(config: GRPOConfig, step: int) -> list[Request]:
    """The episodes of a step: `prompts` tasks of the rl split, `group_size` episodes each."""
    rng = random.Random(f"{config.seed}|{step}")
    kinds = [(family, depth) for family, depth, _ in config.mixture]
    weights = [weight for _, _, weight in config.mixture]
    requests: list[Request] = []
    for group in range(config.prompts):
        family, depth = rng.choices(kinds, weights)[0]
        task = tasks.sample(family, depth=depth, seed=rng.getrandbits(40), split="rl")
        for _ in range(config.group_size):
            sequence = step * config.prompts * config.group_size + len(requests)
            requests.append(
                Request(
                    task=task,
                    seed=config.seed,
                    sequence=sequence,
                    temperature=config.temperature,
                    group=group,
                )
            )
    return requests


def update(
    model: Model,
    optimizers: Optimizers,
    episodes: Sequence[Episode],
    config: GRPOConfig,
    *,
    factor: float = 1.0,
) -> dict[str, float]:
    """One policy step on `episodes`; returns its statistics. Without a group that has spread nothing changes."""
    rewards = [None if e.status == "infra_error" else e.reward for e in episodes]
    groups = [episode.request.group for episode in episodes]
    advantages = group_advantages(rewards, groups)
    used = [(e, a) for e, a in zip(episodes, advantages, strict=True) if a != 0.0]
    total_groups = len(set(groups))
    taught = len({episode.request.group for episode, _ in used})
    stats = {
        "zero_groups": 1 - taught / total_groups,
        "clip_share": 0.0,
        "log_gap": 0.0,
        "entropy": 0.0,
        "norm": 0.0,
    }
    tokens = sum(sum(episode.mask) for episode, _ in used)
    if not tokens:
        return stats
    model.train()
    used.sort(key=lambda pair: len(pair[0].ids))
    for part in _micro_batches(used, config.micro_tokens):
        width = max(len(episode.ids) for episode, _ in part)
        ids, mask = (
            torch.zeros(len(part), width, dtype=torch.int64),
            torch.zeros(len(part), width, dtype=torch.bool),
        )
        old, advantage = torch.zeros(len(part), width), torch.zeros(len(part), width)
        for row, (episode, value) in enumerate(part):
            size = len(episode.ids)
            ids[row, :size], mask[row, :size] = torch.tensor(episode.ids), torch.tensor(episode.mask)
            old[row, :size], advantage[row] = torch.tensor(episode.logprobs), value
        hidden = model.train_pass(ids, mode=AttentionMode()).hidden
        target = mask[:, 1:]
        log_probs, entropy = token_log_probs(
            model.logits(hidden[:, :-1][target]) / config.temperature, ids[:, 1:][target]
        )
        before = old[:, 1:][target]
        loss, clipped = policy_loss(
            log_probs, before, advantage[:, 1:][target], clip_low=config.clip_low, clip_high=config.clip_high
        )
        (loss / tokens).backward()  # type: ignore[no-untyped-call]
        stats["clip_share"] += float(clipped.sum()) / tokens
        stats["log_gap"] += float((log_probs.detach() - before).abs().sum()) / tokens
        stats["entropy"] += float(entropy.sum()) / tokens
    stats["norm"] = optimizers.step(factor)
    model.eval()
    return stats


def _micro_batches(used: Sequence[tuple[Episode, float]], tokens: int) -> list[list[tuple[Episode, float]]]:
    parts: list[list[tuple[Episode, float]]] = [[]]
    for pair in used:
        if parts[-1] and len(pair[0].ids) * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(pair)
    return parts


async def run(
    out: Path,
    start: str | Path,
    config: GRPOConfig,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Raises the model in `start` by RL, into directory `out`; resumes from its checkpoint. Returns the report's data.

    Cancelled, it keeps a checkpoint of the last whole step. Raises TrainError for a foreign checkpoint, RolloutError
    when sandboxes do not start.
    """
    note = on_note or (lambda _: None)
    out.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 -- this coroutine owns its loop: the trainer blocks it anyway
    tokenizer = Tokenizer.from_file(start)
    model = Model.from_pretrained(start)
    optimizers = Optimizers(model, config.optim)
    identity = {"config": asdict(config), "start": str(start)}
    resumed = saves.load(out, model, optimizers)
    progress = resumed or {"step": 0, "seconds": 0.0, **identity}
    if _comparable(progress) != _comparable(identity):
        raise TrainError(f"{out} holds a run of another recipe or start: use another --out, or --fresh")
    engine = Engine(model)
    log = out / "rl.jsonl"
    step, before = int(progress["step"]), float(progress["seconds"])
    history = saves.read_lines(log, below=step + 1)
    if history:
        saves.write_lines(log, history)  # steps after the checkpoint are run again
    else:
        log.unlink(missing_ok=True)
    count = config.prompts * config.group_size
    note(f"starting {count} sandboxes")
    async with SandboxPool.open(count) as pool:

        async def measure(per_depth: int, temperature: float) -> dict[str, Any]:
            result = await evaluate(
                engine,
                tokenizer,
                pool,
                families=config.eval_families,
                per_depth=per_depth,
                temperature=temperature,
                seed=EVAL_SEED,
                config=config.rollout,
            )
            return result.to_json()

        def keep() -> None:
            saves.save(out, model, optimizers, {"step": step, "seconds": before, **identity})

        if resumed is None:
            note(f"measuring {start} at T=1 and greedy")
            saves.write_json(out / "before.json", await _both(measure, config.final_per_depth))
            keep()  # so that the measurement is not repeated
        kept, row = step, dict[str, Any]()
        try:
            while step < config.steps:
                began = time.monotonic()
                episodes = await rollout(engine, tokenizer, pool, draw(config, step), config.rollout)
                acted = time.monotonic()
                stats = update(
                    model, optimizers, episodes, config, factor=min(1.0, (step + 1) / max(config.warmup, 1))
                )
                step += 1
                before += time.monotonic() - began
                row = {
                    "step": step,
                    "seconds": before,
                    "reward": _mean([e.reward for e in episodes if e.status != "infra_error"]),
                    "statuses": _counts(episodes),
                    "tokens": sum(sum(e.mask) for e in episodes),
                    "length": _mean([len(e.ids) for e in episodes]),
                    "turns": _mean([e.turns for e in episodes]),
                    "rollout_seconds": acted - began,
                    "update_seconds": time.monotonic() - acted,
                    **stats,
                }
                if step % config.eval_every == 0 or step == config.steps:
                    row["held_out"] = await measure(config.eval_per_depth, 1.0)
                saves.append_line(log, row)
                history.append(row)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    keep()
                    kept = step
                if on_step is not None:
                    on_step(row)
        except asyncio.CancelledError:
            if step > kept:  # `update` is never cut: the weights are those of `step`
                if not history or history[-1]["step"] != step:
                    saves.append_line(log, row)  # its evaluation was cut
                keep()
            raise
        note("measuring the trained model at T=1 and greedy")
        after = await _both(measure, config.final_per_depth)
        saves.write_json(out / "after.json", after)
    tokenizer.save(out / "tokenizer.json")
    sft.finish(out, model, {"recipe": "rl", **identity, "steps": step, "seconds": before})
    return {"history": history, "after": after}


async def _both(measure: Any, per_depth: int) -> dict[str, Any]:
    return {"sampled": await measure(per_depth, 1.0), "greedy": await measure(per_depth, 0.0)}


async def control(
    out: Path,
    start: str | Path,
    config: GRPOConfig,
    *,
    seconds: float,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The control of an RL run: as many seconds of more SFT on the same kind of traces, then the same measurement.

    Cancelled, it ends at the next step with a checkpoint. `on_step` is called from a thread.
    """
    recipe = sft.SFTConfig(
        steps=1_000_000,
        seed=1,
        init=str(start),
        optim=OptimConfig(muon_lr=3e-3, adam_lr=9e-4),
        decay_share=0.0,
    )
    stop = threading.Event()
    try:
        model = await asyncio.to_thread(
            sft.run, out / "control", recipe, seconds=seconds, on_step=on_step, stop=stop.is_set
        )
    finally:
        stop.set()
    engine, tokenizer = Engine(model), Tokenizer.from_file(start)
    async with SandboxPool.open(config.prompts * config.group_size) as pool:
        result = {}
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            evaluation = await evaluate(
                engine,
                tokenizer,
                pool,
                families=config.eval_families,
                per_depth=config.final_per_depth,
                temperature=temperature,
                seed=EVAL_SEED,
                config=config.rollout,
            )
            result[name] = evaluation.to_json()
    saves.write_json(out / "control.json", result)
    return result


def _comparable(progress: dict[str, Any]) -> dict[str, Any]:
    """What must not change between a run and its resumption: JSON types, without the number of steps."""
    plain: dict[str, Any] = json.loads(json.dumps({"config": progress["config"], "start": progress["start"]}))
    plain["config"].pop("steps")
    return plain


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _counts(episodes: Sequence[Episode]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for episode in episodes:
        counts[episode.status] = counts.get(episode.status, 0) + 1
    return counts
