"""Whole PCs, really booted: a Debian from its packages under BIOS and UEFI, and one guest that is no Linux of ours.

Machines are emulated where KVM boots nothing, so one is started and the others go on from its snapshot. Disks are built
once per cache. What needs no machine is in test_disks.py, test_screen.py and test_machine_channels.py.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import (
    GuestError,
    HostUnfit,
    ImageNotFound,
    ImageRejected,
    InvalidRequest,
    PtySize,
    Sandbox,
    SandboxEnded,
    Snapshot,
    Unsupported,
    images,
)
from rorqual.sandbox.machines.q35 import Q35
from rorqual.sandbox.state import StateDir
from tests.sandbox.internet import World

MEMTEST = "/usr/lib/memtest86+/memtest86+x64.iso"


def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.2)


def disk(name: str, **arguments: object) -> str:
    try:
        return images.build_debian_disk(name, size_mb=1024, **arguments).name  # type: ignore[arg-type]
    except HostUnfit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def debian() -> str:
    """Also without a machine's test this proves the builder: it is built from packages when the cache has it not."""
    return disk("test-debian", packages=["qemu-guest-agent"])


@pytest.fixture(scope="module")
def vm(debian: str, state: StateDir) -> Iterator[Sandbox]:
    try:
        Q35().program()
    except HostUnfit as error:
        pytest.skip(str(error))
    with Sandbox.create(
        substrate="fullvm",
        image=debian,
        cpu=2,
        memory_mb=320,
        disk_mb=200,
        timeout=1200,
        require=["agent", "screen", "keyboard", "memory_snapshot"],
    ) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def taken(vm: Sandbox) -> Iterator[Snapshot]:
    vm.commands.run("echo in memory only > /dev/shm/note; echo on disk > /root/note")
    vm.commands.run("n=0; while :; do n=$((n+1)); echo $n >/dev/shm/count; sleep 0.2; done", background=True)
    snapshot = vm.snapshot()
    yield snapshot
    images.remove_image(snapshot.name)


