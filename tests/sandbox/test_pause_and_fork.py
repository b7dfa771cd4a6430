"""Pause, resume, snapshot, fork and commit, against real containers; what is in a snapshot, and what is refused."""

# ruff: noqa: ASYNC110 -- tests wait for conditions of another process; their files are small

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rorqual.sandbox import (
    AsyncSandbox,
    ImageError,
    ImageRejected,
    InvalidRequest,
    Paused,
    PtySize,
    SandboxEnded,
    Snapshot,
)
from rorqual.sandbox._async import commands
from rorqual.sandbox.images import Bounds, images, remove_image
from rorqual.sandbox.keeper import cgroups, layers, leases
from rorqual.sandbox.prune import prune, reap_once
from rorqual.sandbox.state import StateDir

pytestmark = pytest.mark.skipif(not cgroups.can_freeze(), reason="no freezer cgroup that this user may use")


@pytest.fixture
async def sb(runtime: str) -> AsyncIterator[AsyncSandbox]:
    async with await AsyncSandbox.create(disk_mb=64) as sandbox:
        yield sandbox


def cpu_used(sandbox: AsyncSandbox) -> int:
    """What the kernel says it has used; independent of the freezer."""
    points = cgroups.hierarchies()
    for key, name in (("cpuacct", "cpuacct.usage"), ("unified", "cpu.stat")):
        path = Path(f"{points.get(key, '')}/rorqual-{sandbox.id}/{name}")
        if path.exists():
            return int(path.read_text().replace("usage_usec", "").split()[0])
    pytest.skip("no CPU accounting on this host")


def hidden(state: StateDir) -> list[str]:
    """Half-made images and layers of forks."""
    return [
        path.name for path in state.images.iterdir() if path.name.startswith((".fork", ".building", ".rem"))
    ]


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


# -- pause --------------------------------------------------------------------------------------------------


async def test_a_paused_sandbox_uses_no_cpu_and_goes_on_where_it_was(sb: AsyncSandbox) -> None:
    spin = await sb.commands.run("while :; do :; done", background=True, timeout=None)
    before = cpu_used(sb)
    await until(lambda: cpu_used(sb) > before)
    report = await sb.pause()
    assert isinstance(report, Paused) and 0 < report.memory_after <= report.memory_before
    assert (await sb.info()).paused
    before = cpu_used(sb)
    await asyncio.sleep(0.3)
    assert cpu_used(sb) == before
    await sb.resume()
    assert not (await sb.info()).paused
    await until(lambda: cpu_used(sb) > before)
    assert spin.id in [info.id for info in await sb.commands.list() if info.running]
    kinds = [entry.kind for entry in await sb.trajectory.list()]
    assert kinds == ["created", "command", "pause", "resume"]


async def test_every_kind_of_call_resumes_it(sb: AsyncSandbox) -> None:
    await sb.files.write("a", "1")
    cat = await sb.commands.run("cat", background=True, stdin=True)

    async def other() -> None:
        async with await AsyncSandbox.connect(sb.id) as second:
            assert await second.files.read("a") == "1"

    async def terminal() -> None:
        pty = await sb.pty.create(cmd="true", size=PtySize(rows=5, cols=5))
        assert await pty.wait() == 0

    for call in (
        lambda: sb.commands.run("true"),
        sb.commands.list,
        lambda: sb.files.read("a"),
        lambda: sb.files.write("b", "2"),
        lambda: cat.send_stdin("x"),
        terminal,
        other,
        cat.kill,
    ):
        await sb.pause(reclaim=False)
        assert (await sb.info()).paused
        await call()
        assert not (await sb.info()).paused
    assert (await cat.wait()).stdout == "x"
    resumed = [entry.request["by"] for entry in await sb.trajectory.list() if entry.kind == "resume"]
    assert resumed == ["call"] * len(resumed) and len(resumed) >= 7


async def test_many_calls_at_once_resume_it_once(sb: AsyncSandbox) -> None:
    await sb.pause(reclaim=False)
    results = await asyncio.gather(*[sb.commands.run(f"echo {n}") for n in range(8)])
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(8)]
    assert [entry.kind for entry in await sb.trajectory.list()].count("resume") == 1


