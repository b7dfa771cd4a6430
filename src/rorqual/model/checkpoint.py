"""Reads and writes checkpoints: config.json beside safetensors, in every dialect of dialects.py.

A load surveys the headers first: names, shapes and dtypes of all tensors are checked against the
configuration before a byte of data is read. Then FP8 and FP4 weights are dequantised to BF16 (exact: 2 to 4
significant bits and a power of two), experts are stacked, and NaN or infinity is refused.
A save writes temporary files, syncs, renames, syncs the directory. Never reads or writes pickle.
spec/model.md 5 (weight formats) and 7 (names).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.model.config import Config
from rorqual.model.dialects import Place, is_other_drafter, place
from rorqual.model.errors import CheckpointError
from rorqual.model.quant import unpack_fp4_weight, unpack_fp8_weight
from rorqual.model.shapes import expected_shapes, explain_names, explain_shape, listed

__all__ = ["load_metadata", "load_state", "save"]

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PLAIN = ("F32", "BF16", "F16")
FP4_CONTAINERS = ("I8", "U8")
SCALES = ("F8_E8M0", "U8")
CORE = ("embed.weight", "norm.weight", "layers.0.attn.wkv.weight")


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor in a file, and where it belongs."""

    file: Path
    stored: str
    shape: tuple[int, ...]
    dtype: str
    place: Place


def load_state(directory: str | Path, config: Config) -> dict[str, Tensor]:
    """All tensors of the checkpoint in `directory` under our names (`shapes.expected_shapes`), on the CPU.

    Dtypes are the stored ones; quantised weights become BF16. `mtp.*` is there if the files hold it.
    Raises CheckpointError: no, truncated or pickled files; names missing, doubled or unknown; a shape or
    dtype that `config` does not expect; NaN or infinity; a shard outside the directory.
    """
    directory = Path(directory)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(_opened(file)) for file in _files(directory)}
        weights, scales = _survey(handles)
        shapes = expected_shapes(config, mtp=any(name.startswith("mtp.") for name in weights))
        for name in CORE:  # the wrong config altogether: say so before listing its other layers
            if name in weights:
                _check_parts(name, weights[name], scales.get(name, []), shapes[name], config)
        _check_names(weights, scales, shapes, config)
        for name, parts in weights.items():
            _check_parts(name, parts, scales.get(name, []), shapes[name], config)
        return {
            name: _read(name, weights[name], scales.get(name, []), shapes[name], handles, config)
            for name in shapes
        }


def load_metadata(directory: str | Path) -> dict[str, str]:
    """What `save` was given as `metadata`. Raises CheckpointError when there is no readable file."""
    out: dict[str, str] = {}
    for file in _files(Path(directory)):
        with _opened(file) as handle:
            out |= handle.metadata() or {}
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
        _check_values(name, tensor, config)
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


def _files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory: give one that holds config.json and {WEIGHTS}"
        )
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory} holds both {WEIGHTS} and {INDEX}: remove the one that is stale")
    if single.exists():
        return [single]
    if index.exists():
        return _indexed(directory, index)
    if files := sorted(directory.glob("*.safetensors")):
        return files
    pickled = sorted(
        file.name for end in ("bin", "pt", "pth", "ckpt", "pkl") for file in directory.glob(f"*.{end}")
    )
    if pickled:
        raise CheckpointError(
            f"{directory} holds {pickled[0]}: pickle can run code and is never read; convert to safetensors"
        )
    raise CheckpointError(f"{directory} holds no *.safetensors: weights are missing")


def _indexed(directory: Path, index: Path) -> list[Path]:
    """The shards that the index names: plain file names in `directory`."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f'{index}: not an index: expected {{"weight_map": {{tensor: file}}}}'
        ) from error
    files = []
    for name in sorted(names, key=str):
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or "\\" in name
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{index}: names the shard {name!r}, expected a *.safetensors file beside the index"
            )
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{index}: names the shard {name}, which is missing: the download is incomplete"
            )
        files.append(directory / name)
    if not files:
        raise CheckpointError(f"{index}: names no shard")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """`file` open for reading, its header checked."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}): copy it again") from error


def _survey(handles: Mapping[Path, Any]) -> tuple[dict[str, list[_Part]], dict[str, list[_Part]]]:
    """Weights and scales of all files by our name, from the headers alone."""
    weights: dict[str, list[_Part]] = {}
    scales: dict[str, list[_Part]] = {}
    stored = [(file, name) for file, handle in handles.items() for name in handle.keys()]  # noqa: SIM118
    drafter = any(is_other_drafter(name) for _, name in stored)
    if drafter:
        log.warning("the checkpoint's mtp.* tensors are a DSpark drafter, which is not supported: left out")
    seen: dict[tuple[str, int | None, bool], str] = {}
    for file, name in stored:
        header = handles[file].get_slice(name)
        for spot in place(name):
            if drafter and spot.name.startswith("mtp."):
                continue
            key = (spot.name, spot.expert, spot.scale)
            if key in seen:
                raise CheckpointError(f"{spot.name}: given twice, as {seen[key]} and as {name}")
            seen[key] = name
            part = _Part(file, name, tuple(header.get_shape()), header.get_dtype(), spot)
            (scales if spot.scale else weights).setdefault(spot.name, []).append(part)
    return weights, scales


