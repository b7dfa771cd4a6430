"""The same attacks on every substrate, as its user and as its root: whatever happens inside, the host is untouched.

What is refused where differs (a container's root may not mount, a machine's root may mount what it likes); what must
not differ is checked after each attack: no secret of the host was seen, its canaries live, its settings and files are
as they were, its services were not reached, and the sandbox answers or has ended with a cause.
"""

from __future__ import annotations

import io
import os
import secrets
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rorqual.sandbox import FunctionFailure, Sandbox, SandboxEnded, SandboxError
from rorqual.sandbox.errors import HostUnfit

SETTINGS = (
    "kernel/hostname",
    "kernel/core_pattern",
    "vm/overcommit_memory",
    "kernel/panic",
    "net/ipv4/ip_forward",
)
SUBSTRATES = ("function", "container", "microvm")
METADATA = ("169.254.169.254", 80)


@dataclass(kw_only=True)
class Canary:
    """What must not be seen, reached, changed or killed."""

    place: Path
    token: str
    process: subprocess.Popen[bytes]
    listener: socket.socket
    visits: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def settings(self) -> dict[str, str]:
        return {name: Path("/proc/sys", name).read_text() for name in SETTINGS}

    def watch(self) -> None:
        while True:
            try:
                peer, address = self.listener.accept()
            except OSError:
                return
            self.visits.append(str(address))
            peer.close()


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory, runtime: str) -> Iterator[Canary]:
    place = tmp_path_factory.mktemp("host") / "secret"
    token = f"secret-{secrets.token_hex(16)}"
    place.write_text(token)
    listener = socket.create_server(("0.0.0.0", 0))
    code = "import time; time.sleep(3600)"
    with subprocess.Popen([sys.executable, "-c", code, token], stdin=subprocess.DEVNULL) as process, listener:
        made = Canary(place=place, token=token, process=process, listener=listener)
        threading.Thread(target=made.watch, daemon=True).start()
        yield made
        process.kill()


class Target:
    """One sandbox under attack: shell commands and Python, as the user and as root where there is one."""

    def __init__(self, substrate: str) -> None:
        self.substrate = substrate
        # An emulated machine is slow, and its root can do all that its user can.
        self.users = {"function": ("user",), "microvm": ("root",)}.get(substrate, ("user", "root"))
        if substrate == "function":
            self.function = Sandbox.function(memory_mb=96, timeout=20, workers=1, pids=32)
        else:
            self.box = Sandbox.create(substrate=substrate, memory_mb=256, pids=64, disk_mb=32, timeout=900)

    def python(self, code: str, *, user: str = "user", timeout: float = 60.0) -> str:
        """What it printed, whatever became of it."""
        if self.substrate == "function":
            done = self.function(code, timeout=min(timeout, 20.0))
            return (
                done.stdout
                + done.stderr
                + (str(done.error) if isinstance(done.error, FunctionFailure) else "")
            )
        result = self.box.commands.run(["python3", "-c", code], user=user, timeout=timeout)
        return result.stdout + result.stderr

    def alive(self) -> bool:
        return "42" in self.python("print(6 * 7)")

    def kill(self) -> None:
        if self.substrate == "function":
            self.function.close()
        else:
            self.box.kill()


@pytest.fixture(scope="module", params=SUBSTRATES)
def target(request: pytest.FixtureRequest, runtime: str) -> Iterator[Target]:
    try:
        made = Target(request.param)
    except HostUnfit as error:
        pytest.skip(str(error))
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def untouched(canary: Canary, target: Target) -> Iterator[None]:
    before = canary.settings()
    yield
    assert canary.settings() == before
    assert canary.process.poll() is None, "a process of the host was killed"
    assert canary.place.read_text() == canary.token
    assert canary.visits == []
    assert target.alive()


def each_user(target: Target, code: str, **options: float) -> str:
    return "".join(target.python(code, user=user, **options) for user in target.users)


def test_files_of_the_host_are_not_there(target: Target, canary: Canary) -> None:
    found = each_user(
        target,
        f"""
import glob, os
path = {str(canary.place)!r}
ways = [path, "/proc/1/root" + path, "/proc/self/root/../.." + path, "/proc/self/cwd/../../../../../.." + path]
ways += glob.glob("/proc/[0-9]*/root" + path) + glob.glob("/proc/self/fd/*")
for way in ways:
    try:
        if os.path.isdir(way):
            print(os.listdir(way))
        elif os.path.isfile(way):
            print(open(way, errors="replace").read(100))
    except OSError:
        pass
os.chdir("/")
for _ in range(40):
    os.chdir("..")
print(os.path.exists("." + path), os.path.exists("/work"), os.path.exists("/root/.cache/rorqual"))
""",
    )
    assert canary.token not in found and "True" not in found


