"""What an edge promises when something dies: the edge, a client, the connection, in the middle of anything."""

# ruff: noqa: ASYNC220 -- clients are processes that die; starting one takes no time

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import (
    AsyncSandbox,
    EdgeError,
    EdgeFull,
    EdgeLost,
    EdgeUnreachable,
    InvalidRequest,
    Sandbox,
    SandboxEnded,
    SandboxNotFound,
    Unsupported,
)
from rorqual.sandbox.state import StateDir
from tests.sandbox.edge_process import EdgeProcess


@pytest.fixture(scope="module")
def edge(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeProcess]:
    process = EdgeProcess("faults", tmp_path_factory.mktemp("edge"))
    process.start()
    yield process
    assert process.stop() == 0


@pytest.fixture
async def sb(edge: EdgeProcess) -> AsyncIterator[AsyncSandbox]:
    async with await AsyncSandbox.create(edge=edge.socket) as sandbox:
        yield sandbox


async def until(condition, *, seconds: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.02)


async def ids(edge: EdgeProcess) -> set[str]:
    return {info.id for info in await AsyncSandbox.list(edge=edge.socket)}


async def test_handles_of_commands_and_terminals_end_what_they_stand_for(sb: AsyncSandbox) -> None:
    command = await sb.commands.run(
        "trap 'echo told; exit 3' TERM; echo up; while :; do sleep 0.05; done", background=True
    )
    await until(lambda: command.stdout == "up\n")
    assert await command.kill(signal=15)
    assert (await command.wait()).exit_code == 3 and command.stdout == "up\ntold\n"
    assert not await command.kill()
    terminal = await sb.pty.create(cmd="sleep 1000")
    assert await terminal.kill()
    assert await terminal.wait() == 137
    assert not await terminal.kill()
    assert [entry.kind for entry in await sb.trajectory.list()].count("kill") >= 2


# -- kill -9 of the edge ------------------------------------------------------------------------------------


async def test_a_command_outlives_its_edge_and_the_waiting_client_gets_all_of_it(
    edge: EdgeProcess, sb: AsyncSandbox
) -> None:
    seen: list[str] = []
    code = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.05; done; printf '\\377'; exit 5"
    handle = await sb.commands.run(code, background=True, on_stdout=seen.append)
    foreground = asyncio.create_task(sb.commands.run("sleep 2.5; echo late"))
    await until(lambda: "line 3" in handle.stdout)
    edge.kill9()
    await asyncio.sleep(0.2)  # it prints while nobody listens
    edge.start()
    result = await handle.wait()
    assert result.exit_code == 5 and not result.truncated
    assert result.stdout == "".join(f"line {n}\n" for n in range(40)) + "\ufffd" == "".join(seen)
    assert (await foreground).stdout == "late\n"

    async def logged() -> bool:
        row = next(entry for entry in await sb.trajectory.list() if entry.seq == handle.seq)
        return row.result is not None and row.result["exit_code"] == 5 and row.stdout.startswith(b"line 0\n")

    await until(logged)
    assert sb.id in await ids(edge) and (await sb.commands.run("echo on")).stdout == "on\n"


