"""Real microVMs on QEMU: limits, ends, ports, snapshots, forks. Most share one machine or go on from its memory."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import qemu.qmp

from rorqual.sandbox import (
    AsyncSandbox,
    HostUnfit,
    ImageRejected,
    InvalidRequest,
    LaunchFailed,
    Sandbox,
    SandboxEnded,
    SandboxError,
    Snapshot,
    Unsupported,
    images,
)
from rorqual.sandbox._dial import Address, PortCodec, dial
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox.errors import GuestError, GuestGone
from rorqual.sandbox.keeper.client import own_keeper
from rorqual.sandbox.machines.kernel import find_kernel
from rorqual.sandbox.machines.qemu import PORTS, Qemu
from rorqual.sandbox.machines.rootfs import base_layer
from rorqual.sandbox.network import NetworkPolicy
from rorqual.sandbox.network.order import lacking
from rorqual.sandbox.state import StateDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ROOT = os.geteuid() == 0
SMALL: dict[str, Any] = {"substrate": "microvm", "vmm": "qemu", "memory_mb": 192, "disk_mb": 32, "pids": 48}


@pytest.fixture(scope="module")
def machine(runtime: str) -> Iterator[Sandbox]:
    """One booted machine for every test that leaves it as it was."""
    try:
        find_kernel()
        Qemu().program()
    except HostUnfit as error:
        pytest.skip(str(error))
    with Sandbox.create(**SMALL, metadata={"purpose": "tests"}) as sb:
        sb.commands.run("python3 -c 'import socket'")
        yield sb


@pytest.fixture(scope="module")
def snapshot(machine: Sandbox) -> Iterator[Snapshot]:
    """Its memory: a restored machine costs a tenth of a booted one."""
    loop = "i=0; while sleep 0.05; do i=$((i+1)); echo $i > /tmp/count; done"
    handle = machine.commands.run(loop, background=True, timeout=None)
    wait_until(lambda: machine.commands.run("cat /tmp/count").stdout.strip() not in ("", "0", "1"))
    machine.files.write("/home/user/kept", "before\n")
    taken = machine.snapshot()
    machine.commands.kill(handle.id)
    machine.files.write("/home/user/kept", "after\n")
    yield taken
    images.remove_image(taken.name)


def restored(snapshot: Snapshot, **fields: Any) -> Sandbox:
    return Sandbox.create(substrate="microvm", image=snapshot, **fields)


def record(sb: Sandbox, state: StateDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((state.sandboxes / sb.id / "record.json").read_text())
    return found


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# --- what it is ---


def test_it_has_a_kernel_of_its_own_and_says_what_runs_it(machine: Sandbox) -> None:
    info = machine.info()
    inside = machine.commands.run("uname -r; id -un; pwd; hostname; cat /proc/1/comm").stdout.split()
    assert inside == [find_kernel().release, "user", "/home/user", "sandbox", "init"]
    assert inside[0] != os.uname().release
    assert (
        info.accelerator in ("kvm", "tcg") and info.runtime == "qemu" and info.metadata["purpose"] == "tests"
    )
    assert any(info.accelerator == "kvm" or "emulated" in note for note in info.notes)
    assert info.limits["memory"] == "machine" and info.limits["disk"] == "guest"


def test_who_demands_acceleration_gets_it_or_a_refusal_that_says_what_was_tried(machine: Sandbox) -> None:
    found = Qemu().accelerator()
    if found.name == "kvm":
        with Sandbox.create(**SMALL, accelerated=True) as sb:
            assert sb.info().accelerator == "kvm"
        return
    with pytest.raises(Unsupported, match=r"KVM|/dev/kvm") as caught:
        Sandbox.create(**SMALL, accelerated=True)
    assert found.why in str(caught.value) and "emulate" in str(caught.value)
    with pytest.raises(Unsupported, match="accelerated"):
        Sandbox.create(**SMALL, require=["accelerated"])


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"runtime": "crun"}, Unsupported, r"OCI runtime.*vmm='qemu'"),
        ({"vmm": "bochs"}, Unsupported, "bochs.*qemu"),
        ({"mounts": {"/usr": "/data"}}, Unsupported, "files.write"),
        ({"memory_mb": 64}, InvalidRequest, "at least 128"),
        ({"accelerated": "yes"}, InvalidRequest, "True, False or None"),
        ({"image": "no-such-image"}, SandboxError, "no image"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_starts(
    machine: Sandbox, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Sandbox.create(**{**SMALL, **fields})


@pytest.mark.skipif(not ROOT, reason="the jail of a VMM needs root")
def test_the_monitor_is_nobody_on_the_host(machine: Sandbox, state: StateDir) -> None:
    pid = record(machine, state)["init_pid"]
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["Uid"].split()[0]) > 0x70000000 and int(fields["CapEff"], 16) == 0
    assert fields["Seccomp"] == "2" and fields["NoNewPrivs"] == "1"
    for kind in ("net", "mnt", "ipc", "uts"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    seen = set(os.listdir(f"/proc/{pid}/root"))
    assert not seen & {"root", "home", "run", "var"} and "vm" in seen
    assert (state.sandboxes / machine.id / "vm").stat().st_mode & 0o077 == 0


def test_root_inside_rules_its_own_kernel_only(machine: Sandbox) -> None:
    inside = (
        "hostname own && hostname && hostname sandbox; id -u; ls /dev/kvm /dev/sda 2>&1 | grep -c 'No such'"
    )
    assert machine.commands.run(inside, user="root").stdout.split() == ["own", "0", "2"]
    assert machine.commands.run("hostname own").exit_code != 0


# --- limits ---


def test_memory_processes_and_disk_have_an_end(machine: Sandbox) -> None:
    eater = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    eaten = machine.commands.run(["python3", "-c", eater], timeout=120)
    assert eaten.exit_code == 137 and eaten.oom
    assert not machine.commands.run("exit 137").oom
    bomb = (
        "import os\nr, w = os.pipe()\nn = 0\ntry:\n  while True:\n"
        "    if os.fork() == 0: os.close(w); os.read(r, 1); os._exit(0)\n    n += 1\n"
        "except OSError: print(n)"
    )
    assert 10 <= int(machine.commands.run(["python3", "-c", bomb], timeout=60).stdout) < 48
    full = machine.commands.run("head -c 40000000 /dev/zero > big; stat -c %s big; rm big", timeout=60)
    assert "No space left" in full.stderr and int(full.stdout) < 33 << 20
    assert machine.commands.run("echo still here").stdout == "still here\n"


def test_memory_can_be_taken_back_and_given_again(machine: Sandbox) -> None:
    def available() -> int:
        return int(machine.commands.run("grep MemAvailable /proc/meminfo").stdout.split()[1])

    before = available()
    assert machine.set_memory(160) == 160
    assert before - available() > 20 << 10
    assert machine.set_memory(192) == 192
    wait_until(lambda: before - available() < 10 << 10)
    with pytest.raises(InvalidRequest, match="192"):
        machine.set_memory(4096)


@pytest.mark.skipif(not ROOT, reason="no freezer cgroup that this user may use")
def test_a_paused_machine_stands_still_and_the_next_call_resumes_it(machine: Sandbox) -> None:
    loop = "i=0; while sleep 0.02; do i=$((i+1)); echo $i > /tmp/n; done"
    handle = machine.commands.run(loop, background=True, timeout=None)
    wait_until(lambda: machine.commands.run("cat /tmp/n").stdout)
    machine.pause()
    assert machine.info().paused
    before = machine.metrics().cpu_seconds
    time.sleep(0.3)
    assert machine.metrics().cpu_seconds - before < 0.1
    assert machine.commands.run("echo on").stdout == "on\n" and not machine.info().paused
    machine.commands.kill(handle.id)


@pytest.mark.skipif(not ROOT, reason="no freezer cgroup that this user may use")
def test_a_paused_machine_can_be_taken_and_stays_paused(machine: Sandbox) -> None:
    machine.files.write("/tmp/paused", "yes")
    machine.pause()
    taken = machine.snapshot()
    assert machine.info().paused
    with restored(taken) as sb:
        assert sb.files.read("/tmp/paused") == "yes"
    assert machine.info().paused and images.remove_image(taken.name)
    machine.resume()


# --- the ports ---


async def test_each_client_has_a_port_and_the_one_too_many_is_told(machine: Sandbox, state: StateDir) -> None:
    address = record(machine, state)["guest"]
    clients = []
    with pytest.raises(GuestGone, match="all 8 ports"):
        while True:
            clients.append(await GuestClient.connect(address, timeout=5 if len(clients) < 7 else 0.3))
    assert len(clients) == PORTS - 1  # the machine's own is the eighth
    for client in clients:
        assert client.info.pid == 1
        await client.close()
    async with await GuestClient.connect(address, timeout=10) as client:
        assert await client.exists("/etc/passwd")


@pytest.mark.parametrize(
    "left",
    [
        b"\x00\x00\x01\x00\x10\x00\x00\x00half a frame",
        b"\xff" * 5000,
        b"\x7d\x00\x7d\x7d" * 100,
        b"\x7e" * 100 + b"0123456789abcdeX",
        b"\x7d",
    ],
    ids=["half a frame", "a huge frame", "bad escapes", "beginnings without end", "half an escape"],
)
async def test_a_client_that_leaves_rubbish_behind_does_not_hurt_the_next(
    machine: Sandbox, state: StateDir, left: bytes
) -> None:
    address = record(machine, state)["guest"]
    for _ in range(3):
        dialed = await dial(Address.parse(address))
        dialed.sock.setblocking(True)
        dialed.sock.sendall(left)
        dialed.close()
        async with await GuestClient.connect(address, timeout=10) as client:
            assert await client.read_file("/etc/hostname", limit=100) is not None
    assert machine.info().id == machine.id


async def test_a_client_that_breaks_the_protocol_is_hung_up_on_and_told(
    machine: Sandbox, state: StateDir
) -> None:
    dialed = await dial(Address.parse(record(machine, state)["guest"]))
    dialed.sock.setblocking(True)
    dialed.sock.settimeout(10)
    codec = dialed.codec
    assert codec is not None
    dialed.sock.sendall(PortCodec.encode(b"\x04\x00\x00\x00\x99\x00\x00\x00\x01\x00\x00\x00abcd"))
    raw = b""
    while not raw.endswith(b"\x7e"):  # an ERROR with id 0, then the end of this connection
        raw += dialed.sock.recv(4096)
    assert b"HELLO" in raw
    dialed.close()


async def test_many_bytes_go_both_ways_unchanged(machine: Sandbox, state: StateDir) -> None:
    data = bytes(range(256)) * 4096 + b"\x7d\x7e" * 100_000
    async with await GuestClient.connect(record(machine, state)["guest"], timeout=10) as client:
        await client.write_file("/tmp/bytes", data)
        assert await client.read_file("/tmp/bytes") == data
        await client.remove("/tmp/bytes")


# --- snapshots ---


def test_a_restored_machine_goes_on_where_it_was_as_one_of_its_own(
    machine: Sandbox, snapshot: Snapshot
) -> None:
    assert snapshot.memory and snapshot.parent == "base"
    ids = (
        "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1"
    )
    seen = []
    for _ in range(2):
        with restored(snapshot) as sb:
            first = int(sb.commands.run("cat /tmp/count").stdout)
            wait_until(lambda: int(sb.commands.run("cat /tmp/count").stdout or 0) > first)  # noqa: B023
            assert sb.files.read("kept") == "before\n"
            assert abs(float(sb.commands.run("date +%s.%N").stdout) - time.time()) < 5
            assert sb.info().memory_mb == 192 and any(machine.id in note for note in sb.info().notes)
            seen.append(sb.commands.run(ids).stdout.split("\n"))
            assert seen[-1][0] == sb.id
    for mine, other in zip(*seen, strict=True):
        assert mine != other or not mine
    assert machine.files.read("kept") == "after\n"


def test_forked_machines_share_memory_until_they_write(machine: Sandbox, state: StateDir) -> None:
    machine.files.write("/tmp/who", "parent")
    children = machine.fork(count=2)
    try:
        for child in children:
            assert child.commands.run("cat /tmp/who").stdout == "parent"
            child.commands.run(f"echo {child.id} > /tmp/who")
        assert [child.commands.run("cat /tmp/who").stdout.strip() for child in children] == [
            child.id for child in children
        ]
        assert machine.commands.run("cat /tmp/who").stdout == "parent"
        smaps = Path(f"/proc/{record(children[0], state)['init_pid']}/smaps").read_text()
        ram = re.search(r"memfd:rorqual-ram[^\n]*\n(?:[A-Za-z_]+:[^\n]*\n)*", smaps)
        assert ram is not None
        shared = int(re.search(r"Shared_Dirty: +(\d+)", ram[0])[1])  # type: ignore[index]
        private = int(re.search(r"Private_Dirty: +(\d+)", ram[0])[1])  # type: ignore[index]
        assert shared > 1000 and private < 100_000
        again = children[0].snapshot()
        with restored(again) as sb:
            assert sb.commands.run("cat /tmp/who").stdout.strip() == children[0].id
        assert again.parent == "base" and images.remove_image(again.name)
    finally:
        for child in children:
            child.kill()
    assert not list(state.images.glob(".fork-*"))


def test_a_disk_on_the_host_is_part_of_the_snapshot(machine: Sandbox) -> None:
    with Sandbox.create(**{**SMALL, "disk_mb": None}) as sb:
        assert int(sb.commands.run("df -BG --output=size / | tail -1").stdout.strip(" G\n")) > 50
        sb.commands.run("echo old > file; head -c 50000000 /dev/zero > big; sync", timeout=60)
        taken = sb.snapshot()
        sb.commands.run("echo new > file; sync")
        with restored(taken, disk_mb=None) as other:
            assert other.commands.run(
                "cat file; stat -c %s big; echo mine > file; cat file"
            ).stdout.split() == [
                "old",
                "50000000",
                "mine",
            ]
        assert sb.files.read("file") == "new\n"
        assert images.remove_image(taken.name)


def test_what_a_snapshot_cannot_change_is_refused(snapshot: Snapshot) -> None:
    for fields, words in (
        ({"memory_mb": 1024}, "192"),
        ({"pids": 9}, "48"),
        ({"disk_mb": None}, "32"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            restored(snapshot, **fields)
    with pytest.raises(Unsupported, match="layers"):
        restored(snapshot, layers=["base"])
    with pytest.raises(Unsupported, match="substrate='microvm'"):
        Sandbox.create(image=snapshot)


@pytest.mark.parametrize("damage", ["state", "ram", "layer", "json", "version", "machine"])
def test_a_damaged_snapshot_is_a_clear_error_and_leaves_nothing(
    snapshot: Snapshot, state: StateDir, damage: str
) -> None:
    bad = state.images / "damaged"
    shutil.copytree(state.images / snapshot.name, bad, copy_function=os.link)
    data = json.loads((bad / "image.json").read_text())
    error: type[Exception] = ImageRejected
    try:
        if damage == "state":
            (bad / "state").unlink()
            (bad / "state").write_bytes(b"QEVM\x00\x00\x00\x03" + b"\x99" * 4096)
            error, words = LaunchFailed, "VMM exited|migrat"
        elif damage == "ram":
            (bad / "ram").unlink()
            (bad / "ram").write_bytes(b"short")
            words = "5 bytes.*192 MiB"
        elif damage == "layer":
            data["machine"]["layers"] = ["/no/such/layer.erofs"]
            words = "/no/such/layer.erofs is gone"
        elif damage == "version":
            data["machine"]["version"] = "0.9"
            words = "0.9 took it"
        elif damage == "machine":
            del data["machine"]
            words = "does not describe a machine"
        else:
            words = "cannot be read"
        (bad / "image.json").unlink()
        (bad / "image.json").write_text("{" if damage == "json" else json.dumps(data))
        with pytest.raises(error, match=words):
            Sandbox.create(substrate="microvm", image="damaged")
    finally:
        shutil.rmtree(bad)


@pytest.mark.skipif(not ROOT, reason="a small file system of its own needs root")
def test_a_snapshot_that_finds_the_disk_full_is_none_and_the_machine_runs_on(
    machine: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "small", small], check=True)
    try:
        monkeypatch.setenv("RORQUAL_STATE", str(small))
        with Sandbox.create(**SMALL, trajectory=tmp_path / "log.db") as sb:
            with pytest.raises(SandboxError, match="No space left"):
                sb.snapshot()
            assert sb.commands.run("echo on").stdout == "on\n"
            assert not [path for path in (small / "images").iterdir() if "base" not in path.name]
        keeper = own_keeper(StateDir.from_environment())
        keeper.close()
    finally:
        shutil.rmtree(StateDir.from_environment().run, ignore_errors=True)
        subprocess.run(["umount", "-l", small], check=True)


# --- the network ---


@pytest.mark.skipif(lacking() is not None, reason=str(lacking()))
def test_a_networked_machine_reaches_its_name_server_and_nothing_else(machine: Sandbox) -> None:
    with Sandbox.create(**SMALL, network=NetworkPolicy()) as sb:
        probe = (
            "import socket\n"
            "try: socket.gethostbyname('example.com')\nexcept OSError as e: print('name:', e)\n"
            "s = socket.socket(); s.settimeout(2)\n"
            "try: s.connect(('169.254.169.254', 80)); print('reached')\nexcept OSError as e: print('metadata:', e)\n"
        )
        result = sb.commands.run(["python3", "-c", probe], timeout=60)
        assert "name:" in result.stdout and "metadata:" in result.stdout and "reached" not in result.stdout
        assert any(event.what == "example.com" for event in sb.network_log().events)
    assert machine.commands.run("ls /sys/class/net").stdout.split() == ["lo"]


# --- ends ---


def ending(sb: Sandbox) -> SandboxEnded:
    with pytest.raises((SandboxEnded, GuestError)) as caught:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            sb.commands.run("sleep 0.1")
    assert isinstance(caught.value, SandboxEnded), caught.value
    return caught.value


KILL_THE_AGENT = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] * 2
regs = (ctypes.c_ulong * 27)()
assert libc.ptrace(16, 1, None, None) == 0  # attach to process 1
os.waitpid(1, 0x40000000)
libc.ptrace(12, 1, None, regs)
regs[16] = 0  # its next instruction lies nowhere
libc.ptrace(13, 1, None, regs)
libc.ptrace(17, 1, None, None)
"""


