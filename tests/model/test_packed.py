"""A checkpoint as mapped weights: every dialect and dtype gives the stored numbers, and nothing bad gets through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.model import CheckpointError, Config, ConfigError, checks, packed
from rorqual.model.packed import PackedWeights, open_weights
from rorqual.model.quant import pack_fp8_weight
from rorqual.model.shapes import expected_shapes
from rorqual.model.synth import synth
from tests.model.test_checkpoint import SMALL, hf_names, random_state, write
from tests.oracles.official_checkpoint import official
from tests.snippets import run_python

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(SMALL)


def values(weights: PackedWeights, name: str, shape: tuple[int, ...]) -> Tensor:
    """Our tensor `name` put together again through the public calls."""
    if name.endswith("tid2eid"):
        return weights.table(name)
    if ".ffn.experts." in name:
        stem, leaf = name.split("experts.")
        return torch.stack([weights.matrix(f"{stem}experts.{e}.{leaf}").unpack() for e in range(shape[0])])
    if len(shape) == 2 and ".hc_" not in name and not name.startswith("hc_") and not name.endswith("ape"):
        return weights.matrix(name.removesuffix(".weight")).unpack()
    return weights.vector(name.removesuffix(".weight"))


def same(directory: Path, state: State) -> PackedWeights:
    with PackedWeights(directory) as weights:
        for name, shape in expected_shapes(SMALL, mtp=weights.drafter == "mtp").items():
            assert torch.equal(values(weights, name, shape).to(state[name].dtype), state[name]), name
        return weights


def saved_names(state: State) -> State:
    third = {f"model.{n}".replace(".attn.kv_norm.", ".attn.norm."): t for n, t in state.items()}
    third["head.weight"] = third.pop("model.head.weight")
    for end in ("fn", "base", "scale"):
        third[f"model.hc_head.hc_{end}"] = third.pop(f"model.hc_head_{end}")
    return third


@pytest.mark.parametrize(
    "dialect, name",
    [
        ("fp4", "official"),
        ("fp8", "official"),
        (None, "official"),
        ("ours", "stacked"),
        ("saved", "hf-saved"),
    ],
)
def test_every_dialect_gives_the_stored_numbers(
    tmp_path: Path, state: State, dialect: str | None, name: str
) -> None:
    tensors = {"ours": lambda: state, "saved": lambda: saved_names(official(state))}.get(
        str(dialect), lambda: official(state, experts=dialect)
    )()
    weights = same(write(tmp_path, tensors), state)
    assert weights.survey.dialect == name and weights.drafter == "mtp" and weights.experts_resident


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hf_names_with_stacked_halves_give_the_stored_numbers(
    tmp_path: Path, state: State, dtype: torch.dtype
) -> None:
    without = {n: t for n, t in state.items() if not n.startswith("mtp.")}
    named = {n: t if t.dtype == torch.int64 else t.to(dtype) for n, t in hf_names(without).items()}
    weights = same(write(tmp_path, named), without)
    assert weights.survey.dialect == "hf" and weights.drafter is None
    assert weights.matrix("head").kind == ("bf16" if dtype == torch.bfloat16 else "f32")


def test_matrices_keep_their_format_and_their_bytes(tmp_path: Path, state: State) -> None:
    tensors = official(state)
    weights = PackedWeights(write(tmp_path, tensors))
    fp8 = weights.matrix("layers.1.attn.wq_b")
    assert (fp8.kind, fp8.shape, fp8.block, fp8.data.dtype) == ("fp8", (256, 160), 128, torch.uint8)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(fp8.data, stored["layers.1.attn.wq_b.weight"].view(torch.uint8))
    assert fp8.scale is not None
    assert torch.equal(fp8.scale, stored["layers.1.attn.wq_b.scale"].view(torch.uint8))
    fp4 = weights.matrix("layers.1.ffn.experts.2.w1")
    assert (fp4.kind, fp4.shape, fp4.block) == ("fp4", (32, 64), 32)
    assert fp4.data.shape == (32, 32) and fp4.scale is not None and fp4.scale.shape == (32, 2)
    assert fp4.nbytes == 32 * 32 + 32 * 2
    assert weights.matrix("layers.1.attn.wq_b").data.data_ptr() == fp8.data.data_ptr()
    assert (
        weights.matrix("layers.0.ffn.gate").kind == "bf16" and weights.vector("norm").dtype == torch.float32
    )


def test_fp8_in_blocks_of_32_is_read_and_said(tmp_path: Path, state: State) -> None:
    tensors = official(state)
    for name in [name for name in tensors if name.endswith("wq_b.scale")]:
        weight = state[name.replace("scale", "weight")]
        codes, scale = pack_fp8_weight(weight, block=32)
        tensors[name], tensors[name.replace("scale", "weight")] = scale, codes
    weights = same(write(tmp_path, tensors), state)
    assert weights.matrix("layers.1.attn.wq_b").block == 32
    assert weights.matrix("layers.1.attn.wkv").block == 128


def test_a_config_that_says_another_block_is_refused(tmp_path: Path, state: State) -> None:
    write(tmp_path, official(state))
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {"weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        CheckpointError, match=r"FP8 in blocks of 128, config.json says 32 \(quantization_config"
    ):
        PackedWeights(tmp_path)
    raw["quantization_config"] = {"weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    PackedWeights(tmp_path)


def test_a_file_whose_tensors_are_not_aligned_is_read_all_the_same(tmp_path: Path, state: State) -> None:
    write(tmp_path, state)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip(b" ")
    header += b" " * (1 - len(header) % 2)  # an odd header: every tensor at an odd offset
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    same(tmp_path, state)


def test_mapped_tensors_outlive_their_source(tmp_path: Path, state: State) -> None:
    head = open_weights(write(tmp_path, state)).matrix("head").data
    for file in tmp_path.iterdir():
        file.unlink()
    assert torch.equal(head, state["head.weight"])


def test_opening_reads_no_data(tmp_path: Path) -> None:
    """Flash's own shapes, in a sparse file of over 50 GB: only headers can have been read."""
    config = Config.preset("flash").replace(num_hidden_layers=2, num_nextn_predict_layers=0)
    header, at = {}, 0
    for name, shape in expected_shapes(config).items():
        count = int(torch.tensor(shape).prod())
        dtype, size = ("I64", 8) if name.endswith("tid2eid") else ("F32", 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count * size]}
        at += count * size
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    assert at > 50e9
    weights = PackedWeights(tmp_path)
    assert weights.matrix("layers.1.ffn.experts.255.w2").shape == (4096, 2048)


