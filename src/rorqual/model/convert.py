"""Rewrites a checkpoint in another storage: packed or plain, official or HF's names, some rows of a tensor at a time.

FP8 and FP4 scales are powers of two, 2^ceil(log2(amax / top)) of their block (quant.py): a matrix that such a scheme
already stored comes back to the bit, and FP4 fits into FP8 without loss. A tensor whose storage does not change is
copied, bytes and all.
Owns the values on their way. storage.py says what is stored how, writer.py writes. spec/model.md 5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rorqual.model.checks import bad_values
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
from rorqual.model.packed import PackedWeights
from rorqual.model.quant import pack_fp4_weight, pack_fp8_weight
from rorqual.model.storage import (
    FORMATS,
    FP8_BLOCK,
    LAYOUTS,
    Format,
    Layout,
    Planned,
    Unit,
    config_document,
    plan_units,
)
from rorqual.model.weights import Packed
from rorqual.model.writer import SHARD_BYTES, Written, fingerprint, write_checkpoint

__all__ = ["Conversion", "convert"]

PIECE = 4 << 20
"""Elements converted together, and at least one row of blocks."""
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Files that go along when they lie beside the weights."""
STORED = {"f32": "F32", "bf16": "BF16", "fp8": "F8_E4M3", "fp4": "I8"}


class Conversion:
    """A conversion, planned: `units` says what will be written, `run` writes it.

    `store`: a format of storage.py, or `keep` for every tensor as it is stored. A DSpark drafter is copied as it is,
    under official names only; HF's layout leaves the MTP head out, as HF does.
    Raises ConfigError, CheckpointError: `source` cannot be read, or cannot be stored so.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        store: Format | Literal["keep"] = "keep",
        layout: Layout = "official",
    ) -> None:
        if store not in (*FORMATS, "keep") or layout not in LAYOUTS:
            raise CheckpointError(
                f"no storage {store!r} in layout {layout!r}: choose {', '.join(FORMATS)} or keep, and "
                f"{' or '.join(LAYOUTS)}"
            )
        self.source = Path(source)
        self._weights = PackedWeights(source)
        self._options = [store, layout]
        mtp = self._weights.drafter == "mtp"
        self.units = plan_units(
            self._weights.config, self._as_stored if store == "keep" else store, layout=layout, mtp=mtp
        )
        dtypes = {planned.dtype for unit in self.units for planned in unit.tensors}
        if layout == "hf" and dtypes & {"I8", "F8_E4M3"}:
            raise CheckpointError(
                "HF's layout holds plain weights, these are packed: choose bf16 or fp32 with it"
            )
        if self._weights.drafter == "dspark" and layout == "official":
            self.units += [
                Unit(part.name, (Planned(part.name, part.dtype, part.shape),))
                for part in self._weights.survey.drafter_parts
            ]

    def run(
        self,
        target: str | Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Written:
        """Writes the checkpoint into `target`; a run that was killed is continued by the same call.

        Raises CheckpointError: the source's values are damaged or do not fit the new type, or see
        `write_checkpoint`.
        """
        target = Path(target)
        if target.resolve() == self.source.resolve():
            raise CheckpointError(f"{target} is the source itself: choose another directory")
        raw = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        if self._options[1] == "hf":
            raw = _hf_schedule(raw, self._weights.config)
        dtypes = {planned.dtype for unit in self.units for planned in unit.tensors}
        experts = next(unit.tensors[0].dtype for unit in self.units if ".ffn.experts." in unit.source)
        stats = [
            [shard.file.name, shard.size, shard.file.stat().st_mtime_ns]
            for shard in self._weights.survey.shards
        ]
        return write_checkpoint(
            target,
            self.units,
            self._bytes,
            config=config_document(raw, dtypes, experts=experts),
            job=fingerprint("convert 1", raw, stats, self._options, shard_bytes),
            shard_bytes=shard_bytes,
            beside=[self.source / name for name in BESIDE if (self.source / name).is_file()],
            on_bytes=on_bytes,
        )

    def _as_stored(self, source: str) -> str:
        """The dtype in which `source` is stored now; FP16 becomes FP32."""
        weights = self._weights
        if source.endswith("tid2eid"):
            return "I64"
        shape = weights.survey.shapes.get(source)
        if shape is not None and len(shape) != 2:
            stored = weights.survey.weights[source][0].stored.dtype
        else:
            stored, block = weights.storage(source)
            if stored == "F8_E4M3" and block != FP8_BLOCK:
                raise CheckpointError(
                    f"{source}: FP8 in blocks of {block} cannot be kept, V4 stores blocks of {FP8_BLOCK}: "
                    "choose a format"
                )
        return {"F16": "F32", "U8": "I8"}.get(stored, stored)

    def _bytes(self, unit: Unit) -> Iterator[bytes | memoryview]:
        """The data of a unit's tensors, one after the other."""
        weights, planned = self._weights, unit.tensors[0]
        if weights.drafter == "dspark" and unit.source.startswith(("mtp.", "model.mtp.")):
            yield from self._copied(unit.source)
        elif planned.dtype == "I64":
            yield from _raw(weights.table(unit.source))
        elif len(planned.shape) != 2:
            yield from _raw(_cast(unit.source, weights.vector(unit.source), planned.dtype))
        else:
            matrix = weights.matrix(unit.source)
            if STORED[matrix.kind] == planned.dtype and matrix.block in (
                0,
                32 if matrix.kind == "fp4" else 128,
            ):
                yield from _raw(matrix.data)
                if matrix.scale is not None:
                    yield from _raw(matrix.scale)
            else:
                yield from _converted(unit.source, matrix, planned.dtype)
            weights.forget(unit.source)

    def _copied(self, name: str) -> Iterator[bytes | memoryview]:
        part = next(part for part in self._weights.survey.drafter_parts if part.name == name)
        yield from _raw(self._weights.stored_bytes(part))


