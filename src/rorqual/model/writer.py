"""Writes a checkpoint shard by shard with bounded memory: a kill at any moment loses one shard's work, and no more.

    journal -> for each shard: temporary file, fsync, rename -> index.json -> config.json -> journal removed

Until config.json is there the directory is no checkpoint to anyone; the same call goes on where the last one stopped.
Owns the files of a checkpoint that is being made. Knows nothing of what the bytes mean. Torch-free.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rorqual.model.errors import CheckpointError
from rorqual.model.shards import INDEX, WEIGHTS
from rorqual.model.storage import Unit

__all__ = ["SHARD_BYTES", "Written", "fingerprint", "write_checkpoint"]

JOURNAL = ".rorqual-unfinished.json"
SHARD_BYTES = 2 << 30
"""Bytes of data in a shard, unless one tensor alone is larger."""
SYNC_BYTES = 256 << 20
"""Bytes after which written data is pushed to the disk, so that a shard's end is no long wait."""
HEADROOM = 64 << 20
"""Free bytes that must remain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a call did."""

    shards: int
    data_bytes: int
    """Of all tensors."""
    resumed_bytes: int
    """Of those, what an earlier call had written."""


def fingerprint(*parts: Any) -> str:
    """A name for the job of writing a checkpoint: an unfinished one is only continued by the same job."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def write_checkpoint(
    directory: str | Path,
    units: Sequence[Unit],
    produce: Callable[[Unit], Iterator[bytes | memoryview]],
    *,
    config: Mapping[str, Any],
    job: str,
    shard_bytes: int = SHARD_BYTES,
    beside: Sequence[Path] = (),
    on_bytes: Callable[[int], None] | None = None,
) -> Written:
    """Writes `units`, whose bytes `produce` gives in order, with the index and `config` as config.json.

    `beside`: files to copy along.
    `on_bytes` hears of every further data byte, resumed ones included. Raises CheckpointError: the directory holds
    another checkpoint or job, someone else writes there, the disk is full or fails. What `produce` raises passes.
    """
    directory, told = Path(directory), on_bytes or (lambda count: None)
    shards = _shards(units, shard_bytes)
    total = sum(unit.nbytes for unit in units)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _journal(directory, job, [name for name, _ in shards]):
            resumed = 0
            have = {name: _complete(directory / name, own) for name, own in shards}
            missing = sum(unit.nbytes for name, own in shards if not have[name] for unit in own)
            free = shutil.disk_usage(directory).free
            if free < missing + HEADROOM:
                raise CheckpointError(
                    f"{directory}: {missing} bytes are to be written, {free} are free: make room or choose another disk"
                )
            for name, own in shards:
                if have[name]:
                    done = sum(unit.nbytes for unit in own)
                    resumed += done
                    told(done)
                else:
                    _write_shard(directory / name, own, produce, told)
            if len(shards) > 1:
                where = {
                    planned.name: name for name, own in shards for unit in own for planned in unit.tensors
                }
                _write_text(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
            for file in beside:
                shutil.copyfile(file, directory / file.name)
            _write_text(directory / "config.json", config)
    except OSError as error:
        hint = (
            "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        )
        raise CheckpointError(
            f"cannot write {directory}: {hint}; what is finished stays, the same command goes on from there"
        ) from error
    return Written(shards=len(shards), data_bytes=total, resumed_bytes=resumed)


def _shards(units: Sequence[Unit], limit: int) -> list[tuple[str, list[Unit]]]:
    """File names and their units. Inside a file the wider elements come first, so that all lie aligned."""
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if groups[-1] and size + unit.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    for group in groups:
        group.sort(key=lambda unit: -_width(unit))
    if len(groups) == 1:
        return [(WEIGHTS, groups[0])]
    return [
        (f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, start=1)
    ]


def _width(unit: Unit) -> int:
    first = unit.tensors[0]
    return first.nbytes // max(1, _count(first.shape))


def _count(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


def _header(units: Sequence[Unit]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for unit in units:
        for planned in unit.tensors:
            entries[planned.name] = {
                "dtype": planned.dtype,
                "shape": list(planned.shape),
                "data_offsets": [at, at + planned.nbytes],
            }
            at += planned.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # data begins at a multiple of 8 at least
    return len(text).to_bytes(8, "little") + text


def _complete(file: Path, units: Sequence[Unit]) -> bool:
    """Whether `file` is what a finished write of `units` leaves: it got its name only after its last byte."""
    header = _header(units)
    try:
        with file.open("rb") as stream:
            return stream.read(len(header)) == header and stream.seek(0, 2) == len(header) + sum(
                unit.nbytes for unit in units
            )
    except FileNotFoundError:
        return False


def _write_shard(
    file: Path,
    units: Sequence[Unit],
    produce: Callable[[Unit], Iterator[bytes | memoryview]],
    told: Callable[[int], None],
) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(_header(units))
            for unit in units:
                left = unit.nbytes
                for piece in produce(unit):
                    left -= len(piece)
                    stream.write(piece)
                    told(len(piece))
                    _push(stream, len(piece))
                assert left == 0, f"{unit.source}: {left} bytes too few"
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        _sync(file.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _push(stream: BinaryIO, count: int) -> None:
    """Every SYNC_BYTES: the data so far goes to the disk and out of the page cache, which others need."""
    at = stream.tell()
    if (at - count) // SYNC_BYTES != at // SYNC_BYTES:
        stream.flush()
        os.fdatasync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, at, os.POSIX_FADV_DONTNEED)


@contextmanager
def _journal(directory: Path, job: str, names: Sequence[str]) -> Iterator[None]:
    """Holds the directory for this job: a new or unfinished one of the same job. Ends the job when left well."""
    journal = directory / JOURNAL
    with suppress(FileExistsError):
        found = sorted(path.name for path in directory.iterdir() if _ours(path.name))
        if found and not journal.exists():
            raise CheckpointError(f"{directory} already holds {found[0]}: choose an empty directory")
        with journal.open("x", encoding="utf-8"):
            pass
    with journal.open("r+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{directory}: another process is writing this checkpoint") from None
        text = stream.read()
        try:
            before = json.loads(text)["job"] if text else job
        except (ValueError, KeyError, TypeError):
            before = job  # killed while it was written: no shard was begun
        if before != job:
            raise CheckpointError(
                f"{directory} holds an unfinished checkpoint of another command: delete it or choose another directory"
            )
        stream.seek(0)
        stream.truncate()
        json.dump({"job": job, "shards": list(names)}, stream)
        stream.flush()
        os.fsync(stream.fileno())
        yield
        journal.unlink()
        _sync(directory)


def _ours(name: str) -> bool:
    return name.endswith(".safetensors") or name in (INDEX, "config.json")


def _write_text(file: Path, document: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        _sync(file.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