async def test_another_client_learns_of_the_pause_and_its_call_resumes(sb: AsyncSandbox) -> None:
    async with await AsyncSandbox.connect(sb.id) as other:
        await other.pause(reclaim=False)
        assert (await sb.commands.run("echo on")).stdout == "on\n"
        await other.pause(reclaim=False)
        await other.pause(reclaim=False)
        assert (await sb.info()).paused
        await sb.resume()
        await sb.resume()
        assert not (await other.info()).paused


async def test_a_deadline_that_passes_in_a_pause_is_a_timeout_and_not_a_dead_agent(
    sb: AsyncSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "GRACE_S", 1.0)
    running = asyncio.create_task(sb.commands.run("echo begun; sleep 300", timeout=1.0))
    while not any(info.running for info in await sb.commands.list()):
        await asyncio.sleep(0.01)
    await sb.pause(reclaim=False)
    await asyncio.sleep(2.5)
    assert not running.done()
    await sb.resume()
    result = await running
    assert result.timed_out and result.exit_code == 137


async def test_the_lifetime_goes_on_counting_and_a_paused_sandbox_can_be_killed(runtime: str) -> None:
    doomed = await AsyncSandbox.create(disk_mb=16)
    await doomed.commands.run("sleep 300", background=True, timeout=None)
    await doomed.pause(reclaim=False)
    await doomed.set_timeout(0.3)
    assert (await doomed.info()).paused
    await until(lambda: doomed.cause is not None)
    assert doomed.cause == "timeout" and not cgroups.directories(f"/rorqual-{doomed.id}")
    with pytest.raises(SandboxEnded, match="timeout"):
        await doomed.pause()
    other = await AsyncSandbox.create(disk_mb=16)
    await other.commands.run("sleep 300", background=True, timeout=None)
    await other.pause(reclaim=False)
    assert await other.kill() and other.cause == "killed"
    assert not cgroups.directories(f"/rorqual-{other.id}")


# -- snapshots ----------------------------------------------------------------------------------------------

MAKE = r"""
set -e
cd /home/user
printf hello > plain; chmod 4755 plain; ln plain second-name; chmod 2775 .
mkfifo fifo; truncate -s 1T sparse; printf end | dd of=sparse bs=1 seek=5000000 conv=notrunc status=none
ln -s /etc/shadow link; ln -s ../../../../../../etc up; printf x > secret; chmod 0 secret
mkdir -p "odd $(printf 'n\nl\001\377')" 'a:b,c' -- '--help'; touch -- 'a:b,c/\x' '--help/-rf'
mkdir sticky; chmod 1777 sticky; touch -d @1000000000.123456789 sticky/old
python3 -c 'import os,socket; os.setxattr("plain","user.note",b"kept"); s=socket.socket(socket.AF_UNIX); s.bind("sock")'
"""
LIST = r"""cd / && find home tmp etc var opt root usr/share/doc usr/bin -printf '%p|%y|%m|%U|%G|%n|%T@|%l|' \
 \( -type d -printf '\n' -o -printf '%s\n' \) | LC_ALL=C sort | grep -v '^home/user|' | sha256sum"""
READ = r"""cd /home/user; cat plain second-name; python3 -c '
import os
print(os.getxattr("plain", "user.note"), os.stat("sparse").st_size, os.stat("sparse").st_blocks < 100)
f = open("sparse", "rb"); f.seek(5000000); print(f.read(3))'"""


async def test_a_snapshot_holds_exactly_the_files_whatever_they_are(sb: AsyncSandbox) -> None:
    made = await sb.commands.run(MAKE)
    assert made.exit_code == 0, made.stderr
    # As root of the sandbox: a removed system file (a whiteout) and a replaced system directory (an opaque one).
    root = "rm /usr/bin/env && rm -r /usr/share/doc/bash && mkdir /usr/share/doc/bash && touch /usr/share/doc/bash/new"
    done = await sb.commands.run(root, user="root")
    assert done.exit_code == 0, done.stderr
    want = [await sb.commands.run(LIST, user="root"), await sb.commands.run(READ)]
    taken = await sb.snapshot()
    assert isinstance(taken, Snapshot) and taken.parent == "base" and taken.sandbox_id == sb.id
    assert taken.entries > 15 and taken.size_bytes < 100_000  # and not a terabyte
    assert not (await sb.info()).paused
    try:
        assert taken.name in [info.name for info in images() if info.origin == "snapshot"]
        async with await AsyncSandbox.create(image=taken) as copy:
            got = [await copy.commands.run(LIST, user="root"), await copy.commands.run(READ)]
            assert [result.stdout for result in got] == [result.stdout for result in want]
            assert (await copy.commands.run("ls /usr/share/doc/bash")).stdout == "new\n"
            assert "no process" in " ".join((await copy.info()).notes)
            with pytest.raises(ImageError, match="live sandbox"):
                remove_image(taken.name)
    finally:
        assert remove_image(taken.name)


