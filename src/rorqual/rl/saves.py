"""Training checkpoints: model, optimizers and progress in one safetensors file, written atomically. No pickle.

Owns `state.safetensors` in a run directory: `model.*`, `optim.*` tensors, and a JSON object under `progress`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rorqual.rl.errors import TrainError
from rorqual.rl.optim import Optimizers

__all__ = ["append_line", "load", "read_lines", "save", "write_json"]

NAME = "state.safetensors"


def save(directory: Path, model: nn.Module, optimizers: Optimizers, progress: dict[str, Any]) -> None:
    """Writes the checkpoint: temporary file, fsync, rename, fsync of the directory."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {f"optim.{name}": tensor.contiguous() for name, tensor in optimizers.tensors().items()}
    temporary = directory / f".{NAME}.tmp"
    save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})
    _settle(temporary, directory / NAME)


def load(directory: Path, model: nn.Module, optimizers: Optimizers) -> dict[str, Any] | None:
    """Restores model and optimizers; returns the progress, or None when there is no checkpoint.

    Raises TrainError for a checkpoint that is damaged or of another model.
    """
    path = directory / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads((file.metadata() or {})["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        optimizers.load_tensors({k[6:]: v for k, v in tensors.items() if k.startswith("optim.")})
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise TrainError(
            f"{path} does not fit this run: {str(error).splitlines()[0]}. Use another --out, or --fresh"
        ) from error
    if not isinstance(progress, dict):
        raise TrainError(f"{path} holds no progress: use another --out, or --fresh")
    return progress


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _settle(temporary, path)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Appends one JSON line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def read_lines(path: Path, *, below: int | None = None) -> list[dict[str, Any]]:
    """JSON lines whose `step` is below `below` (all, if None); a torn last line is left out."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if below is None or value.get("step", 0) < below:
            lines.append(value)
    return lines


def _settle(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def torch_threads(count: int) -> None:
    """Sets torch's threads; 0 leaves its own choice."""
    if count:
        torch.set_num_threads(count)
