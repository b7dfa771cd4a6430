"""Limits as a program inside meets them: memory, processes, CPU, disk, output, and commands that misbehave."""

# ruff: noqa: ASYNC110 -- tests wait for other processes

from __future__ import annotations

import asyncio
import shutil
import time

import pytest

from rorqual.sandbox import AsyncSandbox, HostUnfit, SandboxEnded, Unsupported
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates.container import memory_limit


async def test_a_memory_bomb_is_killed_and_the_sandbox_goes_on(runtime: str) -> None:
    async with await AsyncSandbox.create(memory_mb=64) as sb:
        result = await sb.commands.run(["python3", "-c", "x = bytearray(1 << 30)\nprint(len(x))"])
        assert result.exit_code != 0 and result.stdout == ""
        assert result.oom or (await sb.info()).limits["memory"] == "rlimit"
        assert (await sb.commands.run("echo on")).stdout == "on\n"


async def test_memory_that_nobody_can_free_ends_the_sandbox_with_cause_oom(runtime: str) -> None:
    async with await AsyncSandbox.create(memory_mb=48, disk_mb=400) as sb:
        if (await sb.info()).limits["memory"] != "cgroup":
            pytest.skip("no memory cgroup here")
        with pytest.raises(SandboxEnded) as caught:
            for n in range(50):  # tmpfs pages stay when their writer is killed
                await sb.commands.run(f"head -c 60000000 /dev/zero > /tmp/fill{n}", timeout=20)
        assert caught.value.cause == "oom"


async def test_a_fork_bomb_meets_the_process_limit(runtime: str) -> None:
    async with await AsyncSandbox.create(pids=64, cpu=0.5) as sb:
        result = await sb.commands.run("b() { b | b & }; b; wait; sleep 60", timeout=2)
        assert result.timed_out or result.exit_code != 0
        async with asyncio.timeout(30):
            while not (await sb.commands.run("echo back", timeout=5)).ok:
                await asyncio.sleep(0.1)
        left = await sb.commands.run("ls /proc | grep -c '^[0-9]'")
        assert int(left.stdout) < 10


async def test_the_disk_limit_is_an_error_inside_not_a_full_host(runtime: str) -> None:
    async with await AsyncSandbox.create(disk_mb=16, memory_mb=256) as sb:
        result = await sb.commands.run("head -c 64000000 /dev/zero > big; echo $?; ls -l big | cut -d' ' -f5")
        status, size = result.stdout.split()
        assert status != "0" and int(size) <= 16 << 20 and "No space left" in result.stderr
        await sb.files.remove("big")
        await sb.files.write("small", "fits")


async def test_an_unlimited_disk_lies_on_the_host_and_goes_with_the_sandbox(runtime: str) -> None:
    async with await AsyncSandbox.create(disk_mb=None, memory_mb=64) as sb:
        result = await sb.commands.run("head -c 100000000 /dev/zero > big && stat -c %s big")
        assert result.stdout == "100000000\n", result
        assert (await sb.info()).limits["disk"] == "none"


@pytest.mark.parametrize("disk_mb", [None, 64])
async def test_a_tree_too_deep_for_recursion_is_removed_with_the_sandbox(
    disk_mb: int | None, runtime: str, state: StateDir
) -> None:
    code = "import os\nfor n in range(5000):\n  os.mkdir('d'); os.chdir('d')\nprint('deep')"
    async with await AsyncSandbox.create(disk_mb=disk_mb) as sb:
        assert (await sb.commands.run(["python3", "-c", code])).stdout == "deep\n"
    assert not (state.sandboxes / sb.id).exists()
    async with await AsyncSandbox.create() as sb:
        assert (await sb.commands.run("echo on")).stdout == "on\n"


async def test_the_cpu_limit_holds(runtime: str) -> None:
    async with await AsyncSandbox.create(cpu=0.1) as sb:
        if (await sb.info()).limits["cpu"] != "cgroup":
            pytest.skip("no CPU cgroup here")
        code = (
            "import time; t=time.monotonic()\nwhile time.monotonic()-t<1.5: pass\nprint(time.process_time())"
        )
        used = float((await sb.commands.run(["python3", "-c", code])).stdout)
        assert used < 0.75  # of 1.5 s of wall clock, 0.15 s are allowed; idle hosts give little more


async def test_endless_output_costs_constant_memory(runtime: str) -> None:
    async with await AsyncSandbox.create() as sb:
        result = await sb.commands.run("yes", timeout=1.5, max_output=1 << 16)
        assert result.timed_out and result.truncated and len(result.stdout) == 1 << 16
        assert result.stdout_bytes > 10 << 20


async def test_a_command_that_kills_its_shell_and_everything_else_is_a_result(runtime: str) -> None:
    async with await AsyncSandbox.create() as sb:
        assert (await sb.commands.run("echo x; kill -9 $$")).exit_code == 137
        victim = await sb.commands.run("sleep 300", background=True)
        await sb.commands.run("kill -9 -1", user="root")  # everything but itself and PID 1
        assert (await victim.wait()).exit_code == 137
        await sb.commands.run("kill -9 1; kill -TERM 1; kill -SEGV 1; kill -STOP 1", user="root")
        assert (await sb.commands.run("echo alive")).stdout == "alive\n"


async def test_open_files_and_cores_are_bounded(runtime: str) -> None:
    async with await AsyncSandbox.create() as sb:
        files, cores = (await sb.commands.run("ulimit -Hn; ulimit -Hc")).stdout.split()
        assert int(files) <= 65536 and cores == "0"


async def test_without_a_runtime_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostUnfit) as caught:
        await AsyncSandbox.create()
    assert str(caught.value) == "no OCI runtime in PATH (crun or runc). Fix: apt-get install crun runc"


@pytest.mark.parametrize("name", ["crun", "runc"])
async def test_either_runtime_alone_does_the_work(name: str, runtime: str) -> None:
    path = shutil.which(name, path="/usr/bin:/usr/sbin:/bin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    async with await AsyncSandbox.create(memory_mb=128, runtime=name) as sb:
        assert (await sb.commands.run("echo ran")).stdout == "ran\n"
        info = await sb.info()
        assert info.runtime == name
        if info.limits["memory"] == "cgroup":
            assert memory_limit(f"/rorqual-{sb.id}") == 128 << 20


async def test_a_runtime_that_is_not_here_is_refused(runtime: str) -> None:
    with pytest.raises(Unsupported, match="Available: "):
        await AsyncSandbox.create(runtime="youki")


async def test_many_sandboxes_at_once(runtime: str) -> None:
    """As RL does: a wave of creates, a wave of commands, a wave of kills."""
    started = time.monotonic()
    boxes = await asyncio.gather(*[AsyncSandbox.create(memory_mb=64, disk_mb=16) for _ in range(24)])
    try:
        results = await asyncio.gather(*[sb.commands.run(["echo", str(n)]) for n, sb in enumerate(boxes)])
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(24)]
    finally:
        await asyncio.gather(*[sb.kill() for sb in boxes])
    assert time.monotonic() - started < 120
