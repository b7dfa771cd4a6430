"""Weights as kernels read them: matrices in their stored format and in place, vectors in fp32, experts one by one.

A `Weights` hides where the bytes lie: `ModelWeights` gives the parameters of a torch model, packed.py's
`PackedWeights` a checkpoint on disk that is never dequantised.
Names are the official ones, the trailing `.weight` left out or not: `embed`, `layers.3.attn.wq_a`,
`layers.3.ffn.experts.7.w1`, `layers.3.attn_norm`, `layers.3.hc_attn_fn`, `mtp.0.e_proj`.
Owns the views. Never computes with them, and never copies a matrix. spec/model.md 5 (formats) and 7 (names).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
from rorqual.model.quant import unpack_fp4_weight, unpack_fp8_weight

if TYPE_CHECKING:
    from rorqual.model.transformer import Model

__all__ = ["Drafter", "Expert", "Kind", "ModelWeights", "Packed", "Weights", "block_prefix", "split_expert"]

Kind = Literal["f32", "bf16", "fp8", "fp4"]
Drafter = Literal["mtp", "dspark"]
_EXPERT = re.compile(
    r"(?P<block>.*\.)ffn\.experts\.(?P<expert>\d+)\.(?P<matrix>w[123])(?:\.weight)?", re.DOTALL
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A matrix [out, in] as it is stored, row-major and contiguous."""

    data: Tensor
    """`f32`: float32 [out, in]; `bf16`: bfloat16 [out, in]; `fp8`: uint8 [out, in], e4m3 codes; `fp4`: uint8
    [out, in / 2], e2m1 pairs, the even element in the low nibble."""
    scale: Tensor | None
    """ue8m0, uint8. `fp8`: [ceil(out / block), ceil(in / block)]; `fp4`: [out, ceil(in / block)]; else None."""
    kind: Kind
    shape: tuple[int, int]
    block: int
    """Elements one scale covers: along both axes for `fp8` (128; V4.1 32), along K for `fp4` (32); else 0."""

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as `dtype` [out, in]: a copy, for tests and slow paths."""
        if self.scale is None:
            return self.data.to(dtype, copy=True)
        if self.kind == "fp8":
            codes = self.data.view(torch.float8_e4m3fn)
            return unpack_fp8_weight(codes, self.scale, block=self.block, dtype=dtype)
        return unpack_fp4_weight(self.data, self.scale, block=self.block, dtype=dtype)


class Expert(NamedTuple):
    """One routed expert: w2 (silu(w1 x) * w3 x)."""

    w1: Packed
    """[expert width, hidden]"""
    w3: Packed
    """[expert width, hidden]"""
    w2: Packed
    """[hidden, expert width]"""


class Weights(Protocol):
    """Where a runner gets a model's weights. Tensors are on the CPU and stay valid while the source is open."""

    @property
    def config(self) -> Config: ...

    @property
    def drafter(self) -> Drafter | None:
        """Which speculative head the weights hold: `mtp` (spec/model.md 6.1), `dspark` (6.2; unsupported)."""

    @property
    def experts_resident(self) -> bool:
        """Whether `matrix` gives routed experts that stay where they are; else use `load_experts`."""

    def matrix(self, name: str) -> Packed:
        """The matrix `name`. Raises CheckpointError: no such matrix, or its values are damaged."""

    def vector(self, name: str) -> Tensor:
        """Norms, `ape`, `attn_sink`, `hc_*`, `gate.bias`: contiguous fp32. Raises CheckpointError as `matrix`."""

    def table(self, name: str) -> Tensor:
        """`layers.N.ffn.gate.tid2eid`, int64 [vocab, experts per token], every entry a valid expert."""

    def load_experts(self, layer: int, ids: Sequence[int]) -> list[Expert]:
        """The routed experts `ids` of `layer`, in that order. `layer` num_hidden_layers + k is MTP block k.

        What is returned stays valid until the next call, no longer. Raises CheckpointError (damaged values, a
        read that fails), IndexError (no such layer or expert).
        """

    def prefetch(self, token_ids: Sequence[int]) -> None:
        """Says which tokens come next: experts that the hash layers will pick for them are read ahead.

        Changes no result, and ids outside the vocabulary are passed over. Does nothing where experts are resident.
        """


