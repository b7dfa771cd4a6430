"""RL: task families, rollouts in real sandboxes, supervised warm start and GRPO. Needs 'rorqual[train]'.

Tasks and errors load without torch; the rest loads on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rorqual.rl.errors import RlError, RolloutError, SampleError, TaskError, TraceError, TrainError
from rorqual.rl.tasks import Task

if TYPE_CHECKING:
    from rorqual.rl.episodes import Episode, Request, RolloutConfig, SandboxPool, rollout
    from rorqual.rl.evaluation import Evaluation, evaluate
    from rorqual.rl.grpo import RECIPES, GRPOConfig
    from rorqual.rl.optim import OptimConfig
    from rorqual.rl.sft import SFTConfig

__all__ = [
    "RECIPES",
    "Episode",
    "Evaluation",
    "GRPOConfig",
    "OptimConfig",
    "Request",
    "RlError",
    "RolloutConfig",
    "RolloutError",
    "SFTConfig",
    "SampleError",
    "SandboxPool",
    "Task",
    "TaskError",
    "TraceError",
    "TrainError",
    "evaluate",
    "rollout",
]

_HOME = {
    "rorqual.rl.evaluation": ("Evaluation", "evaluate"),
    "rorqual.rl.grpo": ("RECIPES", "GRPOConfig"),
    "rorqual.rl.optim": ("OptimConfig",),
    "rorqual.rl.episodes": ("Episode", "Request", "RolloutConfig", "SandboxPool", "rollout"),
    "rorqual.rl.sft": ("SFTConfig",),
}
_LAZY = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
