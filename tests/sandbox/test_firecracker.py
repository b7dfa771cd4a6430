# ruff: noqa: ASYNC220, ASYNC221, ASYNC240 - tests look at local files and start programs
"""Firecracker's API and jailer, for real: the program starts and answers without KVM until a guest shall run.

That a guest boots is in test_firecracker_guest.py, inside of the emulated host of nested/ where this host has no KVM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rorqual.sandbox.errors import HostUnfit, InvalidRequest
from rorqual.sandbox.keeper import chroot
from rorqual.sandbox.machines import firecracker, firecracker_api, jailer
from rorqual.sandbox.machines.firecracker_api import (
    Balloon,
    BootSource,
    Drive,
    Entropy,
    FirecrackerApi,
    FirecrackerError,
    MachineConfig,
    NetworkInterface,
    Vsock,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_firecracker.py"
TAP = f"rqtap{os.getpid() % 100000}" if os.geteuid() == 0 and Path("/dev/net/tun").exists() else ""


@pytest.fixture(scope="session")
def program() -> Path:
    """Firecracker, fetched into the cache when it is not on this host."""
    with contextlib.suppress(HostUnfit):
        return firecracker.find_firecracker()
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no Firecracker, and none can be fetched: {done.stderr.strip()}")
    return firecracker.find_firecracker()


@pytest.fixture
def vmm(program: Path, tmp_path: Path) -> Iterator[Path]:
    """The API socket of a Firecracker that has configured nothing."""
    running = subprocess.Popen(
        [program, "--api-sock", "api.sock", "--id", "test", "--level", "Error"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield tmp_path / "api.sock"
    finally:
        running.kill()
        running.wait()


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[FirecrackerApi]:
    async with FirecrackerApi(path) as api:
        await api.wait_ready(timeout=20)
        yield api


# --- requests ---


async def test_a_machine_is_configured_device_by_device(vmm: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    (tmp_path / "vmlinux").write_bytes(b"\x7fELF")
    async with connected(vmm) as api:
        assert await api.wait_ready(timeout=20) == "1.12.1"
        await api.put(MachineConfig(vcpu_count=2, mem_size_mib=256))
        await api.put(BootSource(kernel_image_path="vmlinux", boot_args="quiet"))
        await api.put(Drive(drive_id="root", path_on_host="disk", is_read_only=True))
        await api.put(Vsock(guest_cid=3, uds_path="v.sock"))
        if TAP:  # made for the VMM, gone with it
            await api.put(NetworkInterface(iface_id="eth0", host_dev_name=TAP, guest_mac="06:00:ac:10:00:02"))
        await api.put(Balloon(amount_mib=16, stats_polling_interval_s=1))
        await api.put(Entropy())
        assert await api.state() == "Not started"
        got = await api._ask("GET", "/vm/config")
    assert got["machine-config"]["vcpu_count"] == 2 and got["machine-config"]["mem_size_mib"] == 256
    assert got["boot-source"] == {"kernel_image_path": "vmlinux", "initrd_path": None, "boot_args": "quiet"}
    assert got["drives"][0]["path_on_host"] == "disk" and got["drives"][0]["is_read_only"] is True
    assert got["vsock"] == {"guest_cid": 3, "uds_path": "v.sock"}
    if TAP:
        assert got["network-interfaces"][0]["guest_mac"] == "06:00:ac:10:00:02"
    assert got["balloon"]["amount_mib"] == 16 and got["balloon"]["deflate_on_oom"] is True
    assert got["entropy"] is not None


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (MachineConfig(vcpu_count=0, mem_size_mib=128), "number of vCPUs"),
        (MachineConfig(vcpu_count=33, mem_size_mib=128), "number of vCPUs"),
        (MachineConfig(vcpu_count=1, mem_size_mib=0), "memory size"),
        (BootSource(kernel_image_path="/nowhere", boot_args=""), "kernel file cannot be opened"),
        (BootSource(kernel_image_path="/dev/null", initrd_path="/nowhere", boot_args=""), "initrd file"),
        (Drive(drive_id="x", path_on_host="/nowhere", is_read_only=True), "/nowhere"),
        (Drive(drive_id="../x", path_on_host="/dev/null", is_read_only=True), "Invalid request"),
        (Vsock(guest_cid=3, uds_path="/nowhere/v.sock"), "vsock"),
        (NetworkInterface(iface_id="e", host_dev_name="lo", guest_mac="no"), "MAC"),
        (NetworkInterface(iface_id="e", host_dev_name="lo"), "tap"),
        (Balloon(amount_mib=100_000, deflate_on_oom=False), "balloon"),
    ],
)
async def test_what_firecracker_refuses_is_our_error_with_its_words(
    vmm: Path, request_: firecracker_api.Device, says: str
) -> None:
    async with connected(vmm) as api:
        with pytest.raises(FirecrackerError) as caught:
            await api.put(request_)
    assert says.lower() in str(caught.value).lower()
    assert caught.value.status == 400 and caught.value.request.startswith("PUT /")


async def test_calls_that_need_a_running_machine_are_refused_before(vmm: Path) -> None:
    async with connected(vmm) as api:
        for call in (
            api.start(),
            api.pause(),
            api.resume(),
            api.set_balloon(10),
            api.balloon(),
            api.create_snapshot(state="s", memory="m"),
            api.load_snapshot(state="nowhere", memory="nowhere", resume=True),
        ):
            with pytest.raises(FirecrackerError) as caught:
                await call
            assert caught.value.status == 400, caught.value


async def test_a_snapshot_that_is_none_is_refused(vmm: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(os.urandom(4096))
    (tmp_path / "memory").write_bytes(bytes(4096))
    async with connected(vmm) as api:
        with pytest.raises(FirecrackerError, match="snapshot"):
            await api.load_snapshot(state="state", memory="memory", resume=True, taps={"eth0": "tap0"})


# --- the socket and what may sit behind it ---


async def test_nobody_there_is_one_clear_error(tmp_path: Path) -> None:
    async with FirecrackerApi(tmp_path / "api.sock") as api:
        with pytest.raises(FirecrackerError, match="GET /version: it is gone") as caught:
            await api.wait_ready(timeout=0.1)
        assert caught.value.status == 0


async def test_a_link_or_file_in_the_sockets_place_is_not_followed(vmm: Path, tmp_path: Path) -> None:
    async with connected(vmm):
        pass
    (tmp_path / "link").symlink_to(vmm)
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        async with FirecrackerApi(tmp_path / name) as api:
            with pytest.raises(FirecrackerError, match="not a socket"):
                await api.wait_ready(timeout=0.1)


async def test_a_long_path_is_no_obstacle(program: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    running = subprocess.Popen(
        [program, "--api-sock", "api.sock", "--id", "test"], cwd=folder, stdout=subprocess.DEVNULL
    )
    try:
        async with connected(folder / "api.sock") as api:
            assert await api.state() == "Not started"
    finally:
        running.kill()
        running.wait()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "it is gone"),
        (b"SSH-2.0-OpenSSH\r\n", "it is gone"),
        (HEAD % 5 + b"[1,2]", "no object"),
        (HEAD % 4 + b"\xff\xfe{}", "not JSON"),
        (HEAD % (2 << 20) + b" " * (2 << 20), "more than"),
        (HEAD % 17 + b'{"state":"Hacked"', "not JSON"),
        (HEAD % 18 + b'{"state":"Hacked"}', "unknown state"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\n{}", "status 500"),
    ],
)
async def test_a_vmm_that_was_taken_over_cannot_hurt_its_client(
    tmp_path: Path, answer: bytes, says: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    async with server, FirecrackerApi(tmp_path / "s") as api:
        with pytest.raises(FirecrackerError, match=says):
            await api.state()


async def test_a_vmm_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    server = await asyncio.start_unix_server(silent, tmp_path / "s")
    async with server, FirecrackerApi(tmp_path / "s") as api:
        with pytest.raises(FirecrackerError, match=r"no answer in 0\.05 s"):
            await api._ask("GET", "/", deadline=0.05)
        over.set()


@pytest.mark.parametrize("wrong", [{"target_mib": -1}, {"target_mib": "1"}, {"free_memory": True}, {}])
async def test_statistics_of_the_guest_are_checked(tmp_path: Path, wrong: dict[str, object]) -> None:
    good: dict[str, object] = {"target_mib": 1, "actual_mib": 2, "free_memory": 3}
    sent = json.dumps(good | wrong if wrong else {}).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD % len(sent) + sent)
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    async with server, FirecrackerApi(tmp_path / "s") as api:
        with pytest.raises(FirecrackerError, match="does not fit"):
            await api.balloon()


# --- the program ---


def test_a_program_that_is_not_firecracker_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RORQUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostUnfit, match="no firecracker") as caught:
        firecracker.find_firecracker()
    assert "fetch_firecracker" in caught.value.fix and firecracker.find_jailer() is None
    fake = tmp_path / "firecracker"
    for text, says in (
        ("#!/bin/sh\necho hello\n", "not Firecracker"),
        ("#!/bin/sh\necho Firecracker v1.11.0\n", "1.11; 1.12 or newer"),
        ("\x7fELF nonsense", "does not run"),
    ):
        fake.write_text(text)
        fake.chmod(0o755)
        with pytest.raises(HostUnfit, match=says):
            firecracker.find_firecracker()
    fake.write_text("#!/bin/sh\necho Firecracker v1.13.2\n")
    assert firecracker.find_firecracker() == fake


# --- the jailer ---


def test_a_jail_that_the_jailer_would_refuse_is_not_tried() -> None:
    one = Path("/bin/jailer"), Path("/bin/firecracker"), []
    for wrong in ({"sandbox_id": "a/b"}, {"sandbox_id": "x" * 65}, {"sandbox_id": ""}, {"user": 0}):
        options = {"sandbox_id": "sb-1", "user": 5, "base": Path("/j")} | wrong
        with pytest.raises(InvalidRequest):
            jailer.argv(*one, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="named like"):
        jailer.argv(one[0], Path("/bin/vmm"), [], sandbox_id="sb-1", user=5, base=Path("/j"))


async def test_a_jailed_vmm_sees_its_own_files_and_is_nobody(program: Path, tmp_path: Path) -> None:
    tool = firecracker.find_jailer()
    if os.geteuid() or tool is None:
        pytest.skip("the jailer needs root" if os.geteuid() else "there is no jailer on this host")
    user = 0x70010000 + 64000
    inside = jailer.root(tmp_path, "sb-jail")
    inside.mkdir(parents=True)
    (inside / "vmlinux").write_bytes(b"\x7fELF")
    command = jailer.argv(
        tool, program, ["--api-sock", "api.sock"], sandbox_id="sb-jail", user=user, base=tmp_path
    )
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        async with connected(inside / "api.sock") as api:
            await api.put(BootSource(kernel_image_path="/vmlinux", boot_args=""))
            with pytest.raises(FirecrackerError, match="cannot be opened"):
                await api.put(BootSource(kernel_image_path=str(inside / "vmlinux"), boot_args=""))
        status = Path(f"/proc/{running.pid}/status").read_text()
        assert f"Uid:\t{user}\t{user}\t{user}\t{user}" in status
        assert "CapEff:\t0000000000000000" in status
        assert os.path.samefile(f"/proc/{running.pid}/root", inside)
    finally:
        running.kill()
        running.wait()


CHILD = """
import json, os, sys
from rorqual.sandbox.keeper import chroot, linux
home, inside, command = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
linux.unshare(linux.CLONE_NEWNS)
linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
chroot.prepare(home, inside)
os.chdir(home)
os.execv(command[0], command)
"""


async def test_files_appear_in_a_jail_and_a_directory_is_lent_to_it(program: Path, tmp_path: Path) -> None:
    tool = firecracker.find_jailer()
    if os.geteuid() or tool is None:
        pytest.skip("the jailer needs root" if os.geteuid() else "there is no jailer on this host")
    home, user = tmp_path / "vm", 0x70010000 + 64000
    home.mkdir()
    kernel, lent = tmp_path / "vmlinux", tmp_path / "lent"
    kernel.write_bytes(b"\x7fELF")
    kernel.chmod(0o644)
    lent.mkdir()
    os.chown(lent, user, user)
    # As a host's /run is: no device node and no program works there.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev,noexec,nosuid", "tmpfs", home], check=True)
    inside = jailer.root(home / "jail", "sb-jail")
    wish = {"root": str(inside.relative_to(home)), "files": {"kernel": {"path": str(kernel)}}}
    command = jailer.argv(
        tool, program, ["--api-sock", "api.sock"], sandbox_id="sb-jail", user=user, base=home / "jail"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", CHILD, home, json.dumps(wish), json.dumps(command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        async with connected(inside / "api.sock") as api:
            await api.put(BootSource(kernel_image_path="kernel", boot_args=""))
            with pytest.raises(FirecrackerError):  # read-only
                await api.put(Drive(drive_id="d", path_on_host="kernel", is_read_only=False))
            socket = Vsock(guest_cid=3, uds_path=f"{chroot.LENT}/v.sock")
            chroot.lend(running.pid, str(lent))
            await api.put(socket)
            assert (lent / "v.sock").is_socket() and (lent / "v.sock").stat().st_uid == user
            chroot.take_back(running.pid)
            with pytest.raises(
                FirecrackerError, match="Permission denied"
            ):  # its own /out is not its to write
                await api.put(Vsock(guest_cid=3, uds_path=f"{chroot.LENT}/w.sock"))
            assert not (lent / "w.sock").exists()
            with pytest.raises(OSError, match=r"mount namespace of its VMM: .*umount"):
                chroot.take_back(running.pid)
    finally:
        running.kill()
        running.wait()
        subprocess.run(["umount", home], check=True)


@pytest.mark.parametrize("name", ["a/b", "..", "", chroot.LENT])
def test_a_file_of_a_jail_has_a_plain_name(tmp_path: Path, name: str) -> None:
    if os.geteuid():
        pytest.skip("mounts need root")
    wish = {"root": "r", "files": {name: {"path": "/etc/hostname"}}}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path, json.dumps(wish), "[]"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "is not a name" in done.stderr
