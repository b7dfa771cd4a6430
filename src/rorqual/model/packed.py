"""A checkpoint on disk as `Weights`: mapped and never dequantised, experts resident or read on demand.

All names, shapes and dtypes are checked from the headers when it is opened, and no data is read; a tensor's values are
checked (NaN, infinity, scales that overflow, table entries) when it is first asked for. Every dialect of dialects.py,
FP32, BF16, FP8 in blocks of 128 or 32, FP4 by 32. FP16 becomes FP32, which is exact, in memory.
Owns views of files. Mapped tensors are read-only: writing to one ends the process. A file that is cut short while it
is mapped ends it too; replace checkpoints by renaming, as `checkpoint.save` does.
spec/model.md 5 and 7; spec/engines.md 8.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rorqual.model.checks import check_tensor, check_values
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
from rorqual.model.experts import ExpertCache, ExpertStats, Key, Reads, Region
from rorqual.model.shards import DTYPES, Stored
from rorqual.model.survey import FP4_BLOCK, Part, fp8_blocks, survey
from rorqual.model.weights import Drafter, Expert, Kind, Packed, Weights, block_prefix, split_expert

__all__ = ["PackedWeights", "open_weights"]

KINDS: dict[str, Kind] = {
    "F32": "f32",
    "BF16": "bf16",
    "F16": "f32",
    "F8_E4M3": "fp8",
    "I8": "fp4",
    "U8": "fp4",
}
TORCH = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
}
MATRICES = ("w1", "w3", "w2")


def open_weights(directory: str | Path, *, expert_bytes: int | None = None) -> Weights:
    """The weights of a model directory, as a runner takes them: `PackedWeights` with its defaults."""
    return PackedWeights(directory, expert_bytes=expert_bytes)


class PackedWeights:
    """The checkpoint in `directory`.

    `expert_bytes`: None maps the routed experts like everything else; a number keeps no more than that many bytes of
    them in memory and reads the others when they are asked for. `reads` and `threads`: how (experts.py).
    Raises ConfigError, CheckpointError: whatever is wrong with headers, names, shapes, dtypes, or the budget.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        expert_bytes: int | None = None,
        reads: Reads = "direct",
        threads: int = 8,
    ) -> None:
        self._config = Config.from_file(directory)
        self.survey = survey(directory, self._config)
        self.survey.check()
        self._maps = {shard.file: _Map(shard.file, shard.size) for shard in self.survey.shards}
        self._scales = {
            (part.place.name, part.place.expert): part.stored
            for parts in self.survey.scales.values()
            for part in parts
        }
        self._parts = {
            (part.place.name, part.place.expert): part
            for parts in self.survey.weights.values()
            for part in parts
        }
        self._matrices: dict[str, Packed] = {}
        self._tensors: dict[str, Tensor] = {}
        self._experts: ExpertCache[Expert] | None = None
        if expert_bytes is not None:
            self._experts = ExpertCache(
                self._expert_regions(),
                build=self._expert,
                check=self._check_expert,
                budget_bytes=expert_bytes,
                at_least=self._config.num_experts_per_tok,
                reads=reads,
                threads=threads,
            )

    @property
    def config(self) -> Config:
        return self._config

    @property
    def drafter(self) -> Drafter | None:
        return self.survey.drafter

    @property
    def experts_resident(self) -> bool:
        return self._experts is None

    def matrix(self, name: str) -> Packed:
        """See `Weights.matrix`. A routed expert is mapped, even when experts are read on demand."""
        name = name.removesuffix(".weight")
        found = self._matrices.get(name)
        if found is None:
            found = self._matrix(name)
            check_values(name, found)
            self._matrices[name] = found
        return found

    def vector(self, name: str) -> Tensor:
        """See `Weights.vector`."""
        found = self._tensors.get(name)
        if found is None:
            stored = self._part(name, None).stored
            if stored.dtype not in ("F32", "BF16", "F16"):
                raise CheckpointError(f"{stored.name}: {stored.dtype}, a vector is F32, BF16 or F16")
            found = self._plain(stored)
            check_tensor(stored.name, found, self._config)
            found = self._tensors[name] = found.float()
        return found

    def table(self, name: str) -> Tensor:
        """See `Weights.table`."""
        found = self._tensors.get(name)
        if found is None:
            stored = self._part(name, None).stored
            if stored.dtype not in ("I64", "I32"):
                raise CheckpointError(f"{stored.name}: {stored.dtype}, a table is I64 or I32")
            found = self._plain(stored)
            check_tensor(stored.name, found, self._config)
            found = self._tensors[name] = found.long()
        return found

    def load_experts(self, layer: int, ids: Sequence[int]) -> list[Expert]:
        """See `Weights.load_experts`. Experts that find no slot come mapped: slower, the same bytes."""
        prefix, count = self._block(layer), self._config.n_routed_experts
        wrong = next((expert for expert in ids if not 0 <= expert < count), None)
        if wrong is not None:
            raise IndexError(f"layer {layer}, expert {wrong}: the model has experts 0 to {count - 1}")
        if self._experts is None:
            return [self._mapped_expert(prefix, expert) for expert in ids]
        loaded = self._experts.load([(layer, expert) for expert in ids])
        return [loaded[layer, expert] or self._mapped_expert(prefix, expert) for expert in ids]

    def prefetch(self, token_ids: Sequence[int]) -> None:
        """See `Weights.prefetch`."""
        if self._experts is None:
            return
        vocab = self._config.vocab_size
        ids = torch.tensor([token for token in token_ids if 0 <= token < vocab], dtype=torch.int64)
        for layer in range(self._config.num_hash_layers):
            experts = self.table(f"layers.{layer}.ffn.gate.tid2eid")[ids].flatten().tolist()
            self._experts.prefetch([(layer, expert) for expert in dict.fromkeys(experts)])

    def expert_stats(self) -> ExpertStats | None:
        """What reading on demand did so far; None when the experts are resident."""
        return None if self._experts is None else self._experts.stats()

    def storage(self, name: str) -> tuple[str, int]:
        """The dtype (shards.DTYPES) in which the matrix `name` is stored, and its FP8 block or 0. Reads no data."""
        stored, kind, _, _, scale = self._locate(name.removesuffix(".weight"))
        if kind != "fp8" or scale is None:
            return stored.dtype, 0
        return stored.dtype, fp8_blocks(stored.shape, scale.shape)[0]

    def stored_bytes(self, stored: Stored) -> Tensor:
        """The bytes of a tensor of this checkpoint, uint8, mapped: for copying what has no meaning here."""
        return self._maps[stored.file].tensor(stored.begin, stored.nbytes)

    def forget(self, name: str) -> None:
        """Lets go of the matrix `name`: whoever walks through all of them keeps none."""
        self._matrices.pop(name.removesuffix(".weight"), None)

    def close(self) -> None:
        """Ends the reading threads. Tensors that were given out stay readable. May be called again."""
        if self._experts is not None:
            self._experts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _block(self, layer: int) -> str:
        return block_prefix(self._config, layer, drafter=self.drafter)

    def _part(self, name: str, expert: int | None) -> Part:
        part = self._parts.get((name, expert)) or self._parts.get((f"{name}.weight", expert))
        if part is None:
            if name.startswith("mtp.") and self.drafter == "dspark":
                raise CheckpointError(
                    f"{name}: the checkpoint's drafter is DSpark, which is not supported: run it without speculation"
                )
            raise CheckpointError(f"{name}: the checkpoint has no such tensor")
        return part

    def _locate(self, name: str) -> tuple[Stored, Kind, tuple[int, int], Region, Stored | None]:
        """Where the matrix `name` lies: the stored tensor, its kind, shape, bytes, and its scale."""
        expert = split_expert(name)
        skip = 0
        if expert is None:
            part = self._part(name, None)
            shape = part.stored.shape
        else:
            stacked, index = expert
            count = self._config.n_routed_experts
            if not 0 <= index < count:
                raise IndexError(f"{name}: the model has experts 0 to {count - 1}")
            found = self._parts.get((stacked, index))
            part = self._part(stacked, None) if found is None else found
            shape = part.stored.shape
            if found is None:  # one of a stack, perhaps the first or second half of its rows
                _, rows, columns = shape
                own = rows if part.place.half is None else rows // 2
                skip = (index * rows + (part.place.half or 0) * own) * columns
                shape = (own, columns)
        stored = part.stored
        scale = self._scales.get((part.place.name, part.place.expert))
        kind = KINDS.get(stored.dtype)
        if kind is None or len(shape) != 2 or (kind == "fp4" and scale is None):
            raise CheckpointError(f"{stored.name}: {stored.dtype} {list(stored.shape)} is no matrix")
        size = DTYPES[stored.dtype]
        region = Region(stored.file, stored.begin + skip * size, shape[0] * shape[1] * size)
        return stored, kind, (shape[0], shape[1] * (2 if kind == "fp4" else 1)), region, scale

    def _matrix(self, name: str) -> Packed:
        """The matrix `name`, mapped."""
        stored, kind, shape, region, scale = self._locate(name)
        data = self._maps[region.file].tensor(region.begin, region.nbytes)
        factor = None if scale is None else self._maps[scale.file].tensor(scale.begin, scale.nbytes)
        return _pack(stored, kind, shape, data, scale=scale, factor=factor)

    def _plain(self, stored: Stored) -> Tensor:
        return _typed(self.stored_bytes(stored), stored.dtype).view(stored.shape)

    def _mapped_expert(self, prefix: str, expert: int) -> Expert:
        return Expert(*(self.matrix(f"{prefix}ffn.experts.{expert}.{matrix}") for matrix in MATRICES))

    def _expert(self, key: Key, tensors: list[Tensor]) -> Expert:
        """The expert whose regions `tensors` hold, in the order of `_expert_regions`."""
        prefix, expert, given = self._block(key[0]), key[1], iter(tensors)
        matrices = []
        for matrix in MATRICES:
            stored, kind, shape, _, scale = self._locate(f"{prefix}ffn.experts.{expert}.{matrix}")
            data, factor = next(given), None if scale is None else next(given)
            matrices.append(_pack(stored, kind, shape, data, scale=scale, factor=factor))
        return Expert(*matrices)

    def _check_expert(self, key: Key, expert: Expert) -> None:
        prefix = self._block(key[0])
        for matrix, packed in zip(MATRICES, expert, strict=True):
            check_values(f"{prefix}ffn.experts.{key[1]}.{matrix}", packed)

    def _expert_regions(self) -> dict[Key, list[Region]]:
        """Data and scale of w1, w3, w2 of every expert."""
        out: dict[Key, list[Region]] = {}
        blocks = self._config.num_hidden_layers
        blocks += self._config.num_nextn_predict_layers if self.drafter == "mtp" else 0
        for layer in range(blocks):
            prefix = self._block(layer)
            for expert in range(self._config.n_routed_experts):
                regions = out[layer, expert] = []
                for matrix in MATRICES:
                    stored, _, _, region, scale = self._locate(f"{prefix}ffn.experts.{expert}.{matrix}")
                    if stored.dtype == "F16" or region.begin % DTYPES[stored.dtype]:
                        raise CheckpointError(
                            f"{stored.name}: experts in {stored.dtype} at offset {stored.begin} cannot be read on "
                            "demand without a second copy: convert them first (rorqual model convert)"
                        )
                    regions.append(region)
                    if scale is not None:
                        regions.append(Region(scale.file, scale.begin, scale.nbytes))
        return out


