"""Loading in all dialects, saving atomically, and a clear error for each kind of damage."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.model import checkpoint, dialects, shapes
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
from rorqual.model.shapes import expected_shapes
from tests.oracles.official_checkpoint import exact_values, official

SMALL = Config(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=160,
    o_groups=2,
    o_lora_rank=96,
    sliding_window=16,
    compress_ratios=(0, 4, 32, 4),
    index_n_heads=4,
    index_head_dim=32,
    index_topk=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hash_layers=1,
    max_position_embeddings=512,
)


def random_state(config, *, mtp=True):
    """Values that every stored format holds exactly."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, shape in expected_shapes(config, mtp=mtp).items():
        if name.endswith("tid2eid"):
            out[name] = torch.randint(0, config.n_routed_experts, shape, generator=generator)
        else:
            out[name] = exact_values(shape, generator)
    return out


@pytest.fixture(scope="module")
def state():
    return random_state(SMALL)


def same(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].to(tensor.dtype), tensor), name


def write(directory, tensors, *, config=SMALL):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    return directory


def refused(directory, match, config=SMALL):
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.load_state(directory, config)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


# What spec/model.md 7.1 lists for Pro and Flash, layer 2 (CSA, hashed), 3 (HCA).
SPEC_7_1 = {
    "embed.weight": ([129280, 7168], [129280, 4096]),
    "head.weight": ([129280, 7168], [129280, 4096]),
    "norm.weight": ([7168], [4096]),
    "hc_head_fn": ([4, 28672], [4, 16384]),
    "hc_head_base": ([4], [4]),
    "hc_head_scale": ([1], [1]),
    "layers.2.attn_norm.weight": ([7168], [4096]),
    "layers.2.attn.wq_a.weight": ([1536, 7168], [1024, 4096]),
    "layers.2.attn.q_norm.weight": ([1536], [1024]),
    "layers.2.attn.wq_b.weight": ([65536, 1536], [32768, 1024]),
    "layers.2.attn.wkv.weight": ([512, 7168], [512, 4096]),
    "layers.2.attn.kv_norm.weight": ([512], [512]),
    "layers.2.attn.attn_sink": ([128], [64]),
    "layers.2.attn.wo_a.weight": ([16384, 4096], [8192, 4096]),
    "layers.2.attn.wo_b.weight": ([7168, 16384], [4096, 8192]),
    "layers.2.attn.compressor.wkv.weight": ([1024, 7168], [1024, 4096]),
    "layers.3.attn.compressor.wgate.weight": ([512, 7168], [512, 4096]),
    "layers.2.attn.compressor.ape": ([4, 1024], [4, 1024]),
    "layers.3.attn.compressor.ape": ([128, 512], [128, 512]),
    "layers.2.attn.compressor.norm.weight": ([512], [512]),
    "layers.2.attn.indexer.wq_b.weight": ([8192, 1536], [8192, 1024]),
    "layers.2.attn.indexer.weights_proj.weight": ([64, 7168], [64, 4096]),
    "layers.2.attn.indexer.compressor.wkv.weight": ([256, 7168], [256, 4096]),
    "layers.2.attn.indexer.compressor.ape": ([4, 256], [4, 256]),
    "layers.2.attn.indexer.compressor.norm.weight": ([128], [128]),
    "layers.2.hc_attn_fn": ([24, 28672], [24, 16384]),
    "layers.2.hc_ffn_base": ([24], [24]),
    "layers.2.hc_ffn_scale": ([3], [3]),
    "layers.2.ffn.gate.weight": ([384, 7168], [256, 4096]),
    "layers.3.ffn.gate.bias": ([384], [256]),
    "layers.2.ffn.gate.tid2eid": ([129280, 6], [129280, 6]),
    "layers.3.ffn.experts.w1": ([384, 3072, 7168], [256, 2048, 4096]),
    "layers.3.ffn.experts.w3": ([384, 3072, 7168], [256, 2048, 4096]),
    "layers.3.ffn.experts.w2": ([384, 7168, 3072], [256, 4096, 2048]),
    "layers.3.ffn.shared_experts.w1.weight": ([3072, 7168], [2048, 4096]),
    "layers.3.ffn.shared_experts.w2.weight": ([7168, 3072], [4096, 2048]),
    "mtp.0.enorm.weight": ([7168], [4096]),
    "mtp.0.e_proj.weight": ([7168, 7168], [4096, 4096]),
    "mtp.0.h_proj.weight": ([7168, 7168], [4096, 4096]),
    "mtp.0.attn.wkv.weight": ([512, 7168], [512, 4096]),
    "mtp.0.ffn.gate.bias": ([384], [256]),
    "mtp.0.hc_head_fn": ([4, 28672], [4, 16384]),
}


