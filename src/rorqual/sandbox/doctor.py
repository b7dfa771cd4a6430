"""What this host can do, found out by doing it. Each check says what was tried, and the one command that would help.

A runtime counts when a container ran in it; a limit when something was killed by it; KVM when a guest ran an
instruction in it (`/dev/kvm` opens on hosts whose KVM boots nothing: spec/sandbox.md, 0). Leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import mmap
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rorqual.sandbox import _portal, host
from rorqual.sandbox._async.sandbox import AsyncSandbox
from rorqual.sandbox.errors import HostUnfit, SandboxError
from rorqual.sandbox.images.base import python_home
from rorqual.sandbox.images.layers import probe
from rorqual.sandbox.machines.boot_sector import boot_sector
from rorqual.sandbox.machines.firecracker import FIX, Firecracker, find_jailer
from rorqual.sandbox.machines.kernel import find_kernel
from rorqual.sandbox.machines.q35 import firmware_files
from rorqual.sandbox.network.check import check_network
from rorqual.sandbox.records import Check

_NO_KVM = "the microVM substrate will run under emulation (QEMU's TCG)"


def doctor() -> list[Check]:
    """Every check, in the order in which they build on each other. Takes a few seconds."""
    checks = [_user_namespaces(), _overlay(), _layers()]
    checks += [_runtime(name) for name in host.RUNTIMES]
    if any(check.ok for check in checks[-len(host.RUNTIMES) :]):
        checks += _portal.run(_limits())
        checks.append(_portal.run(_function()))
        checks += _portal.run(check_network())
    checks += [
        _python(),
        _kvm(),
        _program("qemu", f"qemu-system-{platform.machine()}", f"qemu-system-{_debian_arch()}"),
        _guest_kernel(),
        _portal.run(_microvm()),
        _firecracker(),
        _portal.run(_full_machine()),
        _uefi(),
        _program("cloud-init seeds", "xorriso", "xorriso"),
    ]
    checks += [
        _program("mmdebstrap", "mmdebstrap", "mmdebstrap"),
        _program("skopeo", "skopeo", "skopeo"),
        _program("newuidmap", "newuidmap", "uidmap"),
    ]
    return checks


def _guest_kernel() -> Check:
    name = "microvm: kernel"
    try:
        kernel = find_kernel()
    except HostUnfit as error:
        return Check(name=name, ok=False, why=error.what, fix=error.fix)
    return Check(name=name, ok=True, why=f"{kernel.release}, in {kernel.bzimage.parent}", fix="")


async def _microvm() -> Check:
    name = "microvm"
    try:
        start = time.monotonic()
        async with await AsyncSandbox.create(
            substrate="microvm", vmm="qemu", memory_mb=128, disk_mb=16, timeout=120
        ) as sb:
            release = (await sb.commands.run("uname -r")).stdout.strip()
            seconds, info = time.monotonic() - start, await sb.info()
    except SandboxError as error:
        return Check(name=name, ok=False, why=str(error), fix=getattr(error, "fix", ""))
    why = f"a machine booted Linux {release} and answered after {seconds:.1f} s; {info.notes[-1]}"
    return Check(name=name, ok=True, why=why, fix="")


def _firecracker() -> Check:
    vmm = Firecracker()
    try:
        version = vmm.version()
        if os.geteuid() == 0 and find_jailer() is None:
            raise HostUnfit("as root, Firecracker is started through its jailer, and there is none.", fix=FIX)
        vmm.accelerator()
    except HostUnfit as error:
        return Check(name="Firecracker", ok=False, why=error.what, fix=error.fix)
    return Check(name="Firecracker", ok=True, why=f"{version} booted a guest with KVM", fix="")


async def _full_machine() -> Check:
    name = "fullvm"
    with tempfile.TemporaryDirectory(prefix="rorqual-doctor-") as place:
        image = Path(place, "tiny.img")
        await asyncio.to_thread(image.write_bytes, boot_sector("rorqual doctor"))
        try:
            async with await AsyncSandbox.create(
                substrate="fullvm", image=str(image), memory_mb=64, timeout=60, channel="screen"
            ) as sb:
                await sb.screen.wait_for_change(timeout=30)
                size, info = await sb.screen.size(), await sb.info()
        except (SandboxError, TimeoutError) as error:
            return Check(name=name, ok=False, why=str(error), fix=getattr(error, "fix", ""))
    why = f"a PC started from a disk of ours and showed {size.width}x{size.height} pixels; {info.notes[0]}"
    return Check(name=name, ok=True, why=why, fix="")


def _uefi() -> Check:
    try:
        code, _ = firmware_files()
    except HostUnfit as error:
        return Check(name="fullvm: UEFI", ok=False, why=error.what, fix=error.fix)
    return Check(name="fullvm: UEFI", ok=True, why=code, fix="")


def _debian_arch() -> str:
    return {"x86_64": "x86", "aarch64": "arm"}.get(platform.machine(), platform.machine())


def _child(code: str) -> tuple[bool, str]:
    """Runs a piece of Python that may change its own namespaces; (worked, last line)."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PRELUDE.format(str(Path(__file__).resolve().parents[2])) + code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit status {done.returncode}"