def _hf_schedule(raw: dict[str, Any], config: Config) -> dict[str, Any]:
    """`raw` with a schedule that HF reads: it takes `compress_ratios` of 0, 4 and 128 only, others as rates."""
    if set(config.compress_ratios) <= {0, 4, 128}:
        return raw
    names = {
        "window": "sliding_attention",
        "csa": "compressed_sparse_attention",
        "hca": "heavily_compressed_attention",
    }
    rates: dict[str, int] = {}
    for kind, ratio in zip(config.layer_kinds, config.compress_ratios, strict=True):
        if ratio and rates.setdefault(names[kind], ratio) != ratio:
            raise CheckpointError(
                f"compress_ratios has HCA layers of ratio {rates[names[kind]]} and {ratio}, HF knows one: keep the "
                "official layout"
            )
    out = {name: value for name, value in raw.items() if name not in ("compress_ratios", "csa_ratio")}
    return out | {"layer_types": [names[kind] for kind in config.layer_kinds], "compress_rates": rates}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    store: Format | Literal["keep"] = "keep",
    layout: Layout = "official",
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> Written:
    """`Conversion(source, ...).run(target, ...)`."""
    conversion = Conversion(source, store=store, layout=layout)
    return conversion.run(target, shard_bytes=shard_bytes, on_bytes=on_bytes)


def _converted(name: str, matrix: Packed, dtype: str) -> Iterator[bytes | memoryview]:
    """`matrix` as `dtype`, then its scales if it has any: a packed block never spans two pieces."""
    rows, columns = matrix.shape
    step = max(1, PIECE // (FP8_BLOCK * columns)) * FP8_BLOCK
    scales: list[Tensor] = []
    for start in range(0, rows, step):
        piece = _rows(matrix, start, min(start + step, rows))
        if dtype in ("F8_E4M3", "I8"):
            codes, scale = pack_fp8_weight(piece) if dtype == "F8_E4M3" else pack_fp4_weight(piece)
            scales.append(scale)
            yield from _raw(codes)
        else:
            yield from _raw(_cast(name, piece, dtype))
    for scale in scales:
        yield from _raw(scale)


def _rows(matrix: Packed, start: int, stop: int) -> Tensor:
    """Rows of `matrix` in fp32; `start` is a multiple of its block."""
    scale = matrix.scale
    if scale is not None:
        scale = (
            scale[start:stop]
            if matrix.kind == "fp4"
            else scale[start // matrix.block : -(-stop // matrix.block)]
        )
    part = Packed(
        data=matrix.data[start:stop],
        scale=scale,
        kind=matrix.kind,
        shape=(stop - start, matrix.shape[1]),
        block=matrix.block,
    )
    return part.unpack()


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    if dtype != "BF16":
        return tensor.float()
    out = tensor.to(torch.bfloat16)
    if count := bad_values(out):
        raise CheckpointError(f"{name}: {count} values are too large for bfloat16: convert to fp32")
    return out


def _raw(tensor: Tensor) -> Iterator[bytes | memoryview]:
    """The bytes of a contiguous tensor."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE].numpy()
        yield memoryview(piece)  # type: ignore[arg-type]  # an ndarray is a buffer; typeshed learns so in 3.12