@pytest.mark.parametrize("column, name, stored", [(0, "pro", 145116), (1, "flash", 69187)])
def test_shapes_and_tensor_count_are_those_of_the_published_checkpoints(column, name, stored):
    config = Config.preset(name)
    found = expected_shapes(config)
    for tensor, sizes in SPEC_7_1.items():
        assert list(found[tensor]) == sizes[column], tensor
    assert "layers.2.ffn.gate.bias" not in found and "layers.3.ffn.gate.tid2eid" not in found
    assert not any(n.startswith("mtp.0.attn.compressor") for n in found)
    assert not any(".indexer." in n for n in found if n.startswith("layers.3."))
    if name == "flash":
        assert not any(n.startswith(("layers.0.attn.compressor", "layers.1.attn.compressor")) for n in found)
    # the file splits the experts and gives each quantised linear a scale (spec/model.md 1.3, 5)
    count = 0
    for tensor in found:
        if ".ffn.experts." in tensor:
            count += 2 * config.n_routed_experts
        else:
            linear = r".*\.(wq_a|wq_b|wkv|wo_a|wo_b|e_proj|h_proj|shared_experts\.w\d)\.weight"
            count += 2 if re.fullmatch(linear, tensor) and ".compressor." not in tensor else 1
    assert count == stored


def test_our_own_save_reads_back_with_its_metadata(tmp_path, state):
    checkpoint.save(tmp_path / "new" / "dir", SMALL, state, metadata={"step": "12", "recipe": "sft"})
    where = tmp_path / "new" / "dir"
    assert sorted(p.name for p in where.iterdir()) == ["config.json", "model.safetensors"]
    same(checkpoint.load_state(where, SMALL), state)
    assert Config.from_file(where) == SMALL
    assert checkpoint.load_metadata(where) == {"step": "12", "recipe": "sft"}
    for file in where.iterdir():
        assert file.stat().st_mode & 0o444 & ~_umask() == 0o444 & ~_umask(), "readable as any new file is"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_mtp_is_there_only_when_the_files_hold_it(tmp_path, state):
    without = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    checkpoint.save(tmp_path, SMALL, without)
    same(checkpoint.load_state(tmp_path, SMALL), without)


@pytest.mark.parametrize("experts", ["fp4", "fp8", None])
def test_the_official_dialect_gives_the_same_numbers(tmp_path, state, experts):
    packed = official(state, experts=experts)
    if experts:
        assert packed["layers.1.ffn.experts.3.w1.scale"].dtype == torch.float8_e8m0fnu
        assert packed["layers.1.attn.wq_b.weight"].dtype == torch.float8_e4m3fn
        assert packed["layers.1.attn.wq_b.scale"].shape == (2, 2)
    got = checkpoint.load_state(write(tmp_path, packed), SMALL)
    same(got, state)
    if experts:
        assert got["layers.1.ffn.experts.w1"].dtype == got["layers.1.attn.wkv.weight"].dtype == torch.bfloat16
        assert got["layers.1.attn.attn_sink"].dtype == torch.float32


def test_shards_with_an_index_are_one_checkpoint(tmp_path, state):
    write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    packed, where = official(state), {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {
            name: packed[name] for i, name in enumerate(sorted(packed)) if i % 3 == shard
        }  # scales part from weights
        save_file(part, tmp_path / file)
        where |= dict.fromkeys(part, file)
    same(checkpoint.load_state(tmp_path, SMALL), state)  # no index: all shards
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": where}), encoding="utf-8"
    )
    same(checkpoint.load_state(tmp_path, SMALL), state)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "names the shard model-00002-of-00003.safetensors, which is missing")


