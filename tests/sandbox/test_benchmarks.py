"""benchmarks/density.py on a small scale, and the arithmetic that the figures of both sandbox benchmarks rest on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import sandbox_host

from rorqual.sandbox.keeper import cgroups

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_percentiles_are_taken_from_the_samples() -> None:
    row = sandbox_host.spread([number / 1000 for number in range(100, 0, -1)])
    assert row == {"p50": 50.5, "p90": 91.0, "p99": 100.0, "min": 1.0, "max": 100.0, "n": 100}
    assert sandbox_host.spread([0.002])["p99"] == 2.0


def test_density_counts_what_lives_and_answers_and_keeps_the_parts_not_asked_for(
    runtime: str, tmp_path: Path
) -> None:
    if not cgroups.can_freeze():
        pytest.skip("memory is read from cgroups, which this user has none of")
    out = tmp_path / "density.json"
    done = run("density.py", "--only", "containers", "--count", "20", "--out", str(out))
    assert done.returncode == 0, done.stderr
    first = json.loads(out.read_text(encoding="utf-8"))
    made = first["containers"]
    assert (
        made["live"] == made["answered"] == made["create_ms"]["n"] == 20 and made["stopped_by"] == "--count"
    )
    assert 0 < made["memory"]["pss_kb_each"] < 2000 and made["memory"]["client_fds"] > 20
    done = run("density.py", "--only", "storm", "--storm", "12", "--out", str(out))
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["storm"]["failures"] == 0 and document["storm"]["first_command_ms"]["n"] == 12
    assert document["containers"] == made


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("density.py", ["--only", "boats"], "--only: boats is none of containers"),
        ("density.py", ["--share", "1.5"], "--share must be between"),
        ("sandbox.py", ["--only", "create,x"], "--only: x is none of create"),
        ("sandbox.py", ["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, options: list[str], words: str) -> None:
    done = run(name, *options)
    assert done.returncode == 2 and words in done.stderr


_MANY = """
import asyncio, resource
from rorqual.sandbox import AsyncSandbox
resource.setrlimit(resource.RLIMIT_NOFILE, (72, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
async def main():
    boxes = []
    for _ in range(30):
        boxes.append(await AsyncSandbox.create(memory_mb=64, disk_mb=16))
    answers = await asyncio.gather(*[sb.commands.run("ulimit -Sn") for sb in boxes])
    print(len(answers), {answer.stdout for answer in answers})
    await asyncio.gather(*[sb.kill() for sb in boxes])
asyncio.run(main())
"""


def test_a_keeper_holds_more_sandboxes_than_its_callers_descriptors_would_let_it(runtime: str) -> None:
    done = subprocess.run([sys.executable, "-c", _MANY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.startswith("30 ") and done.stdout.count("'") == 2, done.stdout
