"""The safetensors files of a checkpoint and their headers: where each stored tensor's bytes lie.

    file = u64 header length | JSON {name: {dtype, shape, data_offsets}} | data, without holes

Headers are untrusted: lengths are bounded by the file, names are unique, shapes agree with offsets, offsets tile
the data exactly. So a `Stored` always points at bytes that were there when the file was opened.
Owns files and byte ranges. Never knows what a name means: survey.py does. Never reads pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from rorqual.model.errors import CheckpointError

__all__ = ["DTYPES", "INDEX", "WEIGHTS", "Shard", "Stored", "find_shards", "read_index", "read_shard"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100 << 20
"""Bytes of the longest header that is read; the format's own limit."""
MAX_AXES = 8
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of an element by the name of its type."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte in the file."""
    nbytes: int

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


@dataclass(frozen=True)
class Shard:
    """A file with its header."""

    file: Path
    size: int
    """Bytes of the whole file."""
    metadata: Mapping[str, str]
    tensors: tuple[Stored, ...]
    """In the order of their data."""

    @cached_property
    def by_name(self) -> dict[str, Stored]:
        return {stored.name: stored for stored in self.tensors}


def find_shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, those of the index, or all there are.

    Raises CheckpointError: there is none, or the index names another directory's or a missing file.
    """
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
        return [directory / name for name in sorted(set(read_index(directory).values()))]
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


def read_index(directory: Path) -> dict[str, str]:
    """Tensor to file of `model.safetensors.index.json`: plain file names in `directory`, all of them there."""
    index = directory / INDEX
    try:
        names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f'{index}: not an index: expected {{"weight_map": {{tensor: file}}}}'
        ) from error
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    if not names:
        raise CheckpointError(f"{index}: names no shard")
    for name in sorted(set(names.values()), key=str):
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
    return names


def read_shard(file: Path) -> Shard:
    """The header of `file`. Raises CheckpointError: not a whole safetensors file, and why."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise _broken(file, f"{size} bytes hold no header of {length}")
            if length > MAX_HEADER:
                raise _broken(file, f"a header of {length} bytes, expected at most {MAX_HEADER}")
            text = stream.read(length)
    except OSError as error:
        raise _broken(file, error.strerror or str(error)) from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, "its __metadata__ is no table of texts")
    base = 8 + length
    tensors = sorted((_stored(file, name, entry, base) for name, entry in header.items()), key=_position)
    at = base
    for tensor in tensors:
        if tensor.begin != at:
            what = "overlaps the tensor before it" if tensor.begin < at else "leaves a hole before it"
            raise _broken(file, f"{tensor.name} {what}")
        at = tensor.end
    if at != size:
        raise _broken(file, f"{size} bytes, its header describes {at}")
    return Shard(file, size, metadata, tuple(tensors))


def _position(stored: Stored) -> tuple[int, int]:
    return stored.begin, stored.nbytes


def _stored(file: Path, name: str, entry: Any, base: int) -> Stored:
    """One entry of a header, whose offsets count from `base`."""
    if not isinstance(entry, dict):
        raise _broken(file, f"{name}: its entry is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(file, f"{name}: unknown dtype {dtype!r:.40}")
    if not _counts(shape) or len(shape) > MAX_AXES:
        raise _broken(file, f"{name}: shape {shape!r:.60} is no list of up to {MAX_AXES} sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise _broken(file, f"{name}: data_offsets {offsets!r:.60} are no two positions")
    nbytes = prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise _broken(
            file, f"{name}: {dtype} {shape} takes {nbytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    return Stored(file, name, dtype, tuple(shape), base + offsets[0], nbytes)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers that a file position can be."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} is given twice")
    return out


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a whole safetensors file ({why}): copy it again")