def split_expert(name: str) -> tuple[str, int] | None:
    """`layers.3.ffn.experts.7.w1` as (`layers.3.ffn.experts.w1`, 7); None for all other names."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    return f"{match['block']}ffn.experts.{match['matrix']}", int(match["expert"])


def block_prefix(config: Config, layer: int, *, drafter: Drafter | None) -> str:
    """The prefix of block `layer`'s names; MTP blocks follow the layers. IndexError: there is no such block."""
    count = config.num_hidden_layers
    blocks = count + (config.num_nextn_predict_layers if drafter == "mtp" else 0)
    if not 0 <= layer < blocks:
        raise IndexError(f"layer {layer}: the model has {count} layers and {blocks - count} MTP blocks")
    return f"layers.{layer}." if layer < count else f"mtp.{layer - count}."


class ModelWeights:
    """A torch model's own parameters, looked up anew at every call: replaced ones are seen.

    Matrices are the parameters themselves (fp32 or bf16, on the CPU), stacked experts views of them; fp32 vectors
    too, bf16 vectors are converted. Raises CheckpointError for parameters that a kernel cannot read in place.
    """

    experts_resident = True

    def __init__(self, model: Model) -> None:
        self._model = model
        self._names = dict(zip(model.official_state(), model.state_dict(), strict=True))
        self._places: list[tuple[dict[str, Any], str]] = [
            (table, leaf)
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for leaf, tensor in table.items()
            if tensor is not None
        ]
        self._converted = [
            (table, leaf)
            for table, leaf in self._places
            if table[leaf].dtype == torch.bfloat16 and table[leaf].dim() < 2
        ]

    @property
    def config(self) -> Config:
        return self._model.config

    @property
    def drafter(self) -> Drafter | None:
        return "mtp" if len(self._model.mtp) else None

    def matrix(self, name: str) -> Packed:
        """See `Weights.matrix`."""
        expert = split_expert(name)
        if expert is None:
            return _plain(name, self._tensor(name))
        stacked, index = expert
        tensor = self._tensor(stacked)
        if index >= len(tensor):
            raise IndexError(f"{name}: the model has experts 0 to {len(tensor) - 1}")
        return _plain(name, tensor[index])

    def vector(self, name: str) -> Tensor:
        """See `Weights.vector`."""
        return self._tensor(name).float().contiguous()

    def table(self, name: str) -> Tensor:
        """See `Weights.table`."""
        return self._tensor(name)

    def load_experts(self, layer: int, ids: Sequence[int]) -> list[Expert]:
        """See `Weights.load_experts`; these stay valid as long as the parameters."""
        prefix = block_prefix(self.config, layer, drafter=self.drafter)
        return [
            Expert(*(self.matrix(f"{prefix}ffn.experts.{expert}.{w}") for w in ("w1", "w3", "w2")))
            for expert in ids
        ]

    def prefetch(self, token_ids: Sequence[int]) -> None:
        """See `Weights.prefetch`."""

    def addresses(self) -> list[int]:
        """Where every tensor lies now, and the version of those that `vector` converts.

        While it stays the same, what `matrix` and `vector` gave still holds; updates in place are seen.
        """
        addresses = [table[leaf].data_ptr() for table, leaf in self._places]
        return addresses + [table[leaf]._version for table, leaf in self._converted]

    def _tensor(self, name: str) -> Tensor:
        path = self._names.get(name) or self._names.get(f"{name}.weight")
        if path is None:
            raise CheckpointError(f"{name}: the model has no such tensor")
        module, _, leaf = path.rpartition(".")
        tensor: Tensor = getattr(self._model.get_submodule(module), leaf)
        if tensor.device.type != "cpu":
            raise CheckpointError(f"{name} is on {tensor.device}: native kernels read CPU memory")
        return tensor.detach()


def _plain(name: str, tensor: Tensor) -> Packed:
    """An fp32 or bf16 parameter as a `Packed` over the same memory."""
    kinds: dict[torch.dtype, Kind] = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if tensor.dim() != 2 or tensor.dtype not in kinds or not tensor.is_contiguous():
        raise CheckpointError(
            f"{name}: {tensor.dtype} {list(tensor.shape)}, expected a contiguous float32 or bfloat16 matrix"
        )
    rows, columns = tensor.shape
    return Packed(data=tensor, scale=None, kind=kinds[tensor.dtype], shape=(rows, columns), block=0)
