# ruff: noqa: ASYNC240 -- the guest is this host
"""The guest's interface without our agent: by a shell, over qemu-guest-agent's protocol, over a serial line.

The shells are real and run on this host; tests/sandbox/test_fullvm.py does the same in machines. Hostile ends are
written here, since no honest guest behaves like that.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import json
import os
import pty
import shutil
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from rorqual.sandbox._guest import GuestClient, PtySize
from rorqual.sandbox.errors import (
    GuestFileError,
    GuestGone,
    GuestProtocolError,
    GuestRefused,
    Unsupported,
)
from rorqual.sandbox.machines.console import ConsoleGuest, Login
from rorqual.sandbox.machines.qga import QgaGuest
from rorqual.sandbox.machines.shell_guest import ShellGuest

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class HostShell(ShellGuest):
    """This host as the guest."""

    channel = "a shell of this host"
    chunk = 4096

    async def script(self, text: str, *, feed: bytes = b"", limit: int = 65536) -> tuple[int, bytes]:
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", text, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate(feed)
        assert len(out) <= limit
        return process.returncode or 0, out


@contextlib.asynccontextmanager
async def listening(path: Path, serve: Serve) -> AsyncIterator[None]:
    """`serve` at a Unix socket, its connections ended with it."""
    tasks: set[asyncio.Task[None]] = set()

    async def each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(each, str(path), limit=64 << 20)
    try:
        yield
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def serial_line(path: Path) -> AsyncIterator[None]:
    """A real shell on a real terminal behind a socket, as QEMU puts a serial line there."""
    primary, secondary = pty.openpty()
    mode = termios.tcgetattr(secondary)
    env = {"PATH": os.environ["PATH"], "PS1": "# ", "TERM": "vt220"}
    process = await asyncio.create_subprocess_exec(
        "setsid", "-c", "sh", "-i", stdin=secondary, stdout=secondary, stderr=secondary, env=env
    )
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    loop.add_reader(primary, lambda: queue.put_nowait(os.read(primary, 4096)))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        termios.tcsetattr(secondary, termios.TCSANOW, mode)  # a getty's reset between logins

        async def up() -> None:
            while data := await reader.read(16):
                os.write(primary, data)

        task = asyncio.create_task(up())
        try:
            while True:
                writer.write(await queue.get())
                await writer.drain()
        finally:
            task.cancel()

    try:
        queue.put_nowait(await queue.get())  # its first prompt: from here on ^C does not end it
        async with listening(path, serve):
            yield
    finally:
        loop.remove_reader(primary)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        os.close(primary)
        os.close(secondary)


async def qga_of_this_host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """qemu-guest-agent's protocol over a shell of this host. (The real one needs a virtio port: test_fullvm.py.)"""
    done: dict[int, dict[str, object]] = {}
    while line := await reader.readline():
        request = json.loads(line.lstrip(b"\xff"))
        name, arguments = request["execute"], request.get("arguments", {})
        answer: object = {}
        if name == "guest-sync-delimited":
            writer.write(b'{"return": 17}\n\xff')
            answer = arguments["id"]
        elif name == "guest-info":
            names = ("guest-exec", "guest-exec-status", "guest-file-open", "guest-file-read")
            answer = {
                "version": "0",
                "supported_commands": [{"name": item, "enabled": True} for item in names],
            }
        elif name == "guest-exec":
            process = await asyncio.create_subprocess_exec(
                arguments["path"],
                *arguments["arg"],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            out, _ = await process.communicate(base64.b64decode(arguments["input-data"]))
            done[process.pid] = {
                "exited": True, "exitcode": process.returncode, "out-data": base64.b64encode(out).decode()
            }  # fmt: skip
            answer = {"pid": process.pid}
        elif name == "guest-exec-status":
            answer = done.pop(arguments["pid"])
        writer.write(json.dumps({"return": answer}).encode() + b"\n")
        await writer.drain()


@pytest.fixture(params=["shell", "qga", "console"])
async def guest(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ShellGuest]:
    kind, path = request.param, tmp_path / "end.sock"
    async with contextlib.AsyncExitStack() as stack:
        if kind == "shell":
            made: ShellGuest = HostShell()
            await made.prepare()
        elif kind == "qga":
            await stack.enter_async_context(listening(path, qga_of_this_host))
            made = await QgaGuest.open(path, timeout=10)
        else:
            await stack.enter_async_context(serial_line(path))
            made = await ConsoleGuest.open(path, login=Login(), timeout=20)
        try:
            yield made
        finally:
            _, out = await made.script("cat " + made._base + "/*/pid")
            for pid in out.split():
                await made.kill(int(pid))
            await made.close()
            shutil.rmtree(made._base, ignore_errors=True)


async def run(guest: GuestClient, argv: list[str], **more: object) -> tuple[int, bytes, bytes]:
    process = await guest.start(argv, cwd="/", **more)  # type: ignore[arg-type]
    got = {"stdout": b"", "stderr": b""}
    async for stream, data in process.events():
        got[stream] += data
    return (await process.wait()).exit_code, got["stdout"], got["stderr"]


async def test_a_command_has_arguments_variables_both_streams_and_an_exit_code(guest: ShellGuest) -> None:
    code, out, err = await run(
        guest,
        ["sh", "-c", 'printf "%s|" "$0" "$@" "$X"; pwd; echo oops >&2; exit 3', "a b", "it's", "$(id)\n*"],
        env={"X": "é'\"\\ ;"},
    )
    assert (code, err) == (3, b"oops\n")
    assert out.decode() == "a b|it's|$(id)\n*|é'\"\\ ;|/\n"


async def test_bytes_of_every_value_come_through_and_too_many_are_cut(guest: ShellGuest) -> None:
    every = bytes(range(256)) * 40
    code, out, _ = await run(guest, ["cat"], stdin=False)
    assert (code, out) == (0, b"")
    process = await guest.start(
        ["sh", "-c", "cat; head -c 50000 /dev/zero"], cwd="/", stdin=True, max_output=20000
    )
    await process.send_stdin(every)
    await process.close_stdin()
    end = await process.wait()
    data = b"".join([part async for _, part in process.events()])
    assert data == every + bytes(20000 - len(every))
    assert (end.exit_code, end.truncated, end.stdout_bytes) == (0, True, 50000 + len(every))


async def test_a_deadline_kills_the_whole_group_and_keeps_what_was_printed(guest: ShellGuest) -> None:
    process = await guest.start(["sh", "-c", "echo begun; sleep 600 & sleep 600"], cwd="/", timeout=0.5)
    end = await process.wait()
    assert end.timed_out and end.exit_code == 137
    assert [part async for part in process.events()] == [("stdout", b"begun\n")]


async def test_commands_are_listed_attached_to_and_killed(guest: ShellGuest) -> None:
    process = await guest.start(["sh", "-c", "echo here; sleep 600"], cwd="/", tag="7")
    info = next(item for item in await guest.list() if item.pid == process.pid)
    assert (info.running, info.tag, info.argv[:2]) == (True, "7", ("sh", "-c"))
    again = await guest.attach(process.pid)
    assert await anext(again.events()) == ("stdout", b"here\n")
    assert await guest.kill(process.pid, signal=15)
    assert (await again.wait()).exit_code == (await process.wait()).exit_code == 143
    assert not await guest.kill(process.pid)
    assert not next(item for item in await guest.list() if item.pid == process.pid).running
    with pytest.raises(GuestRefused):
        await guest.attach(2**30)


async def test_what_cannot_be_started_says_why(guest: ShellGuest) -> None:
    assert (await run(guest, ["/no/such/program"]))[0] == 127
    process = await guest.start(["true"], cwd="/no/such/place")
    assert (await process.wait()).exit_code == 126
    code, _, err = await run(guest, ["true"], user="nobody-here")
    assert (code, err) == (126, b"no such user: nobody-here\n")
    with pytest.raises(Unsupported, match="agent"):
        await guest.start(["sh"], pty=PtySize())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_command_runs_as_the_user_it_is_given(guest: ShellGuest) -> None:
    assert (await run(guest, ["id", "-un"], user="nobody"))[1] == b"nobody\n"


async def test_files_are_written_read_and_moved(guest: ShellGuest, tmp_path: Path) -> None:
    place = str(tmp_path / "it's a\n place")
    data = os.urandom(20_000)
    await guest.write_file(f"{place}/sub/x", data, mode=0o640)
    assert (tmp_path / "it's a\n place/sub/x").read_bytes() == data
    assert await guest.read_file(f"{place}/sub/x") == data
    assert await guest.read_file(f"{place}/sub/x", offset=19_990, limit=5) == data[19_990:19_995]
    await guest.write_file(f"{place}/sub/x", b"more", append=True)
    assert (await guest.stat(f"{place}/sub/x")).size == 20_004
    await guest.write_file(f"{place}/sub/x", b"new")
    info = await guest.stat(f"{place}/sub/x")
    assert (info.type, info.size, info.mode) == ("file", 3, 0o640)  # an old file keeps its bits
    await guest.write_file(f"{place}/sub/-empty", b"")
    os.symlink("x", f"{place}/sub/link")
    listed = await guest.list_dir(f"{place}/sub")
    assert [(item.name, item.type, item.target) for item in listed] == [
        ("-empty", "file", None),
        ("link", "symlink", "x"),
        ("x", "file", None),
    ]
    await guest.rename(f"{place}/sub/x", f"{place}/y")
    await guest.remove(f"{place}/sub/link")
    assert await guest.exists(f"{place}/y") and not await guest.exists(f"{place}/sub/link")
    with pytest.raises(GuestFileError) as caught:
        await guest.remove(place)
    assert caught.value.errno == errno.ENOTEMPTY
    await guest.remove(place, recursive=True)
    assert not os.path.exists(place)
    assert await guest.make_dir(f"{place}/a/b") and not await guest.make_dir(f"{place}/a/b")
    assert await guest.list_dir(f"{place}/a/b") == []


async def test_a_file_call_fails_with_its_errno(guest: ShellGuest, tmp_path: Path) -> None:
    for call, number in (
        (guest.read_file("/no/such"), errno.ENOENT),
        (guest.read_file("/etc"), errno.EISDIR),
        (guest.list_dir("/etc/passwd"), errno.ENOTDIR),
        (guest.list_dir("/no/such"), errno.ENOENT),
        (guest.stat("/etc/passwd/x"), errno.ENOTDIR),
        (guest.write_file("/proc/nothing/x", b""), errno.ENOENT),
        (guest.write_file(str(tmp_path), b""), errno.EISDIR),
        (guest.rename("/no/such", "/tmp/x"), errno.ENOENT),
        (guest.remove("/no/such"), errno.ENOENT),
    ):
        with pytest.raises(GuestFileError) as caught:
            await call
        assert caught.value.errno == number
    with pytest.raises(GuestRefused):
        await guest.write_file(str(tmp_path / "x"), b"", user="nobody-here")
    assert not (tmp_path / "x").exists()


# --- hostile ends


def answers(*lines: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads((await reader.readline()).lstrip(b"\xff"))
        writer.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
        for line in lines:
            await reader.readline()
            writer.write(line)
            await writer.drain()
        await reader.read()

    return serve


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for _ in range(4096):
        writer.write(b"x" * 65536)
        await writer.drain()
    await reader.read()


async def stale(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for _ in range(100):
        writer.write(b'\xff{"return": 1}\n' * 4096)
        await writer.drain()
    await reader.read()


_INFO = json.dumps(
    {"return": {"supported_commands": [
        {"name": name, "enabled": True}
        for name in ("guest-exec", "guest-exec-status", "guest-file-open", "guest-file-read")
    ]}}
).encode() + b"\n"  # fmt: skip


@pytest.mark.parametrize(
    ("serve", "error"),
    [
        (flood, GuestProtocolError),
        (stale, GuestProtocolError),
        (answers(b"\xfe\x00 nonsense\n"), GuestProtocolError),
        (answers(b"[" * 100_000 + b"\n"), GuestProtocolError),
        (answers(b'{"return": {"supported_commands": 3}}\n'), GuestProtocolError),
        (answers(b'{"return": {"supported_commands": []}}\n'), Unsupported),
        (answers(b'{"error": {"class": "X", "desc": "no"}}\n'), GuestProtocolError),
        (answers(b"x" * (9 << 20)), GuestProtocolError),
        (answers(_INFO + b'{"return": []}\n'), GuestProtocolError),
        (answers(b"", b""), GuestGone),
    ],
    ids=[
        "flood",
        "stale",
        "nonsense",
        "nested",
        "shape",
        "nothing allowed",
        "error",
        "long",
        "ahead",
        "silent",
    ],
)
async def test_garbage_from_a_guest_agent_is_an_error_in_bounded_time_and_memory(
    tmp_path: Path, serve: Serve, error: type[Exception]
) -> None:
    path = tmp_path / "end.sock"
    async with listening(path, serve):
        with pytest.raises(error):
            await QgaGuest.open(path, timeout=0.5)


@pytest.mark.parametrize(
    "state",
    [
        {"exited": True, "exitcode": 0, "out-data": "!!!"},
        {"exited": True, "exitcode": 0, "out-data": 7},
        {"exited": True, "exitcode": 0, "out-data": "QUFB" * 100_000},
        {"exited": True, "exitcode": 0, "out-data": "", "out-truncated": True},
        [],
    ],
)
async def test_a_forged_answer_to_a_script_is_refused(tmp_path: Path, state: object) -> None:
    path = tmp_path / "end.sock"
    guest = QgaGuest(path)
    async with listening(
        path, answers(b'{"return": {"pid": 1}}\n', json.dumps({"return": state}).encode() + b"\n")
    ):
        with pytest.raises(GuestProtocolError):
            await guest.script("true", limit=1000)
    await guest.close()


async def test_a_line_that_echoes_all_we_type_is_no_shell(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data + b"\r\n# ")
            await writer.drain()

    path = tmp_path / "end.sock"
    guest = ConsoleGuest(path, Login())
    async with listening(path, serve):
        with pytest.raises(GuestGone, match="no answer"):
            async with guest._shell(6.0):
                pass
    await guest.close()


async def test_a_line_that_never_stops_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "end.sock"
    guest = ConsoleGuest(path, Login())
    async with listening(path, flood):
        with pytest.raises(GuestProtocolError, match="no answer"):
            await guest.script("true")
    await guest.close()


async def test_two_clients_of_a_line_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "end.sock"
    async with serial_line(path):
        first = await ConsoleGuest.open(path, login=Login(), timeout=20)
        second = await ConsoleGuest.open(path, login=Login(), timeout=20)
        try:
            for guest in (first, second, first):
                assert await guest.script("echo $((6*7)); exit 3") == (3, b"42\n")
        finally:
            await first.close()
            await second.close()
            shutil.rmtree(first._base, ignore_errors=True)


async def test_kernel_messages_between_the_lines_do_no_harm(tmp_path: Path) -> None:
    """A second process writes to the same terminal all the while."""
    path = tmp_path / "end.sock"
    async with serial_line(path):
        guest = await ConsoleGuest.open(path, login=Login(), timeout=20)
        await guest.script(
            "(while sleep 0.02; do echo '[ 1.0] eth0: link is up'; done) >/dev/tty 2>&1 & echo $! >/tmp/.noise"
        )
        try:
            code, out, _ = await run(guest, ["sh", "-c", "seq 3000"])
            assert code == 0 and out.decode().split() == [str(number) for number in range(1, 3001)]
        finally:
            await guest.script("kill $(cat /tmp/.noise); rm -f /tmp/.noise")
            await guest.close()
            shutil.rmtree(guest._base, ignore_errors=True)