# --- bad input ---


def test_a_dspark_drafter_is_recognised_and_refused_by_name(tmp_path: Path, state: State) -> None:
    without = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    drafter = {"mtp.0.main_proj.weight": torch.zeros(4, 4), "mtp.2.attn.wkv.weight": torch.zeros(4, 4)}
    weights = same(write(tmp_path, without | drafter), without)
    assert weights.drafter == "dspark"
    with pytest.raises(CheckpointError, match=r"mtp.0.e_proj: the checkpoint's drafter is DSpark"):
        weights.matrix("mtp.0.e_proj")
    with pytest.raises(IndexError, match="4 layers and 0 MTP blocks"):
        weights.load_experts(4, [0])


@pytest.mark.parametrize(
    "name, change, touch, match",
    [
        ("layers.1.attn.wkv.weight", (0, 0x7F), "layers.1.attn.wkv", "1 of 4096 values are NaN"),
        ("layers.1.attn.wkv.weight", (4095, 0xFF), "layers.1.attn.wkv", "1 of 4096 values are NaN"),
        ("layers.1.attn.wkv.scale", (0, 0xFF), "layers.1.attn.wkv", r"1 of 1 scales are NaN or above 2\^119"),
        ("layers.1.attn.wkv.scale", (0, 247), "layers.1.attn.wkv", "scales are NaN or above"),
        ("layers.2.ffn.experts.1.w2.scale", (3, 253), "layers.2.ffn.experts.1.w2", r"1 of 64 scales.*2\^125"),
        ("norm.weight", (1, 0x7F), "norm", "norm.weight: 1 of 64 values are NaN or infinite"),
        ("head.weight", (7, 0xFF), "head", "head: 1 of 6144 values are NaN"),
        ("layers.3.attn.attn_sink", (3, 0x7F), "layers.3.attn.attn_sink", "NaN or infinite"),
        ("layers.0.ffn.gate.tid2eid", (8, 4), "layers.0.ffn.gate.tid2eid", r"expert 0 to 4, .* has 4"),
        ("layers.0.ffn.gate.tid2eid", (15, 0x80), "layers.0.ffn.gate.tid2eid", "names expert -"),
    ],
)
def test_damaged_values_are_named_at_first_touch(
    tmp_path: Path, state: State, name: str, change: tuple[int, int], touch: str, match: str
) -> None:
    tensors = official(state)
    raw = tensors[name].contiguous().reshape(-1).view(torch.uint8).clone()
    at, byte = change
    raw[at] = byte
    if tensors[name].dtype in (torch.bfloat16, torch.float32):  # a whole exponent of ones
        width = tensors[name].element_size()
        raw[at // width * width :][: width - 1] = 0x80
        raw[at // width * width + width - 1] = byte
    tensors[name] = raw.view(tensors[name].dtype).view(tensors[name].shape)
    weights = PackedWeights(write(tmp_path, tensors))  # the headers are fine
    get = (
        weights.table
        if "tid2eid" in touch
        else weights.vector
        if touch in ("norm", "layers.3.attn.attn_sink")
        else weights.matrix
    )
    for _ in range(2):  # and it is not forgotten
        with pytest.raises(CheckpointError, match=match):
            get(touch)
    weights.matrix("embed")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"layers.1.attn.wq_b.scale": None}, "layers.1.attn.wq_b.weight: FP8 without its scale tensor"),
        ({"layers.1.attn.wq_b.scale": torch.zeros(1, 2).byte()}, r"shape \[1, 2\], expected \[2, 2\]"),
        ({"layers.1.attn.wqx.scale": torch.ones(1, 1).byte()}, "a scale without its weight"),
        ({"norm.weight": None}, "norm.weight: missing"),
        ({"rotor": torch.zeros(1)}, "rotor: not a tensor of this configuration"),
        ({"model.norm.weight": torch.zeros(64)}, "norm.weight: given twice"),
        ({"norm.weight": torch.zeros(65)}, r"\[65\], config.json expects \[64\] \(hidden_size\)"),
        ({"norm.weight": torch.zeros(64, dtype=torch.float64)}, "dtype F64, expected F32 or BF16 or F16"),
        ({"layers.1.ffn.experts.2.w1.scale": None}, "layers.1.ffn.experts.2.w1.weight: dtype I8"),
    ],
)
def test_headers_that_contradict_the_config_are_refused_at_open(
    tmp_path: Path, state: State, change: dict[str, Tensor | None], match: str
) -> None:
    tensors = {n: t for n, t in (official(state) | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=match):
        PackedWeights(write(tmp_path, tensors))


def test_files_that_are_no_checkpoint_are_refused_at_open(tmp_path: Path, state: State) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        PackedWeights(tmp_path)
    file = write(tmp_path, state) / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:40], b"", whole + b"x"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            PackedWeights(tmp_path)