def hf_names(state):
    """Our names to HF's in-memory ones, by hand from spec/model.md 7.2."""
    pairs = [
        (r"^embed\.", "model.embed_tokens."), (r"^head\.", "lm_head."), (r"^norm\.", "model.norm."),
        (r"^hc_head_", "model.hc_head.hc_"), (r"^layers", "model.layers"),
        (r"\.attn_norm\.", ".input_layernorm."), (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.hc_attn_", ".attn_hc."), (r"\.hc_ffn_", ".ffn_hc."),
        (r"\.attn\.indexer\.compressor\.norm", ".self_attn.compressor.indexer.kv_norm"),
        (r"\.attn\.indexer\.compressor\.wkv", ".self_attn.compressor.indexer.kv_proj"),
        (r"\.attn\.indexer\.compressor\.wgate", ".self_attn.compressor.indexer.gate_proj"),
        (r"\.attn\.indexer\.compressor\.ape", ".self_attn.compressor.indexer.position_bias"),
        (r"\.attn\.indexer\.wq_b", ".self_attn.compressor.indexer.q_b_proj"),
        (r"\.attn\.indexer\.weights_proj", ".self_attn.compressor.indexer.scorer.weights_proj"),
        (r"\.attn\.compressor\.norm", ".self_attn.compressor.kv_norm"),
        (r"\.attn\.compressor\.wkv", ".self_attn.compressor.kv_proj"),
        (r"\.attn\.compressor\.wgate", ".self_attn.compressor.gate_proj"),
        (r"\.attn\.compressor\.ape", ".self_attn.compressor.position_bias"),
        (r"\.attn\.wq_a", ".self_attn.q_a_proj"), (r"\.attn\.q_norm", ".self_attn.q_a_norm"),
        (r"\.attn\.wq_b", ".self_attn.q_b_proj"), (r"\.attn\.wkv", ".self_attn.kv_proj"),
        (r"\.attn\.kv_norm", ".self_attn.kv_norm"), (r"\.attn\.attn_sink", ".self_attn.sinks"),
        (r"\.attn\.wo_a", ".self_attn.o_a_proj"), (r"\.attn\.wo_b", ".self_attn.o_b_proj"),
        (r"\.ffn\.gate\.bias", ".mlp.gate.e_score_correction_bias"), (r"\.ffn\.gate\.", ".mlp.gate."),
        (r"\.ffn\.shared_experts\.w1", ".mlp.shared_experts.gate_proj"),
        (r"\.ffn\.shared_experts\.w3", ".mlp.shared_experts.up_proj"),
        (r"\.ffn\.shared_experts\.w2", ".mlp.shared_experts.down_proj"),
        (r"\.ffn\.experts\.w2", ".mlp.experts.down_proj"),
    ]  # fmt: skip
    out = {}
    for name, tensor in state.items():
        if name.endswith("experts.w1"):
            both = torch.cat([tensor, state[name.replace("w1", "w3")]], 1)
            out["model." + name.replace("ffn.experts.w1", "mlp.experts.gate_up_proj")] = both
        elif not name.endswith("experts.w3"):
            for pattern, there in pairs:
                name = re.sub(pattern, there, name)
            out[name] = tensor
    return out


def test_hf_in_memory_names_give_the_same_numbers(tmp_path, state):
    without = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    named = hf_names(without)
    assert not set(named) & set(without), "every name differs"
    same(checkpoint.load_state(write(tmp_path, named), SMALL), without)


def test_official_names_may_carry_the_model_prefix_and_renamed_kv_norm(tmp_path, state):
    third = {
        f"model.{n}".replace(".attn.kv_norm.", ".attn.norm."): t
        for n, t in official(state, experts=None).items()
    }
    third["head.weight"] = third.pop("model.head.weight")
    for end in ("fn", "base", "scale"):
        third[f"model.hc_head.hc_{end}"] = third.pop(f"model.hc_head_{end}")
    same(checkpoint.load_state(write(tmp_path, third), SMALL), state)


def test_a_dspark_drafter_is_left_out_and_said(tmp_path, state, caplog):
    without = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    drafter = {"mtp.0.main_proj.weight": torch.zeros(4, 4), "mtp.2.attn.wkv.weight": torch.zeros(4, 4)}
    got = checkpoint.load_state(write(tmp_path, without | drafter), SMALL)
    same(got, without)
    assert "DSpark drafter" in caplog.text


# --- bad input ---


def test_missing_and_unknown_tensors_are_named(tmp_path, state):
    less = {n: t for n, t in state.items() if n not in ("layers.2.attn.wkv.weight", "norm.weight")}
    refused(write(tmp_path, less), r"layers.2.attn.wkv.weight, norm.weight: missing\.\n.*num_hidden_layers 4")
    more = state | {"layers.4.attn.wkv.weight": torch.zeros(1), "mtp.0.rotor": torch.zeros(1)}
    refused(
        write(tmp_path, more), "layers.4.attn.wkv.weight, mtp.0.rotor: not a tensor of this configuration"
    )
    text = refused(write(tmp_path, {}), "missing")
    assert re.search(r"and \d\d+ more: missing", text)


def test_a_wrong_shape_names_the_config_field(tmp_path, state):
    bad = dict(state)
    bad["layers.3.attn.wkv.weight"] = torch.zeros(64, 48)
    text = refused(write(tmp_path, bad), "wkv")
    assert text.splitlines()[0] == (
        "layers.3.attn.wkv.weight: shape [64, 48], config.json expects [64, 64] (hidden_size)."
    )
    bad = dict(state)
    bad["layers.1.ffn.experts.w2"] = torch.zeros(5, 64, 32)
    refused(write(tmp_path, bad), r"expects \[4, 64, 32\] \(n_routed_experts\)")
    bad = dict(state)
    bad["layers.2.attn.compressor.ape"] = torch.zeros(16, 64)
    refused(write(tmp_path, bad), r"expects \[32, 64\] \(compress_ratios\)")
    bad = dict(state)
    bad["layers.2.attn.wq_b.weight"] = torch.zeros(256)
    refused(write(tmp_path, bad), r"wq_b.weight: shape \[256\], config.json expects \[256, 160\]")


def test_flash_weights_under_pros_config_are_recognised():
    text = shapes.explain_shape("layers.7.attn.wkv.weight", (512, 4096), (512, 7168), Config.preset("pro"))
    assert text == (
        "layers.7.attn.wkv.weight: shape [512, 4096], config.json expects [512, 7168] (hidden_size).\n"
        "These look like Flash weights: use the config.json that came with them."
    )


@pytest.mark.parametrize(
    "change, match",
    [
        ({"hidden_size": 128}, r"shape \[96, 64\], config.json expects \[96, 128\] \(hidden_size\)"),
        ({"vocab_size": 100}, r"\(vocab_size\)"),
        ({"num_hidden_layers": 3}, r"layers.3.*not a tensor of this configuration"),
        ({"num_hidden_layers": 5, "compress_ratios": (0, 4, 32, 4, 4)}, r"layers.4.*missing"),
        ({"num_hash_layers": 0}, r"gate.bias: missing.\n.*tid2eid: not a tensor.*\n.*num_hash_layers 0"),
        ({"compress_ratios": (0, 4, 32, 32)}, r"indexer.*not a tensor.*\n.*compress_ratios \[0, 4, 32, 32\]"),
        ({"n_routed_experts": 8}, r"n_routed_experts"),
        ({"num_nextn_predict_layers": 2}, r"mtp.1.*missing.*\n.*num_nextn_predict_layers 2"),
        ({"q_lora_rank": 80}, r"\(q_lora_rank\)"),
        ({"index_n_heads": 8}, r"\(index_n_heads\)"),
    ],
)
@pytest.mark.parametrize("dialect", ["ours", "official"])
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, state, change, match, dialect):
    write(tmp_path, state if dialect == "ours" else official(state))
    refused(tmp_path, "(?s)" + match, SMALL.replace(**change))