def test_processes_of_the_host_are_not_seen_nor_signalled(target: Target, canary: Canary) -> None:
    found = each_user(
        target,
        f"""
import os, signal
for name in os.listdir("/proc"):
    if name.isdigit():
        try:
            print(open(f"/proc/{{name}}/cmdline").read(), open(f"/proc/{{name}}/environ").read())
        except OSError:
            pass
for pid in ({canary.process.pid}, {os.getpid()}):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
""",
    )
    assert canary.token not in found


def test_kernel_settings_devices_and_modules(target: Target) -> None:
    """A machine's root changes its own kernel; `untouched` sees that the host's stays as it is."""
    each_user(
        target,
        f"""
import os, socket
for name in {SETTINGS!r}:
    try:
        open("/proc/sys/" + name, "w").write("7" if "hostname" not in name and "pattern" not in name else "owned")
    except OSError:
        pass
for path, text in (("/sys/kernel/uevent_helper", "/bin/x"), ("/proc/sysrq-trigger", "h"), ("/sys/power/state", "mem0")):
    try:
        open(path, "w").write(text)
    except OSError:
        pass
for major, minor in ((1, 1), (1, 2), (8, 0), (254, 0), (10, 232)):
    try:
        os.mknod("/tmp/node", 0o60666 if major > 7 and major != 10 else 0o20666, os.makedev(major, minor))
        print(open("/tmp/node", "rb").read(16))
    except OSError:
        pass
    try:
        os.unlink("/tmp/node")
    except OSError:
        pass
""",
    )


def test_mounts_and_namespaces_lead_nowhere(target: Target, canary: Canary) -> None:
    found = each_user(
        target,
        f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.makedirs("/tmp/at", exist_ok=True)
tries = [(b"none", b"proc", b""), (b"none", b"sysfs", b""), (b"none", b"cgroup", b"memory"), (b"/proc", None, b""),
         (b"none", b"devtmpfs", b""), (b"/dev/vda", b"ext4", b""), (b"/dev/vda", b"erofs", b"")]
for source, kind, data in tries:
    if libc.mount(source, b"/tmp/at", kind, 4096 if kind is None else 0, data) == 0:
        for root, folders, files in os.walk("/tmp/at"):
            folders[:] = folders[:5]
            for name in files[:5]:
                try:
                    if os.path.isfile(os.path.join(root, name)):  # a terminal's device would wait for input
                        print(open(os.path.join(root, name), errors="replace").read(200))
                except (OSError, ValueError):
                    pass
            if root.count("/") > 3:
                folders[:] = []
        libc.umount2(b"/tmp/at", 2)
for flags in (0x10000000, 0x00020000, 0x40000000, 0x7E020000):
    if os.fork() == 0:
        libc.unshare(flags)
        print(os.path.exists({str(canary.place)!r}), flush=True)
        os._exit(0)
    os.wait()
""",
    )
    assert canary.token not in found and "True" not in found


def test_the_network_of_the_host_and_metadata_addresses(target: Target, canary: Canary) -> None:
    here = [address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    found = each_user(
        target,
        f"""
import socket
addresses = {["127.0.0.1", "10.0.2.2", "192.168.0.1", "172.17.0.1", *here]!r}
for address in [(one, {canary.port}) for one in addresses] + [{METADATA!r}, ("1.1.1.1", 443), ("10.0.2.3", 53)]:
    try:
        socket.create_connection(address, timeout=1.0)
        print("REACHED", address)
    except OSError:
        pass
for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM):
    for family in (socket.AF_PACKET, socket.AF_INET, 40, 17):
        try:
            sender = socket.socket(family, kind, 17 if family == socket.AF_INET else 0)
            sender.settimeout(0.5)
            sender.sendto(b"x", ("10.0.2.2", {canary.port}) if family == socket.AF_INET else (2, {canary.port}))
        except (OSError, TypeError, ValueError):
            pass
for cid in (0, 1, 2):
    try:
        probe = socket.socket(40, socket.SOCK_STREAM)
        probe.settimeout(0.5)
        probe.connect((cid, {canary.port}))
        print("REACHED vsock", cid)
    except (OSError, AttributeError, TypeError):
        pass
""",
        timeout=120.0,
    )
    assert "REACHED" not in found


def test_a_fork_bomb_ends_at_the_limit(target: Target) -> None:
    each_user(
        target,
        """
import os, time
made = 0
try:
    while made < 4000:
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        made += 1
except OSError as error:
    print("stopped at", made, error)
""",
        timeout=60.0,
    )


def test_a_memory_bomb_hurts_nobody_else(target: Target) -> None:
    """The agent outlives its processes: `untouched` asks it for an answer afterwards."""
    each_user(target, "kept = []\nwhile True:\n    kept.append(bytes(1 << 20) + b'y')", timeout=60)


def test_disk_and_inode_bombs_end_at_the_limit(target: Target) -> None:
    found = each_user(
        target,
        """
