"""Reads and writes checkpoints: config.json beside safetensors, in every dialect of dialects.py.

A load surveys the headers first (survey.py): names, shapes and dtypes of all tensors are checked against the
configuration before a byte of data is read. Then FP8 and FP4 weights are dequantised to BF16 (exact: 2 to 4
significant bits and a power of two), experts are stacked, and NaN or infinity is refused.
Kept packed instead: packed.py.
A save writes temporary files, syncs, renames, syncs the directory. Never reads or writes pickle.
spec/model.md 5 (weight formats) and 7 (names).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.model.checks import check_tensor
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
from rorqual.model.quant import unpack_fp4_weight, unpack_fp8_weight
from rorqual.model.shapes import expected_shapes, explain_names, explain_shape
from rorqual.model.shards import INDEX, WEIGHTS, find_shards, read_shard
from rorqual.model.survey import Survey, fp8_blocks, survey

__all__ = ["load_metadata", "load_state", "save"]

log = logging.getLogger(__name__)


def load_state(directory: str | Path, config: Config) -> dict[str, Tensor]:
    """All tensors of the checkpoint in `directory` under our names (`shapes.expected_shapes`), on the CPU.

    Dtypes are the stored ones; quantised weights become BF16. `mtp.*` is there if the files hold it.
    Raises CheckpointError: no, truncated or pickled files; names missing, doubled or unknown; a shape or
    dtype that `config` does not expect; NaN or infinity; a shard outside the directory.
    """
    found = survey(directory, config)
    if found.drafter == "dspark":
        log.warning("the checkpoint's mtp.* tensors are a DSpark drafter, which is not supported: left out")
    found.check()
    with ExitStack() as stack:
        handles = {shard.file: stack.enter_context(_opened(shard.file)) for shard in found.shards}
        return {name: _read(name, found, handles) for name in found.shapes}


def load_metadata(directory: str | Path) -> dict[str, str]:
    """What `save` was given as `metadata`. Raises CheckpointError when there is no readable file."""
    out: dict[str, str] = {}
    for file in find_shards(Path(directory)):
        out |= read_shard(file).metadata
    out.pop("format", None)
    return out


def save(
    directory: str | Path,
    config: Config,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into `directory`, replacing each in one step.

    A crash leaves the old file or the new one, never a part. Raises CheckpointError when `state` is not what
    `config` expects or holds NaN (before anything is written), and when the disk does not take it.
    """
    directory = Path(directory)
    shapes = expected_shapes(config, mtp=any(name.startswith("mtp.") for name in state))
    if set(shapes) != set(state):
        raise CheckpointError(explain_names(set(shapes) - set(state), set(state) - set(shapes), config))
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(explain_shape(name, tuple(tensor.shape), shapes[name], config))
        check_tensor(name, tensor, config)
    if (directory / INDEX).exists():
        raise CheckpointError(
            f"{directory} holds a sharded checkpoint ({INDEX}): save into another directory"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    temporary = {
        directory / name: directory / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS, "config.json")
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary[directory / WEIGHTS], metadata={"format": "pt", **(metadata or {})})
        temporary[directory / "config.json"].write_text(text, encoding="utf-8")
        # safetensors makes its files private to the user: give the weights the mode of any new file
        temporary[directory / WEIGHTS].chmod(temporary[directory / "config.json"].stat().st_mode & 0o777)
        for path in temporary.values():
            _sync(path)
        for final, path in temporary.items():
            path.replace(final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {directory}: {error}") from error
    finally:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """`file` open for reading."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}): copy it again") from error


def _read(name: str, found: Survey, handles: Mapping[Path, Any]) -> Tensor:
    """The tensor `name`: parts read, dequantised, stacked, checked for NaN."""
    out: Tensor | None = None
    scales = {scale.place.expert: scale.stored for scale in found.scales.get(name, ())}
    for part in found.weights[name]:
        stored, scale = part.stored, scales.get(part.place.expert)
        tensor = handles[stored.file].get_tensor(stored.name)
        if scale is not None:
            factor = handles[scale.file].get_tensor(scale.name)
            if stored.dtype == "F8_E4M3":
                block = fp8_blocks(stored.shape, scale.shape)[0]
                tensor = unpack_fp8_weight(tensor, factor, block=block)
            else:
                tensor = unpack_fp4_weight(tensor, factor)
        if part.place.half is not None:
            tensor = tensor.chunk(2, 1)[part.place.half].contiguous()
        if part.place.expert is not None:
            out = tensor.new_empty(found.shapes[name]) if out is None else out
            out[part.place.expert] = tensor
        else:
            out = tensor
        check_tensor(stored.name, tensor, found.config)
    assert out is not None, "the survey found at least one part"
    return out.long() if name.endswith("tid2eid") else out
