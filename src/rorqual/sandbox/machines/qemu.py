"""QEMU's microvm machine: its command line, what accelerates it here, snapshot and restore through QMP.

No PCI, no BIOS but a jump into the kernel (PVH), virtio over mmio, found through ACPI. The guest agent is on PORTS
virtio-serial ports. Memory is a memfd that QEMU maps shared, so that a snapshot is a copy of what the guest has touched
plus a stream with the devices only (x-ignore-shared); children of a fork map one sealed memfd privately, so that they
share what they do not write. A machine that runs on such a mapping has its memory in the stream when it is taken.
Source: QEMU 7.2's documentation (microvm.rst, qemu-options, migration), and its sources for x-ignore-shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import json
import mmap
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import HostUnfit, ImageRejected, InvalidRequest
from rorqual.sandbox.host import find_program
from rorqual.sandbox.machines import memory
from rorqual.sandbox.machines.initrd import initrd
from rorqual.sandbox.machines.kernel import find_kernel
from rorqual.sandbox.machines.qmp import monitor
from rorqual.sandbox.machines.vmm import Accelerator, Boot, Plan
from rorqual.sandbox.state import cache_dir

PORTS = 8
"""Clients at once."""
PROGRAM = "qemu-system-x86_64"
FIX = "apt-get install qemu-system-x86"
MIGRATION_S = 120.0
DISK_FILE = "disk.img"
"""In the sandbox's directory."""
_PROBE_S = 8.0
_OVERHEAD_MB = {"kvm": 96, "tcg": 224}
"""QEMU's own memory: 45 MB, and under TCG the translated code of TB_MB on top."""
_TB_MB = 96
IGNORE_SHARED = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
_AGENT_SAYS = "rorqual-guest/"


