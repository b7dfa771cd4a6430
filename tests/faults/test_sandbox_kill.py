"""Kills the client, the keeper and the agent at bad moments; afterwards nothing may be left on the host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import AsyncSandbox, Sandbox, SandboxEnded, TrajectoryError, prune, trajectory
from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.host import find_runtimes
from rorqual.sandbox.images import remove_image
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.keeper.client import close_all
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.trajectory import Log

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDir]:
    try:
        find_runtimes()
    except HostUnfit as error:
        pytest.skip(str(error))
    monkeypatch.setenv("RORQUAL_STATE", str(tmp_path / "state"))
    place = StateDir.from_environment()
    place.prepare()
    yield place
    close_all()
    trajectory.close_all()
    assert leftovers(place) == []
    for directory in (place.keepers, place.sandboxes, place.run):
        directory.rmdir()


def leftovers(state: StateDir) -> list[str]:
    found = [str(path) for place in (state.sandboxes, state.keepers) for path in place.iterdir()]
    found += [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(state.root) in line
    ]
    return found


def wait_for(condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def client(code: str) -> subprocess.Popen[str]:
    """A client process in a session of its own; prints JSON lines."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


HOLD = """
import json, sys, time
from rorqual.sandbox import Sandbox
boxes = [Sandbox.create({options}) for _ in range({count})]
handle = boxes[0].commands.run("sleep 7654", background=True)
talker = boxes[0].commands.run("echo started; sleep 300", background=True)
record = {{"ids": [box.id for box in boxes], "keeper": str(boxes[0]._inner._session.launched.keeper.directory)}}
print(json.dumps(record), flush=True)
boxes[0].commands.run("sleep 300", timeout=None)
"""


def hold(options: str = "", count: int = 2) -> tuple[subprocess.Popen[str], dict[str, object]]:
    process = client(HOLD.format(options=options, count=count))
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return process, json.loads(line)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def cause_of(state: StateDir, sandbox_id: str) -> object:
    log = Log(state.trajectory)
    try:
        last = log.read(sandbox_id)[-1]
    finally:
        log.close()
    return last.result["cause"] if last.kind == "ended" and last.result else None


def gone(state: StateDir, ids: list[str]) -> bool:
    if any((state.sandboxes / name).exists() for name in ids):
        return False
    return not any(cgroups.directories(f"/rorqual-{name}") for name in ids)


def test_kill_9_of_the_client_ends_its_sandboxes_at_once(state: StateDir) -> None:
    process, record = hold()
    process.kill()
    end(process)
    ids = [str(name) for name in record["ids"]]  # type: ignore[attr-defined]
    wait_for(lambda: gone(state, ids))
    wait_for(lambda: not list(state.keepers.iterdir()))
    assert [cause_of(state, name) for name in ids] == ["killed", "killed"]


def test_kill_9_of_client_and_keeper_is_reaped_by_the_next_start(state: StateDir) -> None:
    process, record = hold()
    keeper = keeper_pid(str(record["keeper"]))
    os.kill(keeper, signal.SIGSTOP)  # so that it cannot clean up in between
    process.kill()
    end(process)
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{keeper}").exists())
    ids = [str(name) for name in record["ids"]]  # type: ignore[attr-defined]
    assert not gone(state, ids)
    with Sandbox.create() as sb:
        assert gone(state, ids)
        assert sb.commands.run("echo next").stdout == "next\n"
    assert [cause_of(state, name) for name in ids] == ["infra", "infra"]


def test_kill_9_of_the_keeper_ends_the_command_with_cause_infra_and_is_reaped(state: StateDir) -> None:
    process, record = hold(count=1)
    os.kill(keeper_pid(str(record["keeper"])), signal.SIGKILL)
    code, errors = end(process)
    assert code == 1 and "SandboxEnded" in errors and "infra" in errors
    wait_for(lambda: leftovers(state) == [])
    assert cause_of(state, record["ids"][0]) == "infra"  # type: ignore[index]


