"""What a configuration costs: KV-cache bytes, single-token FLOPs, parameters; V3.2 and GQA8-bf16 beside it.

    KV = CSA layers: n/4 * (entry + index key)  +  HCA layers: n/128 * entry  +  all layers: min(n, W) * entry
    entry = nope e4m3 + rope bf16 + a scale byte per 64 nope, padded to 8 of them (584 B)
    index key = e2m1 pairs + a scale byte per 32 (68 B)

FLOPs are "equivalent FP8": bf16 counts 2, FP8 and FP8 x FP4 GEMMs 1, the FP4 indexer 0.5, as in the report's
figure 1. Owns the byte sizes of the cache formats (quant.py packs them). Torch-free.
spec/model.md 1.3 and 3; tests hold it equal to spec/kv_flops.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from rorqual.model.config import Config
from rorqual.model.shapes import expected_shapes

__all__ = [
    "V32",
    "Flops",
    "KvBytes",
    "Parameters",
    "Reference",
    "Row",
    "entry_bytes",
    "flops_breakdown",
    "flops_per_token",
    "gqa8_bf16",
    "index_key_bytes",
    "kv_breakdown",
    "kv_bytes",
    "parameters",
    "state_bytes",
    "table",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvBytes:
    """Bytes of one sequence's cache by part."""

    csa: int
    """Main entries of CSA layers."""
    index: int
    """Indexer keys of CSA layers."""
    hca: int
    window: int
    """Window rings of all layers."""

    @property
    def total(self) -> int:
        return self.csa + self.index + self.hca + self.window


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Equivalent-FP8 FLOPs of one decoded token by part."""

    weights: float
    """All GEMMs with weights, LM head included."""
    indexer: float
    csa: float
    """Core attention of CSA layers, window included."""
    hca: float
    window: float
    """Core attention of window-only layers."""

    @property
    def total(self) -> float:
        return self.weights + self.indexer + self.csa + self.hca + self.window


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameter counts. Hash tables (`tid2eid`) are not parameters."""

    total: int
    """Without the MTP head."""
    mtp: int
    active: int
    """Touched by one token: its routed experts, embedding table and LM head included."""
    active_without_embedding: int
    """The count that is published as "active"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A model that V4 is compared with: every token of every layer stays in its cache."""

    name: str
    layers: int
    kv_bytes_per_token_layer: int
    flops_fixed: float | None = None
    """Equivalent-FP8 FLOPs per token that do not depend on the context; None where no figure is published."""
    flops_per_context: float = 0.0
    """Further FLOPs for each token of context."""
    flops_per_key: float = 0.0
    """Further FLOPs for each attended key, of which there are at most `top_k`."""
    top_k: int = 0

    def kv_bytes(self, context: int) -> int:
        """Cache bytes of a sequence of `context` tokens."""
        return self.layers * _tokens(context) * self.kv_bytes_per_token_layer

    def flops_per_token(self, context: int) -> float | None:
        """Equivalent-FP8 FLOPs of the token at `context`, or None where the reference has no such figure."""
        if self.flops_fixed is None:
            return None
        keys = min(_tokens(context), self.top_k)
        return self.flops_fixed + self.flops_per_context * context + self.flops_per_key * keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of `table`. Ratios are fractions (0.1 is 10 %); None where there is nothing to compare."""

    name: str
    context: int
    kv_bytes: int
    kv_parts: KvBytes | None
    kv_of_v32: float | None
    kv_of_gqa8: float | None
    """Of GQA8-bf16 with the same number of layers."""
    flops: float | None
    flops_of_v32: float | None
    parameters: int | None
    active_parameters: int | None


def _tokens(context: int) -> int:
    if context < 0:
        raise ValueError(f"context is {context} tokens: expected 0 or more")
    return context


def entry_bytes(head_dim: int, rope_dim: int, *, block: int = 64) -> int:
    """Bytes of a packed window or compressed entry: 584 at 512 with 64 rotating dims."""
    nope = head_dim - rope_dim
    scales = -(-nope // block)
    return nope + 2 * rope_dim + -(-scales // 8) * 8


def index_key_bytes(index_head_dim: int, *, block: int = 32) -> int:
    """Bytes of a packed indexer key: 68 at 128."""
    return -(-index_head_dim // 2) + -(-index_head_dim // block)


def kv_breakdown(config: Config, *, context: int) -> KvBytes:
    """Bytes of the cache of one sequence of `context` tokens, by part. Compressor tails: `state_bytes`."""
    n = _tokens(context)
    entry = entry_bytes(config.head_dim, config.qk_rope_head_dim)
    ratios = [ratio for ratio in config.compress_ratios if ratio]
    csa = sum(n // ratio for ratio in ratios if ratio == config.csa_ratio)
    hca = sum(n // ratio for ratio in ratios if ratio != config.csa_ratio)
    return KvBytes(
        csa=csa * entry,
        index=csa * index_key_bytes(config.index_head_dim),
        hca=hca * entry,
        window=config.num_hidden_layers * min(n, config.sliding_window) * entry,
    )


def kv_bytes(config: Config | Reference, *, context: int) -> int:
    """Cache bytes of one sequence of `context` tokens. Raises ValueError when `context` is negative."""
    return (
        config.kv_bytes(context)
        if isinstance(config, Reference)
        else kv_breakdown(config, context=context).total
    )


def state_bytes(config: Config) -> int:
    """Bytes of the fp32 partial-block state of all compressors of one sequence (spec/model.md 2.8)."""
    total = 0
    for ratio in config.compress_ratios:
        if ratio == config.csa_ratio:
            total += 2 * (2 * ratio) * 2 * (config.head_dim + config.index_head_dim) * 4
        elif ratio:
            total += 2 * ratio * config.head_dim * 4
    return total


def flops_breakdown(config: Config, context: int, *, bf16: float = 2.0, fp4: float = 0.5) -> Flops:
    """FLOPs of decoding one token at `context`, by part; `bf16` and `fp4` weigh these against FP8's 1."""
    n, c, d = _tokens(context), config, config.hidden_size
    width, group = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    window = min(n, c.sliding_window)
    core = 2 * 2 * width * bf16  # a key: q.k and w.v, both of head_dim since K = V
    weights = 2 * bf16 * c.vocab_size * d
    parts = {"csa": 0.0, "hca": 0.0, "window": 0.0}
    indexer = 0.0
    experts = 3 * d * c.moe_intermediate_size * (c.n_shared_experts + c.num_experts_per_tok)
    for layer, ratio in enumerate(c.compress_ratios):
        fp8 = (
            d * c.q_lora_rank
            + c.q_lora_rank * width
            + d * c.head_dim
            + width * c.o_lora_rank
            + group * d
            + experts
        )
        wide = d * c.n_routed_experts + 2 * (2 + c.hc_mult) * c.hc_mult * c.hc_mult * d
        kind, keys = c.kind(layer), window
        if ratio:
            rows = (2 if kind == "csa" else 1) * c.head_dim
            wide += 2 * d * rows + ratio * rows
            keys += min(n // ratio, c.index_topk) if kind == "csa" else n // ratio
        if kind == "csa":
            fp8 += c.q_lora_rank * c.index_n_heads * c.index_head_dim
            wide += d * c.index_n_heads + 2 * d * 2 * c.index_head_dim + ratio * 2 * c.index_head_dim
            indexer += 2 * c.index_n_heads * c.index_head_dim * (n // ratio) * fp4
        weights += 2 * (fp8 + bf16 * wide)
        parts[kind] += core * keys
    return Flops(weights=weights, indexer=indexer, **parts)


def flops_per_token(config: Config | Reference, context: int) -> float:
    """Equivalent-FP8 FLOPs of decoding one token at `context`. ValueError where no figure exists."""
    if isinstance(config, Config):
        return flops_breakdown(config, context).total
    flops = config.flops_per_token(context)
    if flops is None:
        raise ValueError(f"no FLOPs are published for {config.name}: compare its KV bytes")
    return flops


def parameters(config: Config) -> Parameters:
    """Parameter counts from the shapes of all tensors."""
    total = mtp = idle = 0
    unused = 1 - config.num_experts_per_tok / config.n_routed_experts
    for name, shape in expected_shapes(config).items():
        if name.endswith("tid2eid"):
            continue
        if name.startswith("mtp."):
            mtp += prod(shape)
        else:
            total += prod(shape)
            idle += round(prod(shape) * unused) if ".ffn.experts." in name else 0
    embedding = config.vocab_size * config.hidden_size
    active = total - idle
    return Parameters(total=total, mtp=mtp, active=active, active_without_embedding=active - embedding)


def _v32() -> Reference:
    """DeepSeek-V3.2: MLA absorbed, 512 e4m3 + 4 fp32 scales + 64 bf16, FP8 index keys of 132 B, top 2048."""
    d, heads, layers, index = 7168, 128, 61, 64 * 128
    attention = d * 1536 + 1536 * heads * 192 + d * 576 + heads * 128 * d + heads * 128 * 512 * 2
    attention += 1536 * index + d * 128 + d * 64
    moe = 58 * (3 * d * 2048 * 9 + d * 256) + 3 * 3 * d * 18432
    return Reference(
        name="V3.2",
        layers=layers,
        kv_bytes_per_token_layer=(512 + 4 * 4 + 64 * 2) + (128 + 4),
        flops_fixed=2 * (layers * attention + moe) + 2 * 2 * 129280 * d,
        flops_per_context=2 * index * layers,
        flops_per_key=2 * heads * (576 + 512) * layers * 2,
        top_k=2048,
    )


V32 = _v32()
"""DeepSeek-V3.2, the model the published ratios refer to."""


def gqa8_bf16(layers: int, *, head_dim: int = 128) -> Reference:
    """Grouped-query attention with 8 KV heads in bf16, the common baseline, with `layers` layers."""
    return Reference(name="GQA8 bf16", layers=layers, kv_bytes_per_token_layer=2 * 8 * head_dim * 2)


def table(contexts: Sequence[int], *, configs: Mapping[str, Config] | None = None) -> list[Row]:
    """A `Row` per context and configuration, then V3.2 and a GQA8 of the first configuration's depth.

    `configs` maps a display name to a configuration; V4-Pro and V4-Flash when absent.
    """
    if configs is None:
        configs = {"V4-Pro": Config.preset("pro"), "V4-Flash": Config.preset("flash")}
    counts = {name: parameters(config) for name, config in configs.items()}
    rows = []
    for context in contexts:
        v32_kv, v32_flops = V32.kv_bytes(context), flops_per_token(V32, context)
        for name, config in configs.items():
            parts = kv_breakdown(config, context=context)
            gqa8 = gqa8_bf16(config.num_hidden_layers).kv_bytes(context)
            flops = flops_per_token(config, context)
            rows.append(
                Row(
                    name=name,
                    context=context,
                    kv_bytes=parts.total,
                    kv_parts=parts,
                    kv_of_v32=parts.total / v32_kv if v32_kv else None,
                    kv_of_gqa8=parts.total / gqa8 if gqa8 else None,
                    flops=flops,
                    flops_of_v32=flops / v32_flops,
                    parameters=counts[name].total,
                    active_parameters=counts[name].active_without_embedding,
                )
            )
        layers = next((config.num_hidden_layers for config in configs.values()), V32.layers)
        for reference in (V32, gqa8_bf16(layers)):
            held = reference.kv_bytes(context)
            known = reference.flops_per_token(context)
            rows.append(
                Row(
                    name=reference.name,
                    context=context,
                    kv_bytes=held,
                    kv_parts=None,
                    kv_of_v32=held / v32_kv if v32_kv else None,
                    kv_of_gqa8=None,
                    flops=known,
                    flops_of_v32=known / v32_flops if known is not None else None,
                    parameters=None,
                    active_parameters=None,
                )
            )
    return rows
