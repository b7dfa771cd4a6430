# ruff: noqa: ASYNC240, F401, F811 - tests look at local files and take fixtures of test_guest.py
"""What only a machine's agent does: REFRESH after a restore or fork, and listening on vsock.

The agent runs for real, in namespaces of its own, so that host name, machine id and boot id are not this host's. That
the clock of a real guest moves is in the tests of the microVM.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import _protocol as wire
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox._protocol import Type
from rorqual.sandbox.errors import GuestRefused
from tests.sandbox.test_guest import HELLO, ROOT, Agent, Raw, agent, binary, junk_frame, sh

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE_ID = "0123456789abcdef" * 2


class Machine(Agent):
    """An agent that believes it owns its kernel, with a host name, an /etc and mounts of its own."""

    def __init__(self, binary: Path, folder: Path, *, unshare: str) -> None:
        self.path = folder / "agent.sock"
        script = (
            'mount -t tmpfs etc /etc && echo before > /etc/hostname && exec "$0" --socket "$1" --own-kernel'
        )
        env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        self.process = subprocess.Popen(
            ["unshare", *unshare.split(), "sh", "-c", script, binary, self.path],
            env=env,
            stderr=subprocess.PIPE,
        )


@pytest.fixture
def machine(binary: Path, tmp_path: Path) -> Iterator[Machine]:
    if not ROOT:
        pytest.skip("crediting entropy needs root")
    running = Machine(binary, tmp_path, unshare="--uts --mount")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def weak(binary: Path, tmp_path: Path) -> Iterator[Machine]:
    """In a user namespace: neither the clock nor the random generator are its own."""
    if subprocess.run(["unshare", "-Ur", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this host makes no user namespaces for us")
    running = Machine(binary, tmp_path, unshare="-U -r --uts --mount")
    try:
        yield running
    finally:
        running.stop()


async def test_a_refreshed_machine_has_its_own_names_and_boot_ids(machine: Machine) -> None:
    look = "uname -n; cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id"
    here = (os.uname().nodename, BOOT_ID.read_text())
    seen = []
    async with await GuestClient.connect(machine.path) as client:
        first = client.info.boot_id
        for name, ident in (("twin-1", MACHINE_ID), ("twin-2.lan", MACHINE_ID[::-1])):
            await client.refresh(hostname=name, machine_id=ident, entropy=os.urandom(64))
            out, err, _ = await sh(client, look)
            assert (out.decode().split()[:3], err) == ([name, name, ident], b"")
            seen.append(out.decode().split()[3])
        async with await GuestClient.connect(machine.path) as second:
            assert second.info.boot_id != first
        out, _, _ = await sh(client, "grep -c random/boot_id /proc/self/mountinfo; ls -a /dev | grep rorqual")
        assert out == b"1\n"  # refreshes do not pile up
    assert len({*seen, here[1].strip()}) == 3
    assert (os.uname().nodename, BOOT_ID.read_text()) == here


async def test_what_a_refresh_leaves_out_stays_as_it_is(machine: Machine) -> None:
    look = "uname -n; cat /etc/hostname /proc/sys/kernel/random/boot_id; ls /etc/machine-id 2>&1 | grep -c cannot"
    async with await GuestClient.connect(machine.path) as client:
        before, _, _ = await sh(client, look)
        await client.refresh()
        after, _, _ = await sh(client, look)
        assert before == after and before.endswith(b"\n1\n")


async def test_a_command_from_before_a_refresh_can_still_be_killed(machine: Machine) -> None:
    async with await GuestClient.connect(machine.path) as client:
        running = await client.start(["sh", "-c", "setsid sleep 100 & echo $!; sleep 100"])
        async for _, data in running.events():
            stray = int(data)
            break
        await client.refresh(entropy=os.urandom(32))
        await client.kill(running.pid)
        assert (await running.wait()).signal == 9
        assert (await sh(client, f"kill -0 {stray}"))[2].exit_code == 1


async def test_links_planted_under_etc_are_replaced_not_followed(machine: Machine, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    async with await GuestClient.connect(machine.path) as client:
        for name in ("machine-id", "machine-id.rorqual", "hostname", "hostname.rorqual"):
            await sh(client, f"ln -sf {victim} /etc/{name}")
        await client.refresh(hostname="new", machine_id=MACHINE_ID)
        out, _, _ = await sh(client, "cat /etc/machine-id; stat -c %F%a /etc/machine-id /etc/hostname")
    assert out.decode().splitlines() == [MACHINE_ID, "regular file444", "regular file644"]
    assert victim.read_text() == "mine"


async def test_an_agent_that_shares_its_kernel_refuses(agent: Agent) -> None:
    before = os.uname().nodename
    async with await GuestClient.connect(agent.path) as client:
        with pytest.raises(GuestRefused, match="shares its kernel") as caught:
            await client.refresh(hostname="stolen", entropy=os.urandom(64), clock=True)
        assert caught.value.errno == errno.EPERM
        assert (await sh(client, "echo on"))[0] == b"on\n"
    assert os.uname().nodename == before


async def test_a_step_that_fails_is_named(weak: Machine) -> None:
    async with await GuestClient.connect(weak.path) as client:
        with pytest.raises(GuestRefused, match="cannot set the clock") as caught:
            await client.refresh(clock=True)
        assert caught.value.errno == errno.EPERM
        with pytest.raises(GuestRefused, match="cannot credit the entropy"):
            await client.refresh(entropy=os.urandom(64))
        await client.refresh(hostname="weak")
        await sh(client, "rm /etc/hostname; mkdir /etc/machine-id.rorqual")
        with pytest.raises(GuestRefused, match="cannot write /etc/machine-id"):
            await client.refresh(machine_id=MACHINE_ID)
        assert (await sh(client, "uname -n"))[0] == b"weak\n"


def payload(*, wall: int = 0, name: bytes = b"", ident: bytes = b"", entropy: bytes = b"") -> bytes:
    return wire.u64(wall) + wire.u32(len(name)) + name + wire.u32(len(ident)) + ident + entropy


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        payload()[:-1],
        payload(wall=2**63),
        payload(name=b"-a"),
        payload(name=b"a b"),
        payload(name=b"a/b"),
        payload(name=b"a."),
        payload(name=b"a" * 65),
        payload(name=b"a\0b"),
        payload(ident=b"0" * 31),
        payload(ident=b"0" * 33),
        payload(ident=b"G" * 32),
        payload(entropy=bytes(31)),
        payload(entropy=bytes(513)),
        payload(entropy=bytes(70_000)),
        wire.u64(0) + b"\xff\xff\xff\xff" + bytes(40),
    ],
)  # fmt: skip
def test_a_malformed_refresh_ends_the_connection(agent: Agent, bad: bytes) -> None:
    assert b"malformed REFRESH" in Raw(agent.path).say(HELLO + junk_frame(Type.REFRESH, 1, bad))
    assert Raw(agent.path).say(HELLO)[4] == Type.WELCOME


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"hostname": "a b"}, "hostname"),
        ({"hostname": "-a"}, "hostname"),
        ({"hostname": "a" * 65}, "hostname"),
        ({"machine_id": "A" * 32}, "machine_id"),
        ({"machine_id": "0" * 31}, "machine_id"),
        ({"entropy": bytes(31)}, "entropy has 31"),
        ({"entropy": bytes(513)}, "entropy has 513"),
    ],
)
async def test_a_bad_identity_never_leaves_the_host(
    agent: Agent, wrong: dict[str, object], says: str
) -> None:
    async with await GuestClient.connect(agent.path) as client:
        with pytest.raises(ValueError, match=says):
            await client.refresh(**wrong)  # type: ignore[arg-type]


# --- vsock ---


def test_a_vsock_port_that_is_none_is_wrong_use(binary: Path) -> None:
    for arguments in (["--vsock", "0"], ["--vsock", "x"], ["--vsock", "5", "--socket", "y"]):
        done = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 2 and "--vsock PORT" in done.stderr


def test_only_the_host_may_speak_over_vsock(binary: Path) -> None:
    """From inside the guest the port can be reached through the loopback of vsock: hung up on."""
    port = 20_000 + os.getpid() % 10_000
    with contextlib.ExitStack() as stack:
        try:
            probe = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
            probe.bind((socket.VMADDR_CID_ANY, port))
            probe.listen()
            there = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
            there.settimeout(0.5)
            there.connect((1, port))
        except OSError as error:
            pytest.skip(f"this kernel has no vsock loopback: {error}")
    running = subprocess.Popen([binary, "--vsock", str(port)], stderr=subprocess.PIPE)
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
            client.settimeout(5)
            deadline = time.monotonic() + 20
            while client.connect_ex((1, port)) and time.monotonic() < deadline:
                time.sleep(0.01)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(HELLO)
                assert client.recv(100) == b""
    finally:
        running.terminate()
        _, complaints = running.communicate(timeout=20)
    assert (running.returncode, complaints) == (0, b"")