class Qemu:
    """See the module."""

    name = "qemu"
    emulates = True
    modules: tuple[str, ...] = (
        "virtio_mmio",
        "virtio_blk",
        "virtio_console",
        "virtio_balloon",
        "erofs",
        "overlay",
    )

    def program(self) -> str:
        path = find_program(PROGRAM)
        if path is None:
            raise HostUnfit(f"{PROGRAM} is not in PATH.", fix=FIX)
        return path

    def version(self) -> str:
        return _version(self.program())

    def accelerator(self) -> Accelerator:
        program = self.program()
        stat = os.stat(program)
        host = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place = cache_dir() / "guests"
        place.mkdir(exist_ok=True)
        record = place / f"accelerator-{host}-{stat.st_mtime_ns:x}-{os.geteuid()}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Accelerator(**json.loads(record.read_text(encoding="utf-8")))
        found = self._probe(program)
        temporary = record.with_name(f".building-{os.getpid()}-{record.name}")
        temporary.write_text(json.dumps({"name": found.name, "why": found.why}), encoding="utf-8")
        os.rename(temporary, record)
        return found

    def _probe(self, program: str) -> Accelerator:
        """Boots the guests' kernel under KVM with an /init that says its version and ends."""
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            why = "there is no /dev/kvm" if not os.path.exists("/dev/kvm") else "/dev/kvm may not be opened"
            return Accelerator(name="tcg", why=why)
        from rorqual.sandbox.substrates.container import guest_binary

        kernel = find_kernel()
        start = initrd(kernel, guest_binary(), ())
        command = [
            program,
            *_base("kvm", cpus=1),
            "-m",
            "128M",
            "-chardev",
            "stdio,id=console",
        ]
        command += ["-kernel", str(kernel.vmlinux), "-initrd", str(start)]
        command += ["-append", "console=ttyS0 panic=-1 reboot=t quiet -- --version"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Accelerator(
                name="tcg", why=f"a guest booted with KVM did not come up in {_PROBE_S:g} s, and was given up"
            )
        if _AGENT_SAYS.encode() in done.stdout:
            return Accelerator(name="kvm", why="a guest booted with KVM")
        words = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it printed nothing"])[-1]
        return Accelerator(name="tcg", why=f"a guest booted with KVM did not come up: {words[:200]}")

    def plan(self, boot: Boot, *, vm: Path) -> Plan:
        argv = [self.program(), *_base(boot.accelerator, cpus=boot.cpus, memory="ram")]
        argv += ["-name", boot.sandbox_id, "-qmp", "unix:qmp.sock,server=on,wait=off"]
        argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
        argv += ["-chardev", "stdio,id=console,signal=off"]
        files: dict[str, dict[str, Any]] = {}
        size = boot.memory_mb << 20
        share = "on"
        if boot.ram:
            files["ram"], share = {"path": boot.ram, "write": True}, "off"
        elif boot.restore is not None and (boot.restore / memory.RAM).exists():
            files["ram"] = {"memfd": size, "fill": str(boot.restore / memory.RAM)}
        else:
            files["ram"] = {"memfd": size}
        argv += [
            "-m",
            f"{boot.memory_mb}M",
            "-object",
            f"memory-backend-file,id=ram,size={boot.memory_mb}M,mem-path=/proc/self/fd/{{ram}},share={share}",
        ]
        if boot.restore is not None:
            argv += ["-incoming", "defer"]
        else:
            files |= {"kernel": {"path": str(boot.kernel.vmlinux)}, "initrd": {"path": str(boot.initrd)}}
            argv += ["-kernel", "/proc/self/fd/{kernel}", "-initrd", "/proc/self/fd/{initrd}"]
            argv += ["-append", command_line(boot)]
        for number, layer in enumerate(boot.layers):
            name = f"layer{number}"
            files[name] = {"path": str(layer)}
            argv += _drive(name, readonly=True)
        if boot.disk is not None:
            files["disk"] = {"path": str(boot.disk), "copy": DISK_FILE}
            argv += _drive("disk", readonly=False)
        argv += ["-device", f"virtio-serial-device,max_ports={PORTS + 1}"]
        for number in range(PORTS):
            argv += ["-chardev", f"socket,id=agent{number},path=agent-{number}.sock,server=on,wait=off"]
            argv += ["-device", f"virtserialport,chardev=agent{number},name=org.rorqual.agent.{number}"]
        argv += ["-device", "virtio-balloon-device,id=balloon,deflate-on-oom=on,free-page-reporting=on"]
        if boot.network is not None:
            files["tap"] = {"tap": boot.network["tap"]}
            argv += ["-netdev", "tap,id=net,fd={tap}"]
            argv += ["-device", f"virtio-net-device,netdev=net,mac={boot.network['mac']}"]
        return Plan(
            argv=argv,
            files=files,
            shown=shown(argv[0]),
            devices=["null", "urandom", *(["kvm"] if boot.accelerator == "kvm" else [])],
            guest=f"ports:{vm}/agent-%d.sock?n={PORTS}",
            overhead_mb=_OVERHEAD_MB[boot.accelerator],
        )

    async def start(self, boot: Boot, *, vm: Path) -> None:
        """A boot's command line says it all; a restored machine is given its state."""
        if boot.restore is None:
            return
        fd = os.open(boot.restore / memory.STATE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            async with monitor(vm / "qmp.sock") as qmp:
                apart = bool(boot.ram) or (boot.restore / memory.RAM).exists()
                await qmp.execute("migrate-set-capabilities", _ignore_shared(apart))
                await qmp.send_fd("state", fd)
                await qmp.execute("migrate-incoming", {"uri": "fd:state"})
                await qmp.wait_for_migration(deadline=MIGRATION_S)
                await qmp.execute("cont")  # it was stopped when it was taken, and so it comes back
        finally:
            os.close(fd)

    async def snapshot(self, pid: int, target: Path, *, vm: Path, durable: bool) -> dict[str, Any]:
        ram = memory.shared_ram(pid)
        async with monitor(vm / "qmp.sock") as qmp:
            await qmp.execute("stop")
            try:
                fd = os.open(
                    target / memory.STATE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644
                )
                try:
                    await qmp.execute("migrate-set-capabilities", _ignore_shared(bool(ram)))
                    await qmp.send_fd("state", fd)
                    await qmp.execute("migrate", {"uri": "fd:state"})
                    await qmp.wait_for_migration(deadline=MIGRATION_S)
                    if durable:
                        os.fsync(fd)
                finally:
                    os.close(fd)
                taken = await memory.take_ram(ram, target, durable=durable) if ram else {}
                if (vm.parent / DISK_FILE).exists():
                    await asyncio.to_thread(
                        memory.copy_disk, vm.parent / DISK_FILE, target / memory.DISK, durable=durable
                    )
            finally:
                await qmp.execute("cont")
        return {"version": self.version(), **taken}

    async def set_memory(self, memory_mb: int, *, vm: Path) -> int:
        async with monitor(vm / "qmp.sock") as qmp:
            have = (await qmp.execute("query-balloon"))["actual"] >> 20
            if not 16 <= memory_mb <= (total := await _total_mb(qmp)):
                raise InvalidRequest(f"memory_mb: {memory_mb!r} must be from 16 to the machine's {total} MiB")
            await qmp.execute("balloon", {"value": memory_mb << 20})
            end = time.monotonic() + 10.0
            while have != memory_mb and time.monotonic() < end:
                await asyncio.sleep(0.02)
                have = (await qmp.execute("query-balloon"))["actual"] >> 20
        return int(have)


def _ignore_shared(on: bool) -> dict[str, Any]:
    """Whether the stream leaves out what is mapped shared. Both ends must say the same."""
    return {"capabilities": [{"capability": "x-ignore-shared", "state": on}]}


async def _total_mb(qmp: Any) -> int:
    return int((await qmp.execute("query-memory-size-summary"))["base-memory"]) >> 20


def _base(accelerator: str, *, cpus: int, memory: str = "") -> list[str]:
    """The machine and its console, without devices. memory: the object that is its memory."""
    if accelerator == "kvm":
        accel = ["-accel", "kvm", "-cpu", "host"]
    else:
        accel = ["-accel", f"tcg,thread=multi,tb-size={_TB_MB}", "-cpu", "max"]
    machine = "microvm,acpi=on,rtc=on,isa-serial=on,x-option-roms=off"
    machine += f",memory-backend={memory}" if memory else ""
    return [
        *["-M", machine, *accel, "-smp", str(cpus)],
        *["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "chardev:console"],
    ]


def _drive(name: str, *, readonly: bool) -> list[str]:
    mode = "on" if readonly else "off"
    return [
        "-blockdev",
        f"driver=raw,node-name={name},read-only={mode},file.driver=file,file.locking=off,"
        f"file.filename=/proc/self/fd/{{{name}}},discard=unmap",
        "-device",
        f"virtio-blk-device,drive={name},serial={name}",
    ]


def command_line(boot: Boot) -> str:
    """The kernel's. A word it does not know would become the agent's argument. Raises ImageRejected when too long."""
    words = ["console=ttyS0", "quiet", "loglevel=4", "panic=-1", "reboot=t", "8250.nr_uarts=1"]
    words += ["cryptomgr.notests", "random.trust_cpu=on", "audit=0"]
    if boot.accelerator == "tcg":
        # Emulation has no timer to calibrate by: without this the kernel waits for one, sometimes for ever.
        words += [f"tsc_early_khz={tsc_khz()}", "tsc=reliable", "no_timer_check", "mitigations=off"]
        words.append("init_on_alloc=0")  # 15% of the boot
    words += ["--", "--machine", "--ports", str(PORTS), *boot.arguments]
    line = " ".join(words)
    if len(line) > 2000:
        raise ImageRejected(boot.sandbox_id, f"its kernel's command line has {len(line)} bytes; 2000 fit")
    return line


def shown(program: str) -> list[str]:
    """The host directories QEMU needs: its libraries, and its own when it lies elsewhere."""
    places = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"]
    own = os.path.realpath(program)
    if not own.startswith("/usr/"):
        places.append(str(Path(own).parents[1]))
    return places


@functools.cache
def _version(program: str) -> str:
    try:
        words = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise HostUnfit(f"{program} --version fails: {error}.", fix=FIX) from error
    match = re.search(r"version ([0-9][^ )\n]*)", words)
    return match[1] if match else words.split("\n")[0]


@functools.cache
def tsc_khz() -> int:
    """The frequency of this CPU's time stamp counter, which an emulated guest reads as its own; measured in 50 ms."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("0f31 48c1e220 4809d0 c3"))  # rdtsc; rax |= rdx << 32; ret
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    best = (float("inf"), 0)
    for _ in range(3):  # the attempt that was interrupted least
        ticks, start = read(), time.monotonic_ns()
        time.sleep(0.015)
        middle, end, after = read(), time.monotonic_ns(), read()
        best = min(best, (after - middle, round((middle - ticks) * 1e6 / (end - start))))
    return best[1]
