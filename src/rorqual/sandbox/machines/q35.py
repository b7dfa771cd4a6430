"""QEMU's q35 machine, a whole PC: its command line, snapshot and restore. The fullvm substrate's monitor.

Any disk under a qcow2 of the sandbox's own, BIOS or UEFI, a screen, PS/2 keyboard and USB tablet, a serial line, and
the ports of two guest agents: ours and QEMU's. Every file is handed over as a descriptor and opened by its number, its
format named: QEMU follows no path that an image names. Memory is a shared memfd, as the microvm's (machines/qemu.py).
Source: QEMU 7.2's documentation (qemu-options, QMP reference); OVMF of Debian's package.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import HostUnfit, ImageRejected, SandboxError
from rorqual.sandbox.host import find_program
from rorqual.sandbox.keeper.sparse import copy_sparse
from rorqual.sandbox.machines import memory, qga
from rorqual.sandbox.machines.agent_service import PORT, PORTS
from rorqual.sandbox.machines.channel import chosen
from rorqual.sandbox.machines.disks import Disk
from rorqual.sandbox.machines.qemu import IGNORE_SHARED, Qemu, shown
from rorqual.sandbox.machines.qmp import monitor
from rorqual.sandbox.machines.vmm import Plan

DISK, VARS, SEED = "disk", "vars", "seed"
"""Names of files in the sandbox's directory and in a snapshot's."""
WIDTH, HEIGHT = 1280, 800
MIN_DISK_MB = 16
_MIGRATION_S = 300.0
_TB_MB = 192
_OVERHEAD_MB = {"kvm": 160, "tcg": 416}
"""QEMU's own: the screen, its devices, and under TCG the translated code of _TB_MB on top."""
_OVMF = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pc:
    """One machine to start."""

    sandbox_id: str
    base: Disk
    overlay: Path
    """A qcow2 for what it writes; the keeper makes the sandbox's own copy of it."""
    firmware: str
    """'bios' or 'uefi'."""
    memory_mb: int
    cpus: int
    accelerator: str
    disk_mb: int | None = None
    """How large the overlay may grow; None: without limit."""
    seed: Path | None = None
    """An ISO for cloud-init."""
    network: Mapping[str, Any] | None = None
    """None: no interface; otherwise {"tap": name, "mac": address}."""
    restore: Path | None = None
    """Directory of a memory snapshot, instead of a boot."""
    ram: str = ""
    """restore: a file to map copy-on-write in place of the snapshot's own memory file."""


def firmware_files() -> tuple[str, str]:
    """UEFI's code and the template of its variables. Raises HostUnfit."""
    for code, variables in _OVMF:
        if os.path.isfile(code) and os.path.isfile(variables):
            return code, variables
    raise HostUnfit("firmware='uefi' needs OVMF, which is not installed.", fix="apt-get install ovmf")


