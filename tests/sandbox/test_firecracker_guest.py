"""Firecracker with guests, through the SDK. Runs where /dev/kvm boots one; nested/ runs it in an emulated host.

One machine serves most tests, in the order of the file: on an emulated host a boot takes seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import (
    InvalidRequest,
    NetworkPolicy,
    Sandbox,
    SandboxEnded,
    Snapshot,
    Unsupported,
    images,
)
from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.network.order import lacking
from rorqual.sandbox.state import StateDir, cache_dir
from rorqual.sandbox.substrates.microvm import VMMS

VMM = VMMS["firecracker"]
LOOK = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/boot_id /etc/machine-id; hostname; date +%s"
PROGRAMS = (
    "cat", "date", "dd", "echo", "free", "head", "hostname", "id", "kill", "ls", "mkdir", "nc", "od", "rm", "seq", "sh",
    "sleep", "touch", "true", "uname", "wc",
)  # fmt: skip


def _why_not() -> str:
    try:
        VMM.accelerator()
    except HostUnfit as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """busybox and nothing else: on an emulated host, copying a whole base would take most of the time."""
    why = _why_not()
    if why:
        pytest.skip(why)
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("the guest is made of busybox: apt-get install busybox-static")
    tree = tmp_path_factory.mktemp("tiny")
    tree.chmod(0o755)
    (tree / "bin").mkdir()
    shutil.copy(busybox, tree / "bin/busybox")
    for name in PROGRAMS:
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "tmp").mkdir()
    (tree / "tmp").chmod(0o1777)
    return tree


@pytest.fixture(scope="module")
def image(state: StateDir, tree: Path) -> str:
    images.import_directory(tree, name="tiny", state=state)
    return "tiny"


@pytest.fixture(scope="module")
def machine(image: str) -> Iterator[Sandbox]:
    with Sandbox.create(
        substrate="microvm",
        vmm="firecracker",
        image=image,
        memory_mb=128,
        disk_mb=32,
        user="root",
        timeout=600,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def snapshot(machine: Sandbox) -> Snapshot:
    """Taken with a clock that is years behind, and with a command that runs."""
    machine.commands.run(
        "date -s 2001-01-01; echo kept > /root/kept; (while :; do sleep 1; done) & echo $! > /root/pid"
    )
    return machine.snapshot()


def vmm_of(sandbox: Sandbox) -> int:
    record = StateDir.from_environment().sandboxes / sandbox.id / "record.json"
    return int(re.search(r'"init_pid": ?([0-9]+)', record.read_text())[1])  # type: ignore[index]


def test_it_boots_and_says_what_it_is(machine: Sandbox) -> None:
    info = machine.info()
    assert (info.substrate, info.runtime, info.memory_mb) == ("microvm", "firecracker", 128)
    assert any("runs with KVM" in note for note in info.notes), info.notes
    assert machine.commands.run("uname -r").stdout.strip().endswith("-amd64")
    assert machine.commands.run("cat /proc/1/cmdline").stdout.startswith("/init")


def test_its_vmm_is_jailed(machine: Sandbox) -> None:
    if os.geteuid():
        pytest.skip("the jailer needs root")
    pid = vmm_of(machine)
    status = Path(f"/proc/{pid}/status").read_text()
    assert int(re.search(r"Uid:\t([0-9]+)", status)[1]) > 1_000_000  # type: ignore[index]
    assert (
        "CapEff:\t0000000000000000" in status
        and "Seccomp:\t2" in Path(f"/proc/{pid}/task/{pid}/status").read_text()
    )
    seen = sorted(os.listdir(f"/proc/{pid}/root"))
    assert set(seen) >= {"kernel", "initrd", "layer0", "v.sock"} and "usr" not in seen and "etc" not in seen
    assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def test_commands(machine: Sandbox) -> None:
    done = machine.commands.run("echo out; echo err >&2; echo $X; id -u; exit 3", envs={"X": "y"})
    assert (done.stdout, done.stderr, done.exit_code) == ("out\ny\n0\n", "err\n", 3)
    other = machine.commands.run("id -u", user="user", cwd="/")
    assert (other.stdout, other.error) == ("1000\n", "")
    late = machine.commands.run("echo began; sleep 100", timeout=1)
    assert late.timed_out and late.stdout == "began\n"
    assert machine.commands.run("seq 20000").stdout == "".join(f"{n}\n" for n in range(1, 20001))


def test_files(machine: Sandbox) -> None:
    data = os.urandom(200_000)
    machine.files.write("/root/data", data)
    assert machine.files.read("/root/data", format="bytes") == data
    assert machine.commands.run("wc -c < /root/data").stdout.strip() == "200000"
    assert "data" in [entry.name for entry in machine.files.list("/root")]


def test_there_is_no_network_and_no_host(machine: Sandbox) -> None:
    assert sorted(machine.commands.run("ls /sys/class/net").stdout.split()) == ["lo"]
    assert not machine.files.exists("/work") and not machine.files.exists("/nested-command")
    full = machine.commands.run("dd if=/dev/zero of=/root/full bs=1M count=100; rm -f /root/full; true")
    assert "No space left" in full.stderr


def test_a_paused_one_is_resumed_by_the_next_call(machine: Sandbox) -> None:
    if not cgroups.can_freeze():
        pytest.skip("no freezer cgroup here")
    ticking = machine.commands.run("while :; do echo tick; sleep 0.2; done", background=True, timeout=60)
    machine.pause()
    assert machine.info().paused
    assert machine.commands.run("echo on").stdout == "on\n"
    assert not machine.info().paused and ticking.kill()


def test_its_memory_is_given_back_by_the_balloon(machine: Sandbox) -> None:
    used = lambda: int(machine.commands.run("free -m").stdout.split()[8])  # noqa: E731
    before = used()
    assert machine.set_memory(100) == 100
    assert used() >= before + 20  # what the balloon holds
    assert machine.set_memory(128) == 128
    assert used() < before + 20
    for wrong in (15, 129):
        with pytest.raises(InvalidRequest, match="from 16 to the machine's 128 MiB"):
            machine.set_memory(wrong)


def test_it_runs_on_while_it_is_taken(machine: Sandbox, snapshot: Snapshot) -> None:
    assert snapshot.memory and snapshot.name.startswith("snap-") and snapshot.size_bytes > 1 << 20
    assert machine.commands.run("kill -0 $(cat /root/pid) && cat /root/kept").stdout == "kept\n"
    process = machine.commands.run("echo one; sleep 4; echo two", background=True)
    machine.snapshot()
    done = process.wait()
    assert (done.stdout, done.exit_code) == ("one\ntwo\n", 0)


def test_a_snapshot_goes_on_where_it_was_taken(machine: Sandbox, snapshot: Snapshot) -> None:
    there = machine.commands.run(LOOK).stdout.split()
    machine.files.write("/root/later", b"")
    with Sandbox.create(substrate="microvm", vmm="firecracker", image=snapshot, timeout=300) as again:
        assert again.commands.run("kill -0 $(cat /root/pid) && cat /root/kept").stdout == "kept\n"
        assert not again.files.exists("/root/later")
        here = again.commands.run(LOOK).stdout.split()
        assert abs(int(here[-1]) - time.time()) < 60, "its clock was in 2001"
        assert here[-2] == again.id and here[-4:-2] != there[-4:-2]


def test_children_of_a_fork_are_themselves(machine: Sandbox, snapshot: Snapshot) -> None:
    machine.commands.run("echo forked > /root/forked")
    twins = machine.fork(count=2)
    try:
        looks = [twin.commands.run(LOOK).stdout.split() for twin in twins]
        for position in range(len(looks[0]) - 1):  # random bytes, boot id, machine id, host name
            if position < 16:
                continue
            assert looks[0][position] != looks[1][position]
        assert looks[0][:16] != looks[1][:16]
        for twin, look in zip(twins, looks, strict=True):
            assert look[-2] == twin.id and abs(int(look[-1]) - time.time()) < 60
            assert twin.commands.run("cat /root/forked").stdout == "forked\n"
            twin.files.write("/root/own", twin.id.encode())
        assert {twin.files.read("/root/own", format="bytes") for twin in twins} == {
            twin.id.encode() for twin in twins
        }
        assert not machine.files.exists("/root/own")
    finally:
        for twin in twins:
            twin.kill()


WORLD = """
ip netns add world
ip link add up0 type veth peer name down0 netns world
ip addr add 203.0.113.2/24 dev up0
ip link set up0 up
ip -n world addr add 203.0.113.1/24 dev down0
ip -n world addr add 93.184.216.34/32 dev lo
ip -n world link set lo up
ip -n world link set down0 up
ip route add 93.184.216.34/32 via 203.0.113.1
"""


@pytest.fixture
def world() -> Iterator[None]:
    """A server in a network beyond a router: http://93.184.216.34:8001, and the same on 8002."""
    problem = lacking()
    if problem is not None:
        pytest.skip(str(problem))
    servers = []
    try:
        subprocess.run(["sh", "-ec", WORLD], check=True)
        for port in ("8001", "8002"):
            answer = f"while :; do echo port {port} | busybox nc -l -p {port}; done"
            servers.append(subprocess.Popen(["ip", "netns", "exec", "world", "sh", "-c", answer]))
        yield
    finally:
        for server in servers:
            server.kill()
            server.wait()
        subprocess.run(
            ["sh", "-c", "ip netns pids world | xargs -r kill -9; ip netns del world; ip link del up0"],
            check=False,
        )


