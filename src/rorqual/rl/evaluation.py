"""Evaluation: held-out success per family and depth, acting in real sandboxes, at a temperature or greedy.

Owns which tasks are asked: fixed draws of the `test` split, the same for every model. Rates come with their counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.chat import Tokenizer
from rorqual.engine import Engine
from rorqual.rl import tasks
from rorqual.rl.episodes import Episode, Request, RolloutConfig, SandboxPool, rollout

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Success of one model at one temperature."""

    temperature: float
    solved: dict[str, dict[int, float]]
    """family -> depth -> share solved; infrastructure failures are left out."""
    counted: dict[str, dict[int, int]]
    statuses: dict[str, int]

    def rate(self, family: str, depths: Sequence[int] | None = None) -> float:
        """Share solved over `depths` (None: all), each depth weighing the same."""
        rates = [rate for depth, rate in self.solved[family].items() if depths is None or depth in depths]
        return sum(rates) / len(rates)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "temperature": self.temperature,
            "solved": {f: {str(d): r for d, r in by.items()} for f, by in self.solved.items()},
            "counted": {f: {str(d): c for d, c in by.items()} for f, by in self.counted.items()},
            "statuses": self.statuses,
        }


async def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    pool: SandboxPool,
    *,
    families: Sequence[str],
    per_depth: int,
    temperature: float,
    seed: int = 0,
    depths: Sequence[int] | None = None,
    config: RolloutConfig | None = None,
) -> Evaluation:
    """Runs `per_depth` test tasks (seeds 0, 1, ...) of every family and depth once."""
    requests: list[Request] = []
    for family in families:
        for depth in tasks.depths(family, split="test"):
            if depths is None or depth in depths:
                for number in range(per_depth):
                    task = tasks.sample(family, depth=depth, seed=number, split="test")
                    requests.append(
                        Request(task=task, seed=seed, sequence=len(requests), temperature=temperature)
                    )
    return summarize(await rollout(engine, tokenizer, pool, requests, config), temperature)


def summarize(episodes: Sequence[Episode], temperature: float) -> Evaluation:
    """Rates per family and depth."""
    rewards: dict[str, dict[int, list[float]]] = {}
    statuses: dict[str, int] = {}
    for episode in episodes:
        task = episode.request.task
        statuses[episode.status] = statuses.get(episode.status, 0) + 1
        values = rewards.setdefault(task.family, {}).setdefault(task.depth, [])
        if episode.status != "infra_error":
            values.append(episode.reward)
    solved = {f: {d: sum(v) / len(v) if v else 0.0 for d, v in by.items()} for f, by in rewards.items()}
    counted = {f: {d: len(v) for d, v in by.items()} for f, by in rewards.items()}
    return Evaluation(temperature, solved, counted, statuses)
