"""The warm start: it learns, it resumes exactly, it refuses foreign checkpoints."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from rorqual.model import Config, Model
from rorqual.rl import saves, sft
from rorqual.rl.errors import TrainError
from rorqual.rl.optim import OptimConfig, Optimizers
from rorqual.rl.sft import SFTConfig

SMALL = Config.preset("tiny").replace(
    hidden_size=32, num_hidden_layers=3, compress_ratios=(0, 4, 32), head_dim=32, num_attention_heads=2,
    q_lora_rank=16, o_lora_rank=16, index_head_dim=16, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip
RECIPE = SFTConfig(steps=6, batch_tokens=2048, vocab_size=512, corpus=60, warmup=2, checkpoint_every=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _weights(directory):
    return Model.from_pretrained(directory).state_dict()


def test_the_loss_falls_and_a_loadable_model_is_left(tmp_path):
    rows = []
    sft.run(tmp_path, dataclasses.replace(RECIPE, steps=30), model_config=SMALL, on_step=rows.append)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    model = Model.from_pretrained(tmp_path)
    assert model.config.vocab_size == 512 and len(model.mtp) == 1
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["recipe"] == "sft" and facts["steps"] == 30


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    sft.run(tmp_path / "whole", RECIPE, model_config=SMALL)

    class Stop(Exception):
        pass

    def stop_at_five(row):
        if row["step"] == 5:  # the checkpoint is of step 4: step 5 is done again
            raise Stop

    with pytest.raises(Stop):
        sft.run(tmp_path / "parts", RECIPE, model_config=SMALL, on_step=stop_at_five)
    sft.run(tmp_path / "parts", RECIPE, model_config=SMALL)
    whole, parts = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_checkpoint_of_another_model_or_recipe_is_refused(tmp_path):
    sft.run(tmp_path, dataclasses.replace(RECIPE, steps=1), model_config=SMALL)
    with pytest.raises(TrainError, match="--fresh"):
        sft.run(tmp_path, RECIPE, model_config=SMALL.replace(hidden_size=64))
    with pytest.raises(TrainError, match="another seed, style: use another --out"):
        sft.run(tmp_path, dataclasses.replace(RECIPE, seed=1, style="expert"), model_config=SMALL)


def test_a_stopped_run_keeps_its_last_step_and_writes_no_model(tmp_path):
    rows = []
    sft.run(tmp_path, RECIPE, model_config=SMALL, on_step=rows.append, stop=lambda: len(rows) == 2)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "training.json").exists()
    sft.run(tmp_path, RECIPE, model_config=SMALL, on_step=rows.append)
    assert [row["step"] for row in rows[3:]] == [4, 5, 6] and (tmp_path / "model.safetensors").exists()


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True)
    try:
        model = Model(SMALL).initialize(0)
        optimizers = Optimizers(model, OptimConfig())
        saves.save(small, model, optimizers, {"step": 1})
        saves.append_line(small / "sft.jsonl", {"step": 1})
        free = os.statvfs(small)
        (small / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
        with pytest.raises(
            TrainError, match=r"state\.safetensors cannot be written: .*No space left on device"
        ):
            saves.save(small, model, optimizers, {"step": 2})
        with pytest.raises(TrainError, match=r"sft\.jsonl cannot be written: No space left"):
            saves.append_line(small / "sft.jsonl", {"step": 2, "pad": "x" * 10_000})
        assert sorted(path.name for path in small.iterdir()) == ["filler", "sft.jsonl", saves.NAME]
        assert saves.load(small, model, optimizers) == {"step": 1}
        assert saves.read_lines(small / "sft.jsonl") == [{"step": 1}]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    log = tmp_path / "sft.jsonl"
    log.write_text('{"step": 1}\n{"ste')
    saves.append_line(log, {"step": 2})
    assert saves.read_lines(log) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, damage):
    model = Model(SMALL)
    (tmp_path / saves.NAME).write_bytes(damage)
    with pytest.raises(TrainError, match=r"state\.safetensors"):
        saves.load(tmp_path, model, Optimizers(model, OptimConfig()))


@pytest.mark.slow
def test_kill_minus_nine_leaves_a_run_that_goes_on(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        import torch
        torch.set_num_threads(1)
        from pathlib import Path
        from rorqual.rl import sft
        from tests.rl.test_sft import RECIPE, SMALL
        sft.run(Path(sys.argv[1]), RECIPE, model_config=SMALL)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 200
    while not (tmp_path / saves.NAME).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rows = []
    sft.run(tmp_path, RECIPE, model_config=SMALL, on_step=rows.append)
    assert rows and rows[0]["step"] > 1  # not from the start
    assert rows[-1]["step"] == RECIPE.steps


def test_hidden_branches_follow_seed_and_step():
    kinds = [sft.hidden_kinds(SFTConfig(), step) for step in range(2000)]
    assert kinds == [sft.hidden_kinds(SFTConfig(), step) for step in range(2000)]
    share = sum(kind == frozenset({"csa"}) for kind in kinds) / 2000
    assert abs(share - SFTConfig().hide_csa) < 0.03


def test_the_schedule_rises_holds_and_falls():
    factors = [sft.schedule(step, steps=100, warmup=10, decay_share=0.3) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:71] == [1.0] * 62
    assert factors[-1] == pytest.approx(0.05) and sorted(factors[70:], reverse=True) == factors[70:]
