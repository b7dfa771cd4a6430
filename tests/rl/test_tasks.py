"""Tasks: pure, disjoint between splits, solvable, graded exactly, and really in the directory after setup."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from rorqual.rl import tasks
from rorqual.rl.errors import TaskError

CASES = [(family, depth) for family in tasks.families() for depth in tasks.depths(family)]
# What must not cross splits, read from the prompt alone.
CONTENT = {
    "hop-recover": lambda prompt: tuple(re.search(rf"\b{word} (\d+)", prompt)[1] for word in ("file", "box")),
    "calc-tool": lambda prompt: re.search(r"[\d+*-]{3,}", prompt)[0],
}


@pytest.mark.parametrize(("family", "depth"), CASES)
def test_same_arguments_give_the_same_task(family: str, depth: int) -> None:
    first, again = (tasks.sample(family, depth=depth, seed=11, split="test") for _ in range(2))
    assert first == again
    assert list(first.files) == list(again.files)
    assert tasks.sample(family, depth=depth, seed=12, split="test") != first


def test_a_known_task_never_changes() -> None:
    # Frozen draws: a change here silently moves tasks between splits of models already trained.
    text = repr([tasks.sample(f, depth=d, seed=7, split=s) for f, d in CASES for s in tasks.SPLITS])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1cdaedeb9a668c70"


@pytest.mark.parametrize("family", tasks.families())
def test_splits_never_share_content(family: str) -> None:
    seen: dict[str, set[object]] = {}
    for split in tasks.SPLITS:
        drawn = [
            tasks.sample(family, depth=depth, seed=seed, split=split)
            for depth in tasks.depths(family)
            for seed in range(400)
        ]
        seen[split] = {CONTENT[family](task.prompt) for task in drawn}
    assert all(len(contents) > 300 for contents in seen.values())
    assert not seen["train"] & seen["rl"]
    assert not seen["train"] & seen["test"]
    assert not seen["rl"] & seen["test"]


def test_small_sums_repeat_between_seeds_so_that_disjointness_is_not_an_accident() -> None:
    drawn = [tasks.sample("calc-tool", depth=1, seed=seed, split="train").prompt for seed in range(20000)]
    assert len({CONTENT["calc-tool"](prompt) for prompt in drawn}) < 0.8 * len(drawn)


@pytest.mark.parametrize("depth", tasks.depths("hop-recover"))
def test_hop_chain_leads_to_the_key_and_a_wrong_box_never_does(depth: int) -> None:
    recovered = 0
    for seed in range(200):
        task = tasks.sample("hop-recover", depth=depth, seed=seed, split="test")
        name, box = CONTENT["hop-recover"](task.prompt)
        opened = 0
        while True:
            opened += 1
            content = task.files.get(name)
            if content is None:
                opened += 1
                content = task.files[f"box{box}/{name}"]
                recovered += 1
                others = [
                    path for path in task.files if path.endswith(f"/{name}") and f"box{box}/" not in path
                ]
                assert len(others) == 2
                assert all(
                    task.files[path] not in (content, f"key {task.answer}\n".encode()) for path in others
                )
            kind, name = content.decode().split()
            if kind == "key":
                break
        assert (name, opened + 1) == (task.answer, task.min_calls)
    # 35% of 200 * depth pointers, within four standard deviations.
    expected = tasks.MISSING_SHARE * 200 * depth
    assert abs(recovered - expected) < 4 * (expected * (1 - tasks.MISSING_SHARE)) ** 0.5


@pytest.mark.parametrize("depth", tasks.depths("calc-tool"))
def test_calc_answer_is_what_python_prints(depth: int) -> None:
    for seed in range(200):
        task = tasks.sample("calc-tool", depth=depth, seed=seed, split="rl")
        expression = CONTENT["calc-tool"](task.prompt)
        assert task.answer == str(eval(expression))
        assert len(re.findall(r"[+*-]", expression)) == depth
        assert not task.files


def test_prompts_are_short_and_varied() -> None:
    for family, depth in CASES:
        prompts = [tasks.sample(family, depth=depth, seed=seed).prompt for seed in range(60)]
        assert max(map(len, prompts)) <= 110
        assert len({re.sub(r"\d[\d+*-]*", "N", prompt) for prompt in prompts}) == 4


def test_grade_is_exact_after_stripping() -> None:
    task = tasks.sample("calc-tool", depth=2, seed=3)
    assert tasks.grade(task, f" {task.answer}\n") == 1.0
    for wrong in (None, "", "unknown", task.answer + "0", task.answer + ".", f"the answer is {task.answer}"):
        assert tasks.grade(task, wrong) == 0.0


def test_deepest_hops_are_only_tested() -> None:
    assert tasks.depths("hop-recover", split="train") == (1, 2, 3)
    assert tasks.depths("hop-recover", split="rl") == (1, 2, 3, 4)
    assert tasks.depths("hop-recover") == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: tasks.sample("maze", depth=1, seed=0),
            "unknown task family 'maze'; known: hop-recover, calc",
        ),
        (lambda: tasks.sample("calc-tool", depth=9, seed=0), "no depth 9; this family has 1, 2, 3"),
        (lambda: tasks.sample("calc-tool", depth=1, seed=0, split="dev"), "unknown split 'dev'"),
        (lambda: tasks.depths("calc-tool", split="dev"), "unknown split 'dev'"),
    ],
)
def test_bad_arguments_are_named(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TaskError, match=re.escape(words)):
        call()


# ---- setup, in a real directory by a real shell ----


@dataclass(frozen=True)
class Ended:
    stdout: str
    stderr: str
    exit_code: int


class HostShell:
    """The sandbox's surface that setup uses, run by the host's sh: what is judged is the script."""

    @property
    def commands(self) -> HostShell:
        return self

    async def run(self, command: str) -> Ended:
        done = await asyncio.to_thread(
            subprocess.run, ["sh", "-c", command], capture_output=True, text=True, check=False
        )
        return Ended(done.stdout, done.stderr, done.returncode)


async def test_setup_writes_exactly_the_files(tmp_path: Path) -> None:
    task = tasks.sample("hop-recover", depth=6, seed=5, split="test")
    root = tmp_path / "a b" / "work"
    await tasks.setup(task, HostShell(), str(root))
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert found == task.files


async def test_setup_writes_any_bytes(tmp_path: Path) -> None:
    task = tasks.Task(
        family="hop-recover",
        depth=1,
        seed=0,
        split="test",
        prompt="",
        answer="",
        files={"it's 100%": bytes(range(256)), "-rf": b"%s\\n'$HOME`"},
        min_calls=1,
    )
    await tasks.setup(task, HostShell(), str(tmp_path / "w"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "w").iterdir()} == task.files


async def test_setup_refuses_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TaskError, match=r"directory is not empty.*empty directory"):
        await tasks.setup(tasks.sample("hop-recover", depth=1, seed=0), HostShell(), str(tmp_path))
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_setup_refuses_paths_that_leave_the_directory() -> None:
    base = tasks.sample("calc-tool", depth=1, seed=0)
    for path in ("../x", "/etc/x", "a/../../x", "./x"):
        task = tasks.Task(
            family=base.family,
            depth=1,
            seed=0,
            split="rl",
            prompt="",
            answer="",
            files={path: b""},
            min_calls=1,
        )
        with pytest.raises(TaskError, match=r"file path .* plain"):
            tasks.setup_script(task, "/work")
    with pytest.raises(TaskError, match="absolute path"):
        tasks.setup_script(base, "work")
