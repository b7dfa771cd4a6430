"""What a model directory holds, from config.json and the headers alone: nothing of the data is read.

Owns the summary that `rorqual model inspect` prints. Torch-free. spec/model.md 1 and 7.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rorqual.model import cost
from rorqual.model.config import Config
from rorqual.model.survey import survey

__all__ = ["Inspection", "Storage", "describe_schedule", "inspect"]

CONTEXT = 1 << 20
KINDS = {
    "F32": "fp32",
    "BF16": "bf16",
    "F16": "fp16",
    "F8_E4M3": "fp8",
    "I8": "fp4",
    "I64": "table",
    "I32": "table",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """Tensors of one sort."""

    tensors: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A checkpoint's summary. Bytes are those of the data in the files."""

    directory: Path
    config: Config
    schedule: str
    """Layers in words, as `2 window, 20 x (csa, hca), csa`."""
    dialect: str
    drafter: str | None
    files: int
    file_bytes: int
    parameters: cost.Parameters
    by_kind: dict[str, Storage]
    """`fp32`, `bf16`, `fp16`, `fp8`, `fp4`, their `scales`, expert `table`s, `other`."""
    by_part: dict[str, Storage]
    """`experts`, `attention`, `shared experts`, `embedding and head`, `mixing, gates and norms`, `drafter`."""
    expert_bytes: int
    """One routed expert of layer 0, scales included."""
    resident_bytes: int
    """What a runner that reads experts on demand keeps mapped: all but the routed experts."""
    kv_context: int
    kv_bytes: int
    """Cache of one sequence of `kv_context` tokens, by the formats (cost.py)."""
    problems: list[str]
    """What is wrong with names, shapes and dtypes: none, and the checkpoint opens."""

    def to_dict(self) -> dict[str, Any]:
        """As one JSON document."""
        return {
            "directory": str(self.directory),
            "config": self.config.to_dict(),
            "schedule": self.schedule,
            "layer_kinds": list(self.config.layer_kinds),
            "dialect": self.dialect,
            "drafter": self.drafter,
            "files": self.files,
            "file_bytes": self.file_bytes,
            "parameters": {
                "total": self.parameters.total,
                "mtp": self.parameters.mtp,
                "active": self.parameters.active,
                "active_without_embedding": self.parameters.active_without_embedding,
            },
            "bytes_by_kind": {name: one.nbytes for name, one in self.by_kind.items()},
            "tensors_by_kind": {name: one.tensors for name, one in self.by_kind.items()},
            "bytes_by_part": {name: one.nbytes for name, one in self.by_part.items()},
            "expert_bytes": self.expert_bytes,
            "resident_bytes": self.resident_bytes,
            "kv_context": self.kv_context,
            "kv_bytes": self.kv_bytes,
            "problems": self.problems,
        }


def inspect(directory: str | Path) -> Inspection:
    """Summarises `directory`. Raises ConfigError, CheckpointError: there is nothing that could be summarised."""
    directory = Path(directory)
    config = Config.from_file(directory)
    found = survey(directory, config)
    kinds: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    expert = 0
    for group, scales in ((found.weights, False), (found.scales, True)):
        for name, members in group.items():
            for member in {id(member.stored): member for member in members}.values():
                stored = member.stored
                kind = "scales" if scales else KINDS.get(stored.dtype, "other")
                share = stored.nbytes // 2 if member.place.half is not None else stored.nbytes
                kinds[kind] += share
                parts[_part(name)] += share
                counts[kind] += 1
                counts[_part(name)] += 1
                if name.startswith("layers.0.ffn.experts."):
                    expert += share if member.place.expert == 0 else 0
                    expert += share // config.n_routed_experts if member.place.expert is None else 0
    for stored in found.drafter_parts:
        kinds["drafter"] += stored.nbytes
        parts["drafter"] += stored.nbytes
        counts["drafter"] += 1
    return Inspection(
        directory=directory,
        config=config,
        schedule=describe_schedule(config),
        dialect=found.dialect,
        drafter=found.drafter,
        files=len(found.shards),
        file_bytes=sum(shard.size for shard in found.shards),
        parameters=cost.parameters(config),
        by_kind={kind: Storage(tensors=counts[kind], nbytes=kinds[kind]) for kind in sorted(kinds)},
        by_part={part: Storage(tensors=counts[part], nbytes=parts[part]) for part in sorted(parts)},
        expert_bytes=expert,
        resident_bytes=sum(kinds.values()) - parts["experts"] - parts["drafter"],
        kv_context=CONTEXT,
        kv_bytes=cost.kv_bytes(config, context=CONTEXT),
        problems=list(found.problems()),
    )


def describe_schedule(config: Config) -> str:
    """The layers in words, pairs that repeat taken together: `2 window, 20 x (csa, hca), csa`."""
    kinds = list(config.layer_kinds)
    out: list[str] = []
    while kinds:
        pair, times = kinds[:2], 0
        while len(pair) == 2 and pair[0] != pair[1] and kinds[2 * times : 2 * times + 2] == pair:
            times += 1
        if times > 1:
            out.append(f"{times} x ({pair[0]}, {pair[1]})")
            kinds = kinds[2 * times :]
            continue
        kind, run = next(groupby(kinds))
        count = len(list(run))
        out.append(f"{count} {kind}" if count > 1 else kind)
        kinds = kinds[count:]
    return ", ".join(out)


def _part(name: str) -> str:
    if name.startswith("mtp."):
        return "experts" if ".ffn.experts." in name else "drafter"
    if ".ffn.experts." in name:
        return "experts"
    if ".shared_experts." in name:
        return "shared experts"
    if name.startswith(("embed.", "head.")):
        return "embedding and head"
    if ".attn." in name:
        return "attention"
    return "mixing, gates and norms"
