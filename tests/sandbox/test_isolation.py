"""Escape attempts from inside a container, as its user and as its root. Each names what it tries to reach."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import Sandbox
from rorqual.sandbox.host import plan


@pytest.fixture(scope="module")
def box(runtime: str) -> Iterator[Sandbox]:
    with Sandbox.create() as sandbox:
        yield sandbox


USERS = ("user", "root")

PYTHON = r"""
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = libc.syscall(number, *args)
    return result if result >= 0 else -ctypes.get_errno()
"""


def python(box: Sandbox, user: str, code: str) -> str:
    result = box.commands.run(["python3", "-c", PYTHON + code], user=user)
    assert not result.timed_out
    return (result.stdout + result.stderr).strip()


@pytest.mark.parametrize("user", USERS)
def test_host_directories_are_not_there(box: Sandbox, user: str) -> None:
    for path in (
        "/work",
        "/root/.bash_history",
        "/home/cloudsdk",
        "/etc/shadow",
        "/boot/vmlinuz",
        "/mnt/bundle",
        "/mnt/disk",
    ):
        assert (box.commands.run(["test", "-e", path], user=user)).exit_code == 1, path
    listing = (box.commands.run("ls -A / /tmp /var/log /opt /srv", user=user)).stdout
    assert ".dockerenv" not in listing and "farm" not in listing


@pytest.mark.parametrize("user", USERS)
def test_the_mount_table_names_no_host_path_that_can_be_used(box: Sandbox, user: str) -> None:
    text = (box.commands.run("cat /proc/self/mountinfo", user=user)).stdout
    for line in text.splitlines():
        point = line.split()[4]
        assert point == "/" or point.startswith(
            ("/usr", "/bin", "/lib", "/sbin", "/proc", "/dev", "/sys", "/.rorqual")
        ), line


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "path",
    [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/drop_caches",
        "/proc/sysrq-trigger",
        "/sys/kernel/uevent_helper",
        "/sys/devices/system/cpu/online",
        "/.rorqual/guest",
    ],
)
def test_kernel_files_cannot_be_written(box: Sandbox, user: str, path: str) -> None:
    result = box.commands.run(f"echo x > {path}", user=user)
    assert result.exit_code != 0, path


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "path", ["/proc/kcore", "/proc/keys", "/proc/kallsyms", "/proc/kpagecgroup", "/proc/kmsg"]
)
def test_masked_files_are_empty(box: Sandbox, user: str, path: str) -> None:
    result = box.commands.run(f"head -c 16 {path} | wc -c", user=user)
    assert result.stdout.strip() == "0"


@pytest.mark.parametrize("user", USERS)
def test_mounts_namespaces_and_devices_are_refused(box: Sandbox, user: str) -> None:
    for command in (
        "mount -t tmpfs none /mnt",
        "mount --bind /proc /mnt",
        "umount /proc/sys",
        "mount -o remount,rw /sys",
        "unshare -r true",
        "unshare -m true",
        "chroot / true",
        "mknod /tmp/disk b 254 0",
        "mknod /tmp/mem c 1 1",
        "hostname changed",
        "date -s 2001-01-01",
        "swapon /etc/passwd",
        "modprobe dummy",
        "reboot -f",
    ):
        result = box.commands.run(f"PATH=$PATH:/usr/sbin:/sbin {command}", user=user)
        assert result.exit_code != 0, command
    assert (box.commands.run("true")).ok


@pytest.mark.parametrize("user", USERS)
def test_privileges_cannot_grow(box: Sandbox, user: str) -> None:
    status = (box.commands.run("cat /proc/self/status", user=user)).stdout
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    assert fields["NoNewPrivs"].strip() == "1" and fields["Seccomp"].strip() == "2"
    wide = 0b11101011  # CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID
    assert int(fields["CapBnd"], 16) & ~wide == 0
    if user == "user":
        assert int(fields["CapEff"], 16) == 0 and int(fields["CapPrm"], 16) == 0
        assert (box.commands.run("su -c id root < /dev/null; cat /root/x", user="user")).exit_code != 0


@pytest.mark.parametrize("user", USERS)
def test_denied_system_calls_answer_an_error(box: Sandbox, user: str) -> None:
    code = """