@pytest.mark.parametrize(
    "name, tensor, match",
    [
        ("layers.1.attn.wkv.weight", torch.zeros(64, 64).int(), "dtype I32, expected F32 or BF16 or F16"),
        ("norm.weight", torch.zeros(64, dtype=torch.float64), "dtype F64"),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(96, 2), "dtype F32, expected I64 or I32"),
        ("layers.0.ffn.gate.tid2eid", torch.full((96, 2), 4), r"names expert.*has 4 \(n_routed_experts\)"),
        ("layers.0.ffn.gate.tid2eid", torch.full((96, 2), -1), "names expert -1"),
        ("layers.1.ffn.experts.w1", torch.zeros(4, 32, 32, dtype=torch.int8), "dtype I8, expected"),
        ("layers.1.attn.wkv.weight", torch.zeros(64, 64).to(torch.float8_e4m3fn), "FP8 without its scale"),
        ("layers.1.attn.wkv.weight", torch.full((64, 64), torch.nan), "4096 of 4096 values are NaN"),
        ("layers.3.attn.attn_sink", torch.tensor([0, torch.inf, 0, 0]), "1 of 4 values are NaN or infinite"),
        ("layers.1.attn.wkv.scale", torch.ones(1, 1, dtype=torch.uint8), "F32 with a scale"),
        ("layers.1.attn.wqx.scale", torch.ones(1, 1).byte(), "layers.1.attn.wqx.scale: a scale without"),
        ("model.layers.1.attn.norm.weight", torch.zeros(64), "layers.1.attn.kv_norm.weight: given twice, as"),
        ("layers.1.ffn.experts.0.w1.weight", torch.zeros(32, 64), "given both stacked and one by one"),
    ],
)  # fmt: skip
def test_a_mislabelled_or_damaged_tensor_is_named(tmp_path, state, name, tensor, match):
    refused(write(tmp_path, state | {name: tensor}), match)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"layers.1.attn.wq_b.scale": None}, "layers.1.attn.wq_b.weight: FP8 without its scale tensor"),
        ({"layers.1.attn.wq_b.scale": torch.zeros(1, 2).byte()}, r"shape \[1, 2\], expected \[2, 2\]"),
        ({"layers.1.attn.wq_b.scale": torch.zeros(2, 2)}, "dtype F32, expected F8_E8M0 or U8"),
        ({"layers.1.ffn.experts.2.w1.scale": None}, "layers.1.ffn.experts.2.w1.weight: dtype I8"),
        ({f"layers.1.ffn.experts.2.w1.{end}": None for end in ("weight", "scale")}, "expert 2 is missing"),
        ({"layers.1.ffn.experts.2.w1.weight": None}, "expert 2 is missing"),
        ({"layers.1.ffn.experts.4.w1.weight": torch.zeros(32, 64)}, "expert 4 is too many"),
        ({"layers.1.ffn.experts.2.w1.weight": torch.zeros(32, 16).char()}, r"\[32, 32\] \(hidden_size\)"),
        ({"layers.1.ffn.experts.2.w1.scale": torch.full((32, 2), 255).byte()}, "2048 of 2048 values are NaN"),
    ],
)  # fmt: skip
def test_damaged_packing_is_named(tmp_path, state, change, match):
    packed = {n: t for n, t in (official(state) | change).items() if t is not None}
    refused(write(tmp_path, packed), match)


