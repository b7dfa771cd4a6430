"""Firecracker as a VMM of the microvm substrate: the program, its jail, what boots in it, snapshot and restore.

A machine is configured through the API, never by a file, so that a refusal is an answer (firecracker_api.py). Its
devices are virtio over MMIO, named to the guest in ACPI tables; the guest agent is on vsock. All files have the same
names in the directory of every VMM, since a restored machine has the file names of its snapshot: as root the jailer's
chroot has them (keeper/chroot.py), else links to open descriptors. The memory of a snapshot is one file, which any
number of children map privately; while it is written, and when it is loaded, all connections of vsock are reset.
Owns no process: substrates/microvm.py starts it through the keeper.
Source: Firecracker 1.12, docs/getting-started.md, docs/jailer.md, docs/snapshotting/snapshot-support.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox.errors import (
    GuestGone,
    GuestProtocolError,
    HostUnfit,
    ImageRejected,
    InvalidRequest,
    SandboxError,
)
from rorqual.sandbox.host import find_program
from rorqual.sandbox.keeper import chroot
from rorqual.sandbox.machines import firecracker_api as fc
from rorqual.sandbox.machines import jailer, memory
from rorqual.sandbox.machines.initrd import initrd
from rorqual.sandbox.machines.kernel import find_kernel
from rorqual.sandbox.machines.qemu import DISK_FILE
from rorqual.sandbox.machines.vmm import Accelerator, Boot, Plan
from rorqual.sandbox.state import cache_dir

API_SOCKET, VSOCK_SOCKET = "api.sock", "v.sock"
GUEST_CID = 3
AGENT_PORT = 1024
FIX = "python scripts/fetch_firecracker.py"
KNOWN = (1, 12)
"""What this was written and tested against; a snapshot of another version is refused by Firecracker itself."""
SETTLE_S = 20.0
_PROBE_S = 60.0
"""A fraction of a second on a machine, but KVM may itself run in an emulated one."""
_OVERHEAD_MB = 48
"""Firecracker has 5 MB, its copy in the jail 3; the rest is what the kernel charges for a guest's page tables."""
_AGENT_SAYS = "rorqual-guest/"
# Modules load from the initial file system; there is no keyboard controller worth a probe but for the reset.
_WORDS = (
    "console=ttyS0 8250.nr_uarts=1 quiet loglevel=4 reboot=k panic=-1 pci=off audit=0 cryptomgr.notests "
    "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd random.trust_cpu=on"
)


