"""Names of a checkpoint's tensors in four dialects, brought to ours: official names, routed experts stacked.

| dialect            | example                                                             |
|--------------------|---------------------------------------------------------------------|
| ours               | layers.2.ffn.experts.w1                       [E, ff, d]            |
| official           | layers.2.ffn.experts.5.w1.{weight,scale}      [ff, d]               |
| HF in memory       | model.layers.2.mlp.experts.gate_up_proj       [E, 2 ff, d]          |
| HF save_pretrained | model.layers.2.ffn.experts.5.w1.weight, and attn.norm for attn.kv_norm |

Owns names only. Reads no file: checkpoint.py does. spec/model.md 7.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Place", "is_other_drafter", "place"]

_TOP = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
    "hc_head.fn": "hc_head_fn",
    "hc_head.base": "hc_head_base",
    "hc_head.scale": "hc_head_scale",
}

# Inside a block, longest prefix first: the indexer's names begin with the compressor's.
_BLOCK = (
    ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.compressor.indexer.q_b_proj.", "attn.indexer.wq_b."),
    ("self_attn.compressor.indexer.scorer.weights_proj.", "attn.indexer.weights_proj."),
    ("self_attn.compressor.indexer.kv_proj.", "attn.indexer.compressor.wkv."),
    ("self_attn.compressor.indexer.gate_proj.", "attn.indexer.compressor.wgate."),
    ("self_attn.compressor.indexer.position_bias", "attn.indexer.compressor.ape"),
    ("self_attn.compressor.indexer.kv_norm.", "attn.indexer.compressor.norm."),
    ("self_attn.compressor.kv_proj.", "attn.compressor.wkv."),
    ("self_attn.compressor.gate_proj.", "attn.compressor.wgate."),
    ("self_attn.compressor.position_bias", "attn.compressor.ape"),
    ("self_attn.compressor.kv_norm.", "attn.compressor.norm."),
    ("self_attn.q_a_proj.", "attn.wq_a."),
    ("self_attn.q_a_norm.", "attn.q_norm."),
    ("self_attn.q_b_proj.", "attn.wq_b."),
    ("self_attn.kv_proj.", "attn.wkv."),
    ("self_attn.kv_norm.", "attn.kv_norm."),
    ("self_attn.o_a_proj.", "attn.wo_a."),
    ("self_attn.o_b_proj.", "attn.wo_b."),
    ("self_attn.sinks", "attn.attn_sink"),
    ("attn_hc.", "hc_attn_"),
    ("ffn_hc.", "hc_ffn_"),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
    ("mlp.gate.", "ffn.gate."),
    ("mlp.shared_experts.gate_proj.", "ffn.shared_experts.w1."),
    ("mlp.shared_experts.up_proj.", "ffn.shared_experts.w3."),
    ("mlp.shared_experts.down_proj.", "ffn.shared_experts.w2."),
    ("mlp.experts.down_proj", "ffn.experts.w2"),
    ("attn.norm.", "attn.kv_norm."),  # save_pretrained renames so, and not back
)
_NAME = re.compile(r"(?:model\.)?(?P<block>(?:layers|mtp)\.\d+\.)?(?P<leaf>.+)", re.DOTALL)
_EXPERT = re.compile(r"ffn\.experts\.(?P<expert>\d+)\.(?P<matrix>w[123])\.(?P<kind>weight|scale)")
_OTHER_DRAFTER = re.compile(r"mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor belongs."""

    name: str
    """Our name of the whole tensor; of a scale, the name of the tensor it scales."""
    expert: int | None = None
    """Which slice along the first axis it is; None: all of it."""
    half: int | None = None
    """0 or 1: the tensor holds two of ours, concatenated on axis 1, and this is the first or second."""
    scale: bool = False
    """It is the quantisation scale of `name`."""


def place(stored: str) -> list[Place]:
    """Where the tensor called `stored` in a file belongs. An unknown name is its own place."""
    match = _NAME.fullmatch(stored)
    if match is None:
        return [Place(stored)]
    block, leaf = match["block"] or "", match["leaf"]
    if not block:
        return [Place(_TOP.get(leaf, leaf))]
    if leaf == "mlp.experts.gate_up_proj":
        return [Place(f"{block}ffn.experts.w1", half=0), Place(f"{block}ffn.experts.w3", half=1)]
    for theirs, ours in _BLOCK:
        if leaf.startswith(theirs):
            leaf = ours + leaf[len(theirs) :]
            break
    if expert := _EXPERT.fullmatch(leaf):
        name = f"{block}ffn.experts.{expert['matrix']}"
        return [Place(name, expert=int(expert["expert"]), scale=expert["kind"] == "scale")]
    if leaf.startswith("hc_head."):
        leaf = _TOP.get(leaf, leaf)
    if leaf.endswith(".scale"):
        return [Place(f"{block}{leaf.removesuffix('.scale')}.weight", scale=True)]
    return [Place(block + leaf)]


def is_other_drafter(stored: str) -> bool:
    """Whether the name belongs to a DSpark drafter, which lies under `mtp.*` (spec/model.md 6.2)."""
    return _OTHER_DRAFTER.match(stored.removeprefix("model.")) is not None