def test_it_reaches_what_its_policy_names_and_nothing_else(image: str, world: None) -> None:
    policy = NetworkPolicy(allow=["93.184.216.34:8001"])
    with Sandbox.create(
        substrate="microvm", vmm="firecracker", image=image, memory_mb=128, network=policy
    ) as guest:
        assert sorted(guest.commands.run("ls /sys/class/net").stdout.split()) == ["eth0", "lo"]
        for port, answer in (("8001", "port 8001\n"), ("8002", ""), ("8001", "port 8001\n")):
            assert guest.commands.run(f"nc -w 10 93.184.216.34 {port} < /dev/null").stdout == answer


ROOTLESS = """
import os, sys
from rorqual.sandbox import Sandbox, images
images.import_directory(sys.argv[1], name="tiny")
with Sandbox.create(substrate="microvm", vmm="firecracker", image="tiny", memory_mb=128, disk_mb=16) as sb:
    assert sb.commands.run("echo 1 > /tmp/step; id -u").stdout == "1000\\n"
    assert any("no jailer" in note for note in sb.info().notes), sb.info().notes
    with Sandbox.create(substrate="microvm", vmm="firecracker", image=sb.snapshot()) as again:
        assert again.commands.run("cat /tmp/step; hostname").stdout == f"1\\n{again.id}\\n"
print("done")
"""


