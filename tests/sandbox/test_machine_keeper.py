"""The keeper's order kind "machine", with a shell in the VMM's place: limits, jail, ends, holds."""

# ruff: noqa: ASYNC110, ASYNC240 -- tests wait for conditions of another process

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rorqual.sandbox.keeper import cgroups, client, machine
from rorqual.sandbox.keeper.client import KeeperClient
from rorqual.sandbox.state import StateDir

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="jail, user and cgroup of a VMM need root")


@pytest.fixture
async def keeper(state: StateDir) -> AsyncIterator[KeeperClient]:
    state.prepare()
    keeper = await asyncio.to_thread(KeeperClient.start, state)
    yield keeper
    await asyncio.to_thread(keeper.close)


def order(state: StateDir, script: str, **changes: Any) -> dict[str, Any]:
    sandbox = f"sb-local-{secrets.token_hex(6)}"
    jailed = {
        "user": 0x70020001,
        "shown": ["/usr", "/bin", "/lib", "/lib64"],
        "cgroup": f"/rorqual-{sandbox}",
    }
    plain = {"user": None, "shown": None, "cgroup": ""}
    return {
        "kind": "machine",
        "id": sandbox,
        "directory": str(state.sandboxes / sandbox),
        "keep": False,
        "timeout": 60.0,
        "trajectory": "",
        "leases": [],
        "userns": None,
        "argv": ["/bin/bash", "-c", script],
        "env": {"PATH": "/usr/bin:/bin"},
        "files": {},
        "limits": {"memory": 64 << 20, "pids": 20, "cpu": 1.0},
        "devices": ["null", "urandom"],
        "network": None,
        "record": {"id": sandbox},
        **(jailed if ROOT else plain),
        **changes,
    }


async def ask(keeper: KeeperClient, op: str, **fields: Any) -> dict[str, Any]:
    return await asyncio.wait_for(asyncio.wrap_future(keeper.request(op, **fields)), timeout=20)


async def ended(keeper: KeeperClient, sandbox: str) -> tuple[str, str]:
    future: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    keeper.watch(sandbox, lambda *verdict: loop.call_soon_threadsafe(future.set_result, verdict))
    return await asyncio.wait_for(future, timeout=20)


async def console(keeper: KeeperClient, sandbox: str, until: str) -> str:
    deadline = time.monotonic() + 20
    while True:
        answer = await ask(keeper, "console", sandbox=sandbox)
        assert "gone" not in answer, await ended(keeper, sandbox)
        text: str = answer["console"]
        if until in text:
            return text
        assert time.monotonic() < deadline, text
        await asyncio.sleep(0.01)


@needs_root
async def test_a_vmm_runs_jailed_as_nobody_in_its_cgroup_without_a_network(
    state: StateDir, keeper: KeeperClient, tmp_path: Path
) -> None:
    (tmp_path / "given").write_text("given to it\n")
    script = """
id -u; pwd; ls /; ls /dev; ls -d /proc/[0-9]* | wc -l; cat /proc/net/dev | grep -c :
grep -E 'CapEff|NoNewPrivs' /proc/self/status; cat <&{file}; stat -Lc %s /proc/self/fd/{ram}
echo '{"json": {file}}'; touch /usr/x 2>/dev/null || echo read-only; touch here && echo writable; echo END; sleep 60
"""
    files = {"file": {"path": str(tmp_path / "given")}, "ram": {"memfd": 1 << 20}}
    it = order(state, script, files=files)
    answer = await ask(keeper, "launch", order=it)
    pid = answer["init_pid"]
    text = await console(keeper, it["id"], "END")
    lines = text.split()
    assert lines[:2] == [str(0x70020001), "/vm"]
    assert not {"home", "root", "etc", "run", "var"} & set(lines)
    assert "CapEff:\t0000000000000000" in text and "NoNewPrivs:\t1" in text
    assert "given to it" in text and "\n1048576\n" in text and "read-only\nwritable\nEND" in text
    assert '{"json": ' in text
    assert cgroups.memory_used(it["cgroup"]) > 0
    limit = Path(f"{cgroups.hierarchies()['memory']}{it['cgroup']}/memory.limit_in_bytes")
    assert not limit.exists() or int(limit.read_text()) == 64 << 20
    assert (state.sandboxes / it["id"] / "vm/here").exists()
    assert await ask(keeper, "kill", sandbox=it["id"], cause="killed", detail="x") == {
        "id": pytest.approx(0, abs=99),
        "cause": "killed",
        "detail": "x",
    }
    assert not Path(f"/proc/{pid}").exists() and not (state.sandboxes / it["id"]).exists()
    assert not cgroups.directories(it["cgroup"])


@pytest.mark.parametrize(
    ("script", "cause", "words"),
    [
        ("exit 0", "exited", "switched off"),
        ("echo it broke >&2; exit 3", "infra", "exited with 3: it broke"),
        ("kill -9 $$", "infra", "signal 9"),
        ("echo '[1] Kernel panic - not syncing: VFS: no root'; exit 0", "infra", "VFS: no root"),
        (
            "echo 'Kernel panic - not syncing: Attempted to kill init! exitcode=9'",
            "infra",
            "guest agent died",
        ),
        ("echo 'Kernel panic - not syncing: System is deadlocked on memory'", "oom", "deadlocked"),
    ],
)
async def test_the_end_of_a_machine_has_a_cause(
    state: StateDir, keeper: KeeperClient, script: str, cause: str, words: str
) -> None:
    it = order(state, f"read x <&{{go}}; {script}", files={"go": {"path": "/dev/null"}})
    await ask(keeper, "launch", order=it)
    verdict = await ended(keeper, it["id"])
    assert verdict[0] == cause and words in verdict[1], verdict