_PRELUDE = """
import os, sys, types
ROOT = {0!r}
for name, path in (("rorqual", ROOT + "/rorqual"), ("rorqual.sandbox", ROOT + "/rorqual/sandbox")):
    module = types.ModuleType(name); module.__path__ = [path]; sys.modules[name] = module
from rorqual.sandbox.keeper import launch, linux
"""


def _user_namespaces() -> Check:
    ok, words = _child("linux.unshare(linux.CLONE_NEWUSER)\n")
    return Check(
        name="user namespaces",
        ok=ok,
        why="one was made" if ok else f"the kernel refuses them: {words}",
        fix=""
        if ok
        else "sysctl -w user.max_user_namespaces=65536 kernel.apparmor_restrict_unprivileged_userns=0",
    )


def _overlay() -> Check:
    code = """
if os.geteuid(): launch.enter_userns("0 %d 1" % os.geteuid(), "0 %d 1" % os.getegid())
linux.unshare(linux.CLONE_NEWNS)
linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
linux.mount("tmpfs", "/mnt", fstype="tmpfs")
for name in ("u", "w", "m"): os.mkdir("/mnt/" + name)
extra = ",userxattr" if os.getuid() == 0 and open("/proc/self/uid_map").read().split()[2] == "1" else ""
linux.mount("overlay", "/mnt/m", fstype="overlay", data="lowerdir=/usr,upperdir=/mnt/u,workdir=/mnt/w" + extra)
open("/mnt/m/probe", "w").write("x")
assert os.path.exists("/mnt/u/probe") and os.path.exists("/mnt/m/bin")
"""
    ok, words = _child(code)
    return Check(
        name="overlay",
        ok=ok,
        why="a file was written over /usr in a private namespace" if ok else f"it does not mount: {words}",
        fix="" if ok else "modprobe overlay",
    )


def _layers() -> Check:
    ok, why, fix = probe()
    return Check(name="EROFS layers", ok=ok, why=why, fix=fix)


def _runtime(name: str) -> Check:
    path = host.find_program(name)
    if path is None:
        return Check(name=name, ok=False, why="not in PATH", fix=f"apt-get install {name}")
    try:
        result = _portal.run(_try_runtime(name))
    except SandboxError as error:
        return Check(name=name, ok=False, why=f"no container ran in it: {error}", fix="")
    return Check(name=name, ok=True, why=result, fix="")


async def _try_runtime(name: str) -> str:
    async with await AsyncSandbox.create(memory_mb=64, timeout=30, runtime=name) as sb:
        result = await sb.commands.run("id -u; grep -c . /proc/self/status")
        info = await sb.info()
        notes = f" ({'; '.join(info.notes)})" if info.notes else ""
        return f"a container ran a command as user {result.stdout.split()[0]}{notes}"