@pytest.mark.parametrize(
    ("how", "cause", "words"),
    [
        ("echo c > /proc/sysrq-trigger", "infra", "kernel panicked: sysrq triggered crash"),
        ("echo b > /proc/sysrq-trigger", "exited", "rebooted"),
        (KILL_THE_AGENT, "infra", "the guest agent died"),
    ],
    ids=["panic", "reboot", "agent killed"],
)
def test_the_end_of_a_machine_has_a_cause(snapshot: Snapshot, how: str, cause: str, words: str) -> None:
    with restored(snapshot) as sb:
        command: Any = ["python3", "-c", how] if how == KILL_THE_AGENT else how
        sb.commands.run(command, user="root", background=True)
        error = ending(sb)
        assert error.cause == cause and words in error.detail, error


def test_a_killed_monitor_is_an_end_with_a_cause(snapshot: Snapshot, state: StateDir) -> None:
    with restored(snapshot) as sb:
        os.kill(record(sb, state)["init_pid"], signal.SIGKILL)
        error = ending(sb)
        assert error.cause == "infra" and "signal 9" in error.detail


async def test_a_killed_keeper_takes_its_machines_along(snapshot: Snapshot, state: StateDir) -> None:
    sb = await AsyncSandbox.create(substrate="microvm", image=snapshot)
    data = json.loads((state.sandboxes / sb.id / "record.json").read_text())
    os.kill(own_keeper(state)._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    wait_until(lambda: not Path(f"/proc/{data['init_pid']}").exists())
    with pytest.raises(SandboxEnded) as caught:
        await sb.commands.run("true")
    assert caught.value.cause == "infra"
    await sb.close()
    wait_until(lambda: not (state.sandboxes / sb.id).exists())


ROOTLESS = """
import json
from rorqual.sandbox import Sandbox, Unsupported
with Sandbox.create(substrate="microvm", vmm="qemu", memory_mb=160, disk_mb=16, accelerated=False) as sb:
    sb.files.write("a", "kept")
    taken = sb.snapshot()
    try: sb.pause()
    except Unsupported as error: refused = str(error)
    limits = sb.info().limits
with Sandbox.create(substrate="microvm", image=taken) as sb:
    print(json.dumps([sb.files.read("a"), sb.commands.run("id -un").stdout, refused, dict(limits)]))
"""


@pytest.mark.skipif(
    not ROOT, reason="becoming another user needs root; as that user, every other test is this one"
)
def test_a_user_who_is_not_root_gets_a_machine_without_jail_and_cgroup(
    machine: Sandbox, state: StateDir
) -> None:
    if not os.access("/usr/bin/python3", os.X_OK) or shutil.which("setpriv") is None:
        pytest.skip("needs /usr/bin/python3 and setpriv")
    place = Path(tempfile.mkdtemp(prefix="rq-rootless-", dir="/tmp"))
    try:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(images.__file__).parents[2], place / "lib/rorqual", ignore=ignored)
        shutil.copytree(Path(qemu.qmp.__file__).parent, place / "lib/qemu/qmp", ignore=ignored)
        kernel = find_kernel().bzimage.parent
        shutil.copytree(kernel, place / "cache/kernels" / kernel.name)
        base = base_layer(state=state)
        (place / "cache/guests").mkdir()
        shutil.copy(base, place / "cache/guests" / base.name)
        (place / "state").mkdir()
        subprocess.run(["chown", "-R", "nobody", place], check=True)
        env = {"PATH": os.environ["PATH"], "HOME": str(place), "PYTHONPATH": str(place / "lib")}
        env |= {"RORQUAL_STATE": str(place / "state"), "RORQUAL_CACHE": str(place / "cache")}
        user = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
        done = subprocess.run(
            [*user, "/usr/bin/python3", "-c", ROOTLESS],
            env=env,
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        kept, name, refused, limits = json.loads(done.stdout)
        assert (kept, name) == ("kept", "user\n") and "freezer" in refused
        assert limits == {"memory": "machine", "pids": "guest", "cpu": "none", "disk": "guest"}
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.5])
async def test_a_cancelled_create_leaves_nothing(snapshot: Snapshot, state: StateDir, seconds: float) -> None:
    before = set(os.listdir(state.sandboxes))
    for fields in (SMALL, {"substrate": "microvm", "image": snapshot}):
        task = asyncio.create_task(AsyncSandbox.create(**fields))
        await asyncio.wait([task], timeout=seconds)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
        else:  # it was quicker
            await task.result().kill()
        wait_until(lambda: set(os.listdir(state.sandboxes)) <= before)


def test_the_sockets_of_a_machine_are_its_own_users(snapshot: Snapshot, state: StateDir) -> None:
    with restored(snapshot) as sb:
        place = state.sandboxes / sb.id / "vm"
        names = {path.name for path in place.iterdir()}
        assert {"qmp.sock", "agent-0.sock", "agent-7.sock"} <= names
        assert all(socket.socket and path.stat().st_mode & 0o077 == 0 for path in place.iterdir())
    assert not place.exists()