def _pack(
    stored: Stored,
    kind: Kind,
    shape: tuple[int, int],
    data: Tensor,
    *,
    scale: Stored | None,
    factor: Tensor | None,
) -> Packed:
    """`Packed` over raw bytes: `data` those of `stored` or a part of it, `factor` those of `scale`."""
    if scale is None or factor is None:
        typed = _typed(data, stored.dtype).view(shape)
        return Packed(
            data=typed.float() if stored.dtype == "F16" else typed,
            scale=None,
            kind=kind,
            shape=shape,
            block=0,
        )
    columns = shape[1] // 2 if kind == "fp4" else shape[1]
    block = FP4_BLOCK if kind == "fp4" else fp8_blocks(stored.shape, scale.shape)[0]
    return Packed(
        data=data.view(shape[0], columns), scale=factor.view(scale.shape), kind=kind, shape=shape, block=block
    )


def _typed(raw: Tensor, dtype: str) -> Tensor:
    """uint8 bytes as elements of `dtype`; copied where the file does not align them."""
    if raw.data_ptr() % DTYPES[dtype]:
        raw = raw.clone()
    return raw.view(TORCH[dtype])


class _Map:
    """A file mapped read-only. It stays mapped as long as a tensor of it lives."""

    def __init__(self, file: Path, size: int) -> None:
        try:
            with file.open("rb") as stream:
                self._mapping = mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be mapped: {error}") from error
        self._address = int(np.frombuffer(self._mapping, np.uint8).ctypes.data)

    def tensor(self, begin: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] at `begin`, over the file's own pages."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        # torch warns about every read-only buffer: a ctypes array over the address has no such flag
        window = (ctypes.c_uint8 * nbytes).from_address(self._address + begin)
        window._mapping = self._mapping  # type: ignore[attr-defined]  # keeps the pages mapped
        return torch.frombuffer(window, dtype=torch.uint8)
