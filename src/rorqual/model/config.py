"""Configuration of a DeepSeek-V4 model: the field names of the official `config.json`, checked once, frozen.

Owns presets (`pro`, `flash`, `tiny`) and reading `config.json`; knows nothing of torch.
Sources: spec/model.md section 1 (both official files), V4 report table of hyper-parameters.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rorqual.model.errors import ConfigError

__all__ = ["Config", "LayerKind"]

LayerKind = Literal["window", "csa", "hca"]

FIXED: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
"""Keys of config.json that no V4 release varies; another value would change the meaning, so it is refused."""

PAGE_TOKENS = 128
"""Tokens per cache page: a multiple of every compression ratio, so no entry straddles pages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Shape of a V4 model. Defaults are V4-Flash's; `Config.preset` gives the named ones."""

    vocab_size: int = 129280
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    head_dim: int = 512
    """Width of one query head and of the single shared K=V head; the last `qk_rope_head_dim` dims rotate."""
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    """Keys of the uncompressed window, the query itself included."""
    compress_ratios: tuple[int, ...] = ()
    """One per layer: 0 window only, `csa_ratio` CSA, any other HCA. MTP layers have none."""
    csa_ratio: int = 4
    """The ratio that marks a layer as CSA (overlapping compressor and indexer). 4 in every release."""
    rope_theta: float = 10000.0
    """RoPE base of window-only layers and of the MTP head."""
    compress_rope_theta: float = 160000.0
    """RoPE base of CSA and HCA layers, with YaRN on all their rotations."""
    rope_factor: float = 16.0
    """YaRN factor; 1 switches YaRN off."""
    original_seq_len: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    """Compressed entries a CSA query attends to at most."""
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    num_hash_layers: int = 3
    """First layers whose experts are looked up by token id."""
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    """Clamp of the SwiGLU inputs, shared expert included; 0 switches it off."""
    hc_mult: int = 4
    """Residual streams of mHC."""
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 1 << 20
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: Literal["fp4", "fp8"] = "fp4"
    """Storage of routed experts in an official checkpoint."""

    def __post_init__(self) -> None:
        if len(self.compress_ratios) < self.num_hidden_layers:
            raise ConfigError(
                f"compress_ratios has {len(self.compress_ratios)} entries for {self.num_hidden_layers} "
                "layers: give one ratio per layer (0 window only, 4 CSA, 128 HCA)"
            )
        if (
            len(self.compress_ratios) > self.num_hidden_layers
        ):  # official lists carry one more for the MTP head
            object.__setattr__(self, "compress_ratios", self.compress_ratios[: self.num_hidden_layers])
        positive = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups "
            "o_lora_rank sliding_window index_n_heads index_head_dim index_topk n_routed_experts "
            "num_experts_per_tok moe_intermediate_size hc_mult csa_ratio max_position_embeddings "
            "original_seq_len"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a positive number")
        for ratio in set(self.compress_ratios):
            if ratio < 0 or (ratio and PAGE_TOKENS % ratio):
                raise ConfigError(f"compress_ratios holds {ratio}: expected 0 or a divisor of {PAGE_TOKENS}")
        if self.qk_rope_head_dim % 2 or not 0 < self.qk_rope_head_dim <= min(
            self.head_dim, self.index_head_dim
        ):
            raise ConfigError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}: expected an even number up to head_dim "
                f"({self.head_dim}) and index_head_dim ({self.index_head_dim})"
            )
        if self.num_attention_heads % self.o_groups:
            raise ConfigError(f"o_groups ({self.o_groups}) does not divide {self.num_attention_heads} heads")
        if self.expert_dtype not in ("fp4", "fp8"):
            raise ConfigError(f"expert_dtype is {self.expert_dtype!r}, expected 'fp4' or 'fp8'")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} of {self.n_routed_experts} experts"
            )

    def kind(self, layer: int) -> LayerKind:
        """What layer `layer` (0-based) is: `window`, `csa` or `hca`."""
        ratio = self.compress_ratios[layer]
        return "window" if ratio == 0 else "csa" if ratio == self.csa_ratio else "hca"

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """`kind` of every layer, in order."""
        return tuple(self.kind(layer) for layer in range(self.num_hidden_layers))

    def replace(self, **changes: Any) -> Config:
        """A copy with `changes`."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str) -> Config:
        """`pro`, `flash` or `tiny` (the embedded model). Raises ConfigError for other names."""
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}: choose one of {', '.join(sorted(PRESETS))}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Reads the keys of an official `config.json`, and of the one HF's `save_pretrained` writes."""
        model_type = raw.get("model_type", "deepseek_v4")
        if model_type != "deepseek_v4":
            raise ConfigError(f"model_type is {model_type!r}, expected 'deepseek_v4'")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {name: raw[name] for name in fields if raw.get(name) is not None}
        _read_rope(raw, values)
        _read_schedule(raw, values)
        for name, only in FIXED.items():
            if raw.get(name, only) not in (only, None):
                raise ConfigError(
                    f"{name} is {raw[name]!r}: V4 models have {only!r}, nothing else is implemented"
                )
        mlp_types = raw.get("mlp_layer_types")
        if "num_hash_layers" not in values and mlp_types is not None:
            hashed = sum(kind == "hash_moe" for kind in mlp_types)
            if "hash_moe" in mlp_types[hashed:]:
                raise ConfigError("mlp_layer_types: the hash_moe layers must be the first ones")
            values["num_hash_layers"] = hashed
        for name, value in values.items():
            kind = str(fields[name].type)
            good = (
                isinstance(value, tuple)
                if name == "compress_ratios"
                else isinstance(value, str)
                if name == "expert_dtype"
                else isinstance(value, int | float) and not isinstance(value, bool)
            )
            if not good or (kind == "int" and value != int(value)):
                raise ConfigError(f"{name} is {value!r}, expected {kind}")
            if kind == "int":
                values[name] = int(value)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Reads `config.json` at `path`, or in the directory `path`."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{file} does not exist: a model directory holds config.json and *.safetensors"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{file} holds a {type(raw).__name__}, expected an object")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """Keys as in the official `config.json`; `from_dict` reads them back."""
        out = dataclasses.asdict(self)
        out["compress_ratios"] = [*self.compress_ratios, *[0] * self.num_nextn_predict_layers]
        rope = {name: out.pop(name) for name in ("rope_factor", "original_seq_len", "beta_fast", "beta_slow")}
        out["rope_scaling"] = {
            "type": "yarn",
            "factor": rope["rope_factor"],
            "original_max_position_embeddings": rope["original_seq_len"],
            "beta_fast": rope["beta_fast"],
            "beta_slow": rope["beta_slow"],
        }
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "num_key_value_heads": 1,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            **out,
        }


def _read_rope(raw: dict[str, Any], values: dict[str, Any]) -> None:
    """`rope_scaling` (official) or `rope_parameters` (HF 5: one dict per layer type) into our flat fields."""
    scaling = raw.get("rope_scaling") or {}
    parameters = raw.get("rope_parameters") or {}
    if isinstance(parameters, dict) and "main" in parameters:
        main, compress = parameters["main"] or {}, parameters.get("compress") or {}
        values.setdefault("rope_theta", main.get("rope_theta", 10000.0))
        values.setdefault("compress_rope_theta", compress.get("rope_theta", 160000.0))
        scaling = scaling or compress
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in (None, "yarn", "default"):
        raise ConfigError(f"rope_scaling type is {kind!r}: V4 uses 'yarn'")
    if kind == "yarn":
        names = {
            "rope_factor": "factor",
            "original_seq_len": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
        }
        values.update(
            {ours: scaling[theirs] for ours, theirs in names.items() if scaling.get(theirs) is not None}
        )
    elif "rope_factor" not in values:
        values["rope_factor"] = 1.0
    factor = raw.get("partial_rotary_factor")
    if "qk_rope_head_dim" not in values and isinstance(factor, int | float) and "head_dim" in values:
        values["qk_rope_head_dim"] = int(values["head_dim"] * factor)


def _read_schedule(raw: dict[str, Any], values: dict[str, Any]) -> None:
    """`compress_ratios`, or HF's `layer_types` with its compression rates."""
    ratios = raw.get("compress_ratios")
    types = raw.get("layer_types")
    rates = raw.get("compress_rates") or {}
    if ratios is None and types is not None:
        by_type = {
            "sliding_attention": 0,
            "compressed_sparse_attention": rates.get(
                "compressed_sparse_attention", raw.get("compress_rate_csa", 4)
            ),
            "heavily_compressed_attention": rates.get(
                "heavily_compressed_attention", raw.get("compress_rate_hca", 128)
            ),
        }
        unknown = sorted(set(types) - set(by_type))
        if unknown:
            raise ConfigError(f"layer_types holds {unknown[0]!r}: expected one of {sorted(by_type)}")
        ratios = [by_type[kind] for kind in types]
        csa, hca = by_type["compressed_sparse_attention"], by_type["heavily_compressed_attention"]
        if csa == hca and "heavily_compressed_attention" in types:
            raise ConfigError(
                f"compress_rates gives CSA and HCA layers the same ratio {csa}: they must differ"
            )
        values.setdefault("csa_ratio", csa)
    if not isinstance(ratios, list | tuple) or not all(isinstance(ratio, int) for ratio in ratios):
        raise ConfigError(
            "compress_ratios is missing or not a list of integers: it says which layer is CSA or HCA"
        )
    values["compress_ratios"] = tuple(ratios)


PRESETS: dict[str, Config] = {
    "pro": Config(
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        compress_ratios=(128, 128, *(4, 128) * 29, 4),
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
    ),
    "flash": Config(compress_ratios=(0, 0, *(4, 128) * 20, 4)),
    # The embedded model: every part of the architecture, small enough to train on two cores.
    "tiny": Config(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        sliding_window=16,
        compress_ratios=(0, 4, 32, 4, 32),
        rope_factor=1.0,
        original_seq_len=4096,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        num_hash_layers=1,
        hc_mult=2,
        hc_sinkhorn_iters=8,
        max_position_embeddings=4096,
    ),
}
