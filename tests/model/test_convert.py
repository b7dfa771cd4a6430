"""Conversions keep the numbers, synthetic checkpoints are what they say, and a kill or a full disk costs one shard."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.model import (
    CheckpointError,
    Config,
    ConfigError,
    Model,
    checkpoint,
    convert,
    inspection,
    storage,
    synth,
    verify,
    writer,
)
from rorqual.model.convert import Conversion
from rorqual.model.packed import PackedWeights
from rorqual.model.quant import pack_fp8_weight, unpack_fp4_weight, unpack_fp8_weight
from tests.model.test_checkpoint import SMALL, hf_names, random_state, write
from tests.oracles.official_checkpoint import official

State = dict[str, Tensor]
TINY = Config.preset("tiny")


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(SMALL)


def same(got: State, expected: State) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name].to(tensor.dtype), tensor), name


def contents(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.iterdir()
        if file.name != writer.JOURNAL
    }


# --- convert ---


@pytest.mark.parametrize("store", ["official", "fp8", "bf16", "fp32"])
@pytest.mark.parametrize("source", ["ours", "official", "fp8", "hf"])
def test_every_storage_of_exact_values_gives_them_back(
    tmp_path: Path, state: State, source: str, store: str
) -> None:
    own = {n: t for n, t in state.items() if not n.startswith("mtp.")} if source == "hf" else state
    tensors = {
        "ours": lambda: own,
        "official": lambda: official(own),
        "fp8": lambda: official(own, experts="fp8"),
        "hf": lambda: hf_names(own),
    }[source]()
    done = convert.convert(write(tmp_path / "a", tensors), tmp_path / "b", store=store)  # type: ignore[arg-type]
    assert done.shards == 1 and done.resumed_bytes == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    assert Config.from_file(tmp_path / "b") == SMALL.replace(expert_dtype="fp8" if store == "fp8" else "fp4")
    same(checkpoint.load_state(tmp_path / "b", SMALL), own)
    with PackedWeights(tmp_path / "b") as weights:
        kinds = [weights.matrix(n).kind for n in ("layers.1.ffn.experts.0.w1", "layers.1.attn.wq_a", "head")]
    assert (
        kinds
        == {
            "official": ["fp4", "fp8", "bf16"],
            "fp8": ["fp8", "fp8", "bf16"],
            "bf16": ["bf16"] * 3,
            "fp32": ["f32"] * 3,
        }[store]
    )


def test_keeping_copies_the_bytes_and_renames(tmp_path: Path, state: State) -> None:
    tensors = official(state)
    prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    convert.convert(write(tmp_path / "a", prefixed), tmp_path / "b")
    got = load_file(tmp_path / "b" / "model.safetensors")
    assert set(got) == set(tensors)
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_quantising_is_what_the_formats_say_and_pieces_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(TINY).initialize(5)
    model.save_pretrained(tmp_path / "a")
    state = model.official_state()
    convert.convert(tmp_path / "a", tmp_path / "b", store="official")
    got = load_file(tmp_path / "b" / "model.safetensors")
    codes, scale = pack_fp8_weight(state["layers.1.attn.wq_b.weight"])
    assert torch.equal(got["layers.1.attn.wq_b.weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(got["layers.1.attn.wq_b.scale"].view(torch.uint8), scale)
    for expert in (0, 7):
        stem = f"layers.3.ffn.experts.{expert}.w2"
        back = unpack_fp4_weight(got[f"{stem}.weight"], got[f"{stem}.scale"], dtype=torch.float32)
        true = state["layers.3.ffn.experts.w2"][expert]
        step = (
            true.view(128, 3, 32).abs().amax(-1, keepdim=True) / 4
        )  # values of 4 to 6 lie 2 apart, blocks to 2x
        assert ((back - true).view(128, 3, 32).abs() <= step).all()
    monkeypatch.setattr(convert, "PIECE", 128 * 64)
    convert.convert(tmp_path / "a", tmp_path / "c", store="official")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def test_fp4_in_fp8_loses_nothing(tmp_path: Path) -> None:
    synth.synth(tmp_path / "a", TINY, seed=1)
    convert.convert(tmp_path / "a", tmp_path / "b", store="fp8")
    one, two = (
        load_file(tmp_path / "a" / "model.safetensors"),
        load_file(tmp_path / "b" / "model.safetensors"),
    )
    for name in one:
        if ".ffn.experts." in name and name.endswith("weight"):
            scale = name.replace("weight", "scale")
            wide = unpack_fp8_weight(two[name], two[scale], dtype=torch.float32)
            assert torch.equal(unpack_fp4_weight(one[name], one[scale], dtype=torch.float32), wide)


def test_sharding_changes_no_tensor_and_has_an_index(tmp_path: Path, state: State) -> None:
    write(tmp_path / "a", official(state))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    done = convert.convert(tmp_path / "a", tmp_path / "b", shard_bytes=60_000)
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert done.shards > 3 and len(names) == done.shards + 3 and "tokenizer.json" in names
    same(checkpoint.load_state(tmp_path / "b", SMALL), state)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.data_bytes
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "b" / file)
    assert verify.verify(tmp_path / "b").problems == []


def test_hf_loads_the_hf_layout_and_gives_our_logits(tmp_path: Path) -> None:
    from transformers import DeepseekV4ForCausalLM

    model = Model(TINY, mtp=False).initialize(2).eval()
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", store="fp32", layout="hf")
    theirs = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    same(checkpoint.load_state(tmp_path / "b", TINY), model.official_state())


def test_a_dspark_drafter_goes_along_untouched(tmp_path: Path, state: State) -> None:
    own = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    drafter = {
        "mtp.0.main_proj.weight": torch.arange(12.0).view(3, 4),
        "mtp.2.norm.weight": torch.ones(5).bfloat16(),
    }
    write(tmp_path / "a", own | drafter)
    convert.convert(tmp_path / "a", tmp_path / "b", store="bf16")
    got = load_file(tmp_path / "b" / "model.safetensors")
    for name, tensor in drafter.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
    assert inspection.inspect(tmp_path / "b").drafter == "dspark"


@pytest.mark.parametrize(
    "change, options, match",
    [
        ({}, {"store": "fp5"}, "no storage 'fp5'"),
        ({}, {"layout": "gguf"}, "in layout 'gguf'"),
        ({}, {"layout": "hf", "store": "official"}, "HF's layout holds plain weights: choose bf16 or fp32"),
        ({}, {"layout": "hf"}, "HF's layout holds plain weights, these are packed"),
        ({"norm.weight": torch.full((64,), torch.nan)}, {}, "norm.weight: 64 of 64 values are NaN"),
        (
            {"head.weight": torch.full((96, 64), 3.4e38)},
            {"store": "bf16"},
            "6144 values are too large for bfloat16",
        ),
        ({"norm.weight": torch.zeros(3)}, {}, r"shape \[3\]"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, state: State, change: State, options: dict[str, str], match: str
) -> None:
    write(tmp_path / "a", official(state) | change)
    with pytest.raises(CheckpointError, match=match):
        convert.convert(tmp_path / "a", tmp_path / "b", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "b" / "config.json").exists()


def test_fp8_blocks_of_32_are_not_kept_but_converted(tmp_path: Path, state: State) -> None:
    tensors = official(state)
    for name in [name for name in tensors if name.endswith("wq_b.scale")]:
        weight = name.replace("scale", "weight")
        tensors[weight], tensors[name] = pack_fp8_weight(state[weight], block=32)
    write(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match=r"wq_b.weight: FP8 in blocks of 32 cannot be kept"):
        Conversion(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", store="official")
    same(checkpoint.load_state(tmp_path / "b", SMALL), state)


def test_another_checkpoint_job_or_writer_is_never_overwritten(tmp_path: Path, state: State) -> None:
    write(tmp_path / "a", official(state))
    before = contents(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert.convert(tmp_path / "a", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"already holds config.json: choose an empty directory"):
        synth.synth(tmp_path / "a", SMALL)
    assert contents(tmp_path / "a") == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / writer.JOURNAL).write_text(json.dumps({"job": "another"}))
    with pytest.raises(CheckpointError, match="an unfinished checkpoint of another command"):
        synth.synth(tmp_path / "b", SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        synth.synth(tmp_path / "file", SMALL)

    def meddle(count: int) -> None:
        with pytest.raises(CheckpointError, match="another process is writing this checkpoint"):
            synth.synth(tmp_path / "c", SMALL)

    synth.synth(tmp_path / "c", SMALL, on_bytes=meddle)


# --- synth ---


@pytest.mark.parametrize("store", ["official", "fp8", "bf16", "fp32"])
def test_a_synthetic_model_runs_and_is_the_same_however_it_is_sharded(tmp_path: Path, store: str) -> None:
    for name, size in (("a", 1 << 40), ("b", 200_000)):
        synth.synth(tmp_path / name, TINY, seed=7, store=store, shard_bytes=size)  # type: ignore[arg-type]
    one, two = (checkpoint.load_state(tmp_path / name, TINY) for name in ("a", "b"))
    same(one, two)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    model = Model.from_pretrained(tmp_path / "a").float()
    logits = model(torch.arange(64)[None])
    assert torch.isfinite(logits).all() and 0.2 < logits.std() < 5
    assert verify.verify(tmp_path / "a").problems == verify.verify(tmp_path / "b").problems == []


def test_synthetic_values_follow_the_seed_and_have_the_deviation_of_a_fresh_model(tmp_path: Path) -> None:
    synth.synth(tmp_path / "a", TINY, seed=7)
    synth.synth(tmp_path / "b", TINY, seed=8)
    one, two = (checkpoint.load_state(tmp_path / name, TINY) for name in ("a", "b"))
    fresh = Model(TINY).initialize(0).official_state()
    for name, tensor in one.items():
        random = not name.endswith("tid2eid") and fresh[name].std(correction=0) > 0 and "base" not in name
        if random:
            assert not torch.equal(tensor, two[name]), name
        if random and tensor.numel() > 4000:
            assert 0.45 < tensor.float().std() / fresh[name].float().std() < 1.7, name
    table = one["layers.0.ffn.gate.tid2eid"]
    assert all(len(set(row)) == len(row) for row in table.tolist()) and table.unique().numel() == 8


def test_a_synthetic_checkpoint_without_mtp(tmp_path: Path) -> None:
    synth.synth(tmp_path, TINY, mtp=False)
    with PackedWeights(tmp_path) as weights:
        assert weights.drafter is None


def test_experts_lie_together_so_that_one_read_brings_them(tmp_path: Path) -> None:
    synth.synth(tmp_path, TINY)
    with PackedWeights(tmp_path, expert_bytes=1 << 20) as weights:
        whole = sum(m.nbytes for m in weights.load_experts(2, [3])[0])
        assert weights.expert_stats().slot_bytes <= whole + 2 * 4096  # type: ignore[union-attr]


# --- inspect and verify ---


def test_inspect_counts_what_the_files_hold(tmp_path: Path, state: State) -> None:
    tensors = official(state)
    found = inspection.inspect(write(tmp_path, tensors))
    assert sum(one.nbytes for one in found.by_kind.values()) == sum(t.nbytes for t in tensors.values())
    assert sum(one.nbytes for one in found.by_part.values()) == sum(t.nbytes for t in tensors.values())
    assert sum(one.tensors for one in found.by_kind.values()) == len(tensors)
    assert found.expert_bytes == sum(
        tensors[f"layers.0.ffn.experts.0.{w}.{end}"].nbytes
        for w in ("w1", "w2", "w3")
        for end in ("weight", "scale")
    )
    assert (found.drafter, found.dialect, found.files, found.problems) == ("mtp", "official", 1, [])
    assert found.kv_bytes > 0 and json.dumps(found.to_dict())
    del tensors["norm.weight"]
    assert inspection.inspect(write(tmp_path, tensors)).problems[0].startswith("norm.weight: missing")


def test_schedules_in_words() -> None:
    words = [inspection.describe_schedule(Config.preset(name)) for name in ("pro", "flash", "tiny")]
    assert words == [
        "2 hca, 29 x (csa, hca), csa",
        "2 window, 20 x (csa, hca), csa",
        "window, 2 x (csa, hca)",
    ]


def test_verify_names_every_problem_and_where(tmp_path: Path, state: State) -> None:
    tensors = official(state)
    tensors["layers.1.attn.wkv.weight"] = torch.full((64, 64), 127, dtype=torch.uint8).view(
        torch.float8_e4m3fn
    )
    tensors["layers.2.ffn.experts.3.w2.scale"] = torch.full((64, 1), 255).byte()
    tensors["layers.0.ffn.gate.tid2eid"] = torch.full((96, 2), 9)
    tensors["norm.weight"][5] = torch.inf
    convert_from = write(tmp_path / "a", {n: t.contiguous() for n, t in tensors.items()})
    found = verify.verify(convert_from)
    assert {problem.where.split(": ")[1]: problem.what for problem in found.problems} == {
        "layers.1.attn.wkv.weight": "4096 of 4096 values are NaN or infinite",
        "layers.2.ffn.experts.3.w2.scale": "64 of 64 scales are NaN or above 2^125",
        "layers.0.ffn.gate.tid2eid": "names expert 0 to 9, config.json has 4 (n_routed_experts)",
        "norm.weight": "1 of 64 values are NaN or infinite",
    }
    assert found.data_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_verify_compares_the_index_with_the_files(tmp_path: Path) -> None:
    synth.synth(tmp_path, TINY, shard_bytes=200_000)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    where = document["weight_map"]
    files = sorted(set(where.values()))
    where["norm.weight"], where["rotor"] = next(f for f in files if f != where["norm.weight"]), files[0]
    del where["hc_head_base"]
    document["metadata"]["total_size"] += 1
    index.write_text(json.dumps(document))
    save_file({"x": torch.zeros(1)}, tmp_path / "left.safetensors")
    texts = [f"{problem.where}: {problem.what}" for problem in verify.verify(tmp_path).problems]
    assert len(texts) == 5
    for part in (
        "norm.weight: it is in",
        "rotor: model-0",
        "hc_head_base: not in the index",
        "total_size",
        "left.safe",
    ):
        assert any(part in text for text in texts), part


def test_verify_of_broken_directories_is_a_result(tmp_path: Path, state: State) -> None:
    assert "is not a directory" in verify.verify(tmp_path / "no").problems[0].what
    assert "weights are missing" in verify.verify(tmp_path).problems[0].what
    file = write(tmp_path, official(state)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert [problem.where for problem in verify.verify(tmp_path).problems] == ["model.safetensors"]
    write(tmp_path, official(state))
    (tmp_path / "config.json").write_text("{")
    assert [problem.where for problem in verify.verify(tmp_path).problems] == ["config.json"]


# --- violence ---

KILLED = """
import sys
from pathlib import Path
from rorqual.model import convert, synth
from rorqual.model.config import Config
what, target, source = sys.argv[1:4]
def slow(count):
    print(count, flush=True)