def decode(png: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height, rows of RGB: a reader of PNG that knows filter 0 alone, and checks every CRC."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, width, height = 8, b"", 0, 0
    while at < len(png):
        size, kind = struct.unpack_from(">I4s", png, at)
        body = png[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack_from(">I", png, at + 8 + size)[0]
        if kind == b"IHDR":
            width, height, *rest = struct.unpack(">IIBBBBB", body)
            assert rest == [8, 2, 0, 0, 0]
        data += body if kind == b"IDAT" else b""
        at += 12 + size
    plain, step = zlib.decompress(data), 3 * width + 1
    assert len(plain) == step * height and not any(plain[::step])
    return width, height, [plain[y * step + 1 : (y + 1) * step] for y in range(height)]


def test_a_debian_of_packages_boots_under_bios_and_says_what_runs_it(vm: Sandbox, debian: str) -> None:
    info = vm.info()
    assert (info.substrate, info.image, info.runtime, info.channel) == ("fullvm", debian, "qemu", "agent")
    assert info.accelerator in ("kvm", "tcg") and any("QEMU" in note for note in info.notes)
    done = vm.commands.run(
        "test -d /sys/firmware/efi; echo $?; systemctl is-system-running --wait; cat /etc/os-release"
    )
    assert done.stdout.startswith("1\nrunning\n") and "Debian" in done.stdout
    # Its disk is its own: the image was not written to, and no path of it leads to the host.
    assert "vda3" in vm.commands.run("cat /proc/partitions").stdout


def test_commands_files_and_a_terminal_through_our_agent(vm: Sandbox) -> None:
    done = vm.commands.run("read x; echo got $x; echo oops >&2; exit 3", stdin="this\n")
    assert (done.exit_code, done.stdout, done.stderr) == (3, "got this\n", "oops\n")
    assert vm.commands.run("id -un", user="user", cwd="/tmp").stdout == "user\n"
    data = bytes(range(256)) * 4000
    vm.files.write("/root/deep/er/data", data)
    assert vm.files.read("/root/deep/er/data", format="bytes") == data
    assert [entry.name for entry in vm.files.list("/root/deep")] == ["er"]
    seen = bytearray()
    terminal = vm.pty.create(size=PtySize(rows=20, cols=70), on_data=seen.extend)
    terminal.send_stdin("stty size; exit 5\n")
    assert terminal.wait() == 5 and b"20 70" in seen


def test_the_screen_shows_what_is_typed_on_the_keyboard(vm: Sandbox) -> None:
    vm.screen.key("ctrl-l")
    shell_of_user = "cat /proc/[0-9]*/status | grep -A9 '^Name:.bash' | grep -q '^Uid:.1000'"
    wait_until(lambda: vm.commands.run(shell_of_user).exit_code == 0)  # logged in on the screen
    before = vm.screen.capture()
    vm.screen.type("echo It\\'s \"$((6*7))\" > /tmp/typed; clear; printf '%1600s' X | tr ' ' X\n")
    wait_until(lambda: vm.files.exists("/tmp/typed"))
    assert vm.files.read("/tmp/typed") == "It's 42\n"
    after = vm.screen.wait_for_change(timeout=60, pixels=5000)
    size = vm.screen.size()
    width, height, rows = decode(after)
    assert (width, height) == (size.width, size.height) == (720, 400)
    assert decode(before)[:2] == (720, 400) and before != after
    # 20 lines of 80 X: the text console's grey in the upper rows, more of it than anything else but black.
    colours = {bytes(row[at : at + 3]) for row in rows for at in range(0, len(row), 3)}
    assert {b"\0\0\0", b"\xa8\xa8\xa8"} <= colours and len(colours) < 20
    lit = [sum(1 for at in range(0, len(row), 3) if row[at]) for row in rows]
    assert sum(lit[:288]) > 20_000 > sum(lit[336:])
    assert vm.screen.pixel(719, 399) == (0, 0, 0)


def test_the_pointer_moves_and_wrong_input_sends_nothing(vm: Sandbox) -> None:
    vm.screen.move(10, 20)
    vm.screen.click("right", x=719, y=399)
    vm.screen.scroll(-3)
    kinds = [(entry.kind, entry.request) for entry in vm.trajectory.list() if entry.kind == "screen"]
    assert ("screen", {"click": "right", "at": [719, 399], "count": 1}) in kinds
    for call in (
        lambda: vm.screen.move(720, 0),
        lambda: vm.screen.click("fourth"),  # type: ignore[arg-type]
        lambda: vm.screen.key("ctrl-hyper"),
        lambda: vm.screen.type("naïve"),
        lambda: vm.screen.scroll(1000),
    ):
        with pytest.raises(InvalidRequest):
            call()
    assert len([entry for entry in vm.trajectory.list() if entry.kind == "screen"]) == len(kinds)
    with pytest.raises(TimeoutError):
        vm.screen.wait_for_change(timeout=0.3, pixels=200_000)


def test_a_snapshot_goes_on_where_it_was_taken_as_another_machine(vm: Sandbox, taken: Snapshot) -> None:
    assert taken.memory and taken.size_bytes > 10 << 20
    vm.commands.run("echo changed later > /root/note; echo later > /dev/shm/note")
    with Sandbox.create(substrate="fullvm", image=taken, cpu=2, timeout=600) as twin:
        assert twin.commands.run("cat /root/note /dev/shm/note").stdout == "on disk\nin memory only\n"
        first = int(twin.files.read("/dev/shm/count"))
        wait_until(lambda: int(twin.files.read("/dev/shm/count") or 0) > first)  # its processes run on
        assert twin.commands.run("hostname").stdout.strip() == twin.id != vm.id
        assert twin.info().memory_mb == 320 and any("snapshot" in note for note in twin.info().notes)
        drift = abs(float(twin.commands.run("date +%s").stdout) - time.time())
        assert drift < 30
        twin.pause()
        assert Sandbox.connect(twin.id).info().paused is False  # a client's coming resumes it
        children = twin.fork(count=2)
        try:
            random = {child.commands.run("head -c 8 /dev/urandom | od -An -tx8").stdout for child in children}
            assert len(random) == 2
            for child in children:
                assert child.files.read("/dev/shm/note") == "in memory only\n"
        finally:
            for child in children:
                child.kill()


def test_through_qemu_guest_agent_where_that_is_asked_for(taken: Snapshot) -> None:
    with Sandbox.create(
        substrate="fullvm", image=taken, cpu=2, timeout=600, channel="qemu-guest-agent"
    ) as sb:
        assert sb.info().channel == "qemu-guest-agent" and any(
            "only our guest agent" in x for x in sb.info().notes
        )
        done = sb.commands.run(
            "cat /dev/shm/note; cat >&2; exit 4", stdin="in\n", envs={"A": "b c"}, timeout=120
        )
        assert (done.exit_code, done.stdout, done.stderr) == (4, "in memory only\n", "in\n")
        data = bytes(range(256)) * 8192
        sb.files.write("/root/big", data)
        assert sb.files.read("/root/big", format="bytes") == data  # 2 MiB: by guest-file-read
        assert sb.files.get_info("/root/big").size == len(data)
        with pytest.raises(Unsupported, match="our guest agent"):
            sb.pty.create()


def test_through_the_serial_console_as_the_last_resort(taken: Snapshot) -> None:
    with Sandbox.create(substrate="fullvm", image=taken, cpu=2, timeout=600, channel="console") as sb:
        assert sb.info().channel == "console"
        done = sb.commands.run("tty; cat /dev/shm/note; exit 7", timeout=120)
        assert (done.exit_code, done.stdout) == (7, "not a tty\nin memory only\n")
        sb.files.write("/root/x", "written over a line\n")
        assert Sandbox.connect(sb.id).files.read("/root/x") == "written over a line\n"


def test_a_disk_that_is_full_is_an_error_inside_and_harms_nobody(taken: Snapshot, state: StateDir) -> None:
    with Sandbox.create(substrate="fullvm", image=taken, cpu=2, timeout=600) as sb:
        done = sb.commands.run("dd if=/dev/zero of=/root/full bs=1M count=260 oflag=direct", timeout=200)
        assert done.exit_code != 0 and "rror" in done.stderr + done.error
        assert (state.sandboxes / sb.id / "disk").stat().st_size <= 200 << 20
        assert sb.commands.run("echo still here").stdout == "still here\n"


def test_a_guest_that_takes_over_its_agents_ports_gets_no_further(taken: Snapshot, state: StateDir) -> None:
    with Sandbox.create(substrate="fullvm", image=taken, cpu=2, timeout=600) as sb:
        flood = (
            "systemctl stop rorqual-guest; for p in /dev/virtio-ports/org.rorqual.agent.*; "
            "do (while :; do cat /dev/zero; done >$p 2>/dev/null) & done; wait"
        )
        sb.files.write("/root/flood", flood)
        sb.commands.run("systemd-run --no-block sh /root/flood")
        with pytest.raises(GuestError):
            for _ in range(100):
                sb.commands.run("sleep 1", timeout=5)
        assert sb.cause is None
        decode(sb.screen.capture())  # the monitor is not the guest's
        assert sb.kill()
    assert not (state.sandboxes / sb.id).exists()


def test_a_machine_that_switches_itself_off_has_ended(taken: Snapshot) -> None:
    with Sandbox.create(substrate="fullvm", image=taken, cpu=2, timeout=600) as sb:
        with pytest.raises((SandboxEnded, GuestError)):
            sb.commands.run("sync; echo o > /proc/sysrq-trigger; sleep 60", timeout=90)
        wait_until(lambda: sb.cause is not None)
        assert sb.cause == "exited"
        with pytest.raises(SandboxEnded):
            sb.screen.capture()


@pytest.mark.slow
def test_a_cloud_image_boots_under_uefi_and_gets_agent_and_network_by_its_seed(world: World) -> None:
    image = disk("test-cloud", packages=["cloud-init", "sudo"], agent=False)
    seed = {
        "user": "ada",
        "hostname": "engine",
        "ssh_keys": ["ssh-ed25519 AAAA ada@host"],
        "files": {"/etc/seeded": "é from the seed\n"},
        "password": "secret word",
    }
    with Sandbox.create(
        substrate="fullvm",
        image=image,
        firmware="uefi",
        cpu=2,
        memory_mb=512,
        timeout=600,
        cloud_init=seed,
        channel="agent",
        network={"allow": ["allowed.test"]},
    ) as sb:
        wait_until(lambda: sb.files.exists("/home/ada/.ssh/authorized_keys"), seconds=120)
        done = sb.commands.run(
            "ls -d /sys/firmware/efi; hostname; id -un ada; cat /home/ada/.ssh/authorized_keys /etc/seeded"
        )
        assert done.stdout == "/sys/firmware/efi\nengine\nada\nssh-ed25519 AAAA ada@host\né from the seed\n"
        fetch = "python3 -c 'import urllib.request as u; print(u.urlopen(\"http://%s/\", timeout=30).read().decode())'"
        wait_until(lambda: sb.commands.run(fetch % "allowed.test").stdout == "93.184.216.34\n")
        assert "not known" in sb.commands.run(fetch % "other.test").stderr
        wait_until(lambda: (sb.screen.size().width, sb.screen.size().height) == (1280, 800))
        assert "secret word" not in str([(entry.request, entry.result) for entry in sb.trajectory.list()])


@pytest.mark.skipif(not Path(MEMTEST).exists(), reason="apt-get install memtest86+")
def test_a_guest_that_is_no_system_at_all_has_screen_and_keyboard() -> None:
    """memtest86+: nothing in it answers, ever."""
    with Sandbox.create(substrate="fullvm", image=MEMTEST, memory_mb=64, timeout=300, channel="screen") as sb:
        assert sb.info().channel == "screen"
        with pytest.raises(Unsupported, match="screen, keyboard"):
            sb.commands.run("true")
        with pytest.raises(Unsupported, match="screen, keyboard"):
            sb.files.read("/etc/passwd")
        wait_until(lambda: sb.screen.pixel(500, 300) == (0, 0, 168))  # its blue
        assert sb.screen.pixel(300, 250) == (0, 0, 168)
        sb.screen.key("f1")
        wait_until(lambda: sb.screen.pixel(300, 250) == (0, 0, 0))  # a black menu over it
        sb.screen.key("f10")
        wait_until(lambda: sb.screen.pixel(300, 250) == (0, 0, 168))
        sb.pause()
        sb.resume()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"image": "no-such"}, ImageNotFound, "build_debian_disk"),
        ({"image": "/no/such.qcow2"}, ImageRejected, "No such file"),
        ({"image": "sub/../../etc/passwd"}, InvalidRequest, "not an image name"),
        ({"image": "disk.raw"}, ImageNotFound, "path"),
        ({"image": "/etc/passwd"}, ImageRejected, "memory|512|bytes"),
        ({"firmware": "coreboot"}, InvalidRequest, "firmware"),
        ({"channel": "ssh"}, InvalidRequest, "channel"),
        ({"memory_mb": 32}, InvalidRequest, "memory_mb"),
        ({"disk_mb": 2}, InvalidRequest, "disk_mb"),
        ({"cloud_init": {"users": []}}, InvalidRequest, "cloud_init"),
        ({"console": {"name": "x"}}, InvalidRequest, "console"),
        ({"mounts": {"/etc": "/x"}}, Unsupported, "files.write"),
        ({"layers": ["x"]}, Unsupported, "layers"),
        ({"vmm": "firecracker"}, Unsupported, "vmm"),
        ({"require": ["teleport"]}, Unsupported, "teleport"),
        ({"require": ["agent"], "channel": "screen"}, InvalidRequest, "agent"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    change: dict[str, object], error: type[Exception], words: str, tmp_path: Path, state: StateDir
) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    arguments = {"image": str(tmp_path / "disk.raw"), "substrate": "fullvm", **change}
    if change.get("image") == "/etc/passwd":
        arguments["image"] = str(tmp_path / "tiny")
        (tmp_path / "tiny").write_bytes(b"root:x:0:0::/root:/bin/sh\n")
    with pytest.raises(error, match=words):
        Sandbox.create(**arguments)  # type: ignore[arg-type]
    assert not list(state.images.glob(".building-*"))


def test_a_machine_must_be_accelerated_or_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    if Q35().accelerator().name == "kvm":
        pytest.skip("KVM boots guests here")
    with pytest.raises(Unsupported, match="accelerated=None"):
        Sandbox.create(substrate="fullvm", image=str(tmp_path / "disk.raw"), accelerated=True)


def test_other_substrates_have_no_screen_and_take_no_firmware(runtime: str) -> None:
    with pytest.raises(InvalidRequest, match="fullvm"):
        Sandbox.create(firmware="uefi")
    with Sandbox.create(timeout=60) as sb, pytest.raises(Unsupported, match="fullvm"):
        sb.screen.capture()
