"""The trajectory log: durable before the command, ordered, bounded, shared between processes."""

# ruff: noqa: ASYNC220, ASYNC221 -- tests wait for other processes

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rorqual.sandbox import AsyncSandbox, TrajectoryError
from rorqual.sandbox import trajectory_store as store
from rorqual.sandbox.trajectory import HALF_KEPT, Log, bounded, close_all, open_log

ROOT = Path(__file__).resolve().parents[2]


async def test_numbers_are_per_sandbox_without_gaps_under_concurrency(tmp_path: Path) -> None:
    log = Log(tmp_path / "t.db")
    try:
        jobs = [log.begin(sandbox=f"s{n % 3}", kind="command", request={"n": n}) for n in range(300)]
        numbers = await asyncio.gather(*jobs)
        for s in range(3):
            assert [numbers[n] for n in range(300) if n % 3 == s] == list(range(1, 101))
        rows = log.read("s1")
        assert [row.request["n"] for row in rows] == list(range(1, 300, 3))
    finally:
        log.close()


async def test_an_intent_survives_kill_9_of_its_process(tmp_path: Path) -> None:
    code = """
import asyncio, os, signal, sys
from pathlib import Path
from rorqual.sandbox.trajectory import Log
async def main():
    log = Log(Path(sys.argv[1]))
    for n in range(50):
        await log.begin(sandbox="s", kind="command", request={"n": n})
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    path = tmp_path / "t.db"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env={"PYTHONPATH": str(ROOT / "src")}, check=False
    )
    assert done.returncode == -9
    log = Log(path)
    assert [row.seq for row in log.read("s")] == list(range(1, 51))
    assert all(row.result is None for row in log.read("s"))
    log.close()


async def test_two_processes_share_one_file(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
from rorqual.sandbox.trajectory import Log
async def main():
    log = Log(Path(sys.argv[1]))
    for n in range(100):
        seq = await log.begin(sandbox="s", kind="command", request={})
        log.finish(sandbox="s", seq=seq, result={"who": sys.argv[2]})
    log.close()
asyncio.run(main())
"""
    path = tmp_path / "t.db"
    env = {"PYTHONPATH": str(ROOT / "src")}
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), who], env=env) for who in "ab"]
    assert [process.wait(60) for process in both] == [0, 0]
    log = Log(path)
    rows = log.read("s")
    log.close()
    assert [row.seq for row in rows] == list(range(1, 201))
    assert sorted(row.result["who"] for row in rows if row.result) == ["a"] * 100 + ["b"] * 100


def test_stored_output_keeps_head_and_tail() -> None:
    assert bounded(b"x" * (2 * HALF_KEPT)) == (b"x" * (2 * HALF_KEPT), False)
    data = b"a" * HALF_KEPT + b"lost" + b"z" * HALF_KEPT
    assert bounded(data) == (b"a" * HALF_KEPT + b"z" * HALF_KEPT, True)


async def test_a_log_that_cannot_be_written_stops_commands_before_they_run(
    runtime: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.db"
    async with await AsyncSandbox.create(trajectory=path) as sb:
        await sb.commands.run("true")
        blocker = sqlite3.connect(path)
        blocker.execute("DROP TABLE trajectory")
        blocker.close()
        with pytest.raises(TrajectoryError, match=str(path)):
            await sb.commands.run("touch /tmp/ran")
        assert not await sb.files.exists("/tmp/ran")
    open_log(path).close()


async def test_garbage_and_newer_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"not a database" * 100)
    with pytest.raises(TrajectoryError, match=r"garbage\.db"):
        Log(tmp_path / "garbage.db")
    connection = store.connect(str(tmp_path / "new.db"))
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(TrajectoryError, match="format 99"):
        Log(tmp_path / "new.db")


def test_old_sandboxes_are_forgotten_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "t.db")
    connection = store.connect(path)
    for sandbox, moment in (("old", 100.0), ("old", 200.0), ("young", 100.0), ("young", 9e9)):
        store.begin(connection, sandbox=sandbox, kind="command", request={})
        connection.execute(
            "UPDATE trajectory SET started = ? WHERE sandbox = ? AND seq = "
            "(SELECT MAX(seq) FROM trajectory WHERE sandbox = ?)",
            (moment, sandbox, sandbox),
        )
    connection.close()
    assert store.forget_before(path, 1000.0) == 2
    log = Log(Path(path))
    assert len(log.read("young")) == 2 and not log.read("old")
    log.close()


def test_children_forked_in_the_middle_of_writing_write_too_and_harm_nothing(tmp_path: Path) -> None:
    """SQLite keeps its locks in the process: what a fork copies would be held by nobody."""
    path = tmp_path / "log.db"
    log = open_log(path)
    over = threading.Event()

    def write(name: str, count: int) -> None:
        for number in range(count):
            log = open_log(path)
            seq = asyncio.run(log.begin(sandbox=name, kind="command", request={"n": number}))
            log.finish(sandbox=name, seq=seq, result={"exit_code": 0}, stdout=b"x" * 5000)

    def keep_writing() -> None:
        while not over.is_set():
            write("parent", 5)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    children = []
    for number in range(12):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write(f"child-{number}", 10)
                close_all()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
        time.sleep(0.02)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    over.set()
    writer.join()
    log = open_log(path)
    asyncio.run(log.flush())
    assert codes == [0] * 12
    assert [len(log.read(f"child-{number}")) for number in range(12)] == [10] * 12
    log.close()
    check = subprocess.run(
        [sys.executable, "-c", "import sqlite3, sys\n"
         "print(sqlite3.connect(sys.argv[1]).execute('PRAGMA integrity_check').fetchone()[0])", str(path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert check.stdout == "ok\n"