def test_truncated_overlong_or_foreign_files_are_refused(tmp_path, state):
    file = write(tmp_path, state) / "model.safetensors"
    whole = file.read_bytes()
    for content in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:5],
        b"",
        whole + b"x",
        b"\xff" * 4096,
        b"PK\x03\x04" * 99,
    ):
        file.write_bytes(content)
        refused(tmp_path, "model.safetensors is not a whole safetensors file")


@pytest.mark.parametrize(
    "bad",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x.bin",
        7,
        "..",
    ],
)
def test_an_index_cannot_point_outside_the_directory(tmp_path, state, bad):
    inside = write(tmp_path / "inside", state)
    (inside / "model.safetensors").rename(tmp_path / "model.safetensors")
    (inside / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"norm.weight": bad}}), encoding="utf-8"
    )
    refused(inside, "expected a \\*.safetensors file beside the index")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {}}', "\x00"])
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    refused(tmp_path, "not an index|names no shard")


def test_pickles_are_never_read(tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        for file in tmp_path.iterdir():
            file.unlink()
        torch.save({"norm.weight": torch.zeros(1)}, tmp_path / name)
        refused(tmp_path, f"holds {name}: pickle can run code and is never read; convert to safetensors")


def test_an_empty_or_absent_or_ambiguous_directory_is_refused(tmp_path, state):
    refused(tmp_path, r"holds no \*.safetensors: weights are missing")
    refused(tmp_path / "nowhere", "is not a directory")
    write(tmp_path, state)
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    refused(tmp_path, "holds both model.safetensors and model.safetensors.index.json")


# --- saving ---


@pytest.mark.parametrize(
    "name, tensor, match",
    [
        ("norm.weight", None, "norm.weight: missing"),
        ("extra", torch.zeros(1), "extra: not a tensor of this configuration"),
        (
            "norm.weight",
            torch.zeros(63),
            r"norm.weight: shape \[63\], config.json expects \[64\] \(hidden_size\)",
        ),
        ("norm.weight", torch.full((64,), torch.nan), "norm.weight: 64 of 64 values are NaN"),
    ],
)
def test_a_bad_state_is_refused_before_the_old_checkpoint_is_touched(tmp_path, state, name, tensor, match):
    checkpoint.save(tmp_path, SMALL, state)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    bad = {n: t for n, t in (state | {name: tensor}).items() if t is not None}
    with pytest.raises(CheckpointError, match=match):
        checkpoint.save(tmp_path, SMALL, bad)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_saving_beside_an_index_is_refused(tmp_path, state):
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="save into another directory"):
        checkpoint.save(tmp_path, SMALL, state)


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path, state):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        checkpoint.save(tmp_path / "file", SMALL, state)


