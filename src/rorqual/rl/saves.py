"""Training checkpoints: model, optimizers and progress in one safetensors file, written atomically. No pickle.

Owns `state.safetensors` in a run directory: `model.*`, `optim.*` tensors, and a JSON object under `progress`. A write
that fails (full disk) leaves what was there before, no temporary file, and raises TrainError.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rorqual.rl.errors import TrainError
from rorqual.rl.optim import Optimizers

__all__ = ["append_line", "load", "read_lines", "save", "write_json", "write_lines"]

NAME = "state.safetensors"


def save(directory: Path, model: nn.Module, optimizers: Optimizers, progress: dict[str, Any]) -> None:
    """Writes the checkpoint: temporary file, fsync, rename, fsync of the directory. Raises TrainError."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {f"optim.{name}": tensor.contiguous() for name, tensor in optimizers.tensors().items()}
    with _replacing(directory / NAME) as temporary:
        save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})


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
    """Writes `value` atomically. Raises TrainError."""
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines atomically. Raises TrainError."""
    with _replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Appends one JSON line, whole or not at all; a torn line before it (kill -9) is ended. Raises TrainError."""
    line = json.dumps(value).encode() + b"\n"
    try:
        with open(path, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            try:
                view = memoryview(line)
                while view:
                    view = view[file.write(view) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise TrainError(f"{path} cannot be written: {error.strerror}") from error


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


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes `path`'s place at the end of the block, and is gone if the block fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _settle(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        kept = (
            "The one before is whole: make room, and the same command goes on"
            if path.exists()
            else "Make room"
        )
        raise TrainError(f"{path} cannot be written: {reason}. {kept}") from error


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
