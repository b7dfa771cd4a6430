"""rorqual.model.cost against the published ratios and the independent numbers of oracles/kv_flops.json."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from rorqual._cli import cost as cost_command
from rorqual._cli.exits import CliError
from rorqual.model import cost, quant
from rorqual.model.config import Config

GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "kv_flops.json").read_text(encoding="utf-8"))
MILLION = 1 << 20
SMALL = Config(
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    head_dim=72,
    qk_rope_head_dim=32,
    o_groups=2,
    sliding_window=16,
    compress_ratios=(0, 0, 4, 32, 4, 32),
    index_head_dim=48,
    n_routed_experts=8,
)


@pytest.mark.parametrize(
    "name, of_v32, of_gqa8, flops", [("pro", 10.48, 2.02, 26.7), ("flash", 7.32, 2.00, 10.1)]
)
def test_published_ratios_at_a_million_tokens(name, of_v32, of_gqa8, flops):
    config = Config.preset(name)
    held = cost.kv_bytes(config, context=MILLION)
    gqa8 = cost.gqa8_bf16(config.num_hidden_layers)
    assert 100 * held / cost.kv_bytes(cost.V32, context=MILLION) == pytest.approx(of_v32, abs=0.005)
    assert 100 * held / cost.kv_bytes(gqa8, context=MILLION) == pytest.approx(of_gqa8, abs=0.005)
    ratio = cost.flops_per_token(config, MILLION) / cost.flops_per_token(cost.V32, MILLION)
    assert 100 * ratio == pytest.approx(flops, abs=0.05)


@pytest.mark.parametrize(
    "name, total, mtp, active", [("pro", 1573.0, 25.8, 48.85), ("flash", 284.3, 6.6, 13.27)]
)
def test_published_parameter_counts(name, total, mtp, active):
    counts = cost.parameters(Config.preset(name))
    assert counts.total / 1e9 == pytest.approx(total, abs=0.05)
    assert counts.mtp / 1e9 == pytest.approx(mtp, abs=0.05)
    assert counts.active_without_embedding / 1e9 == pytest.approx(active, abs=0.005)


@pytest.mark.parametrize("name", ["pro", "flash"])
@pytest.mark.parametrize("context", list(GOLDEN["contexts"]))
def test_every_part_equals_the_independent_script(name, context):
    config, row = Config.preset(name), GOLDEN["contexts"][context]
    context = int(context)
    kv = cost.kv_breakdown(config, context=context)
    expected = row[name]["kv"]
    assert (kv.csa, kv.index, kv.hca, kv.window) == tuple(expected[k] for k in ("csa", "idx", "hca", "win"))
    assert kv.total == expected["total"] == cost.kv_bytes(config, context=context)
    for weights, key in (({}, "flops"), ({"bf16": 1.0, "fp4": 1.0}, "flops_plain")):
        flops, expected = cost.flops_breakdown(config, context, **weights), row[name][key]
        assert (flops.weights, flops.indexer) == (expected["weights"], expected["indexer"])
        assert (flops.csa, flops.hca, flops.window) == (expected["csa"], expected["hca"], expected["swa"])
        assert flops.total == expected["total"]
    assert cost.kv_bytes(cost.V32, context=context) == row["v32_kv"]
    assert cost.flops_per_token(cost.V32, context) == row["v32_flops"]["total"]


@pytest.mark.parametrize("name", ["pro", "flash"])
def test_parameters_and_state_agree_with_the_independent_script(name):
    config, expected = Config.preset(name), GOLDEN["models"][name]
    counts = cost.parameters(config)
    # the script leaves out norms, biases, sinks and the small mHC vectors: below 1 in 10,000
    for ours, theirs in (
        (counts.total, expected["total"]),
        (counts.mtp, expected["mtp"]),
        (counts.active, expected["active"]),
        (counts.active_without_embedding, expected["active_without_embedding"]),
    ):
        assert 0 <= ours - theirs < theirs * 1e-4
    assert cost.state_bytes(config) == expected["state_bytes"]


def test_any_config_costs_what_its_packed_entries_weigh():
    config = SMALL  # layers: 2 window, 2 CSA of ratio 4, 2 HCA of ratio 32
    entry = quant.pack_entry(torch.zeros(config.head_dim), rope_dim=config.qk_rope_head_dim).numel()
    key = quant.pack_index_key(torch.zeros(config.index_head_dim)).numel()
    for context in (0, 1, 15, 16, 100, 1000):
        expected = (
            2 * (context // 4) * (entry + key) + 2 * (context // 32) * entry + 6 * min(context, 16) * entry
        )
        assert cost.kv_bytes(config, context=context) == expected


def test_entry_sizes_are_those_of_the_format():
    assert cost.entry_bytes(512, 64) == 584
    assert cost.index_key_bytes(128) == 68


def test_table_holds_every_context_and_both_references():
    rows = cost.table([4096, MILLION])
    assert [(r.name, r.context) for r in rows] == [
        (name, n) for n in (4096, MILLION) for name in ("V4-Pro", "V4-Flash", "V3.2", "GQA8 bf16")
    ]
    pro = rows[4]
    assert pro.kv_bytes == 5_280_404_480 and pro.kv_of_v32 == pytest.approx(0.10476, abs=1e-5)
    assert pro.kv_of_gqa8 == pytest.approx(0.02015, abs=1e-5) and pro.flops_of_v32 == pytest.approx(
        0.2674, abs=1e-4
    )
    assert rows[7].kv_bytes == 61 * 4096 * MILLION and rows[7].flops is None
    assert rows[6].kv_of_v32 == rows[6].flops_of_v32 == 1.0


def test_table_of_a_given_config_compares_with_its_own_depth():
    rows = cost.table([1024], configs={"mine": SMALL})
    assert [row.name for row in rows] == ["mine", "V3.2", "GQA8 bf16"]
    assert rows[0].kv_of_gqa8 == rows[0].kv_bytes / (6 * 4096 * 1024)
    empty = cost.table([0])[0]
    assert empty.kv_bytes == 0 and empty.kv_of_v32 is None


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="context is -1 tokens"):
        cost.kv_bytes(Config.preset("pro"), context=-1)
    with pytest.raises(ValueError, match="no FLOPs are published for GQA8 bf16"):
        cost.flops_per_token(cost.gqa8_bf16(61), 1)


def test_all_lists_every_public_name():
    public = {
        n
        for n, v in vars(cost).items()
        if not n.startswith("_") and getattr(v, "__module__", "") == cost.__name__
    } | {"V32"}
    assert len(cost.__all__) == len(public) and public == set(cost.__all__)


def command(*arguments):
    """Runs `rorqual cost`: exit code, stdout, error."""
    app = typer.Typer()
    cost_command.register(app)
    app.command("other")(lambda: None)  # with one command alone, typer takes no name
    done = CliRunner().invoke(app, ["cost", *arguments], env={"COLUMNS": "80"})
    return done.exit_code, done.stdout, done.exception


def test_the_command_prints_the_published_figures():
    code, out, error = command("--context", "1M")
    assert code == 0, error
    for line in (
        r"1,048,576 +V4-Pro +5\.28 GB +10\.5% +2\.0% +319\.4 +26\.7% +1573\.0B +48\.9B",
        r"V4-Flash +3\.69 GB +7\.3% +2\.0% +120\.7 +10\.1% +284\.3B +13\.3B",
        r"V3\.2 +50\.40 GB +100%",
        r"GQA8 bf16 +261\.99 GB",
    ):
        assert re.search(line, out), out


def test_the_command_reads_a_config_and_writes_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(Config.preset("flash").to_dict()), encoding="utf-8")
    code, out, error = command(str(tmp_path), "--context", "128K", "--context", "4096", "--json")
    assert code == 0, error
    rows = json.loads(out)
    assert [row["context"] for row in rows] == [131072] * 3 + [4096] * 3
    assert rows[0]["kv_bytes"] == cost.kv_bytes(Config.preset("flash"), context=131072)
    assert rows[0]["kv_parts"]["csa"] == 21 * 32768 * 584


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pri"], "no model 'pri': give pro, flash, tiny, a config.json"),
        (["--context", "1G"], "--context '1G': expected a number of tokens"),
        (["--context", "-5"], "--context '-5'"),
        (["--context", ""], "--context ''"),
        (["{tmp}"], "config.json does not exist"),
    ],
)
def test_the_command_refuses_nonsense_with_exit_code_2(tmp_path, arguments, message):
    _, _, error = command(*(text.format(tmp=tmp_path) for text in arguments))
    assert isinstance(error, CliError) and error.code == 2 and message in str(error)


def test_the_command_needs_no_torch():
    script = (
        "import sys, typer; from rorqual._cli import cost; import rorqual.model.cost as c; c.table([4096]);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
