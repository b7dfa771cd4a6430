"""Attach: a restarted client gets what was done, in order, and runs nothing twice. Clients are killed for real."""

# ruff: noqa: ASYNC110 -- tests wait for other processes

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rorqual.sandbox import (
    AsyncSandbox,
    GuestFileError,
    InvalidRequest,
    Sandbox,
    SandboxEnded,
    SandboxNotFound,
    TrajectoryMismatch,
    UnknownOutcome,
)
from rorqual.sandbox import trajectory as trajectories
from rorqual.sandbox._forward import IDENTITY, Forward
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.trajectory import TrajectoryEntry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def kept(runtime: str) -> AsyncIterator[AsyncSandbox]:
    sb = await AsyncSandbox.create(keep=True, timeout=120, memory_mb=128)
    yield sb
    await sb.kill()


async def count(sb: AsyncSandbox, name: str) -> int:
    """How often a script has appended a line to a file inside; reads beside the log."""
    try:
        return (await sb._session.guest.read_file(f"/home/user/{name}")).count(b"\n")
    except GuestFileError:
        return 0


# -- what was done is answered from the log -----------------------------------------------------------------


async def script(sb: AsyncSandbox) -> dict[str, object]:
    """A client's program. What it sees must not depend on when it was restarted."""
    seen: dict[str, object] = {}
    pieces: list[str] = []
    first = await sb.commands.run(
        "echo once >> ran; echo out; echo err >&2; exit 3", on_stdout=pieces.append, envs={"A": "1"}
    )
    seen["first"] = (first.exit_code, first.stdout, first.stderr, "".join(pieces))
    seen["written"] = (await sb.files.write("dir/a", "one")).size
    seen["appended"] = (await sb.files.write("dir/a", "+", append=True)).size
    seen["read"] = await sb.files.read("dir/a")
    seen["fed"] = (await sb.commands.run(["cat"], stdin="fed\n")).stdout
    try:
        await sb.files.read("missing")
    except GuestFileError as error:
        seen["missing"] = error.errno
    seen["made"] = await sb.files.make_dir("made")
    seen["made again"] = await sb.files.make_dir("made")
    await sb.files.rename("dir/a", "dir/b")
    seen["listed"] = [entry.name for entry in await sb.files.list("dir")]
    seen["exists"] = (await sb.files.exists("dir/a"), await sb.files.exists("dir/b"))
    await sb.files.remove("dir", recursive=True)
    handle = await sb.commands.run(
        "read line; echo got $line >> ran; echo $line", background=True, stdin=True
    )
    await handle.send_stdin("typed\n")
    await handle.close_stdin()
    seen["background"] = (await handle.wait()).stdout
    sleeper = await sb.commands.run("sleep 1000", background=True)
    seen["killed"] = await sleeper.kill()
    seen["its end"] = (await sleeper.wait()).exit_code
    await sb.set_timeout(100)
    return seen


async def test_a_restarted_client_sees_what_the_first_one_saw_and_nothing_runs_twice(
    kept: AsyncSandbox,
) -> None:
    first = await script(kept)
    assert await count(kept, "ran") == 2
    rows = len(await kept.trajectory.list())
    again = await AsyncSandbox.attach(kept.id)
    assert await script(again) == first
    assert await count(kept, "ran") == 2 and len(await kept.trajectory.list()) == rows
    live = await again.commands.run("echo once >> ran; echo live")  # the log is at its end
    assert live.stdout == "live\n" and not live.cached and live.seq == rows + 1
    assert await count(kept, "ran") == 3
    await again.close()
    third = await AsyncSandbox.attach(kept.id)
    assert await script(third) == first and (await third.commands.run("echo once >> ran; echo live")).cached
    await third.close()


