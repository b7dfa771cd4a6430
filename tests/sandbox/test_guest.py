# ruff: noqa: ASYNC110, ASYNC220, ASYNC221, ASYNC230, ASYNC240 - tests wait for conditions and look at local files
"""The guest agent, for real: built from native/guest, run on a Unix socket, driven by GuestClient."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual.sandbox import _protocol as wire
from rorqual.sandbox._guest import GuestClient, GuestExit, GuestProcess, PtySize
from rorqual.sandbox._protocol import Type
from rorqual.sandbox.errors import GuestFileError, GuestGone, GuestProtocolError, GuestRefused

SOURCE = Path(__file__).parents[2] / "native" / "guest"
ROOT = os.geteuid() == 0


def build(into: Path, target: str) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or shutil.which("make") is None:
        pytest.skip("the guest agent is built from C: apt-get install make gcc libc6-dev")
    out = into / f"rorqual-guest-{target}"
    made = subprocess.run(
        ["make", "-s", "-C", str(SOURCE), target, f"CC={compiler}", f"OUT={out}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if target == "asan" and made.returncode and "asan" in made.stderr:
        pytest.skip(f"this compiler has no address sanitizer: {made.stderr.strip().splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    return out


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RORQUAL_GUEST_TARGET=asan runs every test of this file against the sanitizer build."""
    return build(tmp_path_factory.mktemp("guest"), os.environ.get("RORQUAL_GUEST_TARGET", "all"))