def test_prune_reaps_too_and_leaves_the_living_alone(state: StateDir) -> None:
    process, record = hold(count=1)
    with Sandbox.create() as sb:
        keeper = keeper_pid(str(record["keeper"]))
        os.kill(keeper, signal.SIGSTOP)
        process.kill()
        end(process)
        os.kill(keeper, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{keeper}").exists())
        pruned = prune()
        ids = {str(name) for name in record["ids"]}  # type: ignore[attr-defined]
        assert ids <= set(pruned.sandboxes) and pruned.keepers >= 1 and sb.id not in pruned.sandboxes
        assert not ids & set(prune().sandboxes)
        assert sb.commands.run("echo here").stdout == "here\n"


def keeper_pid(directory: str) -> int:
    for place in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if directory.encode() in arguments and b"-S" in arguments:
            return int(place.name)
    raise AssertionError(f"no keeper for {directory}")


def test_ctrl_c_in_a_command_raises_at_once_and_leaves_nothing(state: StateDir) -> None:
    process, record = hold()
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    code, errors = end(process)
    assert code in (-signal.SIGINT, 130, 1) and "KeyboardInterrupt" in errors
    assert gone(state, [str(name) for name in record["ids"]])  # type: ignore[attr-defined]
    assert not list(state.keepers.iterdir())


def test_cancelling_creates_at_any_moment_leaves_no_cgroup(state: StateDir) -> None:
    """The runtime works on in a child of its own when it is killed: the keeper must not let go of that."""

    async def main() -> None:
        async with await AsyncSandbox.create():  # so that every round below meets a warm keeper
            pass
        for step in range(1, 25):
            task = asyncio.create_task(AsyncSandbox.create(memory_mb=32))
            await asyncio.sleep(step * 0.003)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await task).kill()

    ours = {place.name for place in Path("/sys/fs/cgroup").glob("*/rorqual-*")}
    asyncio.run(main())
    wait_for(lambda: not list(state.sandboxes.iterdir()))
    names = {entry.removeprefix("rorqual-") for entry in logged(state)}
    assert len(names) >= 20  # the very first may be cancelled before their intent is logged
    left = {place.name for place in Path("/sys/fs/cgroup").glob("*/rorqual-*")} - ours
    assert not {name for name in left if name.removeprefix("rorqual-") in names}


def logged(state: StateDir) -> set[str]:
    connection = sqlite3.connect(state.trajectory)
    try:
        return {row[0] for row in connection.execute("SELECT DISTINCT sandbox FROM trajectory")}
    finally:
        connection.close()


@pytest.mark.parametrize("delay", [0.05, 0.15, 0.25, 0.35, 0.5])
def test_ctrl_c_while_creating_leaves_nothing(state: StateDir, delay: float) -> None:
    code = "from rorqual.sandbox import Sandbox\nprint(1, flush=True)\nwhile True: Sandbox.create().kill()"
    process = client(code)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    code_, errors = end(process)
    assert code_ != 0 and "KeyboardInterrupt" in errors
    assert leftovers(state) == []
    assert not any(cgroups.directories(f"/rorqual-{name}") for name in logged(state))


def test_an_exception_in_the_block_ends_the_sandbox(state: StateDir) -> None:
    with pytest.raises(ZeroDivisionError), Sandbox.create() as sb:
        raise ZeroDivisionError
    assert sb.cause == "killed" and gone(state, [sb.id])


def test_a_kept_sandbox_outlives_kill_9_of_its_client_and_is_reached_again(state: StateDir) -> None:
    process, record = hold(options="keep=True, timeout=120", count=1)
    process.kill()
    end(process)
    (name,) = record["ids"]  # type: ignore[misc]
    with Sandbox.connect(name) as sb:
        running = [info for info in sb.commands.list() if info.running]
        assert any(info.command == "sleep 7654" for info in running)
        background = sb.commands.connect(next(info.id for info in running if info.command.startswith("echo")))
        wait_for(lambda: background.stdout == "started\n")
        assert sb.kill()
    wait_for(lambda: leftovers(state) == [])
    assert cause_of(state, name) == "killed"


def test_a_kept_sandbox_still_meets_its_timeout(state: StateDir) -> None:
    process, record = hold(options="keep=True, timeout=2", count=1)
    process.kill()
    end(process)
    wait_for(lambda: leftovers(state) == [])
    (name,) = record["ids"]  # type: ignore[misc]
    assert cause_of(state, name) == "timeout"