async def test_a_mismatch_says_where_they_part_and_nothing_is_done(kept: AsyncSandbox) -> None:
    await kept.commands.run("echo a >> ran")
    await kept.files.write("x", "1")
    again = await AsyncSandbox.attach(kept.id)
    with pytest.raises(TrajectoryMismatch, match="echo b") as caught:
        await again.commands.run("echo b >> ran")
    assert caught.value.seq == 2 and caught.value.expected["cmd"] == "echo a >> ran"
    assert caught.value.asked["cmd"] == "echo b >> ran"
    with pytest.raises(TrajectoryMismatch, match="write"):
        await again.files.write("x", "1")
    assert (await again.commands.run("echo a >> ran", timeout=5)).cached  # a deadline is not what was asked
    with pytest.raises(TrajectoryMismatch, match="sha256"):
        await again.files.write("x", "2")
    with pytest.raises(TrajectoryMismatch, match="at number 3 the log has write"):
        await again.commands.run(["echo", "a"])
    await again.files.write("x", "1")
    assert await count(kept, "ran") == 1 and await again.files.read("x") == "1"
    await again.close()


async def test_calls_that_were_under_way_together_may_come_in_any_order(kept: AsyncSandbox) -> None:
    commands = [f"sleep 0.2; echo {n} >> ran; echo {n}" for n in range(4)]
    first = await asyncio.gather(*[kept.commands.run(cmd) for cmd in commands])
    again = await AsyncSandbox.attach(kept.id)
    second = await asyncio.gather(*[again.commands.run(cmd) for cmd in reversed(commands)])
    assert [r.stdout for r in reversed(second)] == [r.stdout for r in first]
    assert all(r.cached for r in second) and await count(kept, "ran") == 4
    await again.close()


def test_rows_match_in_order_unless_they_overlapped() -> None:
    def row(seq: int, path: str, started: float, ended: float | None) -> TrajectoryEntry:
        return TrajectoryEntry(
            seq=seq, kind="read", request={"path": path}, result={}, stdout=b"", stderr=b"", input=b"",
            started=started, ended=ended,
        )  # fmt: skip

    forward = Forward(
        "s", [row(1, "/a", 0.0, 3.0), row(2, "/b", 1.0, 2.0), row(3, "/c", 2.5, 4.0), row(4, "/d", 5, 6)]
    )
    with pytest.raises(TrajectoryMismatch):  # it began after all the others were over
        forward.take("read", {"path": "/d"})
    for path, seq in (("/b", 2), ("/c", 3), ("/a", 1), ("/d", 4)):
        taken = forward.take("read", {"path": path})
        assert taken is not None and taken.seq == seq
    assert forward.take("read", {"path": "/e"}) is None and len(forward) == 0


def test_every_kind_of_call_that_is_logged_is_matched_when_it_is_asked_again() -> None:
    texts = [path.read_text() for path in (ROOT / "src/rorqual/sandbox/_async").glob("*.py")]
    texts.append((ROOT / "src/rorqual/sandbox/_reattach.py").read_text())
    kinds = {kind for text in texts for kind in re.findall(r'begin\([^)]*?kind="(\w+)"', text)}
    kinds |= {kind for text in texts for kind in re.findall(r'_(?:change|noted|look)\(\s*"(\w+)"', text)}
    assert {"command", "stdin", "write", "rename", "read", "stat", "fork", "network"} <= kinds
    asked = {kind for text in texts for kind in re.findall(r'(?:_known|forwarded)\(\s*"(\w+)"', text)}
    assert kinds - set(IDENTITY) <= {"created", "adopted"} and asked <= set(IDENTITY)


async def test_a_read_is_what_it_was_although_the_file_has_changed(
    kept: AsyncSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "HALF_KEPT", 1000)
    await kept.files.write("small", "then")
    await kept.files.write("large", b"x" * 5000)
    assert await kept.files.read("small") == "then"
    assert len(await kept.files.read("large")) == 5000
    await kept.files.write("small", "now")
    again = await AsyncSandbox.attach(kept.id)
    await again.files.write("small", "then")
    await again.files.write("large", b"x" * 5000)
    assert await again.files.read("small") == "then"
    assert await again.files.read("large") == "x" * 5000  # not in the log whole: read again, the same
    third = await AsyncSandbox.attach(kept.id)
    await kept._session.guest.write_file("/home/user/large", b"y" * 5000)
    await third.files.write("small", "then")
    await third.files.write("large", b"x" * 5000)
    await third.files.read("small")
    with pytest.raises(UnknownOutcome, match="another file now"):
        await third.files.read("large")
    await again.close()
    await third.close()