class Agent:
    """One running agent and its socket."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self.path = folder / "agent.sock"
        env = os.environ | {
            "ASAN_OPTIONS": "detect_leaks=0"
        }  # the leak checker needs ptrace, which the agent refuses
        self.process = subprocess.Popen(
            [binary, "--socket", self.path, "--boot-env", "FROM_BOOT=yes"], env=env, stderr=subprocess.PIPE
        )

    def rss_kib(self) -> int:
        if os.environ.get("RORQUAL_GUEST_TARGET") == "asan":
            pytest.skip("the address sanitizer holds freed memory back: sizes say nothing")
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0])

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> None:
        self.process.terminate()
        _, complaints = self.process.communicate(timeout=20)
        assert self.process.returncode == 0 and not complaints, complaints.decode()


@pytest.fixture
def agent(binary: Path, tmp_path: Path) -> Iterator[Agent]:
    running = Agent(binary, tmp_path)
    try:
        yield running
    finally:
        running.stop()


@pytest_asyncio.fixture
async def client(agent: Agent) -> AsyncIterator[GuestClient]:
    async with await GuestClient.connect(agent.path) as connected:
        yield connected


async def finish(process: GuestProcess) -> tuple[bytes, bytes, GuestExit]:
    out = {"stdout": b"", "stderr": b""}
    async for name, data in process.events():
        out[name] += data
    return out["stdout"], out["stderr"], await process.wait()


async def sh(client: GuestClient, script: str, **options: object) -> tuple[bytes, bytes, GuestExit]:
    return await finish(await client.start(["/bin/sh", "-c", script], **options))  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# --- commands ---


async def test_a_command_returns_its_output_and_status(client: GuestClient) -> None:
    out, err, end = await sh(client, "echo out; echo err >&2; exit 3")
    assert (out, err, end.exit_code, end.signal) == (b"out\n", b"err\n", 3, 0)
    assert (end.stdout_bytes, end.stderr_bytes, end.truncated, end.timed_out) == (4, 4, False, False)
    assert 0 < end.duration < 60


async def test_the_handshake_says_who_answers(client: GuestClient, agent: Agent) -> None:
    assert client.info.pid == agent.process.pid and client.info.protocol == 1
    async with await GuestClient.connect(agent.path) as second:
        assert second.info == client.info


async def test_arguments_arrive_byte_for_byte(client: GuestClient) -> None:
    given = ["a b", "", "'\"$x", "\n", "ü", os.fsdecode(b"\xff\xfe"), "-n"]
    out, _, _ = await finish(await client.start(["printf", "%s\\0", *given]))
    assert out.split(b"\0")[:-1] == [os.fsencode(a) for a in given]


async def test_environment_is_laid_over_the_agents(client: GuestClient) -> None:
    out, _, _ = await sh(client, 'echo "$FROM_BOOT,$X,$PATH"', env={"X": "1=2", "PATH": "/bin:/usr/bin"})
    assert out == b"yes,1=2,/bin:/usr/bin\n"


@pytest.mark.parametrize(
    ("argv", "options", "code", "says"),
    [
        (["no-such-program"], {}, 127, "'no-such-program' was not found in PATH"),
        (["/no/such/program"], {}, 127, "cannot run '/no/such/program': No such file"),
        (["/etc/passwd"], {}, 126, "cannot run '/etc/passwd': Permission denied"),
        (["/etc"], {}, 126, "cannot run '/etc': Permission denied"),
        (
            ["true"],
            {"cwd": "/no/such/dir"},
            126,
            "cannot enter working directory '/no/such/dir': No such file",
        ),
        (["true"], {"cwd": "/etc/passwd"}, 126, "Not a directory"),
        (["true"], {"user": "nobody-like-that"}, 126, "user 'nobody-like-that' is not in /etc/passwd"),
        (["true"], {"cwd": "/nowhere", "pty": PtySize()}, 126, "cannot enter working directory"),
        (["sh", "x" * 140_000], {}, 126, "Argument list too long"),
    ],
)
async def test_what_cannot_start_is_a_result_with_a_reason(
    client: GuestClient, argv: list[str], options: dict[str, object], code: int, says: str
) -> None:
    out, err, end = await finish(await client.start(argv, **options))  # type: ignore[arg-type]
    assert end.exit_code == code and says in end.error
    assert says.encode() in err + out


async def test_a_huge_argv_is_refused_and_the_connection_lives_on(client: GuestClient) -> None:
    with pytest.raises(GuestRefused, match="do not fit into one frame"):
        await client.start(["sh", "-c", "x" * 1_000_000])
    assert (await sh(client, "echo on"))[0] == b"on\n"


async def test_a_script_without_interpreter_line_runs_as_in_a_shell(
    client: GuestClient, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("echo $1\n")
    script.chmod(0o755)
    out, _, end = await finish(await client.start(["script", "hello"], env={"PATH": f"{tmp_path}:/bin"}))
    assert (out, end.exit_code) == (b"hello\n", 0)


async def test_a_shell_that_kills_itself_is_a_result(client: GuestClient) -> None:
    out, _, end = await sh(client, "echo before; kill -KILL $$; echo after")
    assert (out, end.exit_code, end.signal, end.timed_out) == (b"before\n", 137, 9, False)


async def test_a_command_that_closes_its_output_still_ends(client: GuestClient) -> None:
    out, _, end = await sh(client, "echo x; exec >&- 2>&-; sleep 0.2; exit 5")
    assert (out, end.exit_code) == (b"x\n", 5)


async def test_background_children_that_hold_the_pipes_do_not_hold_the_result(client: GuestClient) -> None:
    out, _, end = await sh(client, "sleep 1000 & echo $!")
    assert end.exit_code == 0
    assert alive(int(out)), "the background child must live on"


async def test_background_children_can_go_on_writing(client: GuestClient, tmp_path: Path) -> None:
    script = f"(sleep 0.3; echo late; echo done > {tmp_path}/mark) & echo early"
    out, _, _ = await sh(client, script)
    assert out == b"early\n"
    await until((tmp_path / "mark").exists)


async def test_background_children_that_chatter_for_ever_do_not_hold_the_result(client: GuestClient) -> None:
    process = await client.start(["sh", "-c", "while :; do echo noise; sleep 0.02; done & echo done"])
    async with asyncio.timeout(20):
        out, _, end = await finish(process)
    assert end.exit_code == 0 and b"done\n" in out
    assert await client.kill(process.pid)


async def test_stdin_is_empty_unless_asked_for(client: GuestClient) -> None:
    assert (await finish(await client.start(["cat"])))[0] == b""


async def test_stdin_goes_through_whatever_its_size(client: GuestClient) -> None:
    process = await client.start(["cat"], stdin=True)
    data = os.urandom(1_500_000)

    async def feed() -> None:
        await process.send_stdin(data)
        await process.close_stdin()

    feeding = asyncio.create_task(feed())
    out, _, end = await finish(process)
    await feeding
    assert out == data and end.exit_code == 0
    await process.close_stdin()


async def test_stdin_of_a_command_that_reads_no_more_says_so(client: GuestClient) -> None:
    process = await client.start(["sh", "-c", "exec <&-; echo closed; sleep 1000"], stdin=True)
    assert await anext(aiter(process.events())) == ("stdout", b"closed\n")
    with pytest.raises(GuestRefused) as caught:
        await process.send_stdin(b"x" * 10)
    assert caught.value.errno == errno.EPIPE
    await process.kill()
    await process.wait()
    with pytest.raises(GuestRefused):
        await process.send_stdin(b"x")


async def test_two_writers_of_one_stdin_do_not_mix(client: GuestClient, agent: Agent) -> None:
    process = await client.start(["sleep", "1000"], stdin=True)
    await process.send_stdin(b"x" * 65_536)  # a pipe holds that much
    stuck = asyncio.create_task(process.send_stdin(b"x" * 1000))
    await asyncio.sleep(0)
    await client.list()  # answered after the write was seen
    async with await GuestClient.connect(agent.path) as other:
        same = await other.attach(process.pid)
        with pytest.raises(GuestRefused) as caught:
            await same.send_stdin(b"y")
        assert caught.value.errno == errno.EBUSY
    await process.kill()
    with pytest.raises(GuestRefused, match="does not read"):
        await stuck


async def test_wait_alone_keeps_the_output_for_later(client: GuestClient) -> None:
    process = await client.start(["head", "-c", "3000000", "/dev/zero"])
    assert (await process.wait()).exit_code == 0
    out, _, _ = await finish(process)
    assert len(out) == 3_000_000


# --- bounds ---


async def test_endless_output_costs_constant_memory_on_both_sides(client: GuestClient, agent: Agent) -> None:
    await sh(client, "head -c 2000000 /dev/zero")
    before = agent.rss_kib()
    process = await client.start(["sh", "-c", "yes | head -c 400000000; echo end >&2"], max_output=2 << 20)
    seen, peak = 0, 0
    async for name, data in process.events():
        if name == "stdout":
            seen += len(data)
            peak = max(peak, agent.rss_kib())
    end = await process.wait()
    assert (seen, end.stdout_bytes, end.stderr_bytes) == (2 << 20, 400_000_000, 4)
    assert end.truncated and end.exit_code == 0
    assert max(peak, agent.rss_kib()) - before < 6 * 1024


async def test_output_within_the_limit_is_whole_and_in_order(client: GuestClient) -> None:
    out, _, end = await sh(client, "seq 1 300000")
    assert out == b"".join(b"%d\n" % i for i in range(1, 300_001)) and not end.truncated


async def test_max_output_zero_keeps_nothing_and_counts_all(client: GuestClient) -> None:
    out, err, end = await sh(client, "echo abc; echo de >&2", max_output=0)
    assert (out, err, end.stdout_bytes, end.stderr_bytes, end.truncated) == (b"", b"", 4, 3, True)


async def test_a_client_that_does_not_read_holds_the_command_back(client: GuestClient, agent: Agent) -> None:
    process = await client.start(["sh", "-c", "head -c 8000000 /dev/zero; echo >&2"])
    before = agent.rss_kib()
    first = await anext(aiter(process.events()))
    for _ in range(20):  # other work goes on meanwhile
        assert (await sh(client, "echo x"))[0] == b"x\n"
    [held] = [p for p in await client.list() if p.pid == process.pid]
    assert held.running and agent.rss_kib() - before < 4 * 1024
    out, _, end = await finish(process)
    assert len(out) + len(first[1]) == 8_000_000 and not end.truncated


@pytest.mark.slow
async def test_thousands_of_quick_commands_leak_nothing(client: GuestClient, agent: Agent) -> None:
    async def one() -> None:
        process = await client.start(["/bin/echo", "hello"])
        assert (await finish(process))[0] == b"hello\n"

    for _ in range(30):
        await asyncio.gather(*(one() for _ in range(20)))
    fds, rss = agent.fds(), agent.rss_kib()
    for _ in range(70):
        await asyncio.gather(*(one() for _ in range(20)))
    await until(lambda: agent.fds() == fds)
    assert agent.rss_kib() - rss < 1024
    assert len(await client.list()) == 256
    assert not client._calls and not client._streams


@pytest.mark.slow
async def test_too_many_commands_are_refused_and_room_comes_back(client: GuestClient) -> None:
    running = [await client.start(["sleep", "1000"]) for _ in range(512)]
    with pytest.raises(GuestRefused, match="512 commands are running"):
        await client.start(["true"])
    for process in running:
        await client.kill(process.pid, signal=signal.SIGTERM)
    for process in running:
        assert (await process.wait()).signal == signal.SIGTERM
    assert (await sh(client, "echo on"))[0] == b"on\n"


# --- death ---


async def test_a_timeout_keeps_what_was_printed(client: GuestClient) -> None:
    out, _, end = await sh(client, "echo partial; sleep 1000", timeout=0.2)
    assert (out, end.timed_out, end.signal, end.exit_code) == (b"partial\n", True, 9, 137)


ESCAPES = {
    "background": "sleep 1000 & echo $!",
    "setsid": "setsid sleep 1000 & echo $!",
    "nohup": "nohup setsid sh -c 'echo $$; exec sleep 1000' 2>/dev/null &",
    "orphan": "setsid sh -c 'sleep 1000 & echo $!' &",
    "no environment": "env -i setsid sh -c 'sleep 1000 & echo $!' &",
    "ignores signals": "trap '' TERM HUP INT; setsid sleep 1000 & echo $!",
}


@pytest.mark.parametrize("script", ESCAPES.values(), ids=ESCAPES.keys())
async def test_no_descendant_survives_a_timeout(client: GuestClient, script: str) -> None:
    bystander = await client.start(["sleep", "1000"])
    out, _, end = await sh(client, f"{script}\nsleep 1000", timeout=0.4)
    assert end.timed_out
    pid = int(out)
    await until(lambda: not alive(pid))
    assert alive(bystander.pid), "another command must not be touched"
    await bystander.kill()


async def test_kill_reaches_what_outlived_the_command(client: GuestClient) -> None:
    process = await client.start(["sh", "-c", "env -i setsid sleep 1000 & echo $!"])
    out, _, _ = await finish(process)
    child = int(out)
    assert alive(child)
    assert await client.kill(process.pid)
    await until(lambda: not alive(child))
    assert not await client.kill(process.pid)


async def test_a_kill_right_after_the_start_says_that_it_hit(client: GuestClient) -> None:
    for _ in range(100):  # before the group was counted, two in five of these were answered with false
        process = await client.start(["sleep", "1000"])
        assert await client.kill(process.pid)
        assert (await process.wait()).signal == 9


async def test_a_fork_storm_is_put_down(client: GuestClient) -> None:
    storm = (
        "spawn() { while :; do setsid sh -c 'sleep 1000' & sleep 0.01; done; }; spawn & spawn & spawn; wait"
    )
    out, _, end = await sh(client, f"echo $RORQUAL_CMD; {storm}", timeout=0.6)
    assert end.timed_out
    mark = b"RORQUAL_CMD=" + out.strip()

    def members() -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes() and alive(int(entry.name)):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    await until(lambda: not members())


async def test_a_signal_reaches_the_whole_group(client: GuestClient) -> None:
    process = await client.start(
        [
            "sh",
            "-c",
            "exec 2>/dev/null; trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.05; done",
        ]
    )
    events = process.events()
    assert await anext(events) == ("stdout", b"ready\n")
    assert await process.kill(signal.SIGTERM)
    assert await anext(events) == ("stdout", b"caught\n")
    assert (await process.wait()).exit_code == 7
    assert not await process.kill(signal.SIGTERM)


async def test_unknown_commands_are_said_to_be_unknown(client: GuestClient) -> None:
    assert not await client.kill(2**30)
    with pytest.raises(GuestRefused, match="no such command"):
        await client.attach(2**30)


async def test_stopping_the_agent_leaves_no_process(binary: Path, tmp_path: Path) -> None:
    agent = Agent(binary, tmp_path)
    async with await GuestClient.connect(agent.path) as client:
        out, _, _ = await sh(client, "env -i setsid sleep 1000 & echo $!")
        running = await client.start(["sleep", "1000"])
        agent.stop()
        with pytest.raises(GuestGone):
            await running.wait()
        with pytest.raises(GuestGone):
            await client.list()
    await until(lambda: not alive(int(out)) and not alive(running.pid))


async def test_as_pid_1_it_reaps_and_heeds_only_the_host(binary: Path, tmp_path: Path) -> None:
    unshare = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host does not let us make a PID namespace (needs root)")
    process = subprocess.Popen([*unshare, binary, "--socket", tmp_path / "s"])
    try:
        async with await GuestClient.connect(tmp_path / "s") as client:
            assert client.info.pid == 1
            await sh(
                client,
                "kill -TERM 1; kill -KILL 1; kill -STOP 1; (exit 0 & exit 0) & (setsid sh -c 'exit 3' &)",
            )
            escaped = "env -i setsid sh -c 'sleep 1000 &'; sleep 1000"
            assert (await sh(client, escaped, timeout=0.3))[2].timed_out
            processes = "cat /proc/[0-9]*/stat | grep -v -e '(cat)' -e '(grep)' -e '(sh)' -e '(rorqual-guest'"
            async with asyncio.timeout(20):
                while (left := (await sh(client, processes))[0]) != b"":
                    await asyncio.sleep(0.02)
            assert not left
            await client.start(["sleep", "1000"])
            [agent_pid] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(agent_pid), signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


# --- reattach ---


async def test_a_client_can_die_and_another_finds_the_output_intact(agent: Agent, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = (
        f"seq 1 50000; echo half; while [ ! -e {go} ]; do sleep 0.02; done; echo rest; echo err >&2; exit 4"
    )
    first = await GuestClient.connect(agent.path)
    process = await first.start(["sh", "-c", script], tag="job")
    await anext(aiter(process.events()))
    assert first._connection is not None and first._connection.transport is not None
    first._connection.transport.abort()  # as if the client's process had died
    with pytest.raises(GuestGone):
        await process.wait()
    await first.close()
    async with await GuestClient.connect(agent.path) as second:
        [listed] = await second.list()
        assert (listed.pid, listed.tag, listed.running, listed.argv[:2]) == (
            process.pid,
            "job",
            True,
            ("sh", "-c"),
        )
        again = await second.attach(process.pid)
        go.touch()
        out, err, end = await finish(again)
        whole = b"".join(b"%d\n" % i for i in range(1, 50_001)) + b"half\nrest\n"
        assert (out, err, end.exit_code, end.truncated) == (whole, b"err\n", 4, False)
        out, err, end = await finish(await second.attach(process.pid))
        assert (out, err, end.exit_code) == (whole, b"err\n", 4), "an ended command can be attached too"


async def test_a_command_runs_on_unattached_and_keeps_the_last_mebibyte(
    client: GuestClient, tmp_path: Path
) -> None:
    process = await client.start(["sh", "-c", f"seq 1 1000000; touch {tmp_path}/done"])
    await process.detach()
    await until((tmp_path / "done").exists)
    out, _, end = await finish(await client.attach(process.pid))
    whole = b"".join(b"%d\n" % i for i in range(1, 1_000_001))
    assert out == whole[-(1 << 20) :] and end.truncated and end.stdout_bytes == len(whole)


async def test_two_clients_see_the_same_output(client: GuestClient, agent: Agent) -> None:
    process = await client.start(["sh", "-c", "seq 1 100000; sleep 0.2; echo end"])
    async with await GuestClient.connect(agent.path) as other:
        twin = await other.attach(process.pid)
        a, b = await asyncio.gather(finish(process), finish(twin))
    assert a == b and a[0].endswith(b"end\n")


async def test_a_cancelled_start_leaves_no_command_behind(client: GuestClient) -> None:
    for _ in range(20):
        starting = asyncio.create_task(client.start(["sleep", "1000"]))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    async with asyncio.timeout(20):
        while any(p.running for p in await client.list()) or client._streams:
            await asyncio.sleep(0.01)


async def test_two_events_iterators_share_and_wait_runs_beside_them(client: GuestClient) -> None:
    process = await client.start(["sh", "-c", "seq 1 20000"])
    (out, _, end), waited = await asyncio.gather(finish(process), process.wait())
    assert end is waited and len(out) == end.stdout_bytes


# --- terminals ---


async def read_until(process: GuestProcess, mark: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(20):
        async for _, data in process.events():
            seen += data
            if mark in seen:
                return seen
    raise AssertionError(f"{mark!r} never came: {seen!r}")


async def test_a_terminal_echoes_resizes_and_ends_at_control_d(client: GuestClient) -> None:
    process = await client.start(["sh"], pty=PtySize(rows=31, cols=97), env={"PS1": "$ "})
    await read_until(process, b"$ ")
    await process.send_stdin(b"stty size; tty\n")
    seen = await read_until(process, b"/dev/pts/")
    assert b"stty size" in seen and b"31 97" in seen, "echo and size"
    await process.resize(PtySize(rows=50, cols=132))
    await process.send_stdin(b"stty size\n")
    await read_until(process, b"50 132")
    await process.send_stdin(b"sleep 1000\n")
    await read_until(process, b"sleep 1000\r\n")
    await process.send_stdin(b"\x03")
    await process.send_stdin(b"echo inter''rupted\n")
    await read_until(process, b"interrupted\r\n")
    await process.close_stdin()
    end = await process.wait()
    assert end.signal == 0 and not end.timed_out


async def test_resize_needs_a_terminal(client: GuestClient) -> None:
    process = await client.start(["sleep", "1000"])
    with pytest.raises(GuestRefused, match="no terminal"):
        await process.resize(PtySize())
    with pytest.raises(ValueError, match="rows"):
        await process.resize(PtySize(rows=0))
    await process.kill()


async def test_a_timeout_ends_a_terminal_command(client: GuestClient) -> None:
    process = await client.start(["sh", "-c", "echo hi; sleep 1000"], pty=PtySize(), timeout=0.3)
    out, _, end = await finish(process)
    assert out == b"hi\r\n" and end.timed_out


# --- users ---


@pytest.mark.skipif(not ROOT, reason="switching users needs root")
@pytest.mark.parametrize("user", ["nobody", 65534])
async def test_a_command_runs_as_the_user_asked_for(client: GuestClient, user: str | int) -> None:
    out, _, _ = await sh(client, "id -u; id -un; echo $USER; grep CapEff /proc/self/status", user=user)
    lines = out.decode().split("\n")
    assert lines[:3] == ["65534", "nobody", "nobody"] and lines[3].split()[1] == "0" * 16


@pytest.mark.skipif(not ROOT, reason="switching users needs root")
async def test_a_uid_without_a_name_works_too(client: GuestClient) -> None:
    out, _, _ = await sh(client, "id -u; id -g; id -G; echo $HOME", user=4242)
    assert out == b"4242\n4242\n4242\n/\n"


@pytest.mark.skipif(not ROOT, reason="switching users needs root")
async def test_files_can_be_given_to_a_user(client: GuestClient, tmp_path: Path) -> None:
    await client.write_file(f"{tmp_path}/a/b", b"x", user="nobody")
    assert {(tmp_path / "a").stat().st_uid, (tmp_path / "a/b").stat().st_uid} == {65534}
    await client.write_file(f"{tmp_path}/a/b", b"y")
    assert (tmp_path / "a/b").stat().st_uid == 65534, "a replaced file keeps its owner"
    with pytest.raises(GuestRefused, match="not in /etc/passwd"):
        await client.write_file(f"{tmp_path}/c", b"", user="nobody-like-that")


async def test_the_agent_cannot_be_traced_by_its_commands(client: GuestClient) -> None:
    out, _, _ = await sh(client, "cat /proc/$PPID/status | grep -c Name; ls -l /proc/$PPID/exe", user=None)
    assert out.startswith(b"1\n")  # its parent is the agent, visible and no more
    if ROOT:
        _, err, _ = await sh(client, "cat /proc/$PPID/environ", user="nobody")
        assert b"Permission denied" in err


async def test_commands_get_only_their_three_descriptors(client: GuestClient) -> None:
    out, _, _ = await sh(client, "ls /proc/self/fd")
    assert out.split() == [b"0", b"1", b"2", b"3"]  # 3 is ls's own


# --- files ---


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 1_000_003])
async def test_files_go_in_and_out_whole(client: GuestClient, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = f"{tmp_path}/new/dir/file"
    await client.write_file(path, data)
    assert Path(path).read_bytes() == data == await client.read_file(path)
    assert os.listdir(f"{tmp_path}/new/dir") == ["file"], "no temporary is left"


async def test_reads_of_a_part(client: GuestClient, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 1000)
    whole = path.read_bytes()
    for offset, limit in [(0, 0), (0, 10), (100_000, 100_000), (255_999, None), (256_000, None), (10**9, 5)]:
        want = whole[offset:] if limit is None else whole[offset : offset + limit]
        assert await client.read_file(str(path), offset=offset, limit=limit) == want


async def test_kernel_files_of_size_zero_are_read(client: GuestClient) -> None:
    assert b"MemTotal" in await client.read_file("/proc/meminfo")


async def test_modes_appends_and_parents(client: GuestClient, tmp_path: Path) -> None:
    path = tmp_path / "script"
    await client.write_file(str(path), b"one", mode=0o755)
    assert path.stat().st_mode & 0o7777 == 0o755
    await client.write_file(str(path), b"two")
    assert path.stat().st_mode & 0o7777 == 0o755, "an overwritten file keeps its bits"
    await client.write_file(str(path), b" three", append=True)
    assert path.read_bytes() == b"two three"
    await client.write_file(f"{tmp_path}/log", b"x", append=True)
    assert (tmp_path / "log").stat().st_mode & 0o7777 == 0o644
    with pytest.raises(GuestFileError) as caught:
        await client.write_file(f"{tmp_path}/no/parent", b"", make_parents=False)
    assert (caught.value.errno, caught.value.path) == (errno.ENOENT, f"{tmp_path}/no/parent")


async def test_writing_through_a_link_changes_its_target_only(client: GuestClient, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    await client.write_file(f"{tmp_path}/link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


async def test_a_reader_sees_the_old_or_the_new_file_never_a_half(
    client: GuestClient, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    await client.write_file(str(path), b"a" * 300_000)
    writing = asyncio.create_task(client.write_file(str(path), b"b" * 5_000_000))
    while not writing.done():
        assert set(path.read_bytes()) in ({ord("a")}, {ord("b")})
        await asyncio.sleep(0)
    await writing


async def test_a_write_cut_short_leaves_the_old_file_and_nothing_else(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "files" / "f"
    path.parent.mkdir()
    path.write_text("old")
    client = await GuestClient.connect(agent.path)
    ask = (wire.u8(2 | 4), wire.u32(0), wire.user(None), wire.path(str(path)), b"half")
    await client._file(Type.WRITE_OPEN, str(path), *ask, read=wire.read_handle)
    assert len(os.listdir(path.parent)) == 2
    await client.close()
    await until(lambda: os.listdir(path.parent) == ["f"])
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("what", "code"),
    [("missing", errno.ENOENT), ("dir", errno.EISDIR), ("fifo", errno.EINVAL), ("loop", errno.ELOOP)],
)
async def test_what_is_no_file_is_refused_and_blocks_nothing(
    client: GuestClient, tmp_path: Path, what: str, code: int
) -> None:
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(GuestFileError) as caught:
        await client.read_file(f"{tmp_path}/{what}")
    assert (caught.value.errno, caught.value.path) == (code, f"{tmp_path}/{what}")
    if what != "missing":
        with pytest.raises(GuestFileError) as caught:
            await client.write_file(f"{tmp_path}/{what}", b"x")
        assert caught.value.errno == code


async def test_a_sparse_giant_does_not_eat_the_hosts_memory(client: GuestClient, tmp_path: Path) -> None:
    with open(tmp_path / "giant", "wb") as file:
        file.truncate(1 << 40)
    assert (await client.stat(f"{tmp_path}/giant")).size == 1 << 40
    assert await client.read_file(f"{tmp_path}/giant", offset=1 << 39, limit=3) == b"\0\0\0"


async def test_stat_and_listing_tell_what_is_there(client: GuestClient, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("abc")
    (tmp_path / "l").symlink_to("nowhere")
    os.mkfifo(tmp_path / "p")
    weird = os.fsdecode(b"caf\xe9 \xff\n")
    (tmp_path / weird).write_text("x")
    found = {info.name: info for info in await client.list_dir(str(tmp_path))}
    assert {n: i.type for n, i in found.items()} | {"agent.sock": "other"} == {
        "d": "dir", "f": "file", "l": "symlink", "p": "other", weird: "file", "agent.sock": "other",
    }  # fmt: skip
    assert found["l"].target == "nowhere" and found["f"].size == 3
    assert found[weird].path == f"{tmp_path}/{weird}"
    assert await client.read_file(found[weird].path) == b"x"
    real = (tmp_path / "f").stat()
    stat = await client.stat(f"{tmp_path}/f")
    assert (stat.mode, stat.uid, stat.gid) == (real.st_mode & 0o7777, real.st_uid, real.st_gid)
    assert abs(stat.mtime - real.st_mtime) < 1e-3
    assert (await client.stat("/")).name == "/"


async def test_large_directories_come_in_pages(client: GuestClient, tmp_path: Path) -> None:
    for i in range(5000):
        (tmp_path / f"file-with-a-fairly-long-name-{i:06}").touch()
    names = [i.name for i in await client.list_dir(str(tmp_path)) if i.name.startswith("file")]
    assert names == sorted(names) and len(names) == 5000


async def test_make_rename_remove(client: GuestClient, tmp_path: Path) -> None:
    assert await client.make_dir(f"{tmp_path}/a/b/c/")
    assert not await client.make_dir(f"{tmp_path}/a/b/c")
    with pytest.raises(GuestFileError) as caught:
        await client.make_dir(f"{tmp_path}/a", parents=False)
    assert caught.value.errno == errno.EEXIST
    await client.rename(f"{tmp_path}/a/b", f"{tmp_path}/moved")
    assert await client.exists(f"{tmp_path}/moved/c") and not await client.exists(f"{tmp_path}/a/b")
    assert not await client.exists("/etc/passwd/x")
    with pytest.raises(GuestFileError) as caught:
        await client.remove(f"{tmp_path}/moved")
    assert caught.value.errno == errno.ENOTEMPTY
    await client.remove(f"{tmp_path}/moved", recursive=True)
    await client.remove(f"{tmp_path}/a")
    with pytest.raises(GuestFileError) as caught:
        await client.remove(f"{tmp_path}/a")
    assert caught.value.errno == errno.ENOENT


async def test_a_recursive_remove_never_follows_a_link(client: GuestClient, tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "precious").write_text("x")
    tree = tmp_path / "tree" / "deep" / "deeper"
    tree.mkdir(parents=True)
    (tree / "out").symlink_to(keep)
    (tmp_path / "tree" / "abs").symlink_to(str(keep))
    for i in range(100):
        (tree / str(i)).touch()
    await client.remove(f"{tmp_path}/tree", recursive=True)
    assert not (tmp_path / "tree").exists() and (keep / "precious").exists()
    (tmp_path / "link").symlink_to(keep)
    await client.remove(f"{tmp_path}/link", recursive=True)
    assert (keep / "precious").exists()


async def test_relative_paths_are_refused_before_they_are_sent(client: GuestClient) -> None:
    with pytest.raises(ValueError, match="not absolute"):
        await client.read_file("etc/passwd")


# --- a guest that lies, a client that lies ---


async def test_a_guest_that_breaks_the_protocol_is_hung_up_on(tmp_path: Path) -> None:
    async def forge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes) -> None:
        await reader.read(1000)
        welcome = wire.u32(wire.MAGIC) + wire.u16(1) + wire.u32(1) + bytes(16) + wire.string("forged", "")
        writer.write(wire.frame(Type.WELCOME, 1, welcome))
        await reader.read(1000)
        writer.write(answer)
        await reader.read()
        writer.close()

    started = wire.frame(Type.STARTED, 2, wire.u32(5), b"\0", wire.u64(10))
    lies = {
        "garbage": b"\xff" * 64,
        "an answer nobody asked for": wire.frame(Type.RESULT, 77),
        "the wrong kind of answer": wire.frame(Type.RESULT, 2),
        "a truncated record": wire.frame(Type.STARTED, 2, b"\1"),
        "output before the start": wire.frame(Type.DATA, 9, b"\0x"),
        "a third stream": started + wire.frame(Type.DATA, 2, b"\2x"),
        "output over max_output": started + wire.frame(Type.DATA, 2, b"\0" + b"x" * 11),
        "no data": started + wire.frame(Type.DATA, 2, b"\0"),
        "an impossible exit": started + wire.frame(Type.EXIT, 2, bytes([255]) * 40),
    }
    for name, answer in lies.items():
        path = tmp_path / "forged"
        server = await asyncio.start_unix_server(lambda r, w, a=answer: forge(r, w, a), path)
        async with server, await GuestClient.connect(path) as client:
            with pytest.raises(GuestProtocolError):
                async with asyncio.timeout(20):
                    await (await client.start(["true"], max_output=10)).wait()
                raise AssertionError(name)
            with pytest.raises(GuestProtocolError):
                await client.list()


async def test_output_beyond_the_credit_is_refused(tmp_path: Path) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        welcome = wire.u32(wire.MAGIC) + wire.u16(1) + wire.u32(1) + bytes(16) + wire.string("forged", "")
        writer.write(wire.frame(Type.WELCOME, 1, welcome))
        await reader.read(1000)
        writer.write(wire.frame(Type.STARTED, 2, wire.u32(5), b"\0", wire.u64(10 << 20)))
        for _ in range(20):
            writer.write(wire.frame(Type.DATA, 2, b"\0" + bytes(60_000)))
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(flood, tmp_path / "forged")
    async with server, await GuestClient.connect(tmp_path / "forged") as client:
        process = await client.start(["true"])
        await until(lambda: client._error is not None)
        with pytest.raises(GuestProtocolError, match="credit"):
            await finish(process)


async def test_nobody_at_the_socket_is_said_in_time(tmp_path: Path) -> None:
    with pytest.raises(GuestGone, match="No such file"):
        await GuestClient.connect(tmp_path / "nothing", timeout=0.1)
    silent = socket.socket(socket.AF_UNIX)
    with silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        with pytest.raises(GuestGone, match="no answer to HELLO"):
            await GuestClient.connect(tmp_path / "silent", timeout=0.1)


async def test_a_path_too_long_for_a_socket_address_works(binary: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    handle = os.open(folder, os.O_PATH)
    listener.bind(f"/proc/self/fd/{handle}/sock")
    os.close(handle)
    listener.listen()
    fd = listener.fileno()
    process = subprocess.Popen([binary, "--listen-fd", str(fd)], pass_fds=[fd])
    listener.close()
    try:
        async with await GuestClient.connect(folder / "sock") as client:
            assert (await sh(client, "echo hi"))[0] == b"hi\n"
            assert (await sh(client, "ls /proc/self/fd"))[0].split() == [b"0", b"1", b"2", b"3"]
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_wrong_use_of_the_agent_is_one_line(binary: Path) -> None:
    for arguments in ([], ["--nonsense"], ["--listen-fd", "3", "--socket", "x"], ["--boot-env", "NOVALUE"]):
        done = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    done = subprocess.run(
        [binary, "--listen-fd", "0"], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=20
    )
    assert done.returncode == 1 and b"not a listening socket" in done.stderr


HELLO = wire.hello(1)
KINDS = [*(t for t in Type if t < 0x80), 0x00, 0x7F, 0x81, 0xFF]


class Raw:
    """A client that says whatever it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        deadline = time.monotonic() + 20
        while self.socket.connect_ex(str(path)) and time.monotonic() < deadline:
            time.sleep(0.01)

    def say(self, data: bytes) -> bytes:
        """Everything the agent answers until it, or we, hang up."""
        with self.socket:
            got = b""
            try:
                self.socket.sendall(data)
                self.socket.shutdown(socket.SHUT_WR)
                while part := self.socket.recv(1 << 16):
                    got += part
            except (BrokenPipeError, ConnectionResetError):
                pass
            return got


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("asan")
    running = Agent(build(folder, "asan"), folder)
    try:
        yield running
    finally:
        running.stop()