for name, number, args in [("bpf", 321, (0, 0, 0)), ("io_uring_setup", 425, (1, 0)), ("keyctl", 250, (0, 0)),
        ("add_key", 248, (b"user", b"x", b"y", 1, -3)), ("perf_event_open", 298, (0, 0, -1, -1, 0)),
        ("userfaultfd", 323, (0,)), ("open_by_handle_at", 304, (0, 0, 0)), ("kexec_load", 246, (0, 0, 0, 0)),
        ("init_module", 175, (0, 0, b"")), ("setns", 308, (0, 0)), ("clone3", 435, (0, 0)), ("new", 999, ())]:
    result = call(number, *args)
    if result not in (-1, -38): print(name, result)
for domain in (17, 38, 40, 31):
    kind = {17: socket.SOCK_RAW, 38: socket.SOCK_SEQPACKET}.get(domain, socket.SOCK_STREAM)
    try: socket.socket(domain, kind); print("socket", domain)
    except OSError: pass
flags = 0x10000000 | 17
if call(56, flags, 0, 0, 0, 0) not in (-1, -38): print("clone(NEWUSER)")
"""
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    assert python(box, user, code) == ""


@pytest.mark.parametrize("user", USERS)
def test_only_the_sandbox_is_seen_and_signalled(box: Sandbox, user: str) -> None:
    pids = [int(pid) for pid in (box.commands.run("ls /proc | grep '^[0-9]'", user=user)).stdout.split()]
    assert len(pids) < 20 and max(pids) < 10_000
    box.commands.run(f"kill -9 {os.getpid()} 1; kill -9 -1", user=user)
    assert (box.commands.run("echo alive")).stdout == "alive\n"


def test_the_agent_cannot_be_traced_or_read_by_the_user(box: Sandbox) -> None:
    code = """
print(call(101, 16, 1, 0, 0))
try: open("/proc/1/mem", "rb"); print("opened")
except OSError as error: print(error.errno)
try: os.listdir("/proc/1/fd"); print("listed")
except OSError as error: print(error.errno)
"""
    assert (python(box, "user", code)).split() == ["-1", "13", "13"]


@pytest.mark.parametrize("user", USERS)
def test_no_network_but_its_own_loopback(box: Sandbox, user: str) -> None:
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as abstract:
        server.bind(("0.0.0.0", 0))
        server.listen()
        abstract.bind(b"\0rorqual-test-" + str(os.getpid()).encode())
        abstract.listen()
        port = server.getsockname()[1]
        code = f"""
for address in (("127.0.0.1", {port}), ("10.255.255.53", 53), ("169.254.169.254", 80), ("1.1.1.1", 443)):
    probe = socket.socket(); probe.settimeout(2)
    try: probe.connect(address); print("reached", address)
    except OSError: pass
    probe.close()
probe = socket.socket(socket.AF_UNIX)
try: probe.connect(b"\\0rorqual-test-{os.getpid()}"); print("reached abstract socket")
except OSError: pass
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen()
socket.create_connection(listener.getsockname()); print("loopback")
"""
        assert python(box, user, code) == "loopback"


def test_links_in_file_calls_stay_inside(box: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host secret")
    box.commands.run(f"ln -s {secret} link; ln -s /proc/1/root/../../../.. up; mkdir -p {tmp_path}")
    assert not box.files.exists(str(secret))
    box.files.write("up/tmp/x", "inside")
    assert box.files.read("/tmp/x") == "inside"
    box.files.write(str(secret), "inside", user="root")
    assert secret.read_text() == "host secret"


def test_two_sandboxes_share_nothing(box: Sandbox) -> None:
    with Sandbox.create() as other:
        box.commands.run("echo mine > /tmp/mark; echo mine > /dev/shm/mark", user="root")
        box.commands.run("echo changed > /usr/bin/mark; echo changed >> /etc/passwd", user="root")
        result = other.commands.run("ls /tmp/mark /dev/shm/mark /usr/bin/mark; grep -c changed /etc/passwd")
        assert result.stdout == "0\n"
    assert not Path("/usr/bin/mark").exists()


def test_root_inside_is_nobody_outside(box: Sandbox) -> None:
    if plan().id_base is None and not plan().rootless:
        pytest.skip("no user namespace on this host")
    handle = box.commands.run("sleep 4321", background=True, user="root")
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes()
            owner = place.stat().st_uid
        except OSError:
            continue
        if command == b"sleep\x004321\x00":
            assert owner != 0
            break
    else:
        pytest.fail("the process was not found on the host")
    handle.kill()
