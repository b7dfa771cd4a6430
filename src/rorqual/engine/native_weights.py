"""NativeWeights: pointers to a model's weights, laid out as native/cpu/rorqual_cpu.h wants them.

Owns the mirror structures and references to every tensor they point into. Copies nothing but what `Weights.vector`
converts. `current()` tells whether a torch model's parameters are still where they were.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from rorqual.kernels.cpu import LayerPointers, MatrixPointers, ModelPointers, MtpPointers
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
from rorqual.model.layers import Rope
from rorqual.model.weights import ModelWeights, Packed, Weights

__all__ = ["NativeWeights", "matrix_pointers"]

TYPES = {"f32": 0, "bf16": 1, "fp8": 2, "fp4": 3}

ATTENTION = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")


def matrix_pointers(packed: Packed) -> MatrixPointers:
    """RqMatrix of a matrix; `packed` must outlive it."""
    scale = None if packed.scale is None else packed.scale.data_ptr()
    return MatrixPointers(packed.data.data_ptr(), scale, TYPES[packed.kind], packed.block)


class NativeWeights:
    """Pointers into `weights`. Raises CheckpointError for a matrix of another shape or type than the kernels read."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.config = weights, weights.config
        self._held: list[Any] = []
        self._addresses = self._now()
        config = self.config
        self.model = _dimensions(config)
        tables = [Rope(config, compressed=kind)._frequencies for kind in (False, True)]
        self._held += tables
        self.model.freqs_window, self.model.freqs_compressed = (table.data_ptr() for table in tables)
        vocab, hidden = config.vocab_size, config.hidden_size
        self.model.embed = self._matrix("embed", vocab, hidden)
        if self.model.embed.type > 1:
            raise CheckpointError("embed: the native forward reads float32 and bfloat16 embeddings")
        self.model.head = self._matrix("head", vocab, hidden)
        self.model.norm = self._vector("norm", hidden)
        self._site(self.model.mix, "hc_head", rows=config.hc_mult)
        self.layers = (LayerPointers * config.num_hidden_layers)()
        for number, (layer, ratio) in enumerate(zip(self.layers, config.compress_ratios, strict=True)):
            self._block(layer, f"layers.{number}.", ratio=ratio, hashed=number < config.num_hash_layers)
        self.mtp: MtpPointers | None = None
        if weights.drafter == "mtp":
            self._mtp_layer = LayerPointers()
            self._block(self._mtp_layer, "mtp.0.", ratio=0, hashed=False)
            self.mtp = MtpPointers(layer=ctypes.addressof(self._mtp_layer))
            self.mtp.enorm, self.mtp.hnorm = (
                self._vector("mtp.0.enorm", hidden),
                self._vector("mtp.0.hnorm", hidden),
            )
            self.mtp.e_proj = self._matrix("mtp.0.e_proj", hidden, hidden)
            self.mtp.h_proj = self._matrix("mtp.0.h_proj", hidden, hidden)
            self.mtp.norm = self._vector("mtp.0.norm", hidden)
            self._site(self.mtp.mix, "mtp.0.hc_head", rows=config.hc_mult)

    def current(self) -> bool:
        """Whether every tensor is still where it was."""
        return self._now() == self._addresses

    def _now(self) -> list[int]:
        return self._weights.addresses() if isinstance(self._weights, ModelWeights) else []

    def _block(self, layer: LayerPointers, prefix: str, *, ratio: int, hashed: bool) -> None:
        config = self.config
        hidden, width, rank = config.hidden_size, config.head_dim, config.q_lora_rank
        heads, inner = config.num_attention_heads * width, config.o_groups * config.o_lora_rank
        layer.ratio, layer.overlap = ratio, int(bool(ratio) and ratio == config.csa_ratio)
        shapes = (
            (rank, hidden),
            (heads, rank),
            (width, hidden),
            (inner, heads // config.o_groups),
            (hidden, inner),
        )
        for name, shape in zip(ATTENTION, shapes, strict=True):
            setattr(layer, name, self._matrix(f"{prefix}attn.{name}", *shape))
        sites = (config.hc_mult + 2) * config.hc_mult
        self._site(layer.attn_site, f"{prefix}hc_attn", rows=sites)
        self._site(layer.ffn_site, f"{prefix}hc_ffn", rows=sites)
        layer.attn_norm, layer.ffn_norm = (self._vector(f"{prefix}{n}_norm", hidden) for n in ("attn", "ffn"))
        layer.q_norm = self._vector(f"{prefix}attn.q_norm", rank)
        layer.kv_norm = self._vector(f"{prefix}attn.kv_norm", width)
        layer.sink = self._vector(f"{prefix}attn.attn_sink", config.num_attention_heads)
        if ratio:
            self._compressor(
                layer.main, f"{prefix}attn.compressor", ratio=ratio, width=width, coff=1 + layer.overlap
            )
        if layer.overlap:
            index, count = config.index_head_dim, config.index_n_heads
            self._compressor(
                layer.index, f"{prefix}attn.indexer.compressor", ratio=ratio, width=index, coff=2
            )
            layer.index_wq_b = self._matrix(f"{prefix}attn.indexer.wq_b", count * index, rank)
            layer.index_proj = self._matrix(f"{prefix}attn.indexer.weights_proj", count, hidden)
        layer.gate = self._matrix(f"{prefix}ffn.gate", config.n_routed_experts, hidden)
        if hashed:
            layer.tid2eid = self._keep(self._weights.table(f"{prefix}ffn.gate.tid2eid").contiguous())
        else:
            layer.bias = self._vector(f"{prefix}ffn.gate.bias", config.n_routed_experts)
        self._experts(layer, prefix)

    def _experts(self, layer: LayerPointers, prefix: str) -> None:
        config, hidden = self.config, self.config.hidden_size
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            layer.shared1 = self._matrix(f"{prefix}ffn.shared_experts.w1", width, hidden)
            layer.shared3 = self._matrix(f"{prefix}ffn.shared_experts.w3", width, hidden)
            layer.shared2 = self._matrix(f"{prefix}ffn.shared_experts.w2", hidden, width)
        if not self._weights.experts_resident:
            return
        width, count = config.moe_intermediate_size, config.n_routed_experts
        experts = (MatrixPointers * (3 * count))()
        for number in range(count):
            for place, (name, shape) in enumerate(
                (("w1", (width, hidden)), ("w3", (width, hidden)), ("w2", (hidden, width)))
            ):
                experts[3 * number + place] = self._matrix(f"{prefix}ffn.experts.{number}.{name}", *shape)
        self._held.append(experts)
        layer.experts = ctypes.addressof(experts)

    def _compressor(self, out: Any, prefix: str, *, ratio: int, width: int, coff: int) -> None:
        out.wkv = self._matrix(f"{prefix}.wkv", coff * width, self.config.hidden_size)
        out.wgate = self._matrix(f"{prefix}.wgate", coff * width, self.config.hidden_size)
        out.ape = self._vector(f"{prefix}.ape", ratio * coff * width)
        out.norm = self._vector(f"{prefix}.norm", width)

    def _site(self, out: Any, prefix: str, *, rows: int) -> None:
        wide = self.config.hc_mult * self.config.hidden_size
        out.fn, out.base = self._vector(f"{prefix}_fn", rows * wide), self._vector(f"{prefix}_base", rows)
        out.scale = self._vector(f"{prefix}_scale", 1 if rows == self.config.hc_mult else 3)

    def _matrix(self, name: str, rows: int, columns: int) -> MatrixPointers:
        packed = self._weights.matrix(name)
        if packed.shape != (rows, columns):
            raise CheckpointError(
                f"{name}: shape {list(packed.shape)}, config.json expects {[rows, columns]}"
            )
        self._held.append(packed)
        return matrix_pointers(packed)

    def _vector(self, name: str, count: int) -> int:
        tensor = self._weights.vector(name)
        if tensor.numel() != count:
            raise CheckpointError(f"{name}: {tensor.numel()} values, config.json expects {count}")
        return self._keep(tensor)

    def _keep(self, tensor: Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()


def _dimensions(config: Config) -> ModelPointers:
    return ModelPointers(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        rope_dim=config.qk_rope_head_dim,
        q_rank=config.q_lora_rank,
        groups=config.o_groups,
        o_rank=config.o_lora_rank,
        window=config.sliding_window,
        index_heads=config.index_n_heads,
        index_dim=config.index_head_dim,
        index_topk=config.index_topk,
        experts=config.n_routed_experts,
        per_token=config.num_experts_per_tok,
        expert_width=config.moe_intermediate_size,
        shared_width=config.moe_intermediate_size * config.n_shared_experts,
        streams=config.hc_mult,
        iters=config.hc_sinkhorn_iters,
        hc_eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        route_scale=config.routed_scaling_factor,
        limit=config.swiglu_limit,
        head_scale=config.head_dim**-0.5,
        index_scale=(config.index_head_dim * config.index_n_heads) ** -0.5,
    )
