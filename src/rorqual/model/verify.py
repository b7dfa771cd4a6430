"""Reads a whole checkpoint and says everything that is wrong with it, and where.

Headers against config.json and the index, then every value: NaN, infinity, scales that overflow, experts that are not
there. Files are read in order, in pieces that leave the page cache again, so any size is checked in little memory.
Owns the walk. What is wrong with a value: checks.py; with a header: shards.py, survey.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rorqual.model.checks import TOP_SCALE, bad_scales, bad_values
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError, ModelError
from rorqual.model.shards import DTYPES, INDEX, Shard, Stored, find_shards, read_index, read_shard
from rorqual.model.survey import Survey, survey

__all__ = ["Problem", "Verified", "verify"]

PIECE = 8 << 20
"""Bytes looked at together; a multiple of every element."""
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
INTS = {"I64": torch.int64, "I32": torch.int32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something wrong."""

    where: str
    """The file, and the tensor in it."""
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What a check found."""

    problems: list[Problem]
    files: int
    tensors: int
    data_bytes: int
    """Read and looked at."""


def verify(
    directory: str | Path,
    *,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Verified:
    """Checks the checkpoint in `directory`. `on_total` hears the bytes to read, `on_bytes` of those that were.

    Problems are results, not exceptions: also that there is no checkpoint at all.
    """
    directory = Path(directory)
    problems: list[Problem] = []
    try:
        files = find_shards(directory)
    except CheckpointError as error:
        return Verified(
            problems=[Problem(where=str(directory), what=str(error))], files=0, tensors=0, data_bytes=0
        )
    shards = []
    for file in files:
        try:
            shards.append(read_shard(file))
        except CheckpointError as error:
            problems.append(Problem(where=file.name, what=str(error)))
    problems += _index_problems(directory, shards)
    found: Survey | None = None
    experts = 0
    try:
        config = Config.from_file(directory)
        experts = config.n_routed_experts
        if len(shards) == len(files):
            found = survey(directory, config)
            problems += [
                Problem(where="config.json against the weights", what=text) for text in found.problems()
            ]
    except ModelError as error:
        problems.append(Problem(where="config.json", what=str(error)))
    roles = {} if found is None else _roles(found)
    if on_total is not None:
        on_total(sum(stored.nbytes for shard in shards for stored in shard.tensors))
    read = 0
    for shard in shards:
        for stored in shard.tensors:
            role = roles.get((stored.file, stored.name), _guess(stored))
            text = _value_problem(stored, role, experts, on_bytes)
            if text is not None:
                problems.append(Problem(where=f"{shard.file.name}: {stored.name}", what=text))
            read += stored.nbytes
    return Verified(
        problems=problems,
        files=len(files),
        tensors=sum(len(shard.tensors) for shard in shards),
        data_bytes=read,
    )


def _index_problems(directory: Path, shards: list[Shard]) -> Iterator[Problem]:
    """Where the index and the files disagree."""
    if not (directory / INDEX).is_file():
        return
    try:
        where = read_index(directory)
        said = (
            json.loads((directory / INDEX).read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
        )
    except (CheckpointError, AttributeError) as error:
        yield Problem(where=INDEX, what=str(error))
        return
    have = {stored.name: shard.file.name for shard in shards for stored in shard.tensors}
    read = {shard.file.name for shard in shards}
    for name in sorted(set(where) | set(have)):
        if name not in where:
            yield Problem(where=f"{INDEX}: {name}", what=f"not in the index, but in {have[name]}")
        elif name not in have and where[name] in read:
            yield Problem(where=f"{INDEX}: {name}", what=f"{where[name]} does not hold it")
        elif name in have and where[name] != have[name]:
            yield Problem(where=f"{INDEX}: {name}", what=f"it is in {have[name]}, not in {where[name]}")
    size = sum(stored.nbytes for shard in shards for stored in shard.tensors)
    if said is not None and said != size and len(read) == len(set(where.values())):
        yield Problem(where=INDEX, what=f"metadata.total_size is {said}, the tensors take {size} bytes")
    extra = {file.name for file in directory.glob("*.safetensors")} - set(where.values())
    for name in sorted(extra):
        yield Problem(
            where=name, what="a file that the index does not name: left over, or the index is stale"
        )


def _roles(found: Survey) -> dict[tuple[Path, str], str]:
    """`fp8`, `fp4` for a scale of such a matrix."""
    dtypes = {
        (name, part.place.expert): part.stored.dtype
        for name, parts in found.weights.items()
        for part in parts
    }
    return {
        (part.stored.file, part.stored.name): "fp8"
        if dtypes.get((name, part.place.expert)) == "F8_E4M3"
        else "fp4"
        for name, parts in found.scales.items()
        for part in parts
    }


def _guess(stored: Stored) -> str:
    return "fp4" if stored.dtype == "F8_E8M0" else ""


def _value_problem(
    stored: Stored, role: str, experts: int, on_bytes: Callable[[int], None] | None
) -> str | None:
    """What is wrong with the values of `stored`, or None."""
    bad, low, high = 0, 0, -1
    try:
        for raw in _pieces(stored):
            if role in TOP_SCALE:
                bad += bad_scales(raw, role)
            elif stored.dtype in FLOATS:
                bad += bad_values(raw.view(FLOATS[stored.dtype]))
            elif stored.dtype == "F8_E4M3":
                bad += bad_values(raw, fp8=True)
            elif stored.dtype in INTS:
                values = raw.view(INTS[stored.dtype])
                low, high = min(low, int(values.min())), max(high, int(values.max()))
            if on_bytes is not None:
                on_bytes(len(raw))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except EOFError as error:
        return str(error)
    count = stored.nbytes // DTYPES[stored.dtype]
    if bad:
        what = (
            f"scales are NaN or above 2^{TOP_SCALE[role] - 127}"
            if role in TOP_SCALE
            else "values are NaN or infinite"
        )
        return f"{bad} of {count} {what}"
    if stored.name.endswith("tid2eid") and experts and (low < 0 or high >= experts):
        return f"names expert {low} to {high}, config.json has {experts} (n_routed_experts)"
    return None


def _pieces(stored: Stored) -> Iterator[torch.Tensor]:
    """The bytes of `stored`, uint8."""
    descriptor = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffer = torch.empty(min(PIECE, stored.nbytes), dtype=torch.uint8)
        for start in range(0, stored.nbytes, PIECE):
            piece = buffer[: min(PIECE, stored.nbytes - start)]
            view, at = memoryview(piece.numpy()), 0  # type: ignore[arg-type]  # an ndarray is a buffer
            while at < len(view):
                got = os.preadv(descriptor, [view[at:]], stored.begin + start + at)
                if got == 0:
                    raise EOFError(f"the file ends at {stored.begin + start + at}: it was changed meanwhile")
                at += got
            os.posix_fadvise(descriptor, stored.begin + start, len(view), os.POSIX_FADV_DONTNEED)
            yield piece
    finally:
        os.close(descriptor)
