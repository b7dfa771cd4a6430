"""gVisor as the runtime: tests of the contract run again on it, and what is its own."""

# ruff: noqa: ASYNC110 -- tests wait for conditions of other processes

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from rorqual.sandbox import AsyncSandbox, HostUnfit, Unsupported, host
from rorqual.sandbox._async import sandbox as sdk
from rorqual.sandbox.images import remove_image
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.substrates import gvisor
from rorqual.sandbox.substrates.container import memory_limit
from tests.sandbox import test_contract as contract

pytestmark = pytest.mark.skipif(
    host.find_program("runsc") is None or os.geteuid() != 0 or not cgroups.can_freeze(),
    reason="runsc is not installed, or this is not root with cgroups",
)


@pytest.fixture
def kind(runtime: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The container substrate, whose runtime is runsc unless a test names one."""
    real = sdk._spec

    def spec(arguments: dict[str, object]) -> SandboxSpec:
        made = real(arguments)
        return replace(made, runtime=made.runtime or "runsc")

    monkeypatch.setattr(sdk, "_spec", spec)
    return "container"


@pytest.fixture
async def sb(kind: str) -> AsyncIterator[AsyncSandbox]:
    async with await AsyncSandbox.create(substrate=kind) as sandbox:
        yield sandbox


# Each of these starts a sandbox of its own, 0.2 s and more under load: what differs from crun by nature comes first.
test_streams = contract.test_a_command_returns_both_streams_and_its_exit_code
test_user = contract.test_commands_run_as_the_user_in_its_home_with_its_variables
test_stdin = contract.test_stdin_reaches_the_command_and_ends
test_bound = contract.test_output_beyond_the_bound_is_dropped_and_counted
test_by_id = contract.test_a_command_is_listed_connected_to_and_killed_by_id
test_cancel = contract.test_cancelling_a_command_kills_it_and_logs_that
test_many = contract.test_many_commands_at_once_get_their_own_answers
test_files = contract.test_files_go_in_and_come_out_unchanged
test_terminal = contract.test_a_terminal_has_its_size_echoes_and_ends
test_terminal_kill = contract.test_a_terminal_can_be_killed
test_lifetime = contract.test_the_lifetime_ends_it_with_cause_timeout_even_while_a_command_runs
test_second_hold = contract.test_a_second_hold_sees_the_same_sandbox_and_does_not_end_it


async def test_its_kernel_is_not_the_hosts(sb: AsyncSandbox) -> None:
    info = await sb.info()
    assert info.runtime == "runsc" and any("gVisor" in note for note in info.notes)
    assert info.limits["memory"] == "cgroup" and info.limits["pids"] == "none"
    assert memory_limit(f"/rorqual-{sb.id}") == 512 << 20
    assert "Starting gVisor" in (await sb.commands.run("dmesg", user="root")).stdout
    assert (await sb.commands.run("uname -r")).stdout.strip() != os.uname().release


async def test_only_root_inside_comes_near_the_agent(sb: AsyncSandbox) -> None:
    code = "import socket; socket.socket(socket.AF_UNIX).connect('/.rorqual/run/guest.sock')"
    refused = await sb.commands.run(["python3", "-c", code])
    assert refused.exit_code == 1 and "PermissionError" in refused.stderr


async def test_clients_come_and_go_and_leave_no_process_on_the_host(sb: AsyncSandbox) -> None:
    def relays() -> int:
        found = 0
        for place in Path("/proc").iterdir():
            if place.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (place / "cmdline").read_bytes().split(b"\0")
                    found += sb.id.encode() in words and b"exec" in words
        return found

    assert relays() == 1
    others = await asyncio.gather(*[AsyncSandbox.connect(sb.id) for _ in range(4)])
    results = await asyncio.gather(*[other.commands.run(f"echo {n}") for n, other in enumerate(others)])
    assert [result.stdout for result in results] == ["0\n", "1\n", "2\n", "3\n"] and relays() == 5
    for other in others:
        await other.close()
    async with asyncio.timeout(20):
        while relays() > 1:
            await asyncio.sleep(0.02)


async def test_pause_snapshot_fork_and_ports_are_those_of_a_container(sb: AsyncSandbox) -> None:
    await sb.files.write("a", "written")
    await sb.commands.run("echo appended >> a; python3 -m http.server 8000 >/dev/null 2>&1 & sleep 0.1")
    await sb.pause()
    assert (await sb.info()).paused and await sb.files.read("a") == "writtenappended\n"
    snapshot = await sb.snapshot()
    async with await AsyncSandbox.create(image=snapshot) as later:
        assert await later.files.read("a") == "writtenappended\n"
    (twin,) = await sb.fork()
    async with twin:
        assert (await twin.info()).runtime == "runsc" and await twin.files.read("a") == "writtenappended\n"
    async with asyncio.timeout(20):
        while True:
            try:
                stream = await sb.ports.connect(8000)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
    await stream.write(b"GET /a HTTP/1.0\r\n\r\n")
    answer = b""
    while piece := await stream.read():
        answer += piece
    assert answer.endswith(b"writtenappended\n")
    await stream.close()
    assert (await sb.metrics()).cpu_seconds > 0
    assert remove_image(snapshot.name)


async def test_what_it_cannot_do_is_refused(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="offline"):
        await AsyncSandbox.create(runtime="runsc", network="open")
    with pytest.raises(Unsupported, match="memory_snapshot"):
        await AsyncSandbox.create(runtime="runsc", require=["memory_snapshot"])
    rootless = replace(host.plan(), rootless=True)
    with pytest.raises(Unsupported, match="root and cgroups"):
        gvisor.plan(SandboxSpec(runtime="runsc"), rootless)
    monkeypatch.setattr(host, "find_program", lambda name: None)
    with pytest.raises(HostUnfit, match="apt-get install runsc"):
        gvisor.plan(SandboxSpec(runtime="runsc"), replace(rootless, rootless=False))
