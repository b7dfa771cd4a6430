"""Opens a model directory for the commands that measure or train. Needs `rorqual[model]`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual._cli.exits import UNFIT, WRONG_USE, CliError

if TYPE_CHECKING:
    from rorqual.chat import Tokenizer
    from rorqual.engine import Engine, StoreConfig
    from rorqual.engine.layout import CacheFormat

__all__ = ["FILES", "check_model_dir", "open_model_dir"]

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def check_model_dir(directory: Path) -> None:
    """Raises CliError unless the files and the packages that read them are there."""
    if not directory.is_dir():
        raise CliError(f"{directory}: no such model directory", code=WRONG_USE)
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise CliError(
            f"{directory} is incomplete: {missing[0]} is missing (a model directory holds {', '.join(FILES)})",
            code=UNFIT,
        )
    for module in ("torch", "safetensors", "tokenizers"):
        try:
            import_module(module)
        except ImportError as error:
            raise CliError(
                f"this needs {module} ({error}): pip install 'rorqual[model]'", code=UNFIT
            ) from error


def open_model_dir(
    directory: Path,
    *,
    kv_bytes: int = 2 << 30,
    cache_format: CacheFormat = "exact",
    store: StoreConfig | None = None,
    unit_tokens: int = 8192,
) -> tuple[Engine, Tokenizer]:
    """The model in an engine, with its tokenizer. Raises CliError naming what is missing or damaged."""
    check_model_dir(directory)
    from rorqual.chat import ChatError, Tokenizer
    from rorqual.engine import Engine, SequenceFileError
    from rorqual.model.errors import ModelError

    try:
        engine = Engine(
            directory, kv_bytes=kv_bytes, cache_format=cache_format, store=store, unit_tokens=unit_tokens
        )
        return engine, Tokenizer.from_file(directory)
    except SequenceFileError as error:
        raise CliError(f"the cache on disk cannot be used: {error}", code=UNFIT) from error
    except (ModelError, ChatError) as error:
        raise CliError(f"the model in {directory} cannot be loaded: {error}", code=UNFIT) from error
