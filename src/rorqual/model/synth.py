"""Random checkpoints of any configuration, as large as the disk: for tests of size, speed and memory, not of skill.

Values are drawn as `Model.initialize` draws them, so that activations stay in range: matrices normal with a standard
deviation of 1 / sqrt(columns), packed ones by drawing codes whose values are so distributed. A tensor's bytes depend
on the seed and its name alone, never on sharding, resuming or the machine.
Owns the random values. storage.py says what is stored how, writer.py writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from math import log2, sqrt
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from rorqual.model.config import Config
from rorqual.model.quant import fp4_block, fp8_block
from rorqual.model.storage import Format, Planned, Unit, config_document, plan_units
from rorqual.model.writer import SHARD_BYTES, Written, fingerprint, write_checkpoint

__all__ = ["synth", "synth_units"]

PIECE = 4 << 20
"""Elements made together."""
Bytes = NDArray[np.uint8]


def synth_units(config: Config, *, store: Format = "official", mtp: bool = True) -> list[Unit]:
    """What `synth` would write: to know its size beforehand."""
    return plan_units(config, store, mtp=mtp and config.num_nextn_predict_layers > 0)


def synth(
    directory: str | Path,
    config: Config,
    *,
    seed: int = 0,
    store: Format = "official",
    mtp: bool = True,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> Written:
    """Writes a random checkpoint of `config` into `directory`; a call that was killed is continued by the same call.

    Raises CheckpointError as `write_checkpoint`.
    """
    units = synth_units(config, store=store, mtp=mtp)
    dtypes = {planned.dtype for unit in units for planned in unit.tensors}
    experts = next(unit.tensors[0].dtype for unit in units if ".ffn.experts." in unit.source)
    document = config_document(config.to_dict(), dtypes, experts=experts)
    job = fingerprint("synth 1", document, store, seed, mtp, shard_bytes)
    return write_checkpoint(
        directory,
        units,
        lambda unit: _draw(unit, config, seed),
        config=document,
        job=job,
        shard_bytes=shard_bytes,
        on_bytes=on_bytes,
    )


def _draw(unit: Unit, config: Config, seed: int) -> Iterator[bytes]:
    first = unit.tensors[0]
    digest = hashlib.sha256(f"{seed}/{unit.source}".encode()).digest()
    draw = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    if first.dtype == "I64":
        yield from _table(first, config, draw)
    elif len(unit.tensors) == 2:
        yield from _packed(first, unit.tensors[1], _deviation(unit.source, first, config), draw)
    else:
        yield from _plain(unit.source, first, config, draw)


def _packed(first: Planned, scale: Planned, deviation: float, draw: np.random.Generator) -> Iterator[bytes]:
    """Codes by a table from random bytes, then scales of two neighbouring powers of two."""
    codes, size = _FP4 if first.dtype == "I8" else _FP8
    for start in range(0, first.nbytes, PIECE):
        yield codes[_random_bytes(draw, min(PIECE, first.nbytes - start))].tobytes()
    top = 127 + round(log2(deviation / size) + 0.34)  # the scales' quadratic mean is 2^-0.34 of the higher
    for start in range(0, scale.nbytes, PIECE):
        yield (top - (_random_bytes(draw, min(PIECE, scale.nbytes - start)) & 1)).astype(np.uint8).tobytes()


def _plain(source: str, planned: Planned, config: Config, draw: np.random.Generator) -> Iterator[bytes]:
    count = 1
    for size in planned.shape:
        count *= size
    mean, deviation = _mean(source), _deviation(source, planned, config)
    for start in range(0, count, PIECE):
        values = torch.full((min(PIECE, count - start),), mean)
        if deviation:
            values += torch.from_numpy(draw.standard_normal(len(values), np.float32)) * deviation
        stored = values.bfloat16() if planned.dtype == "BF16" else values
        yield stored.view(torch.uint8).numpy().tobytes()


def _table(planned: Planned, config: Config, draw: np.random.Generator) -> Iterator[bytes]:
    """int64 [vocab, experts per token]: different experts for a token."""
    rows, picked = planned.shape
    step = max(1, PIECE // config.n_routed_experts)
    for start in range(0, rows, step):
        order = draw.random((min(step, rows - start), config.n_routed_experts), np.float32).argsort(1)
        yield order[:, :picked].astype("<i8").tobytes()


def _mean(source: str) -> float:
    if source.endswith("norm.weight"):
        return 1.0
    return 0.3 if source.endswith("_scale") else 0.0


def _deviation(source: str, planned: Planned, config: Config) -> float:
    """As in `Model.initialize`."""
    leaf = source.rsplit(".", 1)[-1]
    columns = planned.shape[-1] * (2 if planned.dtype == "I8" else 1)
    if source == "embed.weight":
        return 1.0
    if leaf == "ape":
        return 0.5
    if leaf.endswith("_fn"):
        return 0.3 / sqrt(columns)
    if len(planned.shape) == 1:  # norms, sinks, biases, hc base and scale
        return 0.0
    damped = source.endswith(("attn.wo_b.weight", "shared_experts.w2.weight"))
    return 1 / sqrt(columns) / (sqrt(2 * config.num_hidden_layers) if damped else 1)


def _random_bytes(draw: np.random.Generator, count: int) -> Bytes:
    return np.frombuffer(draw.bytes(count), np.uint8)


def _normal_codes() -> tuple[tuple[Bytes, float], tuple[Bytes, float]]:
    """For FP4 and FP8: random byte -> stored byte of normally distributed values, and their deviation."""
    normal = NormalDist()
    fine = torch.tensor([normal.inv_cdf((i + 0.5) / 256) for i in range(256)])
    codes, _ = fp8_block(fine * 64, block=256)
    fp8_size = float(codes.float().std(correction=0))
    coarse = torch.tensor([normal.inv_cdf((i + 0.5) / 16) for i in range(16)])
    four, _ = fp4_block(coarse * 2.5, block=16)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[(four & 7).long()]
    pairs = np.arange(256)
    low, high = four.numpy()[pairs & 15], four.numpy()[pairs >> 4]
    return (low | (high << 4), float(values.square().mean().sqrt())), (
        codes.view(torch.uint8).numpy(),
        fp8_size,
    )


_FP4, _FP8 = _normal_codes()
