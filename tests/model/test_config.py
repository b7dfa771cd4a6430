"""Config: presets against spec/model.md section 1, config.json of the official and the HF kind, bad input."""

import json

import pytest

from rorqual.model.config import Config
from rorqual.model.errors import ConfigError

# What the official config.json of Pro and of Flash says about the model (spec/model.md 1.1).
COMMON = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_rope_theta": 160000,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "index_n_heads": 64,
    "index_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_hash_layers": 3,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 1048576,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "initializer_range": 0.02,
    "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    "torch_dtype": "bfloat16",
}
OFFICIAL = {
    "pro": COMMON
    | {
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
        "index_topk": 1024,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "routed_scaling_factor": 2.5,
    },
    "flash": COMMON
    | {
        "num_hidden_layers": 43,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
        "index_topk": 512,
        "n_routed_experts": 256,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 1.5,
    },
}


@pytest.mark.parametrize("name, csa, hca, window", [("pro", 30, 31, 0), ("flash", 21, 20, 2)])
def test_official_config_json_is_the_preset(name, csa, hca, window):
    config = Config.from_dict(OFFICIAL[name])
    assert config == Config.preset(name)
    kinds = config.layer_kinds
    assert (kinds.count("csa"), kinds.count("hca"), kinds.count("window")) == (csa, hca, window)
    assert all(kinds[layer] == "csa" for layer in range(2, len(kinds), 2))


@pytest.mark.parametrize("name", ["pro", "flash", "tiny"])
def test_a_written_config_reads_back(name, tmp_path):
    config = Config.preset(name)
    raw = config.to_dict()
    assert len(raw["compress_ratios"]) == config.num_hidden_layers + 1, (
        "one more for the MTP head, as official"
    )
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert Config.from_file(tmp_path) == Config.from_file(tmp_path / "config.json") == config


def test_what_hf_writes_means_the_same():
    transformers = pytest.importorskip("transformers.models.deepseek_v4")
    keys = {k: v for k, v in OFFICIAL["flash"].items() if k not in ("quantization_config", "torch_dtype")}
    keys["compress_ratios"] = keys["compress_ratios"][:-1]
    raw = transformers.DeepseekV4Config(**keys).to_dict()
    assert "compress_ratios" not in raw and "rope_scaling" not in raw
    assert Config.from_dict(raw) == Config.preset("flash")
    del raw["qk_rope_head_dim"]
    assert Config.from_dict(raw).qk_rope_head_dim == 64, "from partial_rotary_factor"


def test_hf_compress_rates_set_the_ratios():
    raw = Config.preset("flash").to_dict()
    raw["layer_types"] = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    raw["num_hidden_layers"] = 3
    del raw["compress_ratios"], raw["csa_ratio"]
    raw["compress_rates"] = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 16}
    config = Config.from_dict(raw)
    assert config.compress_ratios == (0, 8, 16) and config.layer_kinds == ("window", "csa", "hca")
    raw["compress_rates"]["heavily_compressed_attention"] = 8
    with pytest.raises(ConfigError, match="the same ratio 8"):
        Config.from_dict(raw)


def test_without_rope_scaling_there_is_no_yarn():
    raw = {k: v for k, v in OFFICIAL["flash"].items() if k != "rope_scaling"}
    assert Config.from_dict(raw).rope_factor == 1.0


BAD = [
    ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3', expected 'deepseek_v4'"),
    ({"hidden_size": "4096"}, "hidden_size is '4096', expected int"),
    ({"hidden_size": 4096.5}, "hidden_size is 4096.5, expected int"),
    ({"hidden_size": True}, "hidden_size is True, expected int"),
    ({"hidden_size": 0}, "hidden_size is 0, expected a positive number"),
    ({"compress_ratios": None}, "compress_ratios is missing"),
    ({"compress_ratios": "4"}, "compress_ratios is missing or not a list"),
    ({"compress_ratios": [0, 4]}, "compress_ratios has 2 entries for 43"),
    ({"compress_ratios": [5] * 43}, "compress_ratios holds 5: expected 0 or a divisor of 128"),
    ({"compress_ratios": [-4] * 43}, "compress_ratios holds -4"),
    ({"o_groups": 7}, r"o_groups \(7\) does not divide 64 heads"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63: expected an even number"),
    ({"qk_rope_head_dim": 1024}, "qk_rope_head_dim is 1024"),
    ({"num_experts_per_tok": 257}, "num_experts_per_tok 257 of 256 experts"),
    ({"expert_dtype": "int4"}, "expert_dtype is 'int4', expected 'fp4' or 'fp8'"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling type is 'linear'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True: V4 models have False"),
    ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid': V4 models have 'sqrtsoftplus'"),
    ({"num_key_value_heads": 8}, "num_key_value_heads is 8: V4 models have 1"),
    ({"num_hash_layers": None, "mlp_layer_types": ["moe", "hash_moe"]}, "must be the first ones"),
    ({"compress_ratios": None, "layer_types": ["full_attention"]}, "layer_types holds 'full_attention'"),
]


@pytest.mark.parametrize(
    "change, message", BAD, ids=[next(iter(c)) + f"-{i}" for i, (c, _) in enumerate(BAD)]
)
def test_a_bad_value_is_named(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Config.from_dict(OFFICIAL["flash"] | change)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist: a model directory holds"):
        Config.from_file(tmp_path)
    file = tmp_path / "config.json"
    for content, message in ((b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[1]", "holds a list")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            Config.from_file(file)
    with pytest.raises(ConfigError, match="no preset 'huge': choose one of flash, pro, tiny"):
        Config.preset("huge")