def junk_frame(kind: int, ident: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "little") + bytes([kind, 0, 0, 0]) + ident.to_bytes(4, "little") + payload


field = st.one_of(
    st.binary(max_size=40),
    st.integers(0, 2**32 - 1).map(lambda v: v.to_bytes(4, "little")),
    st.sampled_from([bytes(8), b"\1\0\0\0/", b"\4\0\0\0/tmp", b"\xff" * 8, b"\0\0\0\x80", b"\2\0\0\0/\0"]),
)
junk = st.builds(
    junk_frame, st.sampled_from(KINDS), st.integers(0, 3), st.lists(field, max_size=8).map(b"".join)
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.lists(junk, min_size=1, max_size=6), st.binary(max_size=30))
def test_forged_frames_do_not_crash_the_agent(
    sanitized: Agent, greet: bool, forged: list[bytes], tail: bytes
) -> None:
    Raw(sanitized.path).say((HELLO if greet else b"") + b"".join(forged) + tail)
    assert sanitized.process.poll() is None
    assert Raw(sanitized.path).say(HELLO)[4] == Type.WELCOME


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"payload over 256 KiB"),
        (junk_frame(Type.LIST, 1, bytes(8)), b"not a HELLO"),
        (junk_frame(Type.HELLO, 1, bytes(8)), b"not a HELLO"),
        (junk_frame(Type.HELLO, 1, wire.u32(wire.MAGIC) + b"\2\0\3\0"), b"no common version"),
        (HELLO + junk_frame(0x66, 1, b""), b"unknown frame type"),
        (HELLO + junk_frame(Type.LIST, 0, bytes(8)), b"id 0 is reserved"),
        (HELLO + junk_frame(Type.START, 1, b"\0" * 50), b"malformed START"),
        (HELLO + junk_frame(Type.STAT, 1, b"\3\0\0\0etc"), b"paths are absolute"),
        (HELLO + junk_frame(Type.READ_NEXT, 1, b"\1\0\0\0"), b"a handle that is not open"),
        (HELLO + b"\1\0\0\0\x12\1\0\0\1\0\0\0x", b"reserved header bytes"),
    ],
)  # fmt: skip
def test_a_client_that_breaks_the_protocol_is_told_why(agent: Agent, said: bytes, answer: bytes) -> None:
    assert answer in Raw(agent.path).say(said)
    assert Raw(agent.path).say(HELLO)[4] == Type.WELCOME


