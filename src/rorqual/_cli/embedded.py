"""Opens the model that ships with the package, or a model directory like it. Needs `rorqual[model]`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import rorqual
from rorqual._cli.exits import CliError
from rorqual._cli.model_dir import FILES, check_model_dir, open_model_dir

if TYPE_CHECKING:
    from rorqual.agent import EmbeddedModel
    from rorqual.engine import Engine

__all__ = ["EMBEDDED_DIR", "FILES", "RAISED_DIR", "open_embedded"]

EMBEDDED_DIR = Path(rorqual.__file__).parent / "embedded"
"""The warm start: trained on demonstrations, most of which give up or guess."""
RAISED_DIR = EMBEDDED_DIR / "rl"
"""What reinforcement learning made of it; the model of `run` and `demo`."""
NAMES = {EMBEDDED_DIR: "rorqual-embedded (before RL)", RAISED_DIR: "rorqual-embedded"}


def open_embedded(
    directory: Path = RAISED_DIR, *, seed: int, temperature: float = 1.0, max_tokens: int = 512
) -> EmbeddedModel:
    """A model adapter over our engine. Raises CliError if a file or an optional package is missing."""
    try:
        check_model_dir(directory)
    except CliError as error:
        raise CliError(f"{error}; or use another model with --model URL", code=error.code) from error
    from rorqual.agent import EmbeddedConfig, EmbeddedModel
    from rorqual.engine import SamplingParams

    engine, tokenizer = open_model_dir(directory)
    return EmbeddedModel(
        engine,
        tokenizer,
        EmbeddedConfig(
            name=NAMES.get(directory, directory.name),
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            context_tokens=engine.config.max_position_embeddings,
        ),
        make_params=SamplingParams,
        read_metrics=lambda: cache_metrics(engine),
    )


def cache_metrics(engine: Engine) -> Mapping[str, float]:
    """Bytes the engine's cache holds, and what GQA8-bf16 with the same layers and head width would hold."""
    usage = engine.usage()
    return {} if usage is None else {"kv_bytes": usage.held_bytes, "gqa8_bytes": usage.gqa8_bytes}
