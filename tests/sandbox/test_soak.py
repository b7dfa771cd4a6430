"""scripts/soak.py on a small scale, and that each sort of leak it looks for would be seen."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripts import soak_check

from rorqual.sandbox import trajectory_store
from rorqual.sandbox.keeper import cgroups, linux
from rorqual.sandbox.state import StateDir

SOAK = Path(__file__).resolve().parents[2] / "scripts/soak.py"


def soak(directory: Path, *options: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Its exit code, its report, its log."""
    command = [sys.executable, str(SOAK), "--directory", str(directory), "--out", str(directory / "out.json")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    assert (directory / "out.json").is_file(), done.stderr[-2000:]
    lines = (directory / "soak.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return done.returncode, json.loads((directory / "out.json").read_text(encoding="utf-8")), rows


@pytest.fixture
def runs(runtime: str) -> None:
    if not cgroups.can_freeze():
        pytest.skip("pause, fork and functions need root and a freezer cgroup")


def test_sixty_sandboxes_with_kills_of_client_and_edge_leave_nothing(runs: None, tmp_path: Path) -> None:
    code, report, rows = soak(tmp_path, "--count", "60", "--check-every", "30", "--kill-every", "20")
    assert report["left_behind"] == [] and report["failed"] == [], report
    assert code == 0 and report["verdict"] == "clean"
    assert sorted(row["number"] for row in rows if row["event"] == "made") == list(range(60))
    assert report["kills"]["client"] >= 1 and report["kills"]["edge"] >= 1
    assert report["outcomes"]["ok"] >= 40
    assert report["sandboxes_in_the_log"] >= report["outcomes"]["ok"]
    assert all(lane["ok"] > 10 for lane in report["by_lane"].values())
    assert [row["done"] for row in rows if row["event"] == "check"] == [0, 30, 60]
    roles = {item["role"] for row in rows if row["event"] == "check" for item in row["processes"]}
    assert {"edge", "client sdk", "client edge", "keeper of edge", "keeper of client sdk"} <= roles


def test_a_soak_goes_on_where_it_stopped(runs: None, tmp_path: Path) -> None:
    quick = ("--check-every", "4", "--steady", "1")
    assert soak(tmp_path, "--count", "4", *quick)[0] == 0
    with (tmp_path / "soak.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"event": "made", "numb')  # it was killed in the middle of a line
    code, report, rows = soak(tmp_path, "--count", "6", *quick)
    assert code == 0 and report["made"] == 6
    assert [row["number"] for row in rows if row["event"] == "made"].count(3) == 1
    assert [row["at"] for row in rows if row["event"] == "start"] == [0, 4]


def test_a_soak_that_is_stopped_reports_what_it_did(runs: None, tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--directory", str(tmp_path), "--out", str(tmp_path / "out.json")]
    with subprocess.Popen(
        [*command, "--count", "500", "--steady", "1"], stderr=subprocess.DEVNULL
    ) as process:
        log, deadline = tmp_path / "soak.jsonl", time.monotonic() + 60
        while not (log.is_file() and '"ok"' in log.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "clean" and 1 <= report["made"] < 500 == report["asked"]
    assert report["checks"] == 2


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--steady", "2"], ["--check-every", "1"]])
def test_numbers_that_make_no_soak_are_refused(wrong: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--directory", str(tmp_path / "none"), *wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and wrong[0] in done.stderr
    assert not (tmp_path / "none").exists()


# -- every sort of leak, made by hand


@pytest.fixture
def place(tmp_path: Path) -> Iterator[StateDir]:
    state = StateDir(root=tmp_path / "state", run=tmp_path / "run")
    state.prepare()
    yield state


def log_row(state: StateDir, name: str, *, ended: bool) -> None:
    with contextlib.closing(trajectory_store.connect(str(state.trajectory))) as log:
        seq = trajectory_store.begin(log, sandbox=name, kind="created", request={})
        trajectory_store.finish(log, sandbox=name, seq=seq, result={}, stdout=b"", stderr=b"")
    if ended:
        trajectory_store.append_end(str(state.trajectory), sandbox=name, cause="killed", detail="")


def sorts(state: StateDir, known: set[int] | None = None) -> set[str]:
    return {line.partition(":")[0] for line in soak_check.leaks(soak_check.look(state, known or set()))}


def test_a_clean_host_has_no_leaks(place: StateDir) -> None:
    assert sorts(place) == set()
    log_row(place, "sb-leak-000000000001", ended=True)
    (place.images / ".base-1").mkdir()  # the skeleton of the host's own image stays
    assert sorts(place) == set()


def test_a_sandbox_without_an_end_is_a_leak(place: StateDir) -> None:
    log_row(place, "sb-leak-000000000002", ended=False)
    assert sorts(place) == {"unended"}


def test_files_of_sandboxes_keepers_and_images_are_leaks(place: StateDir) -> None:
    for path in (place.sandboxes / "sb-x", place.keepers / "99999-abc", place.images / "fork-1"):
        path.mkdir()
    assert sorts(place) == {"sandboxes", "keeper_directories", "images"}
    assert sorts(place, {99999}) == {"sandboxes", "images"}  # that keeper's client lives


def test_a_process_that_nobody_knows_is_a_leak(place: StateDir) -> None:
    env = {**os.environ, "RORQUAL_STATE": str(place.root)}
    with subprocess.Popen(["sleep", "100"], env=env) as process:
        assert sorts(place, {process.pid}) == set()
        assert sorts(place) == {"processes"}
        process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts and cgroups need root")
def test_a_mount_and_a_cgroup_are_leaks(place: StateDir) -> None:
    log_row(place, "sb-leak-000000000003", ended=True)
    point = cgroups.hierarchies().get("pids") or cgroups.hierarchies().get("unified")
    if point is None:
        pytest.skip("no cgroups here")
    group, mounted = Path(point + "/rorqual-sb-leak-000000000003"), place.run / "mounted"
    group.mkdir()
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            assert sorts(place) == {"cgroups"}
            (group / "cgroup.procs").write_text(str(process.pid), encoding="ascii")
            assert sorts(place) == {"cgroups", "processes"}
        finally:
            process.kill()
            process.wait()
            group.rmdir()
    mounted.mkdir()
    linux.mount("none", str(mounted), fstype="tmpfs")
    try:
        assert sorts(place) == {"mounts"}
    finally:
        linux.umount(str(mounted))


def checks(sizes: list[int], *, fds: int = 0) -> list[dict[str, Any]]:
    return [
        {"processes": [{"role": "edge", "pid": 7, "made": 250 * n, "pss_kb": size, "fds": 10 + fds * n}]}
        for n, size in enumerate(sizes)
    ]


def test_growth_is_told_from_noise() -> None:
    noise = soak_check.growth(checks([0, 50_000, 50_900, 49_800, 50_700, 50_100]))
    assert [row["leak"] for row in noise] == [False] and noise[0]["judged"]
    leak = soak_check.growth(checks([0, 50_000, 51_000, 52_000, 53_000, 54_000]))
    assert leak[0]["leak"] and leak[0]["kb_per_1000"] == 4000.0
    assert soak_check.growth(checks([0, 50_000, 50_000, 50_000], fds=3))[0]["leak"]
    short = soak_check.growth(checks([0, 50_000, 55_000]))
    assert not short[0]["judged"] and not short[0]["leak"]
    assert soak_check.growth(checks([0, 50_000])) == []


def test_the_log_is_read_while_it_is_written(place: StateDir) -> None:
    log_row(place, "sb-leak-000000000004", ended=True)
    with contextlib.closing(sqlite3.connect(place.trajectory, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert soak_check.ids(place) == {"sb-leak-000000000004"}