def test_a_frame_in_single_bytes_is_still_a_frame(agent: Agent) -> None:
    raw = Raw(agent.path)
    with raw.socket as connection:
        for byte in HELLO:
            connection.sendall(bytes([byte]))
        assert connection.recv(1000)[4] == Type.WELCOME


async def test_connections_come_and_go_without_a_trace(client: GuestClient, agent: Agent) -> None:
    before = agent.fds()
    for _ in range(200):
        raw = Raw(agent.path)
        with contextlib.suppress(
            BrokenPipeError
        ):  # a busy agent may not have seen 32 of the others close yet
            raw.socket.sendall(HELLO[:7])
        raw.socket.close()
    extra = [
        Raw(agent.path) for _ in range(40)
    ]  # over the limit of 32: the surplus is hung up on, not queued
    for raw in extra:
        raw.socket.close()
    await until(lambda: agent.fds() == before)
    assert (await sh(client, "echo on"))[0] == b"on\n"


async def test_a_client_that_never_reads_is_bounded(client: GuestClient, agent: Agent) -> None:
    before = agent.rss_kib()
    raw = Raw(agent.path)
    raw.socket.setblocking(False)
    ask = HELLO + b"".join(
        wire.frame(Type.READ_OPEN, i, wire.u64(0), wire.u64(60_000), wire.path(sys.executable))
        for i in range(2, 3000)
    )
    sent = 0
    try:
        while sent < len(ask):
            sent += raw.socket.send(ask[sent:])
    except BlockingIOError:
        pass
    assert (await sh(client, "echo on"))[0] == b"on\n"
    assert agent.rss_kib() - before < 4 * 1024
    raw.socket.close()