class Firecracker:
    """See the module."""

    name = "firecracker"
    emulates = False
    modules: tuple[str, ...] = (
        "virtio_mmio",
        "virtio_blk",
        "virtio_balloon",
        "virtio_rng",
        "vmw_vsock_virtio_transport",
        "erofs",
        "overlay",
    )

    def program(self) -> str:
        return str(find_firecracker())

    def version(self) -> str:
        return ".".join(map(str, version(find_firecracker())))

    def accelerator(self) -> Accelerator:
        """KVM, or HostUnfit: Firecracker has nothing else."""
        program = find_firecracker()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        record = (
            cache_dir()
            / "guests"
            / f"firecracker-{boot_id}-{program.stat().st_mtime_ns:x}-{os.geteuid()}.json"
        )
        why = ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            why = str(json.loads(record.read_text(encoding="utf-8"))["why"])
        if not why:
            why = _probe(program)
            record.parent.mkdir(exist_ok=True)
            temporary = record.with_name(f".building-{os.getpid()}-{record.name}")
            temporary.write_text(json.dumps({"why": why}), encoding="utf-8")
            os.rename(temporary, record)
        if why != _BOOTED:
            raise HostUnfit(
                f"Firecracker needs a KVM that boots guests: {why}.",
                fix="use vmm='qemu', or a host with hardware virtualisation",
            )
        return Accelerator(name="kvm", why=why)

    def plan(self, boot: Boot, *, vm: Path) -> Plan:
        program = find_firecracker()
        files: dict[str, dict[str, Any]] = {}
        if boot.restore is not None:
            files |= {name: {"path": str(boot.restore / name)} for name in (memory.STATE, memory.RAM)}
        else:
            files |= {"kernel": {"path": str(boot.kernel.vmlinux)}, "initrd": {"path": str(boot.initrd)}}
            command_line(boot)
        for number, layer in enumerate(boot.layers):
            files[f"layer{number}"] = {"path": str(layer)}
        if boot.disk is not None:
            files["disk"] = {"path": str(boot.disk), "copy": DISK_FILE}
        arguments = ["--api-sock", API_SOCKET, "--level", "Error", "--id", boot.sandbox_id]
        root = jail(vm, boot.sandbox_id)
        if root is None:
            plan_argv, inside = [str(program), *arguments], None
        else:
            tool = find_jailer()
            if tool is None:
                raise HostUnfit(
                    "as root, Firecracker is started through its jailer, and there is none.", fix=FIX
                )
            base = vm / _JAILS
            assert boot.user is not None
            plan_argv = jailer.argv(
                tool, program, arguments[:4], sandbox_id=boot.sandbox_id, user=boot.user, base=base
            )
            inside = {"root": str(root.relative_to(vm)), "files": files, "user": boot.user}
        return Plan(
            argv=plan_argv,
            files=files if inside is None else {},
            shown=[],
            devices=[],
            guest=f"vsock:{(root or vm) / VSOCK_SOCKET}?port={AGENT_PORT}",
            overhead_mb=_OVERHEAD_MB,
            chroot=inside,
            links=inside is None,
            notes=(_UNJAILED,) if inside is None else (),
        )

    async def start(self, boot: Boot, *, vm: Path) -> None:
        directory = jail(vm, boot.sandbox_id) or vm
        async with fc.FirecrackerApi(directory / API_SOCKET) as api:
            await api.wait_ready(timeout=fc.REQUEST_S)
            if boot.restore is not None:
                taps = {"eth0": boot.network["tap"]} if boot.network is not None else None
                await api.load_snapshot(state=memory.STATE, memory=memory.RAM, resume=True, taps=taps)
            else:
                for device in devices(boot):
                    await api.put(device)
                await api.start()
        if boot.restore is not None:
            await _settle(f"vsock:{directory / VSOCK_SOCKET}?port={AGENT_PORT}")

    async def snapshot(self, pid: int, target: Path, *, vm: Path, durable: bool) -> dict[str, Any]:
        root = jail(vm, vm.parent.name)
        place = str(target) if root is None else chroot.LENT
        user = os.geteuid() if root is None else root.stat().st_uid
        async with fc.FirecrackerApi((root or vm) / API_SOCKET) as api:
            size = await api.memory_mb() << 20
        await asyncio.to_thread(_reserve, target / memory.RAM, size, user)
        if root is not None:
            os.chown(target, user, user)
            await _in_jail("lend", pid, str(target))
        try:
            async with fc.FirecrackerApi((root or vm) / API_SOCKET) as api:
                await api.pause()
                try:
                    await api.create_snapshot(state=f"{place}/{memory.STATE}", memory=f"{place}/{memory.RAM}")
                    if (disk := vm.parent / DISK_FILE).exists():
                        await asyncio.to_thread(memory.copy_disk, disk, target / memory.DISK, durable=durable)
                finally:
                    await api.resume()
        finally:
            if root is not None:
                await _in_jail("take_back", pid)
                os.chown(target, 0, 0)
        taken = await asyncio.to_thread(_settle_files, target, root is not None, durable)
        return {"version": self.version(), "ram_bytes": taken}

    async def set_memory(self, memory_mb: int, *, vm: Path) -> int:
        async with fc.FirecrackerApi((jail(vm, vm.parent.name) or vm) / API_SOCKET) as api:
            total = await api.memory_mb()
            if not 16 <= memory_mb <= total:
                raise InvalidRequest(f"memory_mb: {memory_mb!r} must be from 16 to the machine's {total} MiB")
            await api.set_balloon(total - memory_mb)
            end = asyncio.get_running_loop().time() + 10.0
            while (have := total - (await api.balloon()).actual_mib) != memory_mb:
                if asyncio.get_running_loop().time() > end:
                    break
                await asyncio.sleep(0.02)
            return have


def devices(boot: Boot) -> list[fc.Device]:
    """What a machine that boots is made of; files by their names in the VMM's directory. Raises ImageRejected."""
    made: list[fc.Device] = [
        fc.MachineConfig(vcpu_count=boot.cpus, mem_size_mib=boot.memory_mb),
        fc.BootSource(kernel_image_path="kernel", initrd_path="initrd", boot_args=command_line(boot)),
    ]
    for number in range(len(boot.layers)):
        name = f"layer{number}"
        made.append(fc.Drive(drive_id=name, path_on_host=name, is_read_only=True))
    if boot.disk is not None:
        made.append(fc.Drive(drive_id="disk", path_on_host="disk", is_read_only=False))
    made += [
        fc.Vsock(guest_cid=GUEST_CID, uds_path=VSOCK_SOCKET),
        fc.Balloon(amount_mib=0, stats_polling_interval_s=60),
        fc.Entropy(),
    ]
    if boot.network is not None:
        tap, mac = str(boot.network["tap"]), str(boot.network["mac"])
        made.append(fc.NetworkInterface(iface_id="eth0", host_dev_name=tap, guest_mac=mac))
    return made


def command_line(boot: Boot) -> str:
    """The kernel's. Raises ImageRejected when it is longer than Firecracker lets it be."""
    line = " ".join([_WORDS, "--", "--machine", "--vsock", str(AGENT_PORT), *boot.arguments])
    if len(line) > 1900:  # 2048, less what Firecracker adds for the devices
        raise ImageRejected(boot.sandbox_id, f"its kernel's command line has {len(line)} bytes; 1900 fit")
    return line


_JAILS = "jail"
_UNJAILED = (
    "without root Firecracker has no jailer: it is a process of yours, held by its own seccomp filters"
)
_PACKAGE = Path(__file__).resolve().parents[2]
_BOOTED = "a guest booted with KVM"