class Q35(Qemu):
    """See the module. Program, version and what accelerates it are the microvm's."""

    name = "qemu-q35"

    def pc(self, pc: Pc, *, vm: Path) -> Plan:
        """vm: `<sandbox>/vm` as the host sees it. Raises HostUnfit, ImageRejected."""
        argv = [self.program(), "-name", pc.sandbox_id, *_machine(pc)]
        files: dict[str, dict[str, Any]] = {}
        size = pc.memory_mb << 20
        share = "on"
        if pc.ram:
            files["ram"], share = {"path": pc.ram, "write": True}, "off"
        elif pc.restore is not None and (pc.restore / memory.RAM).exists():
            files["ram"] = {"memfd": size, "fill": str(pc.restore / memory.RAM)}
        else:
            files["ram"] = {"memfd": size}
        argv += [
            "-object",
            f"memory-backend-file,id=ram,size={pc.memory_mb}M,mem-path=/proc/self/fd/{{ram}},share={share}",
        ]
        if pc.restore is not None:
            argv += ["-incoming", "defer"]
        if pc.firmware == "uefi":
            code, variables = firmware_files()
            files["code"], files[VARS] = {"path": code}, {"path": variables, "copy": VARS}
            argv += _file("code", 10, readonly=True) + _file(VARS, 11, readonly=False)
            argv += ["-blockdev", "driver=raw,node-name=pflash0,file=code,read-only=on"]
            argv += ["-blockdev", f"driver=raw,node-name=pflash1,file={VARS}"]
        argv += self._disks(pc, files)
        argv += _devices()
        if pc.network is not None:
            files["tap"] = {"tap": pc.network["tap"]}
            argv += ["-netdev", "tap,id=net,fd={tap}"]
            argv += ["-device", f"virtio-net-pci,netdev=net,mac={pc.network['mac']},romfile="]
        if pc.disk_mb is not None:
            limit = find_program("prlimit")
            if limit is None:
                raise HostUnfit("disk_mb needs prlimit.", fix="apt-get install util-linux; or disk_mb=None")
            # SIGXFSZ is ignored, by the keeper's own Python: a write beyond is an error that the guest sees.
            argv = [limit, f"--fsize={pc.disk_mb << 20}", *argv]
        return Plan(
            argv=argv,
            files=files,
            shown=shown(self.program()),
            devices=["null", "urandom", *(["kvm"] if pc.accelerator == "kvm" else [])],
            guest=f"pc:{vm}",
            overhead_mb=_OVERHEAD_MB[pc.accelerator],
        )

    def _disks(self, pc: Pc, files: dict[str, dict[str, Any]]) -> list[str]:
        files["base"] = {"path": str(pc.base.path)}
        argv = _file("base", 12, readonly=True)
        if pc.base.format == "iso":
            argv += ["-blockdev", "driver=raw,node-name=cd,file=base,read-only=on"]
            argv += ["-device", "ide-cd,drive=cd,bus=ide.0,bootindex=2"]
        else:
            # `backing: null`: whatever its header says, nothing else is opened.
            null: dict[str, Any] = {"backing": None} if pc.base.format == "qcow2" else {}
            node = {"driver": pc.base.format, "node-name": "image", "file": "base", "read-only": True, **null}
            argv += ["-blockdev", json.dumps(node)]
            source = pc.restore / DISK if pc.restore is not None else pc.overlay
            files[DISK] = {"path": str(source), "copy": DISK}
            argv += _file(DISK, 13, readonly=False)
            top = {
                **{"driver": "qcow2", "node-name": "top", "file": DISK, "backing": "image"},
                **{"discard": "unmap", "cache": {"no-flush": True}},
            }
            argv += ["-blockdev", json.dumps(top)]
            argv += [
                "-device",
                "virtio-blk-pci,drive=top,bootindex=1,serial=disk,werror=report,rerror=report",
            ]
        seed = pc.seed
        if pc.restore is not None and (pc.restore / SEED).exists():
            seed = pc.restore / SEED
        if seed is not None:
            files[SEED] = {"path": str(seed), "copy": SEED}
            argv += _file(SEED, 14, readonly=False)  # as the descriptor is; the node above it is read-only
            argv += ["-blockdev", f"driver=raw,node-name=cidata,file={SEED},read-only=on"]
            argv += ["-device", "virtio-blk-pci,drive=cidata,serial=cidata"]
        return argv

    async def go_on(self, pc: Pc, *, vm: Path) -> None:
        """A restored machine is given its state; a boot's command line says it all. Raises SandboxError."""
        if pc.restore is None:
            return
        fd = os.open(pc.restore / memory.STATE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            async with monitor(vm / "qmp.sock") as qmp:
                await qmp.execute("migrate-set-capabilities", IGNORE_SHARED)
                await qmp.send_fd("state", fd)
                await qmp.execute("migrate-incoming", {"uri": "fd:state"})
                await qmp.wait_for_migration(deadline=_MIGRATION_S)
                if not (await qmp.execute("query-status")).get("running"):  # it was stopped when it was taken
                    await qmp.execute("cont")
        finally:
            os.close(fd)

    async def snapshot(self, pid: int, target: Path, *, vm: Path, durable: bool) -> dict[str, Any]:
        ram = memory.shared_ram(pid)
        async with monitor(vm / "qmp.sock") as qmp:
            running = (await qmp.execute("query-status")).get("running")
            await qmp.execute("stop")
            try:
                read, write = os.pipe2(os.O_CLOEXEC)
                # Through a pipe: the file is ours to write, beyond any limit on the files of the VMM.
                copy = asyncio.ensure_future(asyncio.to_thread(_drain, read, target / memory.STATE, durable))
                try:
                    try:
                        await qmp.execute("migrate-set-capabilities", IGNORE_SHARED)
                        await qmp.send_fd("state", write)
                    finally:
                        os.close(write)
                    await qmp.execute("migrate", {"uri": "fd:state"})
                    await qmp.wait_for_migration(deadline=_MIGRATION_S)
                    await copy
                except BaseException:
                    await asyncio.wait([copy], timeout=10.0)
                    raise
                taken = await memory.take_ram(ram, target, durable=durable) if ram else {}
                for name in (DISK, SEED):
                    if (vm.parent / name).exists():
                        await asyncio.to_thread(_copy, vm.parent / name, target / name, durable)
            finally:
                if running:
                    await qmp.execute("cont")
        known = chosen(vm.parent)
        return {"version": self.version(), **taken, **({"channel": known} if known else {})}


def _drain(read: int, target: Path, durable: bool) -> None:
    with open(read, "rb") as source, target.open("xb") as sink:
        while data := source.read(1 << 20):
            sink.write(data)
        if durable:
            sink.flush()
            os.fsync(sink.fileno())


def _copy(source: Path, target: Path, durable: bool) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        copy_sparse(reader.fileno(), writer.fileno())
        if durable:
            os.fsync(writer.fileno())


def _machine(pc: Pc) -> list[str]:
    if pc.accelerator == "kvm":
        accel = ["-accel", "kvm", "-cpu", "host"]
    else:
        accel = ["-accel", f"tcg,thread=multi,tb-size={_TB_MB}", "-cpu", "max"]
    flash = ",pflash0=pflash0,pflash1=pflash1" if pc.firmware == "uefi" else ""
    return [
        *["-M", f"q35,memory-backend=ram,vmport=off{flash}", *accel, "-smp", str(pc.cpus)],
        *["-m", f"{pc.memory_mb}M", "-nodefaults", "-no-user-config", "-display", "none"],
        *["-boot", "menu=off,strict=on", "-qmp", "unix:qmp.sock,server=on,wait=off"],
        *["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    ]


def _file(name: str, number: int, *, readonly: bool) -> list[str]:
    """A node on a descriptor. A set of descriptors is duplicated, not opened: no permission is asked for again."""
    mode = "on" if readonly else "off"
    return [
        *["-add-fd", f"fd={{{name}}},set={number}"],
        "-blockdev",
        f"driver=file,node-name={name},filename=/dev/fdset/{number},read-only={mode},locking=off,"
        f"cache.no-flush=on,auto-read-only=off",
    ]


def _devices() -> list[str]:
    argv = ["-device", f"VGA,edid=on,xres={WIDTH},yres={HEIGHT}"]
    argv += ["-device", "qemu-xhci,id=usb", "-device", "usb-tablet,bus=usb.0"]
    argv += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
    argv += ["-device", "virtio-balloon-pci,id=balloon,deflate-on-oom=on,free-page-reporting=on"]
    argv += ["-chardev", "socket,id=serial,path=console.sock,server=on,wait=off", "-serial", "chardev:serial"]
    argv += ["-device", f"virtio-serial-pci,max_ports={PORTS + 2}"]
    for number in range(PORTS):
        argv += ["-chardev", f"socket,id=agent{number},path=agent-{number}.sock,server=on,wait=off"]
        argv += ["-device", f"virtserialport,chardev=agent{number},name={PORT % number}"]
    argv += ["-chardev", "socket,id=qga,path=qga.sock,server=on,wait=off"]
    argv += ["-device", f"virtserialport,chardev=qga,name={qga.PORT}"]
    return argv


def check_base(machine: Mapping[str, Any], *, name: str) -> None:
    """The disk under a snapshot is what it was. Raises ImageRejected."""
    base = machine["base"]
    try:
        info = os.stat(base["path"])
    except OSError as error:
        raise ImageRejected(name, f"the disk it lies on is gone: {error}") from error
    if [info.st_size, info.st_mtime_ns] != [base["size"], base["mtime_ns"]]:
        raise ImageRejected(name, f"the disk it lies on, {base['path']}, was changed since it was taken")


def base_identity(base: Disk) -> dict[str, Any]:
    """What `check_base` compares. Raises SandboxError."""
    try:
        info = os.stat(base.path)
    except OSError as error:
        raise SandboxError(f"{base.path}: {error.strerror}") from error
    return {
        "path": str(base.path),
        "format": base.format,
        "virtual_bytes": base.virtual_bytes,
        "size": info.st_size,
        "mtime_ns": info.st_mtime_ns,
    }