@needs_root
async def test_a_vmm_beyond_its_memory_ends_with_oom(state: StateDir, keeper: KeeperClient) -> None:
    it = order(state, "exec perl -e '$x = \"x\" x 200000000; sleep 60'")
    await ask(keeper, "launch", order=it)
    assert (await ended(keeper, it["id"]))[0] == "oom"


@pytest.mark.parametrize(
    ("change", "stage", "words"),
    [
        ({"argv": ["/no/such/vmm"]}, "exec", "No such file"),
        ({"files": {"disk": {"path": "/no/such/disk"}}}, "files", "/no/such/disk"),
        pytest.param({"devices": ["sda"]}, "jail", "/dev/sda", marks=needs_root),
    ],
)
async def test_a_launch_that_fails_names_the_step(
    state: StateDir, keeper: KeeperClient, change: dict[str, Any], stage: str, words: str
) -> None:
    it = order(state, "sleep 60", **change)
    answer = await ask(keeper, "launch", order=it)
    assert answer["error"]["stage"] == stage and words in answer["error"]["detail"]
    assert "gone" in await ask(keeper, "status", sandbox=it["id"])
    assert not (state.sandboxes / it["id"]).exists() and not cgroups.directories(it["cgroup"] or "/none")


async def test_a_flood_on_the_console_costs_nothing(state: StateDir, keeper: KeeperClient) -> None:
    it = order(state, "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo END; sleep 60")
    await ask(keeper, "launch", order=it)
    text = await console(keeper, it["id"], "END")
    assert len(text) <= machine.TAIL
    status = Path(f"/proc/{keeper._process.pid}/status").read_text()  # type: ignore[union-attr]
    assert int(status.partition("VmRSS:")[2].split()[0]) < 100_000


async def test_a_hold_makes_it_count_as_still_and_ends_with_its_client(
    state: StateDir, keeper: KeeperClient
) -> None:
    it = order(state, "sleep 60")
    await ask(keeper, "launch", order=it)
    news: list[tuple[bool, bool]] = []
    keeper.watch_still(it["id"], lambda still, paused: news.append((still, paused)))
    other = KeeperClient.join(keeper.directory)
    await ask(other, "hold", sandbox=it["id"])
    assert (await ask(keeper, "status", sandbox=it["id"]))["still"]
    second = asyncio.create_task(ask(keeper, "hold", sandbox=it["id"]))
    resumed = asyncio.create_task(ask(keeper, "resume", sandbox=it["id"]))
    await ask(keeper, "status", sandbox=it["id"])
    assert not second.done() and not resumed.done()
    await asyncio.to_thread(other.close)
    await second
    assert not resumed.done() and news[-1] == (True, False)
    await ask(keeper, "release", sandbox=it["id"])
    await resumed
    assert not (await ask(keeper, "status", sandbox=it["id"]))["still"] and news[-1] == (False, False)


@needs_root
async def test_a_paused_machine_is_thawed_while_it_is_held_and_frozen_after(
    state: StateDir, keeper: KeeperClient
) -> None:
    it = order(state, "sleep 60")
    await ask(keeper, "launch", order=it)
    freezer = cgroups.Freezer(it["cgroup"])
    assert (await ask(keeper, "pause", sandbox=it["id"]))["paused"] and freezer.frozen()
    await ask(keeper, "hold", sandbox=it["id"])
    assert not freezer.frozen()
    await ask(keeper, "release", sandbox=it["id"])
    deadline = time.monotonic() + 10
    while not freezer.frozen() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    assert freezer.frozen() and (await ask(keeper, "status", sandbox=it["id"]))["still"]


_DEATHS_FIRST = """
import selectors, time
class DeathsFirst(selectors.DefaultSelector):
    def select(self, timeout=None):
        super().select(timeout)
        time.sleep(0.05)
        return sorted(super().select(0), key=lambda event: event[0].data != "wake")
selectors.DefaultSelector = DeathsFirst
"""
"""What happens within 50 ms is told at once, deaths first: the kernel's own order when several machines die at once."""


async def test_a_pipe_that_closes_together_with_its_machine_is_not_looked_at_after_its_end(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_BOOT", _DEATHS_FIRST + client._BOOT)
    state.prepare()
    keeper = await asyncio.to_thread(KeeperClient.start, state)
    try:
        orders = [order(state, "exec sleep 60") for _ in range(4)]
        pids = [(await ask(keeper, "launch", order=it))["init_pid"] for it in orders]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for it in orders:
            cause, detail = await ended(keeper, it["id"])
            assert cause == "infra" and "signal 9" in detail
        last = order(state, "echo END; exec sleep 60")
        await ask(keeper, "launch", order=last)
        await console(keeper, last["id"], "END")
    finally:
        await asyncio.to_thread(keeper.close)