async def test_nothing_in_the_store_belongs_to_an_account_of_the_host(
    sb: AsyncSandbox, state: StateDir
) -> None:
    await sb.commands.run("cp /bin/true /home/user/suid; chmod 4755 /home/user/suid", user="root")
    taken = await sb.snapshot()
    try:
        found = [
            path for path in (state.images / taken.name).rglob("suid") if path.stat().st_mode & stat.S_ISUID
        ]
        assert len(found) == 1 and found[0].stat().st_uid >= 65536
        assert stat.S_IMODE((state.images / taken.name).stat().st_mode) == 0o700
    finally:
        remove_image(taken.name)


async def test_too_much_or_too_deep_is_refused_and_the_sandbox_runs_on(
    sb: AsyncSandbox, state: StateDir
) -> None:
    await sb.commands.run("for i in $(seq 40); do echo $i > f$i; done; head -c 2000000 /dev/urandom > big")
    with pytest.raises(ImageRejected, match="more than 30 files"):
        await sb.snapshot(bounds=Bounds(max_entries=30))
    with pytest.raises(ImageRejected, match="more than 1000000 bytes"):
        await sb.fork(bounds=Bounds(max_bytes=1_000_000))
    deep = "import os\nfor _ in range(700):\n    os.mkdir('d'); os.chdir('d')"
    await sb.commands.run(["python3", "-c", deep])
    with pytest.raises(ImageRejected, match="nested deeper"):
        await sb.commit("deep")
    assert hidden(state) == [] and not (await sb.info()).paused
    assert (await sb.commands.run("echo on")).stdout == "on\n"
    assert (await sb.trajectory.list())[-2].result is not None


async def test_a_cancelled_snapshot_leaves_nothing_and_no_pause(sb: AsyncSandbox, state: StateDir) -> None:
    before = {info.name for info in images()}
    await sb.commands.run("head -c 30000000 /dev/zero | tr '\\0' x > big")
    for delay in (0.0, 0.02, 0.1):
        task = asyncio.create_task(sb.snapshot())
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            remove_image(task.result().name)
    await until(lambda: hidden(state) == [])
    assert (await sb.commands.run("wc -c < big")).stdout == "30000000\n"
    assert {info.name for info in images()} == before


async def test_a_paused_sandbox_stays_paused_through_a_snapshot(sb: AsyncSandbox) -> None:
    await sb.files.write("a", "1")
    await sb.pause(reclaim=False)
    taken = await sb.snapshot()
    assert (await sb.info()).paused
    remove_image(taken.name)


async def test_commit_names_an_image_replaces_it_and_guards_what_is_built_on_it(sb: AsyncSandbox) -> None:
    await sb.files.write("a", "1")
    first = await sb.commit("mine:1")
    await sb.files.write("a", "2")
    second = await sb.commit("mine:1")
    assert first.name == second.name == "mine:1"
    async with await AsyncSandbox.create(image="mine:1") as above:
        assert await above.files.read("a") == "2"
        child = await above.snapshot()
        assert child.parent == "mine:1"
    with pytest.raises(ImageError, match=f"{child.name} is built on it"):
        await sb.commit("mine:1")
    assert remove_image(child.name) and remove_image("mine:1")
    for name in ("base", "Mine", "../x"):
        with pytest.raises(InvalidRequest):
            await sb.commit(name)


# -- forks --------------------------------------------------------------------------------------------------