import os
os.makedirs("/tmp/full", exist_ok=True)
written = 0
try:
    with open("/tmp/full/big", "wb") as file:
        while written < 400 << 20:
            written += file.write(b"x" * (1 << 20))
except (OSError, MemoryError) as error:
    print("full", written >> 20)
made = 0
try:
    os.unlink("/tmp/full/big")
    for number in range(60000):
        open(f"/tmp/full/{number}", "w").close()
        made += 1
except (OSError, MemoryError) as error:
    print("files", made)
import shutil
shutil.rmtree("/tmp/full", ignore_errors=True)
""",
        timeout=120.0,
    )
    assert "full" in found or target.substrate == "function", found  # a function's files count in its memory


def test_ptrace_and_the_agent(target: Target) -> None:
    """As root of a machine it works, and then the agent is silent: that root owns its kernel, and loses its sandbox."""
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in [1, os.getppid()]:
    print(libc.ptrace(16, pid, 0, 0) if pid != os.getpid() else -1)
try:
    open("/proc/1/mem", "r+b")
    print("opened")
except OSError:
    pass
"""
    users = ("user",) if target.substrate == "microvm" else target.users
    found = "".join(target.python(code, user=user) for user in users)
    if target.substrate != "function":  # a call is its own process 1
        assert "opened" not in found and "\n0\n" not in "\n" + found


def test_forged_answers_do_not_reach_the_client(target: Target) -> None:
    """Something inside writes to whatever looks like the agent's channel."""
    each_user(
        target,
        """
import glob, os
for path in [*glob.glob("/dev/vport*"), *glob.glob("/dev/virtio-ports/*"), "/dev/vsock", "/dev/console", "/dev/kmsg",
             *glob.glob("/proc/1/fd/*"), *glob.glob("/.rorqual/*")]:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, b"\\xff" * 4096)
        os.close(fd)
    except OSError:
        pass
""",
    )


def test_links_dots_and_archives_in_file_calls(target: Target, canary: Canary) -> None:
    if target.substrate == "function":
        pytest.skip("a function has no file calls")
    box = target.box
    secret = str(canary.place)
    box.commands.run(
        f"ln -sfn {secret} /tmp/link; ln -sfn / /tmp/root; mkfifo /tmp/pipe; ln -sfn loop /tmp/loop"
    )
    for path in ("/tmp/link", f"/tmp/root{secret}", "../" * 30 + secret, f"/proc/1/root{secret}"):
        with pytest.raises(SandboxError):
            box.files.read(path)
    for path in ("/tmp/pipe", "/tmp/loop"):
        with pytest.raises(SandboxError):
            box.files.read(path)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as made:
        for name in ("../../../../tmp/escaped", "/tmp/escaped-too"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            made.addfile(entry, io.BytesIO(b"out"))
        bomb = tarfile.TarInfo("zeros")
        bomb.size = 300 << 20
        made.addfile(bomb, open("/dev/zero", "rb"))  # noqa: SIM115
    box.files.write("/tmp/bomb.tar.gz", archive.getvalue())
    box.commands.run("cd /tmp && tar xzf bomb.tar.gz; rm -f /tmp/bomb.tar.gz /tmp/zeros", timeout=60)
    assert not Path("/tmp/escaped").exists() and not Path("/tmp/escaped-too").exists()


def test_output_without_end_is_cut(target: Target) -> None:
    code = "import sys\nfor _ in range(3000): sys.stdout.write('y' * (1 << 14))"
    if target.substrate == "function":
        done = target.function(code, timeout=20)
        assert done.truncated and len(done.stdout) <= 1 << 20
        return
    result = target.box.commands.run(["python3", "-c", code], max_output=1 << 16, timeout=120)
    assert result.truncated and len(result.stdout) == 1 << 16 and result.stdout_bytes == 3000 << 14


def test_whatever_happened_the_end_has_a_cause(canary: Canary, target: Target) -> None:
    if target.substrate == "function":
        pytest.skip("a function's calls end, each with its result")
    with Sandbox.create(substrate=target.substrate, memory_mb=256, timeout=600) as box:
        box.commands.run("kill -9 1; kill -SEGV 1; kill -TERM 1; kill -9 -1", user="root")
        box.commands.run(
            ["python3", "-c", "open('/proc/sysrq-trigger', 'w').write('o')"], user="root", background=True
        )
        try:
            for _ in range(5):
                time.sleep(0.2)
                box.commands.run("true", timeout=20)
        except SandboxEnded as ended:
            assert ended.cause in ("exited", "infra", "killed")
