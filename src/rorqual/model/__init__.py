"""Model: the DeepSeek-V4 architecture in torch, its configuration, checkpoints and cost. Needs 'rorqual[model]'.

`Config` and `cost` load without torch; `Model` and the rest load it on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rorqual.model import cost
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError, ConfigError, ModelError

if TYPE_CHECKING:
    from rorqual.model.attention import AttentionMode
    from rorqual.model.state import CacheState
    from rorqual.model.transformer import Model, TrainOutput

__all__ = [
    "AttentionMode",
    "CacheState",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Model",
    "ModelError",
    "TrainOutput",
    "cost",
]

_LAZY = {
    "AttentionMode": "rorqual.model.attention",
    "CacheState": "rorqual.model.state",
    "Model": "rorqual.model.transformer",
    "TrainOutput": "rorqual.model.transformer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "safetensors"):
            raise ModuleNotFoundError(
                f"{error.name} is missing: pip install 'rorqual[model]'", name=error.name
            ) from error
        raise
