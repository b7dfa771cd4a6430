"""`rorqual model ...` as a user runs it: output, exit codes, interrupts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rorqual.cli import app, main
from rorqual.model import Config, Model

ROOT = [sys.executable, "-m", "rorqual.cli"]


def run(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = 0
    try:
        main([str(argument) for argument in ("model", *arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    with pytest.raises(SystemExit, match="0"):
        main(["model", "synth", str(directory), "--seed", "4"])
    return directory


def test_synth_writes_what_verify_and_inspect_find_sound(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("verify", tiny, capsys=capsys)
    assert code == 0 and out.startswith("sound: ") and "verify" in err
    code, out, _ = run("inspect", tiny, capsys=capsys)
    assert code == 0
    for part in (
        "official names",
        "5: window, 2 x (csa, hca); 1 hash-routed",
        "MTP head",
        "fp4",
        "headers      sound",
    ):
        assert part in out, part
    assert Model.from_pretrained(tiny).config == Config.preset("tiny")


def test_json_is_one_document(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        code, out, _ = run(command, tiny, "--json", capsys=capsys)
        document = json.loads(out)
        assert code == 0 and document["problems"] == []
        assert document["directory"] == str(tiny)
    assert document["data_bytes"] == sum(t.nbytes for t in load_file(tiny / "model.safetensors").values())


def test_overrides_change_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        *("synth", tmp_path / "a", "--config", "tiny", "--layers", "3", "--set", "vocab_size=64"),
        *("--set", "swiglu_limit=7.5", "--no-mtp", "--to", "bf16", "--shard-bytes", "200k", "--json"),
        capsys=capsys,
    )
    document, config = json.loads(out), Config.from_file(tmp_path / "a")
    assert code == 0 and document["shards"] > 3
    assert (config.num_hidden_layers, config.vocab_size, config.swiglu_limit) == (3, 64, 7.5)
    code, out, _ = run(
        *("synth", tmp_path / "b", "--config", tmp_path / "a", "--set", "compress_ratios=4,32,4,32"),
        *("--set", "num_hidden_layers=4"),
        capsys=capsys,
    )
    assert code == 0 and Config.from_file(tmp_path / "b").compress_ratios == (4, 32, 4, 32)


def test_convert_there_and_back_gives_the_same_values(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", tiny, tmp_path / "plain", "--to", "fp32", capsys=capsys)[0] == 0
    code, out, err = run(
        "convert", tmp_path / "plain", tmp_path / "packed", "--to", "official", capsys=capsys
    )
    assert code == 0 and "in 1 file" in out and "convert" in err
    one, two = (Model.from_pretrained(path).official_state() for path in (tiny, tmp_path / "packed"))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_damage_exits_1_and_is_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(tiny / "model.safetensors")
    tensors["norm.weight"][3] = torch.nan
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    code, out, err = run("verify", tmp_path, capsys=capsys)
    assert code == 1 and "model.safetensors: norm.weight: 1 of 128 values are NaN or infinite" in out
    assert err.strip().splitlines()[-1] == f"rorqual: {tmp_path}: 1 problem"
    code, out, _ = run("verify", tmp_path, "--json", capsys=capsys)
    assert code == 1 and json.loads(out)["problems"][0]["where"] == "model.safetensors: norm.weight"
    code, _, err = run("convert", tmp_path, tmp_path / "out", capsys=capsys)
    assert code == 1 and "norm.weight: 1 of 128 values are NaN" in err
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    code, out, err = run("inspect", tmp_path, capsys=capsys)
    assert code == 1 and "1 problem" in out and "norm.weight: missing" in err


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["inspect", "/nowhere"], "/nowhere: no such model directory"),
        (["verify", "/nowhere"], "no such model directory"),
        (["convert", "/nowhere", "/tmp/x"], "no such model directory"),
        (
            ["convert", "TINY", "OUT", "--to", "gguf"],
            "--to 'gguf': choose one of official, fp8, bf16, fp32, keep",
        ),
        (["convert", "TINY", "OUT", "--layout", "x"], "--layout 'x': choose one of official, hf"),
        (["convert", "TINY", "OUT", "--shard-bytes", "2 GB"], "--shard-bytes '2 GB': expected bytes such as"),
        (["synth", "OUT", "--config", "huge"], "no model 'huge': give pro, flash, tiny"),
        (["synth", "OUT", "--layers", "6"], "--layers 6: tiny has 5"),
        (["synth", "OUT", "--set", "vocab_size"], "expected field=value"),
        (["synth", "OUT", "--set", "rotors=3"], "with a field of config.json"),
        (["synth", "OUT", "--set", "vocab_size=many"], "vocab_size is of type int"),
        (["synth", "OUT", "--set", "vocab_size=0"], "vocab_size is 0, expected a positive number"),
        (["synth", "OUT", "--set", "expert_dtype=fp3"], "expert_dtype is 'fp3'"),
        (["synth", "OUT", "--set", "num_hidden_layers=9"], "compress_ratios has"),
        (["synth", "OUT", "--set", "moe_intermediate_size=33"], "33 is odd: choose fp8 or bf16"),
        (["synth", "OUT", "--to", "keep"], "--to 'keep': choose one of"),
        (["synth", "OUT", "--shard-bytes", "0"], "expected bytes such as"),
    ],
)
def test_wrong_use_exits_2_with_one_line_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    out = tmp_path / "out"
    names = {"TINY": str(tiny), "OUT": str(out)}
    code, _, err = run(*(names.get(argument, argument) for argument in arguments), capsys=capsys)
    assert code == 2 and text in err, err
    assert len(err.strip().splitlines()) == 1 and not out.exists()


def test_the_target_is_never_overwritten(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny / "model.safetensors").read_bytes()
    code, _, err = run("synth", tiny, capsys=capsys)
    assert code == 1 and "already holds config.json" in err
    code, _, err = run("convert", tiny, tiny, capsys=capsys)
    assert code == 1 and "is the source itself" in err
    assert (tiny / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_130_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [*ROOT, "model", "synth", str(out), "--config", "flash", "--layers", "2", "--shard-bytes", "8M"]
    for field in ("n_routed_experts=8", "vocab_size=1024", "hidden_size=1024", "moe_intermediate_size=1024"):
        command += ["--set", field]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(out.glob("*.safetensors")):
            assert process.poll() is None
        process.send_signal(number)
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("rorqual: interrupted; the same command goes on")
    assert not (out / "config.json").exists() and not [p for p in out.iterdir() if p.name.endswith(".tmp")]
    if number == signal.SIGTERM:
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=240, check=True)
        assert json.loads(done.stdout)["resumed_bytes"] > 0 and (out / "config.json").exists()


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["model", "--help"])
    assert all(name in result.output for name in ("inspect", "convert", "verify", "synth"))