def _check_names(
    weights: Mapping[str, list[_Part]],
    scales: Mapping[str, list[_Part]],
    shapes: Mapping[str, tuple[int, ...]],
    config: Config,
) -> None:
    missing, unknown = set(shapes) - set(weights), set(weights) - set(shapes)
    if missing or unknown:
        extra = {part.stored for name in unknown for part in weights[name]}
        raise CheckpointError(explain_names(missing, extra, config))
    lonely = {part.stored for name in set(scales) - set(weights) for part in scales[name]}
    if lonely:
        raise CheckpointError(f"{listed(lonely)}: a scale without its weight")


def _check_parts(
    name: str, parts: list[_Part], scales: list[_Part], shape: tuple[int, ...], config: Config
) -> None:
    """Shape and dtype of all parts of the tensor `name`, from the headers."""
    single = parts[0].place.expert is None
    if not single:
        have = {part.place.expert for part in parts}
        wanted = set(range(shape[0]))
        if any(part.place.expert is None for part in parts):
            raise CheckpointError(f"{name}: given both stacked and one by one")
        if have != wanted:
            wrong = sorted(have ^ wanted, key=str)
            raise CheckpointError(
                f"{name}: {len(have)} experts are stored, config.json expects {shape[0]} (n_routed_experts); "
                f"expert {wrong[0]} is {'missing' if wrong[0] in wanted else 'too many'}"
            )
    by_expert = {scale.place.expert: scale for scale in scales}
    for part in parts:
        expected = shape if single else shape[1:]
        if part.place.half is not None:
            expected = (shape[0], 2 * shape[1], shape[2])
        scale = by_expert.pop(part.place.expert, None)
        packed = part.dtype in FP4_CONTAINERS and scale is not None and ".ffn.experts." in name
        if packed:
            expected = (*expected[:-1], expected[-1] // 2)
        plain = ("I64", "I32") if name.endswith("tid2eid") else PLAIN
        fp8 = part.dtype == "F8_E4M3" and len(part.shape) == 2
        if not (part.dtype in plain or packed or fp8):
            raise CheckpointError(f"{part.stored}: dtype {part.dtype}, expected {' or '.join(plain)}")
        if part.shape != expected:
            raise CheckpointError(
                explain_shape(part.stored, part.shape, expected, config, name=name, skip=0 if single else 1)
            )
        if part.dtype == "F8_E4M3" and scale is None:
            raise CheckpointError(f"{part.stored}: FP8 without its scale tensor")
        if scale is not None:
            _check_scale(part, scale, packed=packed)
    if by_expert:
        raise CheckpointError(f"{next(iter(by_expert.values())).stored}: a scale without its weight")


def _check_scale(part: _Part, scale: _Part, *, packed: bool) -> None:
    if part.dtype in PLAIN:
        raise CheckpointError(
            f"{part.stored}: {part.dtype} with a scale ({scale.stored}), expected FP8 or packed FP4"
        )
    if packed:
        expected = (*part.shape[:-1], -(-part.shape[-1] * 2 // 32))
    else:
        expected = tuple(-(-size // 128) for size in part.shape)
    if scale.shape != expected:
        raise CheckpointError(
            f"{scale.stored}: shape {list(scale.shape)}, expected {list(expected)} for {part.stored}"
        )
    if scale.dtype not in SCALES:
        raise CheckpointError(f"{scale.stored}: dtype {scale.dtype}, expected {' or '.join(SCALES)}")


def _read(
    name: str,
    parts: list[_Part],
    scales: list[_Part],
    shape: tuple[int, ...],
    handles: Mapping[Path, Any],
    config: Config,
) -> Tensor:
    """The tensor `name`: parts read, dequantised, stacked, checked for NaN."""
    by_expert = {scale.place.expert: scale for scale in scales}
    out: Tensor | None = None
    for part in parts:
        tensor = handles[part.file].get_tensor(part.stored)
        scale = by_expert.get(part.place.expert)
        if scale is not None:
            unpack = unpack_fp8_weight if part.dtype == "F8_E4M3" else unpack_fp4_weight
            factor = handles[scale.file].get_tensor(scale.stored)
            tensor = unpack(tensor, factor)
        if part.place.half is not None:
            tensor = tensor.chunk(2, 1)[part.place.half].contiguous()
        if part.place.expert is not None:
            out = tensor.new_empty(shape) if out is None else out
            out[part.place.expert] = tensor
        else:
            out = tensor
        _check_values(part.stored, tensor, config)
    assert out is not None, "the survey found at least one part"
    return out.long() if name.endswith("tid2eid") else out


def _check_values(name: str, tensor: Tensor, config: Config) -> None:
    if name.endswith("tid2eid"):
        if tensor.numel() and not bool(((tensor >= 0) & (tensor < config.n_routed_experts)).all()):
            raise CheckpointError(
                f"{name}: names expert {int(tensor.min())} to {int(tensor.max())}, "
                f"config.json has {config.n_routed_experts} (n_routed_experts)"
            )
    elif not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite: the weights are damaged"
        )
