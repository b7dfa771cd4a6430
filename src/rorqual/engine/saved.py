"""Saved sequences: tokens and decode state of one sequence in a safetensors file, with a model fingerprint.

Owns the file. Refuses what another model wrote. The packed on-disk page format is a later issue's.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rorqual.engine.errors import SequenceFileError
from rorqual.model.state import RowHistory

if TYPE_CHECKING:
    from rorqual.engine.engine import Engine, SequenceState

__all__ = ["fingerprint", "load_sequence", "save_sequence"]

FORMAT = "rorqual-sequence-1"


def fingerprint(engine: Engine) -> str:
    """SHA-256 over the configuration and every parameter: equal iff the cache means the same. Computed once."""
    known: str | None = getattr(engine, "_fingerprint", None)
    if known is None:
        digest = hashlib.sha256(json.dumps(engine.config.to_dict(), sort_keys=True).encode())
        for name, tensor in sorted(engine.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        known = digest.hexdigest()
        engine._fingerprint = known  # type: ignore[attr-defined]
    return known


def save_sequence(sequence: SequenceState, path: str | Path) -> None:
    """Writes `path` atomically: temporary file, fsync, rename, fsync of the directory."""
    path = Path(path)
    tensors = {"token_ids": torch.tensor(sequence.token_ids, dtype=torch.int64)}
    if sequence.logits is not None:
        tensors["logits"] = sequence.logits.contiguous()
    for number, layer in enumerate(sequence.state.layers):
        for place, part in enumerate(layer.parts()):
            rows = part.rows if isinstance(part, RowHistory) else part.entries
            tensors[f"{number}.{place}"] = rows.contiguous()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, "model": fingerprint(sequence.engine)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_sequence(engine: Engine, path: str | Path) -> SequenceState:
    """The reverse of `save_sequence`. Raises SequenceFileError."""
    from rorqual.engine.engine import SequenceState

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SequenceFileError(f"{path} cannot be read as a saved sequence: {error}") from error
    if metadata.get("format") != FORMAT:
        raise SequenceFileError(f"{path} is not a saved sequence (format {metadata.get('format')!r})")
    if metadata.get("model") != fingerprint(engine):
        raise SequenceFileError(f"{path} was written by another model: its cache means nothing to this one")
    sequence = SequenceState(engine)
    ids = tensors.pop("token_ids", None)
    if ids is None:
        raise SequenceFileError(f"{path} holds no token_ids")
    sequence.token_ids = ids.tolist()
    sequence.logits = tensors.pop("logits", None)
    sequence.state.position = torch.tensor([len(sequence.token_ids)])
    for number, layer in enumerate(sequence.state.layers):
        for place, part in enumerate(layer.parts()):
            rows = tensors.get(f"{number}.{place}")
            have = part.rows if isinstance(part, RowHistory) else part.entries
            fixed = isinstance(part, RowHistory)
            if (
                rows is None
                or rows.dim() != 3
                or rows.shape[2] != have.shape[2]
                or (fixed and rows.shape != have.shape)
            ):
                raise SequenceFileError(
                    f"{path}: layer {number}, part {place} is missing or of another shape"
                )
            if isinstance(part, RowHistory):
                part.rows = rows
            else:
                part.entries = rows
    return sequence