async def _limits() -> list[Check]:
    checks = []
    async with await AsyncSandbox.create(memory_mb=64, pids=32, cpu=0.2, disk_mb=8, timeout=60) as sb:
        info = await sb.info()
        delegation = (
            "run as root, or `systemd-run --user --scope -p Delegate=yes` with cgroup v2 (not supported yet)"
        )

        def check(name: str, ok: bool, why: str) -> None:
            checks.append(Check(name=name, ok=ok, why=why, fix="" if ok else delegation))

        memory = await sb.commands.run(["python3", "-c", "bytearray(1 << 28)"], timeout=20)
        held = "its cgroup killed it" if memory.oom else "an rlimit refused it"
        check("limit: memory", memory.exit_code != 0, f"256 MiB were asked for under a limit of 64: {held}")
        forks = "import os\nfor n in range(200):\n  if os.fork() == 0:\n    import time; time.sleep(3); os._exit(0)"
        pids = await sb.commands.run(["python3", "-c", forks], timeout=5)
        check(
            "limit: processes",
            pids.exit_code != 0,
            f"200 processes under a limit of 32: held by {info.limits['pids']}",
        )
        spin = "import time\nt=time.monotonic()\nwhile time.monotonic()-t<1: pass\nprint(time.process_time())"
        used = await sb.commands.run(["python3", "-c", spin], timeout=20)
        seconds = float(used.stdout or 1)
        check("limit: CPU", seconds < 0.6, f"a busy second under cpu=0.2 got {seconds:.2f} s of CPU")
        full = await sb.commands.run("head -c 16000000 /dev/zero > /tmp/x", timeout=20)
        check(
            "limit: disk",
            full.exit_code != 0,
            "16 MB did not fit in disk_mb=8" if full.exit_code else "16 MB fitted in 8",
        )
        code = "import ctypes; print(ctypes.CDLL(None).syscall(425, 1, 0))"
        status = await sb.commands.run("grep Seccomp: /proc/self/status")
        denied = await sb.commands.run(["python3", "-c", code])
        checks.append(
            Check(
                name="seccomp",
                ok="2" in status.stdout and denied.stdout == "-1\n",
                why="io_uring_setup was refused inside"
                if denied.stdout == "-1\n"
                else "the filter is not in force",
                fix="" if "2" in status.stdout else "apt-get install crun",
            )
        )
    return checks


async def _function() -> Check:
    try:
        async with await AsyncSandbox.function(workers=1) as fn:
            calls = [await fn("import os; os.getpid()") for _ in range(5)]
    except SandboxError as error:
        return Check(name="function", ok=False, why=str(error), fix=getattr(error, "fix", ""))
    fresh = all(call.value == 1 for call in calls)
    best = min(call.seconds for call in calls) * 1e3
    why = f"5 calls, each process 1 of its own namespace; the fastest took {best:.1f} ms"
    return Check(
        name="function", ok=fresh, why=why if fresh else f"a call did not come back: {calls}", fix=""
    )


def _python() -> Check:
    kind, path = python_home()
    return Check(
        name="python3 in the base image",
        ok=kind != "none",
        why={
            "usr": f"{path}",
            "local": f"{path}: the base image shows the host's /usr/local for it",
            "bind": f"none in /usr; {path} is shown read-only instead",
            "none": "none on this host",
        }[kind],
        fix="" if kind == "usr" else "apt-get install python3",
    )


def _program(name: str, program: str, package: str) -> Check:
    path = host.find_program(program)
    if path is None:
        return Check(name=name, ok=False, why=f"{program} is not in PATH", fix=f"apt-get install {package}")
    words = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    first = (words.stdout or words.stderr).strip().splitlines()
    return Check(name=name, ok=True, why=first[0] if first and words.returncode == 0 else path, fix="")