def test_the_death_of_the_agent_is_told_as_its_cause(state: StateDir) -> None:
    with Sandbox.create() as sb:
        record = json.loads((state.sandboxes / sb.id / "record.json").read_text())
        handle = sb.commands.run("sleep 300", background=True)
        os.kill(record["init_pid"], signal.SIGKILL)
        with pytest.raises(SandboxEnded, match="signal 9") as caught:
            handle.wait()
        assert caught.value.cause == "infra"
        wait_for(lambda: gone(state, [sb.id]))


def test_a_full_state_disk_is_an_error_before_the_command(state: StateDir, tmp_path: Path) -> None:
    """The trajectory log on a file system of 1 MiB: its filling up stops commands, it does not lose them."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True)
    try:
        refused = pytest.raises(TrajectoryError, match=r"log\.db cannot be written")
        with Sandbox.create(trajectory=small / "log.db") as sb, refused:
            for _ in range(100):
                sb.commands.run("head -c 60000 /dev/urandom | base64")
        trajectory.close_all()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_garbage_at_the_keepers_socket_harms_nobody(state: StateDir) -> None:
    with Sandbox.create() as sb:
        directory = sb._inner._session.launched.keeper.directory
        for data in (b"not json\n", b"[]\n", b'{"id": "x"}\n', b'{"id": 1}\n', b"x" * 100_000, b""):
            probe = socket.socket(socket.AF_UNIX)
            probe.connect(str(directory / "keeper.sock"))
            probe.sendall(data)
            probe.close()
        assert sb.commands.run("echo on").stdout == "on\n"
        assert abs(sb.info().expires - time.time() - 300) < 60


FORKS = """
import json, time
from rorqual.sandbox import Sandbox
parent = Sandbox.create()
parent.files.write("a", "1")
boxes = [parent, *parent.fork(count=2)]
for box in boxes[1:]:
    box.commands.run("sleep 7654", background=True)
    box.pause()
record = {"ids": [box.id for box in boxes], "keeper": str(boxes[0]._inner._session.launched.keeper.directory)}
print(json.dumps(record), flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(not cgroups.can_freeze(), reason="no freezer cgroup that this user may use")
@pytest.mark.parametrize("keeper_too", [False, True])
def test_paused_sandboxes_and_the_layers_of_forks_go_with_kill_9(state: StateDir, keeper_too: bool) -> None:
    process = client(FORKS)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    record = json.loads(line)
    assert len(list(state.images.glob(".fork-*"))) == 1
    if keeper_too:
        keeper = keeper_pid(str(record["keeper"]))
        os.kill(keeper, signal.SIGSTOP)
    process.kill()
    end(process)
    if keeper_too:
        os.kill(keeper, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{keeper}").exists())
        assert not gone(state, record["ids"])
        prune()
    wait_for(lambda: gone(state, record["ids"]))
    wait_for(lambda: not list(state.images.glob(".fork-*")))
    wait_for(lambda: all(cause_of(state, name) for name in record["ids"]))
    causes = {cause_of(state, name) for name in record["ids"]}
    assert causes == ({"infra"} if keeper_too else {"killed"})


@pytest.mark.skipif(not cgroups.can_freeze(), reason="no freezer cgroup that this user may use")
def test_a_sandbox_killed_in_the_middle_of_its_snapshot_ends_and_nothing_is_kept(state: StateDir) -> None:
    async def main() -> None:
        sb = await AsyncSandbox.create(disk_mb=256, memory_mb=512)
        await sb.commands.run("head -c 100000000 /dev/zero | tr '\\0' x > big")
        task = asyncio.create_task(sb.snapshot())
        while not list(state.images.glob(".building-*/0")) and not task.done():  # noqa: ASYNC110 - not our event
            await asyncio.sleep(0.001)
        await sb.kill()
        await asyncio.wait([task])
        if task.exception() is None:  # it was faster
            await asyncio.to_thread(remove_image, task.result().name)
        else:
            assert isinstance(task.exception(), SandboxEnded)

    asyncio.run(main())
    wait_for(lambda: not [path for path in state.images.iterdir() if not path.name.startswith(".base")])
