"""The fullvm substrate: a whole PC from any disk image, with a screen, on QEMU's q35.

Turns a request into the keeper's order of kind "machine": looks at the disk image (machines/disks.py), lays a qcow2 of
the sandbox's own over it, makes a seed for cloud-init, asks machines/q35.py for the command line. Who answers inside is
found out by the first client (machines/channel.py). A memory snapshot is an image, as with microvm. Owns the request;
never a silent choice: firmware, accelerator and channel are what was asked for, or said in `info()`.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.sandbox import host
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox.errors import (
    HostUnfit,
    ImageNotFound,
    InvalidRequest,
    Unsupported,
)
from rorqual.sandbox.images import debian_disk
from rorqual.sandbox.images.unpack import Bounds
from rorqual.sandbox.keeper import cgroups, leases
from rorqual.sandbox.keeper.client import own_keeper
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.machines import cloud_init, disks, q35, snapshot
from rorqual.sandbox.machines.channel import CHANNELS
from rorqual.sandbox.machines.disks import Disk
from rorqual.sandbox.machines.q35 import Q35, Pc
from rorqual.sandbox.machines.shell_guest import ShellGuest
from rorqual.sandbox.machines.vmm import Accelerator
from rorqual.sandbox.network.addresses import GATEWAY, MACHINE, MACHINE_GATEWAY, MACHINE_MAC, MACHINE_PREFIX
from rorqual.sandbox.network.order import (
    Tap,
    has_network,
    network_capabilities,
    network_order,
)
from rorqual.sandbox.network.secret import secret_envs
from rorqual.sandbox.records import Snapshot
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates.base import Launched, run_order
from rorqual.sandbox.substrates.machine import Seat, machine_order, machine_record, started

if TYPE_CHECKING:
    from rorqual.sandbox._session import Session

_CAPABILITIES = frozenset(
    {
        *("commands", "files", "pty", "background", "reattach", "trajectory", "network:offline", "root"),
        *(
            "memory_snapshot",
            "memory_fork",
            "commit",
            "balloon",
            "own_kernel",
            "screen",
            "keyboard",
            "pointer",
        ),
        *("firmware:bios", "agent", "qemu-guest-agent", "console"),
    }
)
MIN_MEMORY_MB = 64
PATIENCE_S = {"tcg": 240.0, "kvm": 90.0}
"""How long a machine may take from power-on until something in it answers."""


class FullVm:
    """See the module."""

    name = "fullvm"
    snapshots = "memory"

    def __init__(self) -> None:
        self._vmm = Q35()

    def capabilities(self) -> frozenset[str]:
        names = set(_CAPABILITIES | network_capabilities())
        if cgroups.can_freeze():
            names.add("pause")
        try:
            q35.firmware_files()
            names.add("firmware:uefi")
        except HostUnfit:
            pass
        if host.find_program("xorriso"):
            names.add("cloud_init")
        try:
            if self._vmm.accelerator().name == "kvm":
                names.add("accelerated")
        except HostUnfit:
            pass
        return frozenset(names)

    async def launch(
        self, spec: SandboxSpec, *, sandbox_id: str, state: StateDir, trajectory: Path
    ) -> Launched:
        _refuse(spec)
        return await asyncio.shield(
            asyncio.ensure_future(
                _launch(self._vmm, spec, sandbox_id=sandbox_id, state=state, trajectory=trajectory)
            )
        )

    async def take(
        self, session: Session, record: Mapping[str, Any], *, name: str, state: StateDir, bounds: Bounds
    ) -> tuple[Snapshot, list[int]]:
        """bounds do not apply: memory and disk are bounded by what the machine was created with."""
        return await snapshot.take(session, record, self._vmm, name=name, state=state)

    async def set_memory(self, record: Mapping[str, Any], memory_mb: int) -> int:
        return await self._vmm.set_memory(memory_mb, vm=Path(record["directory"]) / "vm")


def _refuse(spec: SandboxSpec) -> None:
    """Raises Unsupported for what no machine can do, InvalidRequest for what is none."""
    if spec.mounts:
        raise Unsupported(
            f"mounts={spec.mounts[0].source!r}",
            reason="a machine shares no file system with its host",
            available=["files.write", "cloud_init={'files': ...}", "substrate='container'"],
        )
    if spec.layers:
        raise Unsupported(f"layers={list(spec.layers)}", reason="a disk image is whole", available=["image"])
    if spec.runtime:
        raise Unsupported(
            f"runtime={spec.runtime!r}",
            reason="a machine has a monitor, not an OCI runtime",
            available=["vmm='qemu'"],
        )
    if spec.vmm not in ("", "qemu"):
        raise Unsupported(f"vmm={spec.vmm!r}", reason="a full machine is QEMU's", available=["vmm='qemu'"])
    if spec.memory_mb < MIN_MEMORY_MB:
        raise InvalidRequest(f"memory_mb: {spec.memory_mb} is too little for a PC: at least {MIN_MEMORY_MB}")
    if spec.disk_mb is not None and spec.disk_mb < q35.MIN_DISK_MB:
        raise InvalidRequest(f"disk_mb: {spec.disk_mb} is too little for a PC: at least {q35.MIN_DISK_MB}")


def _accelerator(vmm: Q35, spec: SandboxSpec) -> Accelerator:
    """Raises Unsupported, HostUnfit."""
    vmm.program()
    if spec.accelerated is False:
        return Accelerator(name="tcg", why="emulation was asked for")
    found = vmm.accelerator()
    if spec.accelerated and found.name != "kvm":
        raise Unsupported(
            "accelerated=True",
            reason=f"{found.why}; a guest would be emulated",
            available=["accelerated=None, which emulates"],
        )
    return found


def is_path(image: str) -> bool:
    """Whether it is the path of a file, and no name: an edge, too, tells a path of its host by how it begins."""
    return image.startswith(("/", "./", "../", "~"))


def find_disk(image: str) -> Disk:
    """A path, or the name of a disk that `images.build_debian_disk` has made. Raises ImageNotFound, ImageRejected."""
    if is_path(image):
        return disks.inspect(Path(image).expanduser())
    known = {item.name: item.path for item in debian_disk.disks()}
    if image not in known:
        raise ImageNotFound(
            image,
            known=sorted(known),
            make="images.build_debian_disk(name), or give the path of a disk image",
        )
    return disks.inspect(known[image], deep=False)


async def _launch(
    vmm: Q35, spec: SandboxSpec, *, sandbox_id: str, state: StateDir, trajectory: Path
) -> Launched:
    accelerator = await asyncio.to_thread(_accelerator, vmm, spec)
    directory = state.sandboxes / sandbox_id
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
    try:
        pc, record, held = await asyncio.to_thread(
            _prepare, vmm, spec, accelerator, building, sandbox_id=sandbox_id, state=state
        )
        plan = vmm.pc(pc, vm=directory / "vm")
        keeper = await asyncio.to_thread(own_keeper, state)
        seat = Seat.of(sandbox_id)
        network = network_order(
            spec, sandbox_id=sandbox_id, tap=Tap(owner=seat.user or 0, group=seat.user or 0)
        )
        record |= machine_record(
            spec,
            seat,
            plan,
            sandbox_id=sandbox_id,
            directory=directory,
            runtime="qemu",
            accelerator=accelerator.name,
            trajectory=trajectory,
            limits={"pids": "none", "disk": "rlimit" if record["disk_mb"] is not None else "none"},
        )
        record |= {"patience": PATIENCE_S[accelerator.name], "screen": True}
        order = machine_order(
            spec,
            seat,
            plan,
            record=record,
            leases=held,
            network=network,
            memory_mb=pc.memory_mb,
            cpus=pc.cpus,
        )
        answer = await run_order(keeper, order)
    finally:
        await asyncio.shield(asyncio.to_thread(remove_tree, str(building)))
    await started(vmm.go_on(pc, vm=directory / "vm"), keeper, sandbox_id=sandbox_id)
    return Launched(
        sandbox_id=sandbox_id,
        keeper=keeper,
        guest=plan.guest,
        user=record["user"],
        workdir=record["workdir"],
        envs=record["envs"],
        expires=answer["expires"],
        runtime="qemu",
        limits=record["limits"],
        notes=tuple(record["notes"]),
        oom_kills=cgroups.OomCounter(seat.cgroup).read,
        patience=record["patience"],
        own_kernel=True,
        greet=partial(_greet, sandbox_id, restored=pc.restore is not None, network=network is not None),
    )


def _prepare(
    vmm: Q35,
    spec: SandboxSpec,
    accelerator: Accelerator,
    building: Path,
    *,
    sandbox_id: str,
    state: StateDir,
) -> tuple[Pc, dict[str, Any], list[str]]:
    """The machine, its part of the record, and the leases on what it is restored from. Blocks."""
    found = None
    if not is_path(spec.image):
        found = snapshot.find(spec.image, state=state)
    if found is not None:
        return _restored(vmm, spec, accelerator, *found, sandbox_id=sandbox_id)
    base = find_disk(spec.image)
    top = building / q35.DISK
    if base.format != "iso":
        disks.overlay(base, top)
    seed = None
    if spec.cloud_init is not None:
        seed = building / q35.SEED
        request = cloud_init.check(spec.cloud_init)
        cloud_init.seed(request, seed, sandbox_id=sandbox_id, network=has_network(spec))
    pc = Pc(
        sandbox_id=sandbox_id,
        base=base,
        overlay=top,
        firmware=spec.firmware,
        memory_mb=spec.memory_mb,
        cpus=max(1, math.ceil(spec.cpu)),
        accelerator=accelerator.name,
        disk_mb=spec.disk_mb,
        seed=seed,
        network=_INTERFACE if has_network(spec) else None,
    )
    user = spec.user or "root"
    record = {
        "user": user,
        "workdir": spec.workdir or ("/root" if user == "root" else f"/home/{user}"),
        "image_envs": {},
        "root_image": spec.image,
        "envs": {**secret_envs(list(spec.secrets)), **spec.envs},
        "cpu": spec.cpu,
        "memory_mb": spec.memory_mb,
        "pids": spec.pids,
        "disk_mb": spec.disk_mb,
        "notes": [_words(vmm, accelerator), "pids is not held: the machine's system has its own limits"],
        "machine": {
            "vmm": vmm.name,
            "accelerator": accelerator.name,
            "memory_mb": pc.memory_mb,
            "cpus": pc.cpus,
            "firmware": pc.firmware,
            "base": q35.base_identity(base),
            "layers": [str(base.path)],
            "disk": base.format != "iso",
            "channel": spec.channel,
            "network": has_network(spec),
        },
    }
    return pc, record, []


def _restored(
    vmm: Q35,
    spec: SandboxSpec,
    accelerator: Accelerator,
    place: Path,
    image: dict[str, Any],
    *,
    sandbox_id: str,
) -> tuple[Pc, dict[str, Any], list[str]]:
    """As `_prepare`, for a memory snapshot: memory, CPUs, disk and firmware are what they were."""
    machine, was = image["machine"], image["record"]
    if machine["vmm"] != vmm.name or machine["accelerator"] != accelerator.name:
        raise Unsupported(
            f"image={spec.image!r}",
            reason=f"{machine['vmm']} with {machine['accelerator']} took it, and it cannot go on in {vmm.name} "
            f"with {accelerator.name}",
            available=[f"accelerated={machine['accelerator'] == 'kvm'}"]
            if machine["vmm"] == vmm.name
            else ["substrate='microvm'"],
        )
    defaults = {name: field.default for name, field in SandboxSpec.__dataclass_fields__.items()}
    for name in ("memory_mb", "disk_mb"):
        if getattr(spec, name) not in (defaults[name], was[name]):
            raise InvalidRequest(
                f"{name}: {getattr(spec, name)!r}, and the snapshot's machine has {was[name]!r}, which stays"
            )
    if spec.cloud_init is not None:
        raise InvalidRequest("cloud_init: the snapshot's machine has booted already; use commands and files")
    if machine["network"] != has_network(spec):
        raise Unsupported(
            f"image={spec.image!r} with{'' if has_network(spec) else 'out'} a network",
            reason="its machine was taken the other way, and a running system keeps its interfaces",
            available=["network=NetworkPolicy()" if machine["network"] else "network='offline'"],
        )
    snapshot.check_restorable(machine, vmm, name=spec.image)
    q35.check_base(machine, name=spec.image)
    kept = machine["base"]
    base = Disk(
        path=Path(kept["path"]),
        format=kept["format"],
        virtual_bytes=kept["virtual_bytes"],
        file_bytes=kept["size"],
    )
    pc = Pc(
        sandbox_id=sandbox_id,
        base=base,
        overlay=place / q35.DISK,
        firmware=machine["firmware"],
        memory_mb=machine["memory_mb"],
        cpus=machine["cpus"],
        accelerator=accelerator.name,
        disk_mb=was["disk_mb"],
        restore=place,
        network=_INTERFACE if machine["network"] else None,
        ram=machine.get("ram", ""),
    )
    channel = machine["channel"] if spec.channel == "auto" else spec.channel
    note = f"goes on from a memory snapshot of {image['sandbox']}"
    its_own = ", with entropy, identity and clock of its own"
    if channel != "agent":
        its_own = "; its entropy, identity and clock are the old ones: only our guest agent can renew them"
    record = {
        "user": spec.user or was["user"],
        "workdir": spec.workdir or was["workdir"],
        "image_envs": {},
        "root_image": image["parent"],
        "envs": {**secret_envs(list(spec.secrets)), **spec.envs},
        "cpu": spec.cpu,
        **{key: was[key] for key in ("memory_mb", "pids", "disk_mb")},
        "notes": [note + its_own, _words(vmm, accelerator)],
        "machine": {key: value for key, value in machine.items() if key not in ("ram", "ram_bytes")}
        | {"channel": channel},
    }
    return pc, record, [str(place / leases.FILE)]


def _words(vmm: Q35, accelerator: Accelerator) -> str:
    how = "runs with KVM" if accelerator.name == "kvm" else f"emulated, not accelerated: {accelerator.why}"
    return f"QEMU {vmm.version()} (q35): {how}"


async def _greet(sandbox_id: str, guest: GuestClient, *, restored: bool, network: bool) -> None:
    """Before anything else is asked of it: a restored machine gets its own entropy, name and clock, where it can;
    one with a network its address, which a booted system may not have."""
    if not guest.info.agent:  # screen and keyboard: nobody to speak to
        return
    if restored and not isinstance(guest, ShellGuest):
        await guest.refresh(
            hostname=sandbox_id, machine_id=secrets.token_hex(16), entropy=secrets.token_bytes(64), clock=True
        )
    if network and not restored:
        process = await guest.start(["/bin/sh", "-c", _SET_ADDRESS], cwd="/", timeout=60)
        await process.wait()


_INTERFACE = {"tap": "tap0", "mac": MACHINE_MAC}
_SET_ADDRESS = f"""for i in /sys/class/net/*; do
[ "$(cat $i/address)" = {MACHINE_MAC} ] || continue; i=${{i##*/}}; ip link set $i up
ip -4 addr show dev $i | grep -q {MACHINE}/ || ip addr add {MACHINE}/{MACHINE_PREFIX} dev $i
ip route show default | grep -q . || ip route add default via {MACHINE_GATEWAY}
grep -qs '^nameserver {GATEWAY}' /etc/resolv.conf || echo nameserver {GATEWAY} >/etc/resolv.conf; done"""


__all__ = ["CHANNELS", "FullVm", "find_disk"]
