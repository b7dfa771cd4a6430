"""What every substrate promises. A later substrate joins by adding its name to SUBSTRATES_UNDER_TEST."""

# ruff: noqa: ASYNC110 -- tests wait for conditions of another process; their files are small

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rorqual.sandbox import (
    AsyncSandbox,
    CommandNotFound,
    GuestFileError,
    HostUnfit,
    InvalidRequest,
    Mount,
    PtySize,
    SandboxEnded,
    SandboxNotFound,
    Unsupported,
)
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.machines.kernel import find_kernel
from rorqual.sandbox.machines.qemu import Qemu
from rorqual.sandbox.substrates import substrate

SUBSTRATES_UNDER_TEST = ("container", "microvm")


@pytest.fixture(params=SUBSTRATES_UNDER_TEST)
def kind(request: pytest.FixtureRequest, runtime: str) -> str:
    name: str = request.param
    if name == "microvm":
        try:
            find_kernel()
            Qemu().program()
        except HostUnfit as error:
            pytest.skip(str(error))
    return name


_TEMPLATES: dict[str, str] = {}


async def create(kind: str, **fields: Any) -> AsyncSandbox:
    """A sandbox of this substrate; a machine goes on from the memory of one that was booted once for all tests."""
    if kind == "microvm" and "memory_mb" not in fields:
        if kind not in _TEMPLATES:
            async with await AsyncSandbox.create(substrate=kind) as first:
                await first.commands.run("python3 -c 'import json, ssl, sqlite3'")
                _TEMPLATES[kind] = (await first.snapshot()).name
        fields["image"] = _TEMPLATES[kind]
    return await AsyncSandbox.create(substrate=kind, **fields)


@pytest.fixture
async def sb(kind: str) -> AsyncIterator[AsyncSandbox]:
    async with await create(kind) as sandbox:
        yield sandbox