if what == "synth":
    done = synth.synth(target, Config.from_file(source), seed=3, shard_bytes=150_000, on_bytes=slow)
else:
    done = convert.convert(source, target, store="fp8", shard_bytes=150_000, on_bytes=slow)
print("resumed", done.resumed_bytes, done.shards)
"""


@pytest.mark.parametrize("what", ["synth", "convert"])
def test_kill_and_resume_ends_in_the_same_bytes(tmp_path: Path, what: str) -> None:
    synth.synth(tmp_path / "source", TINY, seed=2)
    command = [sys.executable, "-c", KILLED, what, str(tmp_path / "out"), str(tmp_path / "source")]
    for lines in (60, 90) if what == "synth" else (60,):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _, line in zip(range(lines), process.stdout, strict=False):
                assert line.strip().isdigit()
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out" / "config.json").exists()
        with pytest.raises(ConfigError, match=r"config.json does not exist"):
            PackedWeights(tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    _, resumed, shards = done.stdout.split("\n")[-2].split()
    assert int(resumed) > 0 and int(shards) > 4
    if what == "synth":
        synth.synth(tmp_path / "whole", TINY, seed=3, shard_bytes=150_000)
    else:
        convert.convert(tmp_path / "source", tmp_path / "whole", store="fp8", shard_bytes=150_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


FULL = """
import resource, signal, sys
from rorqual.model import synth
from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    synth.synth(sys.argv[1], Config.preset("tiny"), shard_bytes=500_000)
except CheckpointError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_disk_that_takes_no_more_leaves_no_half_file_and_the_rest_resumes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), "300000"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "the disk is full; what is finished stays" in done.stderr, done.stderr
    assert not any(path.name.endswith(".tmp") or path.name == "config.json" for path in tmp_path.iterdir())
    synth.synth(tmp_path, TINY, shard_bytes=500_000)
    assert verify.verify(tmp_path).problems == []


def test_too_little_room_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    config = Config.preset("pro").replace(num_nextn_predict_layers=0)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"\d+ bytes are to be written, \d+ are free: make room"):
        synth.synth(tmp_path, config)
    assert not list(tmp_path.glob("*model*")) and time.perf_counter() - start < 60
    assert os.path.getsize(tmp_path / writer.JOURNAL) > 0


def test_all_lists_every_public_name() -> None:
    for module in (convert, inspection, storage, synth, verify, writer):
        public = {
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
        }
        constants = {name for name in module.__all__ if name.isupper()} | {"Format", "Layout"}
        assert public - {"Format", "Layout"} == set(module.__all__) - constants