async def test_an_upload_that_is_cut_by_the_edges_death_leaves_no_file(
    edge: EdgeProcess, sb: AsyncSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rorqual.sandbox import _remote

    def dying(data: bytes):  # type: ignore[no-untyped-def]
        for number, piece in enumerate(_remote_chunks(data)):
            if number == 4:
                edge.kill9()
                edge.start()
            yield piece

    _remote_chunks = _remote.chunks
    monkeypatch.setattr(_remote, "chunks", dying)
    with pytest.raises(EdgeLost, match=r"files\.write"):
        await sb.files.write("big", b"x" * 5_000_000)
    monkeypatch.undo()
    assert not await sb.files.exists("big")
    assert (await sb.commands.run("ls -A /home/user /tmp")).stdout.count("big") == 0
    assert (await sb.files.write("big", b"x" * 5_000_000)).size == 5_000_000


async def test_forks_that_were_never_handed_over_end_with_the_next_edge(
    edge: EdgeProcess, sb: AsyncSandbox
) -> None:
    before = await ids(edge)
    state = StateDir.from_environment()

    def launched() -> set[str]:
        return {
            p.name for p in state.sandboxes.glob(f"sb-{edge.name}-*") if (p / "init.pid").exists()
        } - before

    task = asyncio.create_task(sb.fork(count=6))
    await until(lambda: launched() or task.done())
    edge.kill9()
    orphans = launched()
    edge.start()
    with pytest.raises(EdgeLost, match="fork"):
        await task
    await until(lambda: not launched())
    assert await ids(edge) == before
    for orphan in orphans:
        with pytest.raises(SandboxNotFound, match=r"infra|killed"):
            await AsyncSandbox.connect(orphan, edge=edge.socket)
    async with (await sb.fork())[0] as child:
        assert (await child.commands.run("echo child")).stdout == "child\n"
        assert child.id.startswith(f"sb-{edge.name}-")


async def test_what_ended_while_no_edge_was_there_is_told_with_its_cause(edge: EdgeProcess) -> None:
    sb = await AsyncSandbox.create(edge=edge.socket, timeout=2.0)
    waiting = asyncio.create_task(sb.commands.run("sleep 60", timeout=None))
    await until(lambda: _running(sb))
    edge.kill9()
    await until(lambda: not (StateDir.from_environment().sandboxes / sb.id).exists())
    edge.start()
    with pytest.raises(SandboxEnded, match="timeout"):
        await waiting
    assert sb.cause == "timeout" and (await sb.trajectory.list())[-1].kind == "ended"
    await sb.close()
    with pytest.raises(SandboxNotFound, match="timeout"):
        await AsyncSandbox.connect(sb.id, edge=edge.socket)


async def _running(sb: AsyncSandbox) -> bool:
    return any(info.running for info in await sb.commands.list())


async def test_a_paused_sandbox_stays_paused_through_a_restart(edge: EdgeProcess, sb: AsyncSandbox) -> None:
    await sb.pause()
    edge.kill9()
    edge.start()
    assert next(info for info in await AsyncSandbox.list(edge=edge.socket) if info.id == sb.id).paused
    assert (await sb.commands.run("echo awake")).stdout == "awake\n"


# -- the client dies, or the net ----------------------------------------------------------------------------

CLIENT = """
import sys, time
from rorqual.sandbox import Sandbox
a = Sandbox.create(edge=sys.argv[1], lease=1.0)
b = Sandbox.create(edge=sys.argv[1], lease=1.0, keep=True)
c = a.fork()[0]
h = a.commands.run("sleep 300", background=True, timeout=None)
print(a.id, b.id, c.id, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
async def test_a_client_that_is_not_heard_loses_its_sandboxes_but_not_those_it_keeps(
    edge: EdgeProcess, number: signal.Signals, tmp_path: Path
) -> None:
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(CLIENT))
    client = subprocess.Popen([sys.executable, str(script), edge.socket], stdout=subprocess.PIPE)
    assert client.stdout is not None
    try:
        owned, kept, forked = client.stdout.readline().decode().split()
        before = time.monotonic()
        while time.monotonic() - before < 1.6:  # longer than the lease: the living are heard
            assert {owned, kept, forked} <= await ids(edge)
            await asyncio.sleep(0.1)
        client.send_signal(number)
        await until(lambda: _gone(edge, {owned, forked}))
        assert kept in await ids(edge)
        with pytest.raises(SandboxNotFound, match="killed"):
            await AsyncSandbox.connect(owned, edge=edge.socket)
        async with await AsyncSandbox.connect(kept, edge=edge.socket) as sb:
            assert await sb.kill()
    finally:
        client.kill()
        client.wait()
        client.stdout.close()


async def _gone(edge: EdgeProcess, names: set[str]) -> bool:
    return not names & await ids(edge)


async def test_a_cut_connection_is_dialled_anew_and_nothing_is_lost_or_said_twice(sb: AsyncSandbox) -> None:
    seen: list[str] = []
    code = "i=0; while [ $i -lt 30 ]; do echo $i; i=$((i+1)); sleep 0.03; done; read x; echo got $x"
    handle = await sb.commands.run(code, background=True, stdin=True, on_stdout=seen.append)
    for _ in range(3):
        await asyncio.sleep(0.2)
        sb._channel._socket.transport.abort()  # type: ignore[attr-defined]
    assert await _up(sb)
    await handle.send_stdin("it\n")
    result = await handle.wait()
    assert result.stdout == "".join(f"{n}\n" for n in range(30)) + "got it\n" == "".join(seen)


async def test_a_slow_client_holds_back_its_own_command_and_nobody_else(
    edge: EdgeProcess, sb: AsyncSandbox
) -> None:
    release = asyncio.Event()

    async def slow(text: str) -> None:
        await release.wait()

    flood = await sb.commands.run(
        "yes | head -c 300000000", background=True, on_stdout=slow, max_output=1 << 30
    )
    before = _resident(edge.pid)
    for _ in range(5):
        assert (await sb.commands.run("echo quick")).stdout == "quick\n"
    assert _resident(edge.pid) - before < 50 << 20
    assert await sb.commands.kill(flood.id)
    release.set()
    assert (await flood.wait()).exit_code == 137


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test_a_terminal_goes_on_after_a_cut(sb: AsyncSandbox) -> None:
    seen = bytearray()
    pty = await sb.pty.create(on_data=seen.extend)
    await pty.send_stdin("echo be''fore\n")
    await until(lambda: b"before" in seen)
    sb._channel._socket.transport.abort()  # type: ignore[attr-defined]
    assert await _up(sb)
    await pty.send_stdin("echo af''ter; exit 4\n")
    assert await pty.wait() == 4
    assert seen.count(b"before") == 1 and b"after" in seen


async def _up(sb: AsyncSandbox) -> bool:
    await until(lambda: sb._channel._socket is not None)  # type: ignore[attr-defined]
    await sb.info()
    return True


# -- orderly ends -------------------------------------------------------------------------------------------


async def test_a_stopped_edge_leaves_its_sandboxes_and_the_next_takes_them_up(
    edge: EdgeProcess, sb: AsyncSandbox
) -> None:
    handle = await sb.commands.run("sleep 1; echo through", background=True)
    assert await asyncio.to_thread(edge.stop) == 0  # our loop answers its goodbye meanwhile
    assert "lives on" in edge.log.read_text()
    edge.start()
    assert (await handle.wait()).stdout == "through\n"


async def test_end_on_stop_ends_them_with_a_cause(runtime: str, tmp_path: Path) -> None:
    other = EdgeProcess("brief", tmp_path, options=["--end-on-stop"])
    other.start()
    sb = await AsyncSandbox.create(edge=other.socket)
    assert await asyncio.to_thread(other.stop) == 0
    await sb.close()
    assert not (StateDir.from_environment().sandboxes / sb.id).exists()
    with pytest.raises(SandboxNotFound, match="killed"):
        await AsyncSandbox.connect(sb.id, edge="local")


def test_a_second_edge_of_the_name_is_refused(edge: EdgeProcess, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="runs here already"):
        EdgeProcess(edge.name, tmp_path).start()


async def test_without_an_edge_the_error_names_the_address_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(EdgeUnreachable, match=r"unix:/no/such.*rorqual edge"):
        await AsyncSandbox.create(edge="unix:/no/such")
    for address in ("ftp://x", "unix:relative", "http://", "http://h:0", "nonsense"):
        with pytest.raises(InvalidRequest, match="edge"):
            await AsyncSandbox.list(edge=address)


# -- admission ----------------------------------------------------------------------------------------------


async def test_a_full_edge_refuses_with_numbers(runtime: str, tmp_path: Path) -> None:
    small = EdgeProcess("small", tmp_path, options=["--max-sandboxes", "2", "--max-memory-mb", "700"])
    small.start()
    try:
        async with await AsyncSandbox.create(edge=small.socket, memory_mb=300) as sb:
            with pytest.raises(
                EdgeFull, match=r"'small' is full: 300 MiB.*500 were asked for, of 700"
            ) as caught:
                await AsyncSandbox.create(edge=small.socket, memory_mb=500)
            assert (caught.value.used, caught.value.asked, caught.value.limit) == (300, 500, 700)
            assert 1 <= caught.value.retry_after <= 60
            with pytest.raises(EdgeFull, match="1 sandboxes are in use and 2 were asked for, of 2"):
                await sb.fork(count=2)
            async with (await sb.fork())[0]:
                with pytest.raises(EdgeFull):
                    await AsyncSandbox.create(edge=small.socket, memory_mb=50)
        async with await AsyncSandbox.create(edge=small.socket, memory_mb=600):  # the room is free again
            pass
    finally:
        assert small.stop() == 0


# -- what an edge does not do -------------------------------------------------------------------------------


async def test_what_belongs_to_the_edge_is_refused_by_name(edge: EdgeProcess, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="the edge keeps the log"):
        await AsyncSandbox.create(edge=edge.socket, trajectory=tmp_path / "log.db")
    with pytest.raises(InvalidRequest, match="lease"):
        await AsyncSandbox.create(edge=edge.socket, lease=0.01)
    with pytest.raises(InvalidRequest, match="metadata"):
        await AsyncSandbox.create(edge=edge.socket, metadata={"a": object()})  # type: ignore[dict-item]


def test_the_synchronous_sdk_goes_through_an_edge_too(edge: EdgeProcess) -> None:
    with Sandbox.create(edge=edge.socket) as sb:
        assert sb.commands.run("cat", stdin="x" * 1_000_000).stdout_bytes == 1_000_000
        sb.files.write("f", "text")
        assert sb.files.read("f") == "text"
        handle = sb.commands.run("read x; echo $x", background=True, stdin=True)
        handle.send_stdin("hello\n")
        assert handle.wait().stdout == "hello\n"
        assert sb.id in [info.id for info in Sandbox.list(edge=edge.socket)]
    assert sb.cause == "killed"


async def test_a_server_that_is_no_edge_is_named(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(EdgeError, match="is it an edge"):
            await AsyncSandbox.list(edge=f"http://127.0.0.1:{port}")


# -- a restarted client -------------------------------------------------------------------------------------


async def test_a_restarted_client_is_answered_from_the_edges_log_and_nothing_runs_twice(
    edge: EdgeProcess,
) -> None:
    first = await AsyncSandbox.create(edge=edge.socket, lease=30)
    ran = await first.commands.run("echo $RANDOM $$ >> log; cat log")
    await first.files.write("f", "text")
    running = await first.commands.run("sleep 1; echo done", background=True)
    await first.close()  # as a client that died: nothing of its own is left
    again = await AsyncSandbox.attach(first.id, edge=edge.socket)
    cached = await again.commands.run("echo $RANDOM $$ >> log; cat log")
    assert cached.cached and (cached.stdout, cached.seq) == (ran.stdout, ran.seq)
    await again.files.write("f", "text")
    taken = await again.commands.run("sleep 1; echo done", background=True)
    assert taken.id == running.id and (await taken.wait()).stdout == "done\n"
    left = await again.commands.run("sleep 1; echo left", background=True)
    await again.close()  # a hold that goes while its command runs: the edge follows it to the end

    async def logged() -> bool:
        rows = await AsyncSandbox.logged(first.id, edge=edge.socket)
        return next(row for row in rows if row.seq == left.seq).stdout == b"left\n"

    await until(logged)
    again = await AsyncSandbox.connect(first.id, edge=edge.socket)
    assert (await again.commands.run("wc -l < log")).stdout == "1\n"
    with pytest.raises(Unsupported, match="through an edge"):
        _ = again.ports
    assert await again.kill()


async def test_a_trajectory_is_replayed_into_another_sandbox_of_the_edge(
    edge: EdgeProcess, sb: AsyncSandbox
) -> None:
    await sb.files.write("f", "1")
    await sb.commands.run("echo 2 >> f")
    async with await AsyncSandbox.create(edge=edge.socket) as fresh:
        await sb.trajectory.replay(into=fresh)
        assert await fresh.files.read("f") == "12\n"
        with pytest.raises(InvalidRequest, match="into"):
            await sb.trajectory.replay(into=sb)


async def test_a_function_of_an_edge_is_called_as_one_of_this_process(edge: EdgeProcess) -> None:
    def double(x: int) -> int:
        return 2 * x

    async with await AsyncSandbox.function(edge=edge.socket, workers=1) as fn:
        assert fn.id.startswith(f"sb-{edge.name}-")
        assert (await fn("args[0] + 1", 41)).value == 42
        assert (await fn(double, 21)).value == 42
        failed = await fn("1/0")
        assert failed.error is not None and failed.error.type == "ZeroDivisionError"
        assert (await fn("import sys; sys.stdin.read()", stdin=b"fed")).value == "fed"
        assert (await fn("while True: pass", timeout=0.3)).timed_out
        assert [entry.kind for entry in await fn.trajectory()][:2] == ["created", "command"]
        with pytest.raises(InvalidRequest, match="args"):
            await fn("1", object())
        name = fn.id
    with pytest.raises(InvalidRequest, match="closed"):
        await fn("1")
    await until(lambda: not (StateDir.from_environment().sandboxes / name).exists())
    with pytest.raises(InvalidRequest, match="workers"):
        await AsyncSandbox.function(edge=edge.socket, workers=0)


async def test_a_function_ends_with_its_edge(edge: EdgeProcess) -> None:
    fn = await AsyncSandbox.function(edge=edge.socket, workers=1)
    name = fn.id
    edge.kill9()
    with pytest.raises(EdgeError):
        await fn("1")
    await fn.close()
    edge.start()
    await until(lambda: not (StateDir.from_environment().sandboxes / name).exists())
