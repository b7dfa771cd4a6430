"""What a checkpoint holds, from its headers alone: every tensor of the model found, checked and located.

A survey reads names, shapes and dtypes of all files, brings them to our names (dialects.py), and holds them against
what the configuration expects (shapes.py). It is done before a byte of data is used.
Owns these checks. Reads no data: checkpoint.py, packed.py do. spec/model.md 5 and 7.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.model.config import Config
from rorqual.model.dialects import Place, is_other_drafter, place
from rorqual.model.errors import CheckpointError
from rorqual.model.shapes import Shapes, expected_shapes, explain_names, explain_shape, listed
from rorqual.model.shards import Shard, Stored, find_shards, read_shard

__all__ = ["FP4_BLOCK", "Part", "Survey", "fp8_blocks", "survey"]

log = logging.getLogger(__name__)

PLAIN = ("F32", "BF16", "F16")
FP4_CONTAINERS = ("I8", "U8")
SCALES = ("F8_E8M0", "U8")
FP8_BLOCKS = (128, 32)
"""Sides of an FP8 scale's block: V4, and V4.1."""
FP4_BLOCK = 32
"""Elements along K that one scale of an FP4 matrix covers."""
CORE = ("embed.weight", "norm.weight", "layers.0.attn.wkv.weight")
Dialect = Literal["official", "stacked", "hf", "hf-saved"]


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor, and where it belongs."""

    stored: Stored
    place: Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """The tensors of a checkpoint by our names."""

    config: Config
    shards: Sequence[Shard]
    weights: dict[str, list[Part]]
    """Our name to its parts: one, or one an expert."""
    scales: dict[str, list[Part]]
    """The scales of the tensor of that name."""
    drafter: Literal["mtp", "dspark"] | None
    drafter_parts: list[Stored]
    """A DSpark drafter's tensors as they are stored: they are not in `weights`."""
    dialect: Dialect
    shapes: Shapes
    """What `config` expects."""

    def problems(self) -> Iterator[str]:
        """What is wrong with names, shapes and dtypes, worst first; nothing when all is well."""
        for name in CORE:  # the wrong config altogether: say so before listing its other layers
            if name in self.weights:
                yield from self._part_problems(name)
        missing, unknown = set(self.shapes) - set(self.weights), set(self.weights) - set(self.shapes)
        if missing or unknown:
            extra = {part.stored.name for name in unknown for part in self.weights[name]}
            yield explain_names(missing, extra, self.config)
        lonely = {
            part.stored.name for name in set(self.scales) - set(self.weights) for part in self.scales[name]
        }
        if lonely:
            yield f"{listed(lonely)}: a scale without its weight"
        for name in self.weights:
            if name in self.shapes and name not in CORE:
                yield from self._part_problems(name)
        yield from self._block_problems()

    def check(self) -> None:
        """Raises CheckpointError with the first of `problems`."""
        for problem in self.problems():
            raise CheckpointError(problem)

    def _part_problems(self, name: str) -> Iterator[str]:
        """Shape and dtype of all parts of the tensor `name`."""
        parts, shape = self.weights[name], self.shapes[name]
        single = parts[0].place.expert is None
        if not single:
            have = {part.place.expert for part in parts}
            wanted = set(range(shape[0]))
            if None in have:
                yield f"{name}: given both stacked and one by one"
                return
            if have != wanted:
                wrong = sorted(have ^ wanted, key=str)
                yield (
                    f"{name}: {len(have)} experts are stored, config.json expects {shape[0]} "
                    f"(n_routed_experts); expert {wrong[0]} is "
                    f"{'missing' if wrong[0] in wanted else 'too many'}"
                )
                return
        scales = {scale.place.expert: scale.stored for scale in self.scales.get(name, ())}
        for part in parts:
            stored = part.stored
            expected = shape if single else shape[1:]
            if part.place.half is not None:
                expected = (shape[0], 2 * shape[1], *shape[2:])
            scale = scales.pop(part.place.expert, None)
            packed = stored.dtype in FP4_CONTAINERS and scale is not None and ".ffn.experts." in name
            if packed:
                expected = (*expected[:-1], expected[-1] // 2)
            plain = ("I64", "I32") if name.endswith("tid2eid") else PLAIN
            fp8 = stored.dtype == "F8_E4M3" and len(stored.shape) == 2
            if not (stored.dtype in plain or packed or fp8):
                yield f"{stored.name}: dtype {stored.dtype}, expected {' or '.join(plain)}"
            elif stored.shape != expected:
                skip = 0 if single else 1
                yield explain_shape(stored.name, stored.shape, expected, self.config, name=name, skip=skip)
            elif fp8 and scale is None:
                yield f"{stored.name}: FP8 without its scale tensor"
            elif scale is not None:
                yield from _scale_problems(stored, scale)
        if scales:
            yield f"{next(iter(scales.values())).name}: a scale without its weight"

    def _block_problems(self) -> Iterator[str]:
        """FP8 blocks of one checkpoint have one size, that of config.json's quantization_config if it says one."""
        said = _said_block(self.shards[0].file.parent / "config.json")
        for name, parts in self.weights.items():
            scales = {scale.place.expert: scale.stored for scale in self.scales.get(name, ())}
            for part in parts:
                scale = scales.get(part.place.expert) if part.stored.dtype == "F8_E4M3" else None
                sides = [] if scale is None else fp8_blocks(part.stored.shape, scale.shape)
                if said is not None and sides and said not in sides:
                    yield (
                        f"{part.stored.name}: FP8 in blocks of {sides[0]}, config.json says {said} "
                        "(quantization_config.weight_block_size): use the config.json that came with the weights"
                    )
                    return


def fp8_blocks(shape: tuple[int, ...], scale: tuple[int, ...]) -> list[int]:
    """The block sides that a scale of shape `scale` may mean for an FP8 matrix of `shape`, the likeliest first."""
    return [side for side in FP8_BLOCKS if scale == tuple(-(-size // side) for size in shape)]


def survey(directory: str | Path, config: Config) -> Survey:
    """Surveys the files of `directory`; call `check` or look at `problems` before using it.

    Raises CheckpointError where there is nothing to survey: no, truncated or pickled files, a shard outside the
    directory, a tensor that is given twice.
    """
    shards = [read_shard(file) for file in find_shards(Path(directory))]
    stored = [tensor for shard in shards for tensor in shard.tensors]
    dspark = any(is_other_drafter(tensor.name) for tensor in stored)
    weights: dict[str, list[Part]] = {}
    scales: dict[str, list[Part]] = {}
    left: list[Stored] = []
    seen: dict[tuple[str, int | None, bool], str] = {}
    for tensor in stored:
        for spot in place(tensor.name):
            if dspark and spot.name.startswith("mtp."):
                left.append(tensor)
                continue
            key = (spot.name, spot.expert, spot.scale)
            if key in seen:
                raise CheckpointError(f"{spot.name}: given twice, as {seen[key]} and as {tensor.name}")
            seen[key] = tensor.name
            (scales if spot.scale else weights).setdefault(spot.name, []).append(Part(tensor, spot))
    mtp = any(name.startswith("mtp.") for name in weights)
    return Survey(
        config=config,
        shards=shards,
        weights=weights,
        scales=scales,
        drafter="dspark" if dspark else "mtp" if mtp else None,
        drafter_parts=left,
        dialect=_dialect(tensor.name for tensor in stored),
        shapes=expected_shapes(config, mtp=mtp),
    )


def _scale_problems(part: Stored, scale: Stored) -> Iterator[str]:
    if part.dtype in PLAIN:
        yield f"{part.name}: {part.dtype} with a scale ({scale.name}), expected FP8 or packed FP4"
        return
    if part.dtype in FP4_CONTAINERS:
        expected = (*part.shape[:-1], -(-part.shape[-1] * 2 // FP4_BLOCK))
        fits = scale.shape == expected
    else:
        expected = tuple(-(-size // FP8_BLOCKS[0]) for size in part.shape)
        fits = bool(fp8_blocks(part.shape, scale.shape))
    if not fits:
        yield f"{scale.name}: shape {list(scale.shape)}, expected {list(expected)} for {part.name}"
    elif scale.dtype not in SCALES:
        yield f"{scale.name}: dtype {scale.dtype}, expected {' or '.join(SCALES)}"


def _said_block(config_file: Path) -> int | None:
    """`quantization_config.weight_block_size` of a config.json, where it has one square size."""
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
        sides = set(raw["quantization_config"]["weight_block_size"])
        side = sides.pop()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # Config.from_file judges the file; this key is optional
    return side if not sides and isinstance(side, int) else None


def _dialect(names: Iterator[str]) -> Dialect:
    """The dialect that most names speak: a checkpoint of ours is official but for its stacked experts."""
    counts: Counter[Dialect] = Counter()
    for name in names:
        if name.startswith("lm_head.") or ".self_attn." in name or ".mlp." in name:
            counts["hf"] += 1
        elif name.startswith("model."):
            counts["hf-saved"] += 1
        else:
            counts["official"] += 1
            if ".ffn.experts.w" in name:
                return "stacked"
    return max(counts, key=lambda name: counts[name]) if counts else "official"
