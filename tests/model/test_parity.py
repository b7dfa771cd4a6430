"""The whole model against HF transformers' deepseek_v4 on shared random weights: fp32, quantisation off.

Tolerance: two correct fp32 implementations differ here by 6e-6 at most, at a logit spread of 0.5; 2e-5
leaves room for other summation orders and none for a wrong formula (`test_the_oracle_sees_each_setting`).
32 index heads: with few, exact ties at 0 make the top-k arbitrary (spec/model.md 2.6). The official dialect
of the same weights must give bit-equal logits: it is the same model, read another way.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.model import checkpoint
from rorqual.model.config import Config
from rorqual.model.transformer import Model
from tests.oracles.official_checkpoint import official

transformers = pytest.importorskip("transformers", reason="the numerical oracle: pip install 'rorqual[dev]'")
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM  # noqa: E402

TOLERANCE = 2e-5
LENGTHS = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    19,
    20,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    300,
]
ROPE = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}

# Layers: two window, then CSA and HCA in turn; the HCA ratio shrunk so that 300 tokens make many entries.
SETTINGS = {
    "vocab_size": 173,
    "hidden_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "head_dim": 48,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 40,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 16,
    "index_n_heads": 32,
    "index_head_dim": 32,
    "index_topk": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 2,
    "swiglu_limit": 1.0,
    "max_position_embeddings": 1024,
}


def build(*, compress_ratios, hca, rope=None, seed=0, **changes):
    """HF's model with every parameter random: its own initialisation leaves many at 0 or 1."""
    config = DeepseekV4Config(
        **(SETTINGS | changes),
        compress_ratios=compress_ratios,
        compress_rate_hca=hca,
        rope_scaling=dict(rope or ROPE),
        attn_implementation="eager",
    )
    model = DeepseekV4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("tid2eid"):  # distinct experts for each token, as in the checkpoints
                order = torch.rand(len(tensor), config.n_routed_experts, generator=generator).argsort(-1)
                tensor.copy_(order[:, : tensor.shape[1]])
            elif name.endswith("inv_freq"):
                continue
            elif "norm" in name:
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith(("sinks", "position_bias", "base", "scale")):
                tensor.copy_(0.7 * noise)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * noise)
            elif "embed_tokens" in name:
                tensor.copy_(noise)
            elif "lm_head" in name:
                tensor.copy_(0.5 * noise * tensor.shape[-1] ** -0.5)
            else:
                tensor.copy_(1.5 * noise * tensor.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """HF warns of our tiny original length; and one thread."""
    before, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity(logging.ERROR)
    torch.set_num_threads(1)  # tensors this small gain nothing from two, and lose much beside other work
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def hf():
    return build(compress_ratios=[0, 0, 4, 128, 4, 128, 4], hca=16)


@pytest.fixture(scope="module")
def directory(hf, tmp_path_factory):
    where = tmp_path_factory.mktemp("hf")
    hf.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def ours(directory):
    return Model.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokens(hf):
    return torch.randint(0, hf.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(1))


def hf_logits(hf, tokens):
    with torch.no_grad():
        return hf(tokens, use_cache=False).logits


def difference(a, b):
    return (a - b).abs().max().item()


def test_save_pretrained_is_the_third_dialect_and_loads(hf, directory, ours):
    stored = load_file(directory / "model.safetensors")
    assert "model.layers.2.attn.norm.weight" in stored and "model.hc_head.hc_fn" in stored
    assert "model.layers.2.ffn.experts.5.w1.weight" in stored
    config = Config.from_file(directory)
    assert config.compress_ratios == (0, 0, 4, 16, 4, 16, 4) and config.num_hash_layers == 2
    assert (config.rope_factor, config.original_seq_len, config.qk_rope_head_dim) == (16, 64, 16)
    state = checkpoint.load_state(directory, config)
    assert not any(name.startswith("mtp.") for name in state)
    experts = hf.model.layers[3].mlp.experts
    w1, w3 = experts.gate_up_proj.chunk(2, 1)
    assert torch.equal(state["layers.3.ffn.experts.w1"], w1) and torch.equal(
        state["layers.3.ffn.experts.w3"], w3
    )
    assert torch.equal(state["layers.3.ffn.experts.w2"], experts.down_proj)
    norm, other = (
        hf.model.layers[3].self_attn.kv_norm.weight,
        hf.model.layers[3].self_attn.compressor.kv_norm.weight,
    )
    assert torch.equal(state["layers.3.attn.kv_norm.weight"], norm)
    assert torch.equal(state["layers.3.attn.compressor.norm.weight"], other)
    assert len(ours.mtp) == 0, "HF has no MTP head"


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_logits_equal_hf(hf, ours, tokens, length):
    with torch.no_grad():
        got = ours(tokens[:, :length])
    expected = hf_logits(hf, tokens[:, :length])
    assert got.shape == expected.shape and expected.std() > 0.1
    assert difference(got, expected) <= TOLERANCE


def test_a_batch_equals_its_rows(hf, ours):
    batch = torch.randint(0, hf.config.vocab_size, (3, 77), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got = ours(batch)
    for row in range(3):
        assert difference(got[row], hf_logits(hf, batch[row : row + 1])[0]) <= TOLERANCE


def test_token_by_token_decode_equals_hfs_full_forward(hf, ours, tokens):
    length = 150
    expected = hf_logits(hf, tokens[:, :length])
    state = ours.new_state()
    with torch.no_grad():
        for t in range(length):
            got = ours.extend(tokens[:, t : t + 1], state)
            assert difference(got, expected[:, t]) <= TOLERANCE, f"token {t}"


@pytest.mark.parametrize("start, chunks", [(61, (1,) * 6), (0, (1, 2, 3, 5, 30, 64, 7, 16, 128))])
def test_prefill_then_decode_in_chunks_equals_hfs_full_forward(hf, ours, tokens, start, chunks):
    expected = hf_logits(hf, tokens)
    state, at = ours.new_state(), 0
    with torch.no_grad():
        for size in (*((start,) if start else ()), *chunks):
            got = ours.extend(tokens[:, at : at + size], state, last_only=False)
            at += size
            assert difference(got, expected[:, at - size : at]) <= TOLERANCE, f"chunk ending at {at}"


CHANGES = {
    "rms_norm_eps": {"rms_norm_eps": 1e-3},
    "hc_eps": {"hc_eps": 1e-4},
    "hc_sinkhorn_iters": {"hc_sinkhorn_iters": 2},
    "swiglu_limit": {"swiglu_limit": 1.1},
    "sliding_window": {"sliding_window": 15},
    "index_topk": {"index_topk": 11},
    "rope_theta": {"rope_theta": 10100.0},
    "compress_rope_theta": {"compress_rope_theta": 161000.0},
    "rope_factor": {"rope_factor": 15.0},
    "original_seq_len": {"original_seq_len": 1024},
    "routed_scaling_factor": {"routed_scaling_factor": 1.501},
}


@pytest.mark.parametrize(
    "name", [*CHANGES, "attn_sink", "gate.bias", "ape", "weights_proj.weight", "tid2eid"]
)
def test_the_oracle_sees_each_setting(hf, directory, tokens, name):
    """The comparison fails as soon as one number of the configuration or kind of tensor is a little off."""
    config = Config.from_file(directory)
    state = checkpoint.load_state(directory, config)
    if name in CHANGES:
        config = config.replace(**CHANGES[name])
    else:
        touched = [key for key in state if key.endswith(name)]
        assert touched
        state |= {key: state[key].roll(1, 0) for key in touched}
    model = Model(config, mtp=False).eval()
    model.load_official_state(state)
    with torch.no_grad():
        assert difference(model(tokens[:, :130]), hf_logits(hf, tokens[:, :130])) > 2 * TOLERANCE


def rewrite(tmp_path, directory, tensors):
    (tmp_path / "config.json").write_text(
        (directory / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    return Model.from_pretrained(tmp_path)


def test_official_and_in_memory_names_of_the_same_weights_give_identical_logits(
    hf, ours, directory, tokens, tmp_path_factory
):
    state = checkpoint.load_state(directory, Config.from_file(directory))
    dialects = {"official": official(state, experts=None), "HF in memory": dict(hf.state_dict())}
    assert "layers.0.ffn.experts.5.w2.weight" in dialects["official"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in dialects["HF in memory"]
    with torch.no_grad():
        expected = ours(tokens[:, :150])
        for name, tensors in dialects.items():
            again = rewrite(tmp_path_factory.mktemp("dialect"), directory, tensors)
            assert torch.equal(again(tokens[:, :150]), expected), name


def test_our_own_save_of_the_loaded_model_gives_identical_logits(ours, tokens, tmp_path):
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(Model.from_pretrained(tmp_path)(tokens[:, :150]), ours(tokens[:, :150]))
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["compress_ratios"][:4] == [
        0,
        0,
        4,
        16,
    ]


@pytest.mark.parametrize(
    "compress_ratios, hca, changes",
    [
        # V4-Pro's beginning (HCA, HCA, CSA), no YaRN, wide hc clamp, all experts but one
        (
            [128, 128, 4, 128],
            32,
            {"rope": {"type": "default"}, "num_experts_per_tok": 5, "swiglu_limit": 10.0},
        ),
        # the real HCA ratio and window of 128, yarn with the real original length
        (
            [0, 4, 128],
            128,
            {"sliding_window": 128, "rope": ROPE | {"original_max_position_embeddings": 65536}},
        ),
        # a top-k of 1, one head a group, no nope dims in the index keys
        ([4, 4, 128], 8, {"index_topk": 1, "o_groups": 4, "index_head_dim": 16, "num_hash_layers": 0}),
        # the window only
        ([0, 0], 16, {"num_hash_layers": 1, "hc_sinkhorn_iters": 2}),
    ],
    ids=["pro-like", "real-ratios", "extremes", "window-only"],
)
def test_other_shapes_equal_hf_too(tmp_path, tokens, compress_ratios, hca, changes):
    model = build(
        compress_ratios=compress_ratios, hca=hca, seed=3, num_hidden_layers=len(compress_ratios), **changes
    )
    model.save_pretrained(tmp_path)
    ours = Model.from_pretrained(tmp_path)
    for length in (5, 128, 131, 300):
        with torch.no_grad():
            got = ours(tokens[:, :length])
        assert difference(got, hf_logits(model, tokens[:, :length])) <= TOLERANCE, length
