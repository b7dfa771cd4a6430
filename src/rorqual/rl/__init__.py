"""RL: task families, rollouts in real sandboxes, supervised warm start and GRPO. Needs 'rorqual[train]'."""

from rorqual.rl.errors import RlError, RolloutError, SampleError, TaskError, TraceError, TrainError
from rorqual.rl.evaluate import Evaluation, evaluate
from rorqual.rl.grpo import RECIPES, GRPOConfig
from rorqual.rl.optim import OptimConfig
from rorqual.rl.rollout import Episode, Request, RolloutConfig, SandboxPool, rollout
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
    "TaskError",
    "TraceError",
    "TrainError",
    "evaluate",
    "rollout",
]
