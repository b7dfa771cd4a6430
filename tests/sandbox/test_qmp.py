"""The monitor against a real QEMU (a machine without a CPU), and against something that only claims to be one."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rorqual.sandbox.machines.qmp import MonitorError, monitor

QEMU = shutil.which("qemu-system-x86_64")


@pytest.fixture
async def qmp_socket(tmp_path: Path) -> AsyncIterator[Path]:
    if QEMU is None:
        pytest.skip("apt-get install qemu-system-x86")
    path = tmp_path / "qmp.sock"
    arguments = ["-M", "none", "-nodefaults", "-nographic", "-qmp", f"unix:{path},server=on,wait=off"]
    process = await asyncio.create_subprocess_exec(QEMU, *arguments)
    yield path
    process.kill()
    await process.wait()


async def test_commands_answer_and_a_refused_one_says_why(qmp_socket: Path) -> None:
    async with monitor(qmp_socket) as qmp:
        assert (await qmp.execute("query-status"))["status"] in ("running", "prelaunch")
        with pytest.raises(MonitorError, match="no-such-command") as caught:
            await qmp.execute("no-such-command")
        assert caught.value.kind == "CommandNotFound"
        with (qmp_socket.parent / "x").open("w") as file:
            await qmp.send_fd("x", file.fileno())


async def test_the_second_client_waits_for_the_first(qmp_socket: Path) -> None:
    order: list[str] = []

    async def second() -> None:
        async with monitor(qmp_socket) as qmp:
            await qmp.execute("query-version")
            order.append("second")

    async with monitor(qmp_socket):
        task = asyncio.create_task(second())
        with pytest.raises(MonitorError, match="another client"):
            async with monitor(qmp_socket, deadline=0.1):
                pass
        order.append("first")
    await task
    assert order == ["first", "second"]


async def test_nobody_there_is_an_error_after_the_deadline(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(MonitorError, match=r"qmp\.sock"):
        async with monitor(tmp_path / "qmp.sock", deadline=0.1):
            pass
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("answer", [b"", b"not json\n", b"{}\n", b'{"QMP": {}}\n{"return": []}\n' * 3])
async def test_what_is_no_qemu_is_refused(tmp_path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "qmp.sock"):
        with pytest.raises(MonitorError):
            async with monitor(tmp_path / "qmp.sock", deadline=5) as qmp:
                await qmp.execute("query-status")