async def test_a_command_returns_both_streams_and_its_exit_code(sb: AsyncSandbox) -> None:
    result = await sb.commands.run("echo out; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7)
    assert not result.timed_out and not result.truncated and not result.ok


async def test_commands_run_as_the_user_in_its_home_with_its_variables(kind: str) -> None:
    async with await create(kind, envs={"A": "1", "B": "1"}) as sb:
        result = await sb.commands.run("id -u; pwd; echo $HOME $A $B", envs={"B": "2"})
        assert result.stdout == "1000\n/home/user\n/home/user 1 2\n"
        root = await sb.commands.run("id -u; echo $HOME", user="root", cwd="/tmp")
        assert root.stdout == "0\n/root\n"


async def test_the_working_directory_can_be_chosen_and_belongs_to_the_user(kind: str) -> None:
    async with await create(kind, workdir="/workspace/deep") as sb:
        await sb.files.write("a", "1")
        assert (await sb.commands.run("pwd; touch b; ls")).stdout == "/workspace/deep\na\nb\n"


async def test_python_runs_in_the_base_image(sb: AsyncSandbox) -> None:
    code = "import json, ssl, sqlite3; print(json.dumps({'x': 6 * 7}))"
    assert json.loads((await sb.commands.run(["python3", "-c", code])).stdout) == {"x": 42}


async def test_a_list_of_arguments_goes_through_no_shell(sb: AsyncSandbox) -> None:
    assert (await sb.commands.run(["echo", "$HOME; echo x"])).stdout == "$HOME; echo x\n"


async def test_a_program_that_is_not_there_is_a_result_not_an_exception(sb: AsyncSandbox) -> None:
    result = await sb.commands.run(["no-such-program"])
    assert result.exit_code == 127 and result.error


async def test_a_working_directory_that_is_not_there_is_a_result_that_says_so(sb: AsyncSandbox) -> None:
    result = await sb.commands.run("true", cwd="/no/such/place")
    assert result.exit_code != 0 and "/no/such/place" in result.error


async def test_stdin_reaches_the_command_and_ends(sb: AsyncSandbox) -> None:
    assert (await sb.commands.run("cat; echo end", stdin="a\nb\n")).stdout == "a\nb\nend\n"
    assert (await sb.commands.run("cat; echo end")).stdout == "end\n"


async def test_a_timeout_kills_the_whole_tree_and_keeps_what_was_printed(sb: AsyncSandbox) -> None:
    result = await sb.commands.run("echo begun; setsid sleep 987 & sleep 986", timeout=0.5)
    assert result.timed_out and result.stdout == "begun\n" and result.exit_code == 137
    assert result.duration < 20
    left = await sb.commands.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "sleep 98" not in left.stdout.replace("sleep 98' ", "").replace("tr ", "")


async def test_output_beyond_the_bound_is_dropped_and_counted(sb: AsyncSandbox) -> None:
    result = await sb.commands.run("head -c 50000000 /dev/zero | tr '\\0' x; echo e >&2", max_output=1000)
    assert result.truncated and result.stdout == "x" * 1000
    assert result.stdout_bytes == 50_000_000 and result.stderr == "e\n" and result.exit_code == 0


async def test_output_streams_while_the_command_runs_and_characters_stay_whole(sb: AsyncSandbox) -> None:
    pieces: list[str] = []
    first = asyncio.Event()

    async def collect(text: str) -> None:
        pieces.append(text)
        first.set()

    command = "printf 'gr\\303'; sleep 0.2; printf '\\274n\\n'; read x; echo $x"
    handle = await sb.commands.run(command, background=True, stdin=True, on_stdout=collect)
    await asyncio.wait_for(first.wait(), 10)
    assert (await sb.commands.list())[-1].running
    await handle.send_stdin("done\n")
    result = await handle.wait()
    assert "".join(pieces) == result.stdout == "grün\ndone\n"


async def test_a_command_is_listed_connected_to_and_killed_by_id(sb: AsyncSandbox) -> None:
    handle = await sb.commands.run("echo first; sleep 500", background=True, timeout=None)
    other = await sb.commands.connect(handle.id)
    assert other.seq == handle.seq
    while "first" not in other.stdout:
        await asyncio.sleep(0.01)
    info = next(info for info in await sb.commands.list() if info.id == handle.id)
    assert info.running and info.command == "echo first; sleep 500"
    assert await sb.commands.kill(handle.id)
    assert (await handle.wait()).exit_code == (await other.wait()).exit_code == 137
    assert not await sb.commands.kill(handle.id)


async def test_connecting_to_an_unknown_command_names_it(sb: AsyncSandbox) -> None:
    with pytest.raises(CommandNotFound, match="no command 4242"):
        await sb.commands.connect(4242)


async def test_cancelling_a_command_kills_it_and_logs_that(sb: AsyncSandbox) -> None:
    task = asyncio.create_task(sb.commands.run("sleep 300"))
    while not any(info.running for info in await sb.commands.list()):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(info.running for info in await sb.commands.list())
    assert (await sb.trajectory.list())[-1].result == {"abandoned": "CancelledError"}


async def test_a_failing_callback_ends_the_command_with_its_own_error(sb: AsyncSandbox) -> None:
    def explode(text: str) -> None:
        raise ZeroDivisionError(text)

    with pytest.raises(ZeroDivisionError):
        await sb.commands.run("echo x; sleep 300", on_stdout=explode)
    assert not any(info.running for info in await sb.commands.list())


async def test_many_commands_at_once_get_their_own_answers(sb: AsyncSandbox) -> None:
    results = await asyncio.gather(*[sb.commands.run(f"echo {n}") for n in range(24)])
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(24)]
    assert len({result.seq for result in results}) == 24


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cmd": ""}, "cmd"),
        ({"cmd": []}, "cmd"),
        ({"cmd": "a\0b"}, "NUL"),
        ({"cmd": "true", "timeout": 0}, "timeout"),
        ({"cmd": "true", "max_output": -1}, "max_output"),
    ],
)
async def test_a_wrong_argument_is_refused_before_anything_is_logged(
    sb: AsyncSandbox, fields: dict[str, object], says: str
) -> None:
    before = len(await sb.trajectory.list())
    with pytest.raises(InvalidRequest, match=says):
        await sb.commands.run(**fields)  # type: ignore[call-overload]
    assert len(await sb.trajectory.list()) == before


# -- files --------------------------------------------------------------------------------------------------


async def test_files_go_in_and_come_out_unchanged(sb: AsyncSandbox) -> None:
    data = bytes(range(256)) * 20_000
    entry = await sb.files.write("deep/er/data.bin", data, mode=0o640)
    assert (entry.size, entry.mode, entry.type, entry.uid) == (len(data), 0o640, "file", 1000)
    assert await sb.files.read("/home/user/deep/er/data.bin", format="bytes") == data
    digest = (await sb.commands.run("sha256sum deep/er/data.bin")).stdout.split()[0]
    assert digest == hashlib.sha256(data).hexdigest()


async def test_the_file_calls_agree_with_the_shell(sb: AsyncSandbox) -> None:
    await sb.files.write_files({"d/b.txt": "B", "d/a.txt": b"A"})
    await sb.files.write("d/a.txt", "+", append=True)
    assert [(entry.name, entry.size) for entry in await sb.files.list("d")] == [("a.txt", 2), ("b.txt", 1)]
    assert await sb.files.make_dir("d/new") and not await sb.files.make_dir("d/new")
    assert (await sb.files.rename("d/b.txt", "d/new/c.txt")).path == "/home/user/d/new/c.txt"
    assert await sb.files.exists("d/new/c.txt") and not await sb.files.exists("d/b.txt")
    await sb.commands.run("ln -s /etc/passwd d/link")
    link = await sb.files.get_info("d/link")
    assert (link.type, link.target) == ("symlink", "/etc/passwd")
    with pytest.raises(GuestFileError) as caught:
        await sb.files.remove("d")
    assert caught.value.errno == 39
    await sb.files.remove("d", recursive=True)
    assert (await sb.commands.run("ls -A; ls /etc/passwd")).stdout == "/etc/passwd\n"


