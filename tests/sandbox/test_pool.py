"""Warm pools: what is taken is one's own, what waits is replaced and bounded, nothing is left at the end."""

# ruff: noqa: ASYNC110, ASYNC220 -- tests wait for conditions and for other processes

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.sandbox import (
    AsyncSandbox,
    AsyncWarmPool,
    ImageNotFound,
    InvalidRequest,
    Sandbox,
    SandboxNotFound,
    WarmPool,
)
from rorqual.sandbox._async.pool import KEY
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.state import StateDir

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"memory_mb": 64, "disk_mb": 16}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # type: ignore[misc]
            await asyncio.sleep(0.02)


async def waiting(pool: AsyncWarmPool) -> list[str]:
    return [info.id for info in await AsyncSandbox.list() if info.metadata.get(KEY) == pool.id]


async def test_what_is_taken_is_ones_own_and_is_replaced(runtime: str) -> None:
    async with await AsyncWarmPool.create(size=2, **SMALL) as pool:
        before = await waiting(pool)
        assert len(before) == 2
        sb = await pool.take(envs={"WHO": "me"}, metadata={"job": "7"}, timeout=50)
        assert sb.id in before
        assert (await sb.commands.run("echo $WHO; ls")).stdout == "me\n"
        info = await sb.info()
        assert info.metadata == {"job": "7"} and info.memory_mb == 64
        entries = await sb.trajectory.list()
        assert [entry.kind for entry in entries] == ["created", "adopted", "command"]
        assert entries[0].request["metadata"] == {KEY: pool.id} and entries[1].request["pool"] == pool.id
        assert entries[1].result is not None
        assert entries[1].result["expires"] == info.expires < entries[1].started + 51
        again = await AsyncSandbox.connect(sb.id)  # what was given is in force for others, too
        assert (await again.commands.run("echo $WHO")).stdout == "me\n"
        await again.close()
        await until(lambda: _full(pool))
        assert len(await waiting(pool)) == 2 and sb.id not in await waiting(pool)
        statistics = await pool.statistics()
        assert (statistics.warm, statistics.cold, statistics.failed) == (1, 0, 0)
    assert (await sb.commands.run("echo $WHO")).stdout == "me\n" and await waiting(pool) == []
    if cgroups.can_freeze():
        (child,) = await sb.fork()
        assert (await child.commands.run("echo $WHO")).stdout == "me\n"
        assert (await child.info()).metadata == {"job": "7"}
        await child.kill()
    replayed = await AsyncSandbox.attach(sb.id)
    assert (await replayed.commands.run("echo $WHO; ls")).cached
    await replayed.close()
    await sb.kill()


async def _full(pool: AsyncWarmPool) -> bool:
    statistics = await pool.statistics()
    return statistics.ready == statistics.size and not statistics.making


async def test_more_takers_than_sandboxes_are_served_all_and_no_two_get_the_same(runtime: str) -> None:
    async with await AsyncWarmPool.create(size=2, **SMALL) as pool:
        taken = await asyncio.gather(*[pool.take() for _ in range(6)])
        assert len({sb.id for sb in taken}) == 6
        statistics = await pool.statistics()
        assert statistics.warm + statistics.cold == 6 and statistics.warm >= 2
        await asyncio.gather(*[sb.kill() for sb in taken])
        await until(lambda: _full(pool))
        assert len(await waiting(pool)) == 2


async def test_one_that_ends_while_it_waits_is_replaced_and_never_given_out(runtime: str) -> None:
    async with await AsyncWarmPool.create(size=1, **SMALL) as pool:
        (first,) = await waiting(pool)
        second = await AsyncSandbox.connect(first)
        await second.kill()

        async def replaced() -> bool:
            return await waiting(pool) not in ([], [first]) and await _full(pool)

        await until(replaced)
        (other,) = await waiting(pool)
        sb = await pool.take()
        assert sb.id == other
        await sb.kill()


async def test_the_lifetime_of_what_is_taken_holds(runtime: str) -> None:
    async with await AsyncWarmPool.create(size=1, **SMALL) as pool:
        sb = await pool.take(timeout=0.5)
        async with asyncio.timeout(20):
            await sb._session.over.wait()
        assert sb.cause == "timeout"
        await sb.close()


async def test_wrong_requests_are_refused_and_cost_no_sandbox(runtime: str) -> None:
    for wrong in (0, 513, True, 1.5):
        with pytest.raises(InvalidRequest, match="size"):
            await AsyncWarmPool.create(size=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="give it to take"):
        await AsyncWarmPool.create(size=1, envs={"A": "1"})
    with pytest.raises(ImageNotFound):
        await AsyncWarmPool.create(size=1, image="not-there")
    with pytest.raises(TypeError, match="memory"):
        await AsyncWarmPool.create(size=1, memory=1)
    async with await AsyncWarmPool.create(size=1, **SMALL) as pool:
        with pytest.raises(InvalidRequest, match="timeout"):
            await pool.take(timeout=-1)
        with pytest.raises(InvalidRequest, match="envs"):
            await pool.take(envs={"1": "x"})
        assert (await pool.statistics()).ready == 1
    with pytest.raises(InvalidRequest, match="closed"):
        await pool.take()
    await pool.close()


async def test_a_cancelled_taker_and_a_cancelled_pool_leave_nothing(runtime: str) -> None:
    before = {info.id for info in await AsyncSandbox.list()}
    for steps in range(0, 12, 3):
        async with await AsyncWarmPool.create(size=1, **SMALL) as pool:
            task = asyncio.create_task(pool.take())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                await task.result().kill()
    making = asyncio.create_task(AsyncWarmPool.create(size=3, **SMALL))
    while {info.id for info in await AsyncSandbox.list()} == before:
        await asyncio.sleep(0.005)
    making.cancel()
    await asyncio.wait([making])
    assert making.cancelled() and {info.id for info in await AsyncSandbox.list()} == before


async def test_kill_9_of_the_owner_ends_what_waits_and_what_was_taken_but_not_what_is_kept(
    runtime: str, state: StateDir
) -> None:
    code = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[1])
from rorqual.sandbox import AsyncWarmPool
async def main():
    pool = await AsyncWarmPool.create(size=2, memory_mb=64, disk_mb=16)
    taken, kept = await pool.take(), await pool.take(keep=True, timeout=60)
    while (await pool.statistics()).ready < 2: await asyncio.sleep(0.01)
    print(pool.id, taken.id, kept.id, flush=True)
    time.sleep(1000)
asyncio.run(main())
"""
    command = [sys.executable, "-c", code, str(ROOT / "src")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pool_id, taken, kept = (await asyncio.to_thread(owner.stdout.readline)).split()
    ids = {info.id for info in await AsyncSandbox.list() if info.metadata.get(KEY) == pool_id}
    assert len(ids) == 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()

    async def gone() -> bool:
        return not ({info.id for info in await AsyncSandbox.list()} & (ids | {taken}))

    await until(gone)
    with pytest.raises(SandboxNotFound, match="killed"):
        await AsyncSandbox.connect(taken)
    sb = await AsyncSandbox.connect(kept)
    assert (await sb.commands.run("echo lives")).stdout == "lives\n"
    await sb.kill()


def test_the_synchronous_twin_takes(runtime: str) -> None:
    with WarmPool.create(size=1, **SMALL) as pool:
        with pool.take(envs={"A": "1"}) as sb:
            assert isinstance(sb, Sandbox) and sb.commands.run("echo $A").stdout == "1\n"
        assert pool.statistics().warm == 1 and pool.id.startswith("pool-")