# KVM: _IO(0xAE, n) numbers of linux/kvm.h
_KVM_CREATE_VM, _KVM_CREATE_VCPU, _KVM_RUN, _KVM_GET_VCPU_MMAP_SIZE = 0xAE01, 0xAE41, 0xAE80, 0xAE04
_KVM_SET_USER_MEMORY_REGION, _KVM_GET_SREGS, _KVM_SET_SREGS, _KVM_SET_REGS = (
    0x4020AE46,
    0x8138AE83,
    0x4138AE84,
    0x4090AE82,
)
_KVM_EXIT_HLT, _KVM_EXIT_IO = 5, 2


def _kvm() -> Check:
    if not os.path.exists("/dev/kvm"):
        return Check(
            name="KVM",
            ok=False,
            why=f"there is no /dev/kvm: {_NO_KVM}",
            fix="modprobe kvm_intel || modprobe kvm_amd",
        )
    if platform.machine() != "x86_64":
        return Check(name="KVM", ok=False, why="only x86_64 guests can be tried here", fix="")
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    virtual = " vmx " in flags or " svm " in flags
    code = "from rorqual.sandbox.doctor import run_real_mode_guest as run; print(run())"
    path = str(Path(__file__).resolve().parents[2])
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        words = (done.stdout + done.stderr).strip().splitlines()
        why = words[-1] if words else f"the probe died with status {done.returncode}"
        ran = done.returncode == 0 and why == "ran"
    except subprocess.TimeoutExpired:
        ran, why = False, "the probe guest hangs"
    if ran and virtual:
        return Check(
            name="KVM", ok=True, why="a guest ran three instructions, and the CPU has vmx or svm", fix=""
        )
    if ran:
        module = "kvm_pvm" if os.path.exists("/sys/module/kvm_pvm") else "KVM without vmx or svm"
        why = f"a guest runs real-mode code, but this is {module}: stock kernels do not boot in it. {_NO_KVM}"
    else:
        why = f"/dev/kvm is there, but {why}: {_NO_KVM}"
    return Check(
        name="KVM",
        ok=False,
        why=why,
        fix="use a host with hardware virtualisation (or nested, with vmx or svm)",
    )


def run_real_mode_guest() -> str:
    """Runs `mov al, 'R'; out 0x10, al; hlt` in a new VM; 'ran' when the port write arrived. Raises OSError."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, 4096)
    memory.write(b"\xb0R\xe6\x10\xf4")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, _KVM_SET_USER_MEMORY_REGION, struct.pack("IIQQQ", 0, 0, 0x1000, 4096, address))
    vcpu = fcntl.ioctl(vm, _KVM_CREATE_VCPU, 0)
    size = fcntl.ioctl(kvm, _KVM_GET_VCPU_MMAP_SIZE, 0)
    run = mmap.mmap(vcpu, size)
    sregs = bytearray(312)
    fcntl.ioctl(vcpu, _KVM_GET_SREGS, sregs)
    struct.pack_into("Q", sregs, 0, 0)  # cs.base
    struct.pack_into("H", sregs, 12, 0)  # cs.selector
    fcntl.ioctl(vcpu, _KVM_SET_SREGS, bytes(sregs))
    registers = [0] * 18
    registers[16], registers[17] = 0x1000, 2  # rip, rflags
    fcntl.ioctl(vcpu, _KVM_SET_REGS, struct.pack("18Q", *registers))
    for _ in range(4):
        fcntl.ioctl(vcpu, _KVM_RUN, 0)
        (reason,) = struct.unpack_from("I", run, 8)
        if reason == _KVM_EXIT_IO:
            (offset,) = struct.unpack_from("Q", run, 40)
            return "ran" if run[offset] == ord("R") else "the guest wrote another value than it should"
        if reason == _KVM_EXIT_HLT:
            return "the guest halted without its port write"
    return f"the guest stopped with exit reason {reason}"