async def test_a_missing_file_and_a_binary_one_are_named(sb: AsyncSandbox) -> None:
    with pytest.raises(GuestFileError, match="nothing-here") as caught:
        await sb.files.read("nothing-here")
    assert caught.value.errno == 2
    await sb.files.write("x", b"ok\xff")
    with pytest.raises(InvalidRequest, match="not UTF-8 at byte 2"):
        await sb.files.read("x")
    with pytest.raises(InvalidRequest, match="max_bytes=2"):
        await sb.files.read("x", format="bytes", max_bytes=2)


# -- terminal -----------------------------------------------------------------------------------------------


async def test_a_terminal_has_its_size_echoes_and_ends(sb: AsyncSandbox) -> None:
    seen = bytearray()
    pty = await sb.pty.create(size=PtySize(rows=31, cols=97), on_data=seen.extend)
    await pty.send_stdin("stty size; tty\n")
    async with asyncio.timeout(10):
        while b"31 97" not in seen or b"/dev/pts/" not in seen:
            await asyncio.sleep(0.01)
        await sb.pty.resize(pty.id, PtySize(rows=20, cols=50))
        await sb.pty.send_stdin(pty.id, "stty size\n")
        while b"20 50" not in seen:
            await asyncio.sleep(0.01)
    await pty.send_stdin("exit 3\n")
    assert await pty.wait() == 3


async def test_a_terminal_can_be_killed(sb: AsyncSandbox) -> None:
    pty = await sb.pty.create(cmd="sleep 500")
    assert await sb.pty.kill(pty.id)
    assert await pty.wait() == 137


# -- lifecycle ----------------------------------------------------------------------------------------------


async def test_the_lifetime_ends_it_with_cause_timeout_even_while_a_command_runs(kind: str) -> None:
    async with await create(kind, timeout=1.0) as sb:
        with pytest.raises(SandboxEnded) as caught:
            await sb.commands.run("sleep 300", timeout=None)
        assert caught.value.cause == sb.cause == "timeout"
        with pytest.raises(SandboxEnded, match="timeout"):
            await sb.commands.run("true")
        last = (await sb.trajectory.list())[-1]
        assert last.kind == "ended" and last.result is not None and last.result["cause"] == "timeout"


async def test_set_timeout_moves_the_end(kind: str) -> None:
    async with await create(kind, timeout=300) as sb:
        await sb.set_timeout(1000)
        assert abs((await sb.info()).expires - time.time() - 1000) < 30
        await sb.set_timeout(0.2)
        async with asyncio.timeout(10):
            while sb.cause is None:
                await asyncio.sleep(0.02)
        assert sb.cause == "timeout"


async def test_kill_is_idempotent_and_says_what_it_did(kind: str) -> None:
    sb = await create(kind)
    assert await sb.kill()
    assert not await sb.kill()
    assert sb.cause == "killed"
    with pytest.raises(SandboxEnded, match="killed"):
        await sb.files.read("x")


async def test_a_second_hold_sees_the_same_sandbox_and_does_not_end_it(sb: AsyncSandbox) -> None:
    await sb.files.write("mark", "1")
    handle = await sb.commands.run("sleep 100", background=True)
    async with await AsyncSandbox.connect(sb.id) as other:
        assert await other.files.read("mark") == "1"
        assert handle.id in [info.id for info in await other.commands.list()]
        seq = (await other.commands.run("true")).seq
    assert (await sb.commands.run("true")).seq == seq + 1
    assert sb.id in [info.id for info in await AsyncSandbox.list()]


async def test_every_hold_of_one_process_learns_the_cause_of_the_end(kind: str) -> None:
    sb = await create(kind)
    closed, other = await AsyncSandbox.connect(sb.id), await AsyncSandbox.connect(sb.id)
    waiting = asyncio.create_task(other.commands.run("sleep 300", timeout=None))
    while not any(info.running for info in await other.commands.list()):
        await asyncio.sleep(0.01)
    await closed.close()
    await sb.kill()
    with pytest.raises(SandboxEnded, match="killed"):
        await waiting
    assert other.cause == "killed"
    with pytest.raises(SandboxEnded, match="killed"):
        await other.files.read("x")
    await other.close()