async def test_output_that_the_log_has_cut_is_marked(
    kept: AsyncSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "HALF_KEPT", 1000)
    whole = await kept.commands.run("seq 2000")
    again = await AsyncSandbox.attach(kept.id)
    cut = await again.commands.run("seq 2000")
    assert not whole.truncated and cut.truncated and cut.cached
    assert whole.stdout.startswith(cut.stdout) and len(cut.stdout) == 1000
    assert cut.stdout_bytes == len(whole.stdout)
    await again.close()


# -- what was begun and not seen to end ---------------------------------------------------------------------

CLIENT = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[1])
from rorqual.sandbox import AsyncSandbox
from rorqual.sandbox import trajectory
from rorqual.sandbox._async import commands
from rorqual.sandbox._guest import GuestClient, GuestProcess

point = sys.argv[3]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name):
    setattr(owner, name, die)

def after(owner, name):
    real = getattr(owner, name)
    async def patched(*args, **kwargs):
        value = await real(*args, **kwargs)
        die()
    setattr(owner, name, patched)

async def main():
    sb = await AsyncSandbox.connect(sys.argv[2])
    await sb.commands.run("true")
    if point == "before intent": before(trajectory.Log, "begin")
    if point == "after intent": after(trajectory.Log, "begin")
    if point == "after start": after(GuestClient, "start")
    if point == "start sent":
        real = GuestClient._open_stream
        async def sent(self, process, request, *, kill):
            self._write(request)
            die()
        GuestClient._open_stream = sent
    if point == "while it runs":
        async def out(text):
            if "half" in text: die()
        on = out
    else:
        on = None
    if point == "input half fed":
        real = GuestProcess.send_stdin
        async def half(self, data):
            await real(self, data[:2])
            die()
        GuestProcess.send_stdin = half
    if point == "after end": before(commands.AsyncCommandHandle, "_result")
    if point == "after result":
        real = commands.AsyncCommandHandle._result
        def result(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self._session.log.close()
            die()
        commands.AsyncCommandHandle._result = result
    await sb.commands.run(CMD, stdin=FED, on_stdout=on)
asyncio.run(main())
"""
POINTS = [
    "before intent", "after intent", "start sent", "after start", "input half fed", "while it runs", "after end",
    "after result",
]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
async def test_kill_9_of_the_client_at_every_point(kept: AsyncSandbox, point: str) -> None:
    cmd = "echo half; read line; sleep 0.3; echo $line >> ran; echo whole"
    fed = "input\n" if point in ("input half fed", "after end", "after result", "while it runs") else False
    if fed is False:
        cmd = cmd.replace("read line; ", "line=none; ")
    code = CLIENT.replace("CMD", repr(cmd)).replace("FED", repr(fed))
    client = [sys.executable, "-c", code, str(ROOT / "src"), kept.id, point]
    done = await asyncio.to_thread(subprocess.run, client, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = await AsyncSandbox.attach(kept.id)
    assert (await again.commands.run("true")).exit_code == 0
    pieces: list[str] = []
    result = await again.commands.run(cmd, stdin=fed, on_stdout=pieces.append)
    assert (result.exit_code, result.stdout, "".join(pieces)) == (0, "half\nwhole\n", "half\nwhole\n")
    assert result.seq == 3 and result.cached == (point == "after result")
    line = (await again._session.guest.read_file("/home/user/ran")).decode()
    assert line == ("input\n" if fed else "none\n")  # once, with all of its input, once
    entries = await kept.trajectory.list()
    assert [entry.kind for entry in entries] == ["created", "command", "command"]
    assert entries[-1].result is not None and entries[-1].result["exit_code"] == 0
    await again.close()


async def test_a_background_command_is_taken_over_with_its_output_and_its_input(kept: AsyncSandbox) -> None:
    cmd = "while read line; do echo $line; done; echo end >> ran"
    first = await kept.commands.run(cmd, background=True, stdin=True, timeout=None)
    await first.send_stdin("one\n")
    again = await AsyncSandbox.attach(kept.id)
    second = await again.commands.run(cmd, background=True, stdin=True, timeout=None)
    assert second.id == first.id
    await second.send_stdin("one\n")  # was sent
    await second.send_stdin("two\n")
    await second.close_stdin()
    assert (await second.wait()).stdout == "one\ntwo\n" and await count(kept, "ran") == 1
    await again.close()


async def test_what_the_guest_has_forgotten_is_unknown_and_asking_again_runs_it(kept: AsyncSandbox) -> None:
    log = kept._session.log
    request = {"cmd": "echo x >> ran", "cwd": "/home/user", "user": "user", "timeout": 60.0}
    await log.begin(sandbox=kept.id, kind="command", request=request | {"agent": "another agent"})
    again = await AsyncSandbox.attach(kept.id)
    with pytest.raises(UnknownOutcome, match="not the one that was asked") as caught:
        await again.commands.run("echo x >> ran")
    assert caught.value.seq == 2 and caught.value.running is None and await count(kept, "ran") == 0
    assert (await again.commands.run("echo x >> ran")).seq == 3 and await count(kept, "ran") == 1
    await again.close()
    third = await AsyncSandbox.attach(kept.id)  # the caller's decision is in the log, too
    with pytest.raises(UnknownOutcome):
        await third.commands.run("echo x >> ran")
    assert (await third.commands.run("echo x >> ran")).cached and await count(kept, "ran") == 1
    await third.close()


@pytest.mark.parametrize("done", [False, True])
async def test_a_file_change_without_a_result_is_known_by_its_effect(kept: AsyncSandbox, done: bool) -> None:
    guest, log = kept._session.guest, kept._session.log
    real = log.finish
    log.finish = lambda **_: None  # type: ignore[method-assign] -- the client died before the result was logged
    try:
        await kept.files.write("a", "content")
    finally:
        log.finish = real  # type: ignore[method-assign]
    if not done:
        await guest.remove("/home/user/a")
    again = await AsyncSandbox.attach(kept.id)
    if done:
        assert (await again.files.write("a", "content")).size == 7
    else:
        with pytest.raises(UnknownOutcome, match="its effect is not to be seen"):
            await again.files.write("a", "content")
        await again.files.write("a", "content")
    assert await guest.read_file("/home/user/a") == b"content"
    await again.close()


async def test_an_append_without_a_result_is_never_repeated(kept: AsyncSandbox) -> None:
    log = kept._session.log
    real = log.finish
    log.finish = lambda **_: None  # type: ignore[method-assign]
    try:
        await kept.files.write("a", "x", append=True)
    finally:
        log.finish = real  # type: ignore[method-assign]
    again = await AsyncSandbox.attach(kept.id)
    with pytest.raises(UnknownOutcome):
        await again.files.write("a", "x", append=True)
    assert await kept._session.guest.read_file("/home/user/a") == b"x"
    await again.close()


# -- the end of the sandbox and of its agent ----------------------------------------------------------------


@pytest.mark.parametrize("point", ["before start", "while it runs", "between"])
async def test_kill_9_of_the_guest_agent_ends_it_and_the_log_is_still_answered(
    runtime: str, point: str
) -> None:
    sb = await AsyncSandbox.create(keep=True, timeout=60, memory_mb=128)
    agent = next(
        int(pid)
        for place in cgroups.directories(f"/rorqual-{sb.id}")
        for pid in (Path(place) / "cgroup.procs").read_text().split()
    )
    assert (await sb.commands.run("echo done")).stdout == "done\n"
    if point == "while it runs":
        running = asyncio.create_task(sb.commands.run("echo half; sleep 100"))
        while not sb._session.processes:
            await asyncio.sleep(0.01)
        os.kill(agent, signal.SIGKILL)
        with pytest.raises(SandboxEnded):
            await running
    else:
        os.kill(agent, signal.SIGKILL)
        async with asyncio.timeout(10):
            await sb._session.over.wait()
    if point == "before start":
        log = sb._session.log
        request = {"cmd": "next", "cwd": "/home/user", "user": "user", "timeout": 60.0}
        await log.begin(sandbox=sb.id, kind="command", request=request)
        await log.begin(sandbox=sb.id, kind="ended", request={})
        log.finish(sandbox=sb.id, seq=5, result={"cause": "infra", "detail": "killed"})
    again = await AsyncSandbox.attach(sb.id)
    assert again.cause == "infra" and (await again.commands.run("echo done")).stdout == "done\n"
    if point == "while it runs":
        with pytest.raises(SandboxEnded, match="infra"):  # as the first client saw it
            await again.commands.run("echo half; sleep 100")
    if point == "before start":
        with pytest.raises(UnknownOutcome, match="the sandbox ended"):
            await again.commands.run("next")
    with pytest.raises(SandboxEnded, match="infra"):
        await again.commands.run("anything")
    with pytest.raises(SandboxEnded):
        await again.files.read("anything")
    with pytest.raises(SandboxEnded):
        await again.info()
    await again.close()
    await sb.close()


async def test_attaching_to_nothing_is_refused(runtime: str) -> None:
    with pytest.raises(SandboxNotFound):
        await AsyncSandbox.attach("sb-local-000000000000")
    with pytest.raises(InvalidRequest):
        await AsyncSandbox.attach("../escape")


async def test_pause_snapshot_and_fork_are_answered_from_the_log(kept: AsyncSandbox) -> None:
    if not cgroups.can_freeze():
        pytest.skip("no freezer cgroup that this user may use")
    paused = await kept.pause()
    await kept.resume()
    snapshot = await kept.snapshot()
    children = await kept.fork(count=2)
    await children[0].files.write("who", "0")
    await children[1].kill()
    again = await AsyncSandbox.attach(kept.id)
    assert await again.pause() == paused
    await again.resume()
    assert await again.snapshot() == snapshot
    twins = await again.fork(count=2)
    assert [twin.id for twin in twins] == [child.id for child in children]
    await twins[0].files.write("who", "0")
    assert await twins[0].files.read("who") == "0" and twins[1].cause == "killed"
    for each in (*twins, *children, again):
        await each.close()
    await children[0].kill()
    from rorqual.sandbox.images import remove_image

    assert remove_image(snapshot.name)


# -- replay -------------------------------------------------------------------------------------------------


async def test_a_replay_does_everything_again_and_names_what_came_out_otherwise(kept: AsyncSandbox) -> None:
    await script(kept)
    async with await AsyncSandbox.create(memory_mb=128) as fresh:
        report = await kept.trajectory.replay(into=fresh)
        assert report.differences == () and list(report.skipped.values()) == [
            "set_timeout concerns the life of the old sandbox"
        ]
        assert await count(fresh, "ran") == 2
        with pytest.raises(InvalidRequest, match="fresh"):
            await fresh.trajectory.replay(into=fresh)
    await kept.commands.run("cat /proc/sys/kernel/random/uuid; exit 1")
    await kept.files.write("big", b"x" * ((1 << 20) + 1))
    async with await AsyncSandbox.create(memory_mb=128) as fresh:
        report = await kept.trajectory.replay(into=fresh)
        assert [(d.kind, d.what) for d in report.differences] == [("command", "stdout")]
        assert any("over what the log keeps" in why for why in report.skipped.values()) and not report.same


def test_the_synchronous_twin_attaches_and_replays(runtime: str) -> None:
    with Sandbox.create(memory_mb=128) as sb:
        first = sb.commands.run("echo x >> ran; cat ran")
        again = Sandbox.attach(sb.id)
        second = again.commands.run("echo x >> ran; cat ran")
        assert second.cached and second.stdout == first.stdout == "x\n" and again.files.read("ran") == "x\n"
        again.close()
        with Sandbox.create(memory_mb=128) as fresh:
            assert sb.trajectory.replay(into=fresh).same
    ended = Sandbox.attach(sb.id)
    assert ended.commands.run("echo x >> ran; cat ran").cached and ended.cause == "killed"
    assert json.dumps(ended.trajectory.list()[-1].result)