def test_without_root_it_runs_without_a_jailer(image: str, tree: Path) -> None:
    if os.geteuid():
        pytest.skip("this file runs without root already")
    place = Path("/tmp/rootless")
    shutil.copytree(tree, place / "tree", symlinks=True)
    (place / "cache").mkdir()
    for name in ("bin", "kernels"):
        (place / "cache" / name).symlink_to(cache_dir() / name)
    subprocess.run(["chown", "-R", "-h", "1000:1000", place], check=True)
    mode = os.stat("/dev/kvm").st_mode
    os.chmod("/dev/kvm", 0o666)
    someone = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups")
    homes = {"HOME": str(place), "RORQUAL_STATE": f"{place}/state", "RORQUAL_CACHE": f"{place}/cache"}
    try:
        done = subprocess.run(
            [*someone, sys.executable, "-c", ROOTLESS, "tree"],
            cwd=place,
            env=os.environ | homes,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.chmod("/dev/kvm", mode)
        shutil.rmtree(place)
    assert done.stdout == "done\n", done.stderr[-3000:]


def test_the_example_of_the_docs_runs(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2].joinpath("docs/sandbox-machines.md").read_text(encoding="utf-8")
    example = re.search(r"^```python no-run\n((?:(?!```).)*vmm=\"firecracker\".*?)^```$", page, re.S | re.M)
    assert example is not None
    exec(compile(example[1].replace('"base"', f'"{image}"'), "docs/sandbox-machines.md", "exec"), {})
    printed = capsys.readouterr().out.split()
    assert printed[1::2] == ["1", "1"] and len({*printed[::2]}) == 2


def test_what_it_cannot_do_is_refused(image: str) -> None:
    with pytest.raises(Unsupported, match="has KVM and nothing else"):
        Sandbox.create(substrate="microvm", vmm="firecracker", image=image, accelerated=False)


def test_a_machine_that_dies_ends_with_a_cause_and_leaves_nothing(machine: Sandbox, state: StateDir) -> None:
    pid = vmm_of(machine)
    os.kill(pid, 9)
    with pytest.raises(SandboxEnded) as caught:
        machine.commands.run("true")
    assert caught.value.cause == "infra" and "signal 9" in caught.value.detail
    assert not (state.sandboxes / machine.id).exists()