def test_names_that_are_not_there_or_no_matrix_are_refused(tmp_path: Path, state: State) -> None:
    weights = PackedWeights(write(tmp_path, official(state)))
    for call, name, kind, match in (
        (weights.matrix, "layers.9.attn.wq_a", CheckpointError, "the checkpoint has no such tensor"),
        (weights.matrix, "norm", CheckpointError, r"norm.weight: BF16 \[64\] is no matrix"),
        (weights.matrix, "layers.0.ffn.gate.tid2eid", CheckpointError, "is no matrix"),
        (weights.vector, "layers.1.attn.wq_b", CheckpointError, "F8_E4M3, a vector is"),
        (weights.table, "norm", CheckpointError, "BF16, a table is I64"),
        (weights.matrix, "layers.0.ffn.experts.4.w1", IndexError, "experts 0 to 3"),
    ):
        with pytest.raises(kind, match=match):
            call(name)
    with pytest.raises(IndexError, match="layer 1, expert -1: the model has experts 0 to 3"):
        weights.load_experts(1, [0, -1])
    with pytest.raises(IndexError, match="layer 7"):
        weights.load_experts(7, [0])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_random_change_of_the_header_is_refused_or_harmless(
    tmp_path: Path, state: State, data: st.DataObject
) -> None:
    file = tmp_path / "model.safetensors"
    if not (tmp_path / "clean").exists():
        write(tmp_path, official(state))
        file.rename(tmp_path / "clean")
    content = (tmp_path / "clean").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    what = data.draw(st.sampled_from(["dtype", "shape", "name", "drop", "offsets"]))
    entry = header.pop(name)
    if what == "dtype":
        entry["dtype"] = data.draw(
            st.sampled_from(["F32", "BF16", "F16", "U8", "I8", "F8_E4M3", "F8_E8M0", "I64"])
        )
    elif what == "shape":
        shape = entry["shape"]
        entry["shape"] = data.draw(st.sampled_from([shape[::-1], [*shape, 1], shape[1:], [1, *shape]]))
    elif what == "offsets":
        entry["data_offsets"] = [offset + data.draw(st.integers(-8, 8)) for offset in entry["data_offsets"]]
    if what != "drop":
        header[name + ("x" if what == "name" else "")] = entry
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    try:
        weights = PackedWeights(tmp_path)
    except CheckpointError as error:
        assert len(str(error)) < 900
        return
    # accepted: either nothing changed, or a container of the same width and meaning (I8 and U8, E8M0 and U8)
    for ours, shape in expected_shapes(SMALL).items():
        assert torch.equal(values(weights, ours, shape).to(state[ours].dtype), state[ours]), (name, what)


def test_a_missing_shard_or_a_pickle_is_refused(tmp_path: Path, state: State) -> None:
    write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights are missing"):
        PackedWeights(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle can run code"):
        PackedWeights(tmp_path)


def test_shards_are_one_checkpoint(tmp_path: Path, state: State) -> None:
    write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    tensors = official(state)
    where = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name].contiguous() for i, name in enumerate(sorted(tensors)) if i % 3 == shard}
        save_file(part, tmp_path / file)
        where |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    same(tmp_path, state)


def test_the_python_of_the_page_runs(tmp_path: Path) -> None:
    synth(tmp_path, Config.preset("tiny"))
    names = run_python("docs/checkpoints.md", directory=tmp_path, expert_bytes=1 << 20)
    assert names["matrix"].kind == "fp8" and names["stats"].misses == 1


def test_all_lists_every_public_name() -> None:
    for module in (packed, checks):
        public = {
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
        }
        constants = {name for name in module.__all__ if name.isupper()}  # they know no module
        assert public | constants == set(module.__all__)