FILL = """
import resource, signal, sys
from rorqual.model import checkpoint
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = Config.from_file(sys.argv[1])
state = checkpoint.load_state(sys.argv[1], config)
state["norm.weight"] += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    checkpoint.save(sys.argv[1], config, state)
except CheckpointError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary(tmp_path, state):
    checkpoint.save(tmp_path, SMALL, state)
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "refused: cannot write" in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    same(checkpoint.load_state(tmp_path, SMALL), state)


# Forks a child per step, which dies by SIGKILL just before its n-th open or rename inside the directory.
KILL = """
import os, shutil, signal, sys
import torch
from rorqual.model import checkpoint
from rorqual.model.config import Config
torch.set_num_threads(1)
base = sys.argv[1]
config = Config.from_file(base)
state = checkpoint.load_state(base, config)
state["norm.weight"] += 1
for steps in range(30):
    copy = f"{base}-{steps}"
    shutil.copytree(base, copy)
    child = os.fork()
    if child == 0:
        left = steps
        def trace(event, args):
            global left
            if event in ("open", "os.rename") and str(args[0]).startswith(copy):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(trace)
        checkpoint.save(copy, config, state)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status)
    if status != -signal.SIGKILL:
        break
"""


def test_kill_at_any_step_leaves_a_whole_checkpoint(tmp_path, state):
    checkpoint.save(tmp_path / "base", SMALL, state)
    changed = state | {"norm.weight": state["norm.weight"] + 1}
    command = [sys.executable, "-c", KILL, str(tmp_path / "base")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    statuses = [int(line) for line in done.stdout.split()]
    assert statuses[-1] == 0 and set(statuses[:-1]) == {-signal.SIGKILL} and len(statuses) >= 6, statuses
    replaced = []
    for steps in range(len(statuses)):
        where = tmp_path / f"base-{steps}"
        got = checkpoint.load_state(where, Config.from_file(where))
        replaced.append(torch.equal(got["norm.weight"], changed["norm.weight"]))
        same(got, changed if replaced[-1] else state)
    assert replaced == sorted(replaced) and not replaced[0] and replaced[-1]


def test_unknown_names_keep_their_name():
    for name in ("", "rotor", "layers.x.attn.wkv.weight", "model.", "layers.1.attn.\n"):
        places = dialects.place(name)
        assert len(places) == 1 and not places[0].scale


def test_all_lists_every_public_name():
    for module in (checkpoint, dialects, shapes):
        public = {
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
        }
        assert public == set(module.__all__)


def test_a_saved_file_is_plain_safetensors(tmp_path, state):
    checkpoint.save(tmp_path, SMALL, state)
    same(load_file(tmp_path / "model.safetensors"), state)