async def test_connecting_to_a_dead_sandbox_tells_its_cause(kind: str) -> None:
    sb = await create(kind)
    await sb.kill()
    with pytest.raises(SandboxNotFound, match="killed"):
        await AsyncSandbox.connect(sb.id)
    with pytest.raises(SandboxNotFound):
        await AsyncSandbox.connect("sb-local-000000000000")
    with pytest.raises(InvalidRequest):
        await AsyncSandbox.connect("../escape")


async def test_info_says_what_holds_each_limit(kind: str) -> None:
    async with await create(kind, memory_mb=200, metadata={"job": "7"}) as sb:
        info = await sb.info()
        assert (info.id, info.substrate, info.memory_mb, info.network) == (sb.id, kind, 200, "offline")
        assert info.metadata == {"job": "7"}
        assert set(info.limits) == {"memory", "pids", "cpu", "disk"}
        assert "none" not in info.limits.values() or info.notes


async def test_every_step_is_in_the_trajectory_in_order_with_its_result(sb: AsyncSandbox) -> None:
    await sb.files.write("a", "x")
    result = await sb.commands.run("echo hi; exit 2")
    entries = await sb.trajectory.list()
    assert [entry.seq for entry in entries] == [1, 2, 3]
    assert [entry.kind for entry in entries] == ["created", "write", "command"]
    command = entries[-1]
    assert command.seq == result.seq and command.request["cmd"] == "echo hi; exit 2"
    assert command.result is not None and command.result["exit_code"] == 2 and command.stdout == b"hi\n"
    assert [entry.seq for entry in await sb.trajectory.list(after=2)] == [3]


async def test_what_a_substrate_cannot_do_is_refused_by_name(sb: AsyncSandbox, kind: str) -> None:
    missing = {"container": "memory_snapshot", "microvm": "mounts"}[kind]
    with pytest.raises(Unsupported, match=missing):
        await create(kind, require=["commands", missing])


async def test_without_a_freezer_nothing_that_needs_one_is_offered(
    sb: AsyncSandbox, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "container":
        pytest.skip("only its pause needs a freezer: tests/sandbox/test_microvm.py")
    monkeypatch.setattr(cgroups, "can_freeze", lambda: False)
    for call in (sb.pause, sb.resume, sb.snapshot, sb.fork, lambda: sb.commit("x")):
        with pytest.raises(Unsupported, match=r"freezer cgroup.*Available: .*commands"):
            await call()
    for name in ("pause", "disk_snapshot", "disk_fork", "commit"):
        with pytest.raises(Unsupported, match=name):
            await create(kind, require=[name])
    assert (await sb.commands.run("echo on")).stdout == "on\n"


@pytest.mark.skipif(not cgroups.can_freeze(), reason="no freezer cgroup that this user may use")
async def test_pause_snapshot_and_fork_can_be_required(kind: str) -> None:
    what = {"container": "disk", "microvm": "memory"}[kind]
    names = ["pause", f"{what}_snapshot", f"{what}_fork", "commit"]
    async with await create(kind, require=names) as sb:
        assert (await sb.commands.run("echo on")).stdout == "on\n"


async def test_mounts_show_host_files_and_only_writable_ones_change(kind: str, tmp_path: Path) -> None:
    host = tmp_path
    (host / "in").mkdir()
    (host / "out").mkdir()
    (host / "in" / "a").write_text("host")
    mounts = [
        Mount(source=str(host / "in"), target="/data"),
        Mount(source=str(host / "out"), target="/home/user/out", readonly=False),
    ]
    if "mounts" not in substrate(kind).capabilities():
        with pytest.raises(Unsupported, match="mounts"):
            await create(kind, mounts=mounts)
        return
    async with await create(kind, mounts=mounts) as sb:
        result = await sb.commands.run("cat /data/a; touch /data/b; echo new > out/c; stat -c %U out out/c")
        assert "host" in result.stdout and "user\nuser\n" in result.stdout
        assert "Read-only file system" in result.stderr
    assert (host / "out" / "c").read_text() == "new\n"
    assert (host / "out" / "c").stat().st_uid == host.stat().st_uid
    assert not (host / "in" / "b").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"substrate": "docker"}, "function, container, microvm, fullvm"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"memory_mb": 1}, "memory_mb"),
        ({"pids": True}, "pids"),
        ({"cpu": -1}, "cpu"),
        ({"workdir": "rel"}, "workdir"),
        ({"user": "../x"}, "user"),
        ({"envs": {"A B": "1"}}, "envs"),
        ({"mounts": {"/no/such": "/x"}}, "source"),
        ({"mounts": {"/etc": "/../x"}}, "target"),
        ({"mounts": {"/etc": "/proc/x"}}, "system directory"),
        ({"mounts": [{"from": "/etc"}]}, "source, target, readonly"),
    ],
)
async def test_a_wrong_request_starts_nothing(fields: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        await AsyncSandbox.create(**fields)  # type: ignore[arg-type]
