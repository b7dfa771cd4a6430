"""How a checkpoint stores each tensor: names, dtypes and order of the official layout and of HF's save_pretrained.

| format   | routed experts | dense linears      | embed, head, gates, norms | sinks, ape, hc, bias |
|----------|----------------|--------------------|---------------------------|----------------------|
| official | FP4 by 32      | FP8 128x128        | BF16                      | FP32                 |
| fp8      | FP8 128x128    | FP8 128x128        | BF16                      | FP32                 |
| bf16     | BF16           | BF16               | BF16                      | FP32                 |
| fp32     | FP32           | FP32               | FP32                      | FP32                 |

Owns that table. Writes nothing: writer.py does. Torch-free. spec/model.md 5 and 7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
from rorqual.model.shapes import expected_shapes
from rorqual.model.shards import DTYPES

__all__ = [
    "FORMATS",
    "FP8_BLOCK",
    "LAYOUTS",
    "Format",
    "Layout",
    "Planned",
    "Unit",
    "config_document",
    "plan_units",
]

Format = Literal["official", "fp8", "bf16", "fp32"]
Layout = Literal["official", "hf"]
FORMATS: tuple[Format, ...] = ("official", "fp8", "bf16", "fp32")
LAYOUTS: tuple[Layout, ...] = ("official", "hf")
FP8_BLOCK = 128
FP4_BLOCK = 32
_DENSE = re.compile(
    r"(layers|mtp)\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|attn\.indexer\.wq_b|ffn\.shared_experts\.w[123]|[eh]_proj)"
    r"\.weight"
)
_FP32 = re.compile(r"(.*\.)?(ape|attn_sink|gate\.bias|hc_(attn|ffn|head)_(fn|base|scale))")
_HF_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "head.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that a file is to hold."""

    name: str
    dtype: str
    """A key of `shards.DTYPES`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is written together: a tensor, or a packed matrix and its scale."""

    source: str
    """The tensor's name for `Weights`: official, experts one by one."""
    tensors: tuple[Planned, ...]

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for planned in self.tensors)


def plan_units(
    config: Config,
    store: Format | Callable[[str], str],
    *,
    layout: Layout = "official",
    mtp: bool = True,
) -> list[Unit]:
    """All units of a checkpoint, in the order of the official files: embedding, layers, head, MTP.

    `store`: a format, or a function from a unit's source to its dtype (`F32`, `BF16`, `F8_E4M3`, `I8`, `I64`).
    Raises CheckpointError: HF's layout with packed weights, or FP4 with an odd number of columns.
    """
    if layout == "hf" and store in ("official", "fp8"):
        raise CheckpointError("HF's layout holds plain weights: choose bf16 or fp32 with it")
    dtype_of = store if callable(store) else _dtypes(store)
    shapes = expected_shapes(config, mtp=mtp and layout == "official")
    return [
        Unit(source, tuple(_planned(source, dtype_of(source), shape, layout)))
        for source, shape in _sources(shapes, config)
    ]


def config_document(raw: dict[str, Any], dtypes: set[str], *, experts: str) -> dict[str, Any]:
    """`raw` (a config.json) with what it says of the storage set right: `dtypes` are those the files hold.

    `experts` is the dtype of the routed experts.
    """
    out = {name: value for name, value in raw.items() if name not in ("quantization_config", "expert_dtype")}
    if "F8_E4M3" in dtypes:
        out["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    if experts in ("I8", "F8_E4M3"):
        out["expert_dtype"] = "fp4" if experts == "I8" else "fp8"
    out["torch_dtype"] = "bfloat16" if dtypes & {"BF16", "F8_E4M3", "I8"} else "float32"
    return out


def _dtypes(store: Format) -> Callable[[str], str]:
    def dtype_of(source: str) -> str:
        if source.endswith("tid2eid"):
            return "I64"
        if store == "fp32" or _FP32.fullmatch(source):
            return "F32"
        if ".ffn.experts." in source and store in ("official", "fp8"):
            return "I8" if store == "official" else "F8_E4M3"
        return "F8_E4M3" if store in ("official", "fp8") and _DENSE.fullmatch(source) else "BF16"

    return dtype_of


def _sources(shapes: dict[str, tuple[int, ...]], config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Source names with shapes; w1, w2, w3 of an expert follow each other, so that one read brings them."""
    tail = [name for name in shapes if not name.startswith(("layers.", "mtp.", "embed."))]
    order = ["embed.weight"]
    order += [name for name in shapes if name.startswith("layers.")]
    order += [*tail, *(name for name in shapes if name.startswith("mtp."))]
    for name in order:
        stem, split, matrix = name.partition(".ffn.experts.")
        if not split:
            yield name, shapes[name]
        elif matrix == "w1":
            for expert in range(config.n_routed_experts):
                for one in ("w1", "w2", "w3"):
                    yield f"{stem}.ffn.experts.{expert}.{one}.weight", shapes[f"{stem}{split}{one}"][1:]


def _planned(source: str, dtype: str, shape: tuple[int, ...], layout: Layout) -> Iterator[Planned]:
    name = source if layout == "official" else _hf_name(source)
    scale = f"{name.removesuffix('.weight')}.scale"
    if dtype == "I8":
        rows, columns = shape
        if columns % 2:
            raise CheckpointError(
                f"{source}: FP4 packs pairs of columns, {columns} is odd: choose fp8 or bf16"
            )
        yield Planned(name, dtype, (rows, columns // 2))
        yield Planned(scale, "F8_E8M0", (rows, -(-columns // FP4_BLOCK)))
        return
    yield Planned(name, dtype, shape)
    if dtype == "F8_E4M3":
        yield Planned(scale, "F8_E8M0", (-(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK)))


def _hf_name(source: str) -> str:
    if source in _HF_TOP:
        return _HF_TOP[source]
    return "model." + source.replace(".attn.kv_norm.", ".attn.norm.")
