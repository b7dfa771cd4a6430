"""Names and shapes of every tensor of a model: the official names, with routed experts stacked.

Owns the table that checkpoint.py checks files against and cost.py counts. Torch-free.
spec/model.md 7.1. One thing differs from the official layout: `layers.N.ffn.experts.{e}.w1.weight`
for each e is one tensor here, `layers.N.ffn.experts.w1` [experts, ...].
"""

from __future__ import annotations

from rorqual.model.config import Config

__all__ = ["expected_shapes"]

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: Config, *, mtp: bool = True) -> Shapes:
    """Name to shape of every tensor of a model of `config`, `mtp.K.*` included unless `mtp` is False.

    `layers.N.ffn.gate.tid2eid` is an int64 table and no parameter; all else is floating point.
    """
    c, d = config, config.hidden_size
    out: Shapes = {
        "embed.weight": (c.vocab_size, d),
        "head.weight": (c.vocab_size, d),
        "norm.weight": (d,),
        **_hc_head(c, ""),
    }
    for layer in range(c.num_hidden_layers):
        ratio = c.compress_ratios[layer]
        out |= _block(c, f"layers.{layer}.", ratio=ratio, hashed=layer < c.num_hash_layers)
    for depth in range(c.num_nextn_predict_layers if mtp else 0):
        name = f"mtp.{depth}."
        out |= {f"{name}{norm}.weight": (d,) for norm in ("enorm", "hnorm", "norm")}
        out |= {f"{name}{proj}.weight": (d, d) for proj in ("e_proj", "h_proj")}
        out |= _hc_head(c, name) | _block(c, name, ratio=0, hashed=False)
    return out


def _hc_head(c: Config, name: str) -> Shapes:
    h = c.hc_mult
    return {
        f"{name}hc_head_fn": (h, h * c.hidden_size),
        f"{name}hc_head_base": (h,),
        f"{name}hc_head_scale": (1,),
    }


def _block(c: Config, name: str, *, ratio: int, hashed: bool) -> Shapes:
    """One transformer block under the prefix `name`."""
    d, h = c.hidden_size, c.hc_mult
    out: Shapes = {f"{name}attn_norm.weight": (d,), f"{name}ffn_norm.weight": (d,)}
    for site in ("attn", "ffn"):
        out[f"{name}hc_{site}_fn"] = ((2 + h) * h, h * d)
        out[f"{name}hc_{site}_base"] = ((2 + h) * h,)
        out[f"{name}hc_{site}_scale"] = (3,)
    heads = c.num_attention_heads
    out |= {
        f"{name}attn.wq_a.weight": (c.q_lora_rank, d),
        f"{name}attn.q_norm.weight": (c.q_lora_rank,),
        f"{name}attn.wq_b.weight": (heads * c.head_dim, c.q_lora_rank),
        f"{name}attn.wkv.weight": (c.head_dim, d),
        f"{name}attn.kv_norm.weight": (c.head_dim,),
        f"{name}attn.attn_sink": (heads,),
        f"{name}attn.wo_a.weight": (c.o_groups * c.o_lora_rank, heads // c.o_groups * c.head_dim),
        f"{name}attn.wo_b.weight": (d, c.o_groups * c.o_lora_rank),
    }
    if ratio:
        overlap = ratio == c.csa_ratio
        out |= _compressor(c, f"{name}attn.compressor.", ratio=ratio, width=c.head_dim, overlap=overlap)
        if overlap:
            index = f"{name}attn.indexer."
            out[f"{index}wq_b.weight"] = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            out[f"{index}weights_proj.weight"] = (c.index_n_heads, d)
            out |= _compressor(c, f"{index}compressor.", ratio=ratio, width=c.index_head_dim, overlap=True)
    return out | _moe(c, f"{name}ffn.", hashed=hashed)


def _compressor(c: Config, name: str, *, ratio: int, width: int, overlap: bool) -> Shapes:
    rows = (2 if overlap else 1) * width
    return {
        f"{name}wkv.weight": (rows, c.hidden_size),
        f"{name}wgate.weight": (rows, c.hidden_size),
        f"{name}ape": (ratio, rows),
        f"{name}norm.weight": (width,),
    }


def _moe(c: Config, name: str, *, hashed: bool) -> Shapes:
    d, experts, ff = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    shared = c.n_shared_experts * ff
    out: Shapes = {f"{name}gate.weight": (experts, d)}
    if hashed:
        out[f"{name}gate.tid2eid"] = (c.vocab_size, c.num_experts_per_tok)
    else:
        out[f"{name}gate.bias"] = (experts,)
    out |= {f"{name}experts.w1": (experts, ff, d), f"{name}experts.w3": (experts, ff, d)}
    out[f"{name}experts.w2"] = (experts, d, ff)
    if shared:
        out |= {f"{name}shared_experts.{w}.weight": (shared, d) for w in ("w1", "w3")}
        out[f"{name}shared_experts.w2.weight"] = (d, shared)
    return out