async def test_forks_start_from_the_files_and_go_their_own_ways(runtime: str, state: StateDir) -> None:
    parent = await AsyncSandbox.create(memory_mb=200, disk_mb=32, envs={"A": "1"}, metadata={"job": "7"})
    await parent.files.write("a", "parent")
    await parent.commands.run("sleep 4321", background=True, timeout=None)
    children = await parent.fork(count=3)
    assert len({child.id for child in [parent, *children]}) == 4
    for number, child in enumerate(children):
        assert await child.files.read("a") == "parent"
        await child.files.write("a", str(number))
        seen = await child.commands.run("echo $A; cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        assert seen.stdout.startswith("1\n") and "sleep 4321" not in seen.stdout  # files, not processes
        info = await child.info()
        assert (info.memory_mb, info.disk_mb, info.metadata) == (200, 32, {"job": "7"})
        assert (await child.trajectory.list())[0].request["forked_from"] == parent.id
    assert await parent.files.read("a") == "parent"
    await parent.kill()
    grandchildren = await children[1].fork(count=2, timeout=900)
    assert len([name for name in hidden(state) if name.startswith(leases.FORK_PREFIX)]) == 2
    for child in children:
        await child.kill()
    assert [await each.files.read("a") for each in grandchildren] == ["1", "1"]
    kept = await grandchildren[0].commit("kept")  # what the forks share is copied in, since it will go
    for each in grandchildren:
        await each.kill()
    await until(lambda: hidden(state) == [])
    async with await AsyncSandbox.create(image=kept) as last:
        assert await last.files.read("a") == "1"
    assert remove_image("kept")


async def test_a_fork_that_cannot_be_whole_is_none(sb: AsyncSandbox, state: StateDir) -> None:
    for wrong in (0, 101, True, 1.5):
        with pytest.raises(InvalidRequest, match="count"):
            await sb.fork(count=wrong)  # type: ignore[arg-type]
    before = {info.id for info in await AsyncSandbox.list()}
    task = asyncio.create_task(sb.fork(count=3))
    while not any(name.startswith(leases.FORK_PREFIX) for name in hidden(state)) and not task.done():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        for child in task.result():
            await child.kill()
    assert {info.id for info in await AsyncSandbox.list()} == before
    await until(lambda: hidden(state) == [])


# -- the copier ---------------------------------------------------------------------------------------------


def copy(source: Path, target: Path) -> layers.Budget:
    budget = layers.Budget(max_bytes=1 << 20, max_entries=100)
    flags = os.O_RDONLY | os.O_DIRECTORY
    here, there = os.open(source, flags), os.open(target, flags)
    try:
        layers.copy_tree(here, there, budget=budget)
    finally:
        os.close(here)
        os.close(there)
    return budget


@pytest.mark.parametrize("what", ["device", "redirect", "metacopy"])
def test_what_a_layer_must_not_hold_is_refused_by_name(tmp_path: Path, what: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "d").mkdir(parents=True)
    target.mkdir()
    if what == "device":
        os.mknod(source / "d" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        says = "device node at 'null'"
    else:
        os.setxattr(source / "d", f"trusted.overlay.{what}", b"/x")
        says = f"overlay.{what} cannot be carried"
    with pytest.raises(layers.LayerRefused, match=says):
        copy(source, target)


def test_links_are_copied_as_links_and_not_followed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "d").mkdir(parents=True)
    target.mkdir()
    (tmp_path / "outside").write_text("host")
    (source / "d" / "out").symlink_to(tmp_path / "outside")
    (source / "loop").symlink_to("..")
    (source / "one").write_text("1")
    os.link(source / "one", source / "d" / "two")
    budget = copy(source, target)
    assert (budget.entries, budget.size_bytes) == (5, 1)
    assert os.readlink(target / "d/out") == str(tmp_path / "outside") and os.readlink(target / "loop") == ".."
    assert (target / "one").stat().st_ino == (target / "d/two").stat().st_ino


def test_a_snapshot_whose_maker_was_killed_is_removed_at_the_next_start(tmp_path: Path) -> None:
    state = StateDir(root=tmp_path / "state", run=tmp_path / "run" / "x")
    state.prepare()
    old = time.time() - 60
    for name in ("dead", "alive", "fresh", "other"):
        place = state.images / f".building-{name}"
        place.mkdir()
        if name != "other":  # an image that is being imported has no lease, and hours
            (place / leases.FILE).touch()
            os.utime(place / leases.FILE, (old, old))
    os.utime(state.images / ".building-fresh" / leases.FILE)
    held = leases.take([str(state.images / ".building-alive" / leases.FILE)])
    try:
        reap_once(state)
        left = {path.name.removeprefix(".building-") for path in state.images.iterdir()}
        assert left == {"alive", "fresh", "other"}
    finally:
        leases.give(held)
    assert prune(state=state).images == 1
    assert not (state.images / ".building-alive").exists()