def jail(vm: Path, sandbox_id: str) -> Path | None:
    """The VMM's root as the host sees it; None where there is no jailer, since we are not root."""
    return jailer.root(vm / _JAILS, sandbox_id) if os.geteuid() == 0 else None


def _probe(program: Path) -> str:
    """Boots the guests' kernel with an /init that says its version; what came of it."""
    from rorqual.sandbox.substrates.container import guest_binary

    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "there is no /dev/kvm" if not os.path.exists("/dev/kvm") else "/dev/kvm may not be opened"
    if not re.search(r" (vmx|svm) ", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
        return "this CPU shows neither vmx nor svm, without which the guests' kernel does not boot"
    kernel = find_kernel()
    source = fc.BootSource(
        kernel_image_path=str(kernel.vmlinux),
        initrd_path=str(initrd(kernel, guest_binary(), ())),
        boot_args=f"{_WORDS} -- --version",
    )
    document = fc.config_file([source, fc.MachineConfig(vcpu_count=1, mem_size_mib=128)])
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        command = [str(program), "--no-api", "--level", "Error", "--config-file", file.name]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"a guest did not come up in {_PROBE_S:g} s, and was given up"
    if _AGENT_SAYS.encode() in done.stdout:
        return _BOOTED
    words = (done.stdout + done.stderr).decode("utf-8", "replace").strip().splitlines() or [
        "it printed nothing"
    ]
    return f"a guest did not come up: {words[-1][:200]}"


async def _settle(address: str) -> None:
    """Until a connection to a restored guest lasts: the ones from before its kernel learns of the restore are reset."""
    end = asyncio.get_running_loop().time() + SETTLE_S
    while True:
        try:
            async with await GuestClient.connect(address, timeout=SETTLE_S) as guest:
                await guest.list()
                return
        except GuestProtocolError:
            raise
        except GuestGone as error:
            if asyncio.get_running_loop().time() > end:
                raise SandboxError(f"the restored guest does not answer: {error}") from error
            await asyncio.sleep(0.005)


async def _in_jail(step: str, *arguments: int | str) -> None:
    """`chroot.lend` or `chroot.take_back` in a process of its own: ours has threads, and must not fork."""
    package = _PACKAGE
    code = f"""
import sys, types
for name, path in (("rorqual", {str(package)!r}), ("rorqual.sandbox", {str(package / "sandbox")!r})):
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
from rorqual.sandbox.keeper import chroot
chroot.{step}({", ".join(map(repr, arguments))})
"""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", code),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, said = await running.communicate()
    if running.returncode:
        words = said.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise SandboxError(f"{step} of a directory for a snapshot failed: {words[-1][:300]}")


def _reserve(path: Path, size: int, user: int) -> None:
    """Makes the memory's file before the VMM does: on a file system in memory, its pages are then ours, not the VMM's,
    whose limit they would break. Raises OSError (ENOSPC: before the machine has stood still)."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        if user != os.geteuid():
            os.fchown(fd, user, user)
    finally:
        os.close(fd)


def _settle_files(target: Path, jailed: bool, durable: bool) -> int:
    """The snapshot's files become ours, and durable; bytes of memory they take, without pages of zeros."""
    dig = find_program("fallocate")
    if dig is not None:
        subprocess.run([dig, "--dig-holes", str(target / memory.RAM)], check=False, capture_output=True)
    for name in (memory.STATE, memory.RAM):
        fd = os.open(target / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if jailed:
                os.fchown(fd, 0, 0)
                os.fchmod(
                    fd, 0o644
                )  # a child's VMM, which is another user, maps it; its directory is ours alone
            if durable:
                os.fsync(fd)
            taken = os.fstat(fd).st_blocks * 512
        finally:
            os.close(fd)
    return taken


def find_firecracker() -> Path:
    """The program: in PATH, else in the cache's `bin/`.

    Raises:
        HostUnfit: it is in neither, it does not run here, or it is older than what we speak.
    """
    path = _find("firecracker")
    if path is None:
        raise HostUnfit("no firecracker in PATH or in the cache.", fix=FIX)
    found = version(path)
    if found < KNOWN:
        raise HostUnfit(
            f"{path} is Firecracker {'.'.join(map(str, found))}; 1.12 or newer is needed.", fix=FIX
        )
    return path


def find_jailer() -> Path | None:
    """The jailer that came with it; None when there is none."""
    return _find("jailer")


def _find(name: str) -> Path | None:
    in_path = find_program(name)
    if in_path is not None:
        return Path(in_path)
    cached = cache_dir() / "bin" / name
    return cached if os.access(cached, os.X_OK) else None


def version(path: Path) -> tuple[int, int]:
    """Major and minor. Raises HostUnfit when the program does not run or says something else."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostUnfit(f"{path} does not run here: {error}.", fix=FIX) from error
    match = re.match(r"(?:Firecracker|Jailer) v([0-9]+)\.([0-9]+)", done.stdout)
    if match is None:
        said = (done.stdout or done.stderr).strip().splitlines()
        raise HostUnfit(f"{path} --version says {said[:1]}: this is not Firecracker.", fix=FIX)
    return int(match[1]), int(match[2])
