"""The command line, end to end by subprocess: the scripted server, a real container, exit codes, clean
ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rorqual.sandbox import AsyncSandbox, SandboxError
from tests.agent.scripted import Fail, Say, serving, wait_until


def bash(command: str) -> tuple[str, dict[str, str]]:
    return "bash", {"command": command}


SUBMIT = ("submit", {"answer": "42"})
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(tmp_path: Path, *arguments: str, **env: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "RORQUAL_RUNS": str(tmp_path / "runs"), "COLUMNS": "100", **env}
    environment.pop("RORQUAL_DEBUG", None)
    return [sys.executable, "-m", "rorqual.cli", *arguments], environment


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        argv, environment = command(tmp_path, *arguments, **env)
        return subprocess.run(
            argv, env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture(scope="session")
def container() -> None:
    async def probe() -> None:
        async with await AsyncSandbox.create(timeout=60) as sandbox:
            await sandbox.commands.run("true")

    try:
        asyncio.run(probe())
    except SandboxError as error:
        pytest.skip(f"no container on this host: {error}")


def model(server: Any, *more: str) -> list[str]:
    return ["--model", server.url, "--model-name", "m", *more]


def test_help_and_version_name_the_commands(cli: Run) -> None:
    done = cli("--help")
    assert done.returncode == 0 and all(
        name in done.stdout for name in ("run", "demo", "runs", "train", "eval", "cost", "doctor")
    )
    assert re.fullmatch(r"rorqual \d+\.\d+\.\d+\n", cli("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", " "], "the task is empty"),
        (["run", "x", "--model", "http://localhost:1/v1"], "--model needs --model-name"),
        (["run", "x", "--model-name", "m"], "--model-name needs --model URL"),
        (["run", "x", "--api-key-env", "K"], "--api-key-env needs --model URL"),
        (["run", "x", "--model", "localhost:1", "--model-name", "m"], "expected http://HOST"),
        (
            ["run", "x", "--model", "http://h/v1", "--model-name", "m", "--api-key-env", "NO_KEY"],
            "NO_KEY is not set",
        ),
        (
            ["run", "x", "--model", "http://h/v1", "--model-name", "m", "--workdir", "/no/dir"],
            "not a directory",
        ),
        (
            ["run", "x", "--model", "http://h/v1", "--model-name", "m", "--workdir", "/"],
            "give the agent a project",
        ),
        (["run", "x", "--model", "http://h/v1", "--model-name", "m", "--max-steps", "0"], "max_steps is 0"),
        (["run", "x", "--model", "http://h/v1", "--model-name", "m", "--substrate", "cloud"], "cloud"),
        (["runs", "nothing-like-it"], "no run 'nothing-like-it'"),
        (["demo", "--family", "chess"], "no task family 'chess': choose one of hop-recover, calc-tool"),
        (["demo", "--depth", "99"], "no task family has depth 99"),
        (["eval", "/no/dir"], "/no/dir: no such model directory"),
        (["eval", "--family", "chess"], "no family 'chess': choose from hop-recover, calc-tool"),
        (["train", "rl", "--start", "/no/dir"], "/no/dir: no such model directory"),
        (["cost", "no-such"], "no model 'no-such': give pro, flash, tiny"),
        (["cost", "--context", "lots"], "--context 'lots': expected a number of tokens"),
    ],
)
def test_wrong_use_is_one_line(cli: Run, arguments: list[str], said: str) -> None:
    done = cli(*arguments)
    assert done.returncode in (2, 3) and said in done.stderr
    assert done.stderr.startswith("rorqual: ") and done.stderr.count("\n") == 1 and done.stdout == ""


def test_unknown_options_exit_with_2(cli: Run) -> None:
    assert cli("run", "x", "--nonsense").returncode == 2
    assert cli("nonsense").returncode == 2


def test_a_missing_embedded_model_names_the_file(cli: Run, tmp_path: Path) -> None:
    done = cli("demo", "--model-dir", str(tmp_path))
    assert done.returncode == 3 and f"{tmp_path} is incomplete: config.json is missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model directory with a tokenizer."""
    from rorqual.model import Config, Model
    from tests.agent.scripted_engine import small_tokenizer

    directory = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer()
    config = Config.preset("tiny").replace(vocab_size=tokenizer.vocab_size)
    Model(config).initialize(0).save_pretrained(directory)
    tokenizer.save(directory / "tokenizer.json")
    return directory


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda raw: None,
    "empty": lambda raw: b"",
    "torn": lambda raw: raw[: len(raw) // 2],
    "of another kind": lambda raw: b"[]",
    "not text": lambda raw: b"\xff\xfe" + raw[2:],
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_model_directory_is_one_clear_error(
    small_model: Path, tmp_path: Path, name: str, how: str
) -> None:
    from rorqual._cli.embedded import open_embedded
    from rorqual._cli.exits import CliError, describe
    from rorqual._cli.model_dir import open_model_dir

    shutil.copytree(small_model, tmp_path / "m")
    raw = DAMAGE[how]((small_model / name).read_bytes())
    (tmp_path / "m" / name).unlink() if raw is None else (tmp_path / "m" / name).write_bytes(raw)
    for opening in (lambda: open_embedded(tmp_path / "m", seed=0), lambda: open_model_dir(tmp_path / "m")):
        with pytest.raises(CliError) as caught:
            opening()
        text, code = describe(caught.value)
        assert code == 3 and "\n" not in text and name in text, text


def test_no_runtime_is_exit_code_3_and_names_the_command(cli: Run) -> None:
    done = cli("run", "x", *model(SimpleNamespace(url="http://127.0.0.1:9/v1")), PATH="")
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "crun" in done.stderr, done.stderr
    report = json.loads(cli("doctor", "--json", PATH="").stdout)
    [check] = [check for check in report["checks"] if check["name"] == "container"]
    assert not report["ok"] and not check["ok"] and check["fix"]


@pytest.mark.usefixtures("container")
def test_a_full_disk_under_the_event_log_ends_the_run_with_one_line(cli: Run, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    (tmp_path / "runs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path / "runs")], check=True)
    try:
        flood = [Say(calls=[bash(f"head -c 6000 /dev/urandom | base64; echo {n}")]) for n in range(40)]
        with serving(*flood) as server:
            done = cli("run", "x", "--quiet", *model(server))
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "cannot write the event log: No space left on device" in done.stderr
        [row] = json.loads(cli("runs", "--json").stdout)
        assert row["outcome"] == "died" and row["steps"] >= 2  # what was written is whole
    finally:
        subprocess.run(["umount", str(tmp_path / "runs")], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("container")
@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--tasks", "1", "--max-tokens", "500", "--model-dir", "MODEL"],
        ["eval", "MODEL", "--per-depth", "1", "--sandboxes", "2"],
        ["train", "rl", "--start", "MODEL", "--out", "OUT", "--prompts", "1", "--group-size", "2"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_an_interrupt_of_the_model_commands_leaves_nothing_behind(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    from rorqual.sandbox.state import StateDir

    monkeypatch.setenv("RORQUAL_STATE", str(tmp_path / "state"))
    state = StateDir.from_environment()
    state.prepare()
    names = {"MODEL": str(small_model), "OUT": str(tmp_path / "out")}
    argv, environment = command(tmp_path, *(names.get(word, word) for word in arguments))
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(state.sandboxes.iterdir()) or process.poll() is not None, limit=200)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("rorqual: interrupted")
    wait_until(lambda: not any(state.sandboxes.iterdir()) and not any(state.keepers.iterdir()), limit=30)
    assert str(state.root) not in Path("/proc/self/mountinfo").read_text()
    for directory in (state.keepers, state.sandboxes, state.run):
        directory.rmdir()


@pytest.mark.slow
def test_an_interrupt_of_sft_keeps_its_checkpoint_and_fresh_deletes_only_runs(
    cli: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv, environment = command(tmp_path, "train", "sft", "--out", str(out), "--steps", "1000")
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: (out / "tokenizer.json").exists() or process.poll() is not None, limit=200)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("rorqual: interrupted")
    assert {path.name for path in out.iterdir()} <= {"tokenizer.json", "state.safetensors"}
    (out / "mine.txt").write_text("x")
    refused = cli("train", "sft", "--out", str(out), "--fresh", "--steps", "1")
    assert refused.returncode == 2 and "mine.txt, which no run left: nothing is deleted" in refused.stderr
    assert (out / "tokenizer.json").exists()


def test_fresh_empties_a_run_but_never_a_model(tmp_path: Path) -> None:
    from rorqual._cli.exits import CliError
    from rorqual._cli.train import _prepare

    run, weights = tmp_path / "run", tmp_path / "weights"
    for directory, names in (
        (run, ("state.safetensors", "rl.jsonl", "before.json", ".state.safetensors.tmp")),
        (weights, ("config.json", "model.safetensors", "tokenizer.json")),
    ):
        directory.mkdir()
        for name in names:
            (directory / name).touch()
    _prepare(run, fresh=False)
    assert run.exists()
    _prepare(run, fresh=True)
    assert not run.exists()
    with pytest.raises(CliError, match="is a model, not a run"):
        _prepare(weights, fresh=True)
    assert len(list(weights.iterdir())) == 3
    with pytest.raises(CliError, match="not a directory"):
        _prepare(weights / "config.json", fresh=False)


def test_debug_shows_the_traceback(cli: Run) -> None:
    done = cli("--debug", "runs", "nothing")
    assert done.returncode == 2 and "Traceback" in done.stderr


@pytest.mark.usefixtures("container")
def test_a_task_is_done_in_a_container(cli: Run) -> None:
    steps = [
        Say(reasoning="write", calls=[("write_file", {"path": "t.py", "content": "print(6*7)\n"})]),
        Say(reasoning="run", calls=[bash("pwd; python3 t.py; echo err >&2; exit 3")]),
        Say(reasoning="done", calls=[SUBMIT]),
    ]
    with serving(*steps, strict=True) as server:
        done = cli("run", "Compute.", *model(server))
    assert (done.returncode, done.stdout) == (0, "42\n")
    for shown in ("Compute.", "┆ write", "$ pwd; python3 t.py", "[exit 3]", "submitted  42", "30 tokens"):
        assert shown in done.stderr
    assert server.requests[-1]["messages"][-1]["content"] == "/work\n42\nerr\n[exit 3]"
    listed = json.loads(cli("runs", "--json").stdout)
    assert [(row["outcome"], row["answer"], row["task"]) for row in listed] == [
        ("submitted", "42", "Compute.")
    ]
    shown_again = cli("runs", listed[0]["run"][:10])
    assert shown_again.returncode == 0 and "$ pwd; python3 t.py" in shown_again.stdout
    assert "Compute." in cli("runs").stdout


@pytest.mark.usefixtures("container")
def test_json_is_one_document_and_the_task_may_come_from_stdin(cli: Run) -> None:
    with serving(Say(calls=[SUBMIT])) as server:
        done = cli("run", "-", "--json", "--quiet", *model(server), stdin="Say 42.")
    result = json.loads(done.stdout)
    assert (result["outcome"], result["answer"], done.stderr) == ("submitted", "42", "")
    assert Path(result["log"]).is_file() and server.requests[0]["messages"][1]["content"] == "Say 42."


@pytest.mark.usefixtures("container")
def test_a_working_directory_is_the_users_own(cli: Run, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "in.txt").write_text("from the host\n")
    steps = [Say(calls=[bash("cat in.txt; echo made > out.txt")]), Say(calls=[SUBMIT])]
    with serving(*steps) as server:
        done = cli("run", "x", *model(server), "--workdir", str(project))
    assert done.returncode == 0 and server.requests[1]["messages"][-1]["content"] == "from the host"
    assert (project / "out.txt").read_text() == "made\n" and (
        project / "out.txt"
    ).stat().st_uid == os.getuid()


@pytest.mark.usefixtures("container")
def test_a_failing_model_is_one_line_and_exit_code_1(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Fail(401, '{"error": {"message": "bad key"}}')) as server:
        done = cli("run", "x", "--quiet", *model(server, "--api-key-env", "SOME_KEY"), SOME_KEY="sk-secret-1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "answered 401 Unauthorized: bad key; check the key in the environment variable SOME_KEY"
        in done.stderr
    )
    assert "sk-secret-1" not in done.stderr + "".join(p.read_text() for p in _logs(cli))


def _logs(cli: Run) -> list[Path]:
    rows = json.loads(cli("runs", "--json").stdout)
    return [Path(json.loads(cli("runs", row["run"], "--json").stdout)["path"]) for row in rows]


@pytest.mark.usefixtures("container")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_a_command_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    with serving(Say(calls=[bash("sleep 987")])) as server:
        argv, environment = command(tmp_path, "run", "x", *model(server))
        process = subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: bool(_sleepers()), limit=60)
        [log] = (tmp_path / "runs").glob("*.jsonl")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("rorqual: interrupted\n") and "Traceback" not in err
    assert json.loads(log.read_text().splitlines()[-1])["data"]["outcome"] == "interrupted"
    wait_until(lambda: not _sleepers())


def _sleepers() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes() == b"sleep\x00987\x00":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_dead_run_and_a_damaged_log_are_listed_as_such(cli: Run, tmp_path: Path) -> None:
    from rorqual.agent import EventLog

    with EventLog(tmp_path / "runs" / "20260101-000000-aaaaaa.jsonl") as log:
        log.append("run.start", run="r", model="m")
        log.append("goal", text="a task\x1b[31m")
    bad = tmp_path / "runs" / "20260101-000000-bbbbbb.jsonl"
    bad.write_text("not a log\n" * 3)
    rows = json.loads(cli("runs", "--json").stdout)
    assert [row["outcome"] for row in rows] == ["damaged", "died"]
    shown = cli("runs", "20260101-000000-a")
    assert (
        "a task" in shown.stdout
        and "its process died here" in shown.stdout
        and "\x1b[31m" not in shown.stdout
    )
    assert "line 1 is damaged" in cli("runs", "20260101-000000-b").stderr
    assert "2 runs begin with" in cli("runs", "2026").stderr


@pytest.mark.usefixtures("container")
def test_doctor_tries_and_says(cli: Run) -> None:
    done = cli("doctor", "--json")
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert done.returncode == 0 and report["ok"] and checks["container"]["ok"]
    assert "a command run in" in checks["container"]["detail"] and "cores" in checks["cpu"]["detail"]
    assert "✔" in cli("doctor").stdout


@pytest.mark.slow
@pytest.mark.usefixtures("container")
def test_the_demo_runs_a_real_model_even_an_untrained_one(cli: Run, tmp_path: Path) -> None:
    from rorqual.model import Config, Model
    from tests.agent.scripted_engine import small_tokenizer

    tokenizer = small_tokenizer()
    config = Config.preset("tiny").replace(vocab_size=tokenizer.vocab_size)
    Model(config).initialize(0).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    options = ["--seed", "3", "--tasks", "2", "--max-tokens", "40", "--model-dir", str(tmp_path / "model")]
    done = cli("demo", "--json", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["seed"] == 3 and len(report["tasks"]) == 2
    for task in report["tasks"]:
        assert task["outcome"] == "token_limit" and not task["solved"] and task["answer"] is None
        assert task["completion_tokens"] == 80 and 0 < task["kv_bytes"] < task["gqa8_bytes"]
        assert Path(task["log"]).is_file()
    assert "0 of 2 solved" in done.stderr and "--seed 3" in done.stderr and "✘ not solved" in done.stderr
    again = json.loads(cli("demo", "--json", "--svg", str(tmp_path / "demo.svg"), *options).stdout)
    assert "0&#160;of&#160;2&#160;solved" in (tmp_path / "demo.svg").read_text()
    assert [task["prompt"] for task in again["tasks"]] == [task["prompt"] for task in report["tasks"]]
