"""Names and shapes of every tensor of a model: the official names, with routed experts stacked.

Owns the table that checkpoint.py checks files against and cost.py counts, and the words for what differs.
Torch-free.
spec/model.md 7.1. One thing differs from the official layout: `layers.N.ffn.experts.{e}.w1.weight`
for each e is one tensor here, `layers.N.ffn.experts.w1` [experts, ...].
"""

from __future__ import annotations

import dataclasses

from rorqual.model.config import Config
from rorqual.model.errors import ConfigError

__all__ = ["expected_shapes", "explain_names", "explain_shape", "listed"]

Shapes = dict[str, tuple[int, ...]]
LISTED = 3
"""Names an error text lists before it counts the rest."""


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


def listed(names: set[str]) -> str:
    """The first few of `names`, and how many more there are."""
    some = sorted(names)
    more = f" and {len(some) - LISTED} more" if len(some) > LISTED else ""
    return ", ".join(some[:LISTED]) + more


def explain_names(missing: set[str], extra: set[str], config: Config) -> str:
    """What to say when tensors are missing or unknown, and which config fields decide about them."""
    lines = [f"{listed(missing)}: missing."] if missing else []
    if extra:
        lines.append(f"{listed(extra)}: not a tensor of this configuration.")
    fields = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_hash_layers": config.num_hash_layers,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
    }
    said = ", ".join(f"{name} {value}" for name, value in fields.items())
    if any(".compressor." in name or ".indexer." in name for name in missing | extra):
        said += f", compress_ratios {list(config.compress_ratios)}"
    return "\n".join([*lines, f"config.json says {said}: use the one that came with the weights."])


def explain_shape(
    stored: str,
    found: tuple[int, ...],
    expected: tuple[int, ...],
    config: Config,
    *,
    name: str | None = None,
    skip: int = 0,
) -> str:
    """What to say when `stored` (ours: `name`, of which it leaves out `skip` axes) has shape `found`.

    Names the config fields behind the axes that differ, and the preset that would have fitted.
    """
    name = name or stored
    axes = [i + skip for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
    fields = _fields_behind(name, axes, config)
    because = f" ({', '.join(fields)})" if fields else ""
    text = f"{stored}: shape {list(found)}, config.json expects {list(expected)}{because}."
    for preset, title in (("pro", "Pro"), ("flash", "Flash")):
        other = Config.preset(preset)
        if other != config and expected_shapes(other).get(name, ())[skip:] == found:
            return f"{text}\nThese look like {title} weights: use the config.json that came with them."
    return f"{text}\nUse the config.json that came with the weights."


def _fields_behind(name: str, axes: list[int], config: Config) -> list[str]:
    """The config fields that decide the sizes of `axes` of the tensor `name`: changes each and looks."""
    before = expected_shapes(config).get(name, ())
    fields = ["compress_ratios"] if name.endswith("compressor.ape") and 0 in axes else []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, int) or field.name in ("num_hidden_layers", "csa_ratio"):
            continue
        try:
            after = expected_shapes(config.replace(**{field.name: value * 2})).get(name, ())
        except ConfigError:
            continue
        if any(after[axis : axis + 1] != before[axis : axis + 1] for axis in axes):
            fields.append(field.name)
    return fields
