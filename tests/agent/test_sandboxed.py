"""The agent in real containers, through `AsyncSandbox` and `Sandbox`: hostile commands are results, a dead sandbox ends
the run, an interrupt leaves nothing."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rorqual.agent import Agent, AgentResult, AsyncAgent, RemoteConfig, RemoteModel, SetupError, project
from rorqual.sandbox import AsyncSandbox, Sandbox, SandboxError

from .scripted import Say, Step, serving, wait_until


@pytest.fixture(scope="module", autouse=True)
def _container() -> None:
    try:
        with Sandbox.create(timeout=60) as sandbox:
            sandbox.commands.run("true")
    except SandboxError as error:
        pytest.skip(f"no container on this host: {error}")


def bash(command: str) -> tuple[str, dict[str, str]]:
    return "bash", {"command": command}


SUBMIT = ("submit", {"answer": "42"})


def results(result: AgentResult) -> list[str]:
    return [message["content"] for message in project(result.events) if message["role"] == "tool"]


async def work(*steps: Step, sandbox: dict[str, Any] | None = None, **options: Any) -> AgentResult:
    with serving(*steps) as server:
        async with (
            RemoteModel(RemoteConfig(url=server.url, model="m")) as model,
            await AsyncSandbox.create(timeout=120, **(sandbox or {})) as box,
        ):
            return await AsyncAgent(model=model, sandbox=box, **options).run("x")


async def test_hostile_commands_are_results_and_the_run_goes_on() -> None:
    result = await work(
        Say(calls=[bash("yes 0123456789 | head -c 60000000")]),
        Say(calls=[bash("echo before; kill -9 $$")]),
        Say(calls=[bash("echo on; sleep 100 & sleep 100")]),
        Say(calls=[bash("head -c 400000000 /dev/zero > big; echo $?")]),
        Say(calls=[bash("cat")]),
        Say(calls=[bash("printf '\\377\\376x'")]),
        Say(calls=[bash("exit 0")]),
        Say(calls=[("read_file", {"path": "/proc/self/mem"})]),
        Say(calls=[("write_file", {"path": "/proc/x", "content": ""})]),
        Say(calls=[("read_file", {"path": "nul\x00"})]),
        Say(calls=[SUBMIT]),
        command_timeout=2.0,
        sandbox={"disk_mb": 64},
    )
    assert result.outcome == "submitted"
    flood, killed, hung, full, no_input, odd, silent, *files, _ = results(result)
    assert flood.startswith("0123456789\n") and "bytes left out" in flood and len(flood) < 9000
    assert flood.endswith("[the output was longer; the sandbox kept only its beginning]")
    assert killed == "before\n[exit 137]"
    assert hung == "on\n[timed out after 2s]"
    assert "No space left on device" in full and full.endswith("\n1")
    assert no_input == "(no output)" and silent == "(no output)" and odd == "��x"
    assert all(text.startswith("Error: ") and "\n" not in text for text in files)


async def test_files_and_commands_share_the_working_directory() -> None:
    result = await work(
        Say(calls=[("write_file", {"path": "sub/a.txt", "content": "ü\n"})]),
        Say(calls=[bash("cat sub/a.txt; whoami; pwd")]),
        Say(calls=[("read_file", {"path": "sub/a.txt"})]),
        Say(calls=[SUBMIT]),
        sandbox={"workdir": "/work"},
    )
    assert results(result)[:3] == ["Wrote 3 bytes to sub/a.txt", "ü\nuser\n/work", "ü"]
    [start] = [event.data for event in result.events if event.kind == "run.start"]
    assert start["sandbox"]["sandbox"].startswith("sb-")


async def test_the_sync_agent_refuses_an_async_sandbox() -> None:
    model = RemoteModel(RemoteConfig(url="http://localhost:1", model="m"))
    async with await AsyncSandbox.create(timeout=60) as box:
        with pytest.raises(SetupError, match=r"with an AsyncSandbox, await AsyncAgent\.run"):
            Agent(model=model, sandbox=box).run("x")


async def test_a_sandbox_that_ends_under_the_agent_ends_the_run_with_its_cause() -> None:
    with serving(Say(calls=[bash("sleep 100")])) as server:
        async with (
            RemoteModel(RemoteConfig(url=server.url, model="m")) as model,
            await AsyncSandbox.create(timeout=120) as box,
        ):
            run = asyncio.create_task(AsyncAgent(model=model, sandbox=box).run("x"))
            while not await box.commands.list():  # noqa: ASYNC110 -- nothing tells when a command has begun
                await asyncio.sleep(0.02)
            kill = f"from rorqual.sandbox import Sandbox; Sandbox.connect({box.id!r}).kill()"
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", kill)
            assert await process.wait() == 0
            result = await run
    assert result.outcome == "sandbox_error" and result.error is not None and "killed" in result.error


def test_the_sync_agent_works_in_the_sync_sandbox() -> None:
    with serving(Say(calls=[bash("echo $((6*7))")]), Say(calls=[SUBMIT])) as server:
        model = RemoteModel(RemoteConfig(url=server.url, model="m"))
        with Sandbox.create(timeout=120) as sandbox:
            result = Agent(model=model, sandbox=sandbox).run("x")
    assert result.outcome == "submitted" and results(result)[0] == "42"


SCRIPT = """
import sys
from pathlib import Path
from rorqual.agent import Agent, RemoteConfig, RemoteModel
from rorqual.sandbox import Sandbox
with Sandbox.create(timeout=120) as sandbox:
    model = RemoteModel(RemoteConfig(url=sys.argv[1], model="m"))
    Agent(model=model, sandbox=sandbox, runs_dir=Path(sys.argv[2])).run("x", run_id="r")
"""


def test_ctrl_c_in_a_sync_command_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    with serving(Say(calls=[bash("echo up; sleep 986")])) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, server.url, str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: bool(_sleepers()), limit=60)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=40)
    assert process.returncode != 0
    assert '"outcome":"interrupted"' in (tmp_path / "r.jsonl").read_text()
    wait_until(lambda: not _sleepers())


def _sleepers() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes() == b"sleep\x00986\x00":
                found.append(entry.name)
        except OSError:
            continue
    return found
