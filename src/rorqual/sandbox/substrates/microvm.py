"""The microvm substrate: a machine with a kernel of its own, in seconds of emulation or a fraction of one with KVM.

Turns a request into the keeper's order of kind "machine" (keeper/machine.py): finds kernel, initial file system and
root images, asks the monitor (machines/vmm.py) for its command line, and says what holds which limit. A memory snapshot
is an image, too: `create(image=...)` of one goes on where it was taken, as another sandbox, with entropy, identity and
clock of its own. Owns the choice of the monitor and of KVM or emulation; never a silent one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rorqual.sandbox import host
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox.errors import HostUnfit, InvalidRequest, Unsupported
from rorqual.sandbox.images.unpack import Bounds
from rorqual.sandbox.keeper import cgroups, leases
from rorqual.sandbox.keeper.client import own_keeper
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.machines import memory, rootfs, snapshot
from rorqual.sandbox.machines.firecracker import Firecracker
from rorqual.sandbox.machines.initrd import initrd
from rorqual.sandbox.machines.kernel import find_kernel
from rorqual.sandbox.machines.qemu import Qemu
from rorqual.sandbox.machines.vmm import Accelerator, Boot, Vmm
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
from rorqual.sandbox.substrates.container import guest_binary
from rorqual.sandbox.substrates.machine import Seat, machine_order, machine_record, started

if TYPE_CHECKING:
    from rorqual.sandbox._session import Session

VMMS: dict[str, Vmm] = {"qemu": Qemu(), "firecracker": Firecracker()}
_CAPABILITIES = frozenset(
    {
        *("commands", "files", "pty", "background", "reattach", "trajectory", "network:offline", "ports"),
        *("memory_snapshot", "memory_fork", "commit", "balloon", "root", "own_kernel"),
    }
)
MIN_MEMORY_MB = 128
_INTERFACE = {"tap": "tap0", "mac": MACHINE_MAC}
PATIENCE_S = 90.0
"""How long a guest may take to answer: an emulated one on a busy host takes its time."""


class MicroVm:
    """See the module."""

    name = "microvm"
    snapshots = "memory"

    def capabilities(self) -> frozenset[str]:
        names = set(_CAPABILITIES | network_capabilities())
        if cgroups.can_freeze():
            names.add("pause")
        for vmm in VMMS.values():
            with contextlib.suppress(HostUnfit):
                if vmm.accelerator().name == "kvm":
                    names.add("accelerated")
        return frozenset(names)

    async def launch(
        self, spec: SandboxSpec, *, sandbox_id: str, state: StateDir, trajectory: Path
    ) -> Launched:
        _refuse(spec)
        return await _launch(spec, sandbox_id=sandbox_id, state=state, trajectory=trajectory)

    async def take(
        self, session: Session, record: Mapping[str, Any], *, name: str, state: StateDir, bounds: Bounds
    ) -> tuple[Snapshot, list[int]]:
        """bounds do not apply: a machine's memory and disk are bounded by what it was created with."""
        return await snapshot.take(session, record, VMMS[record["machine"]["vmm"]], name=name, state=state)

    async def set_memory(self, record: Mapping[str, Any], memory_mb: int) -> int:
        vmm = VMMS[record["machine"]["vmm"]]
        return await vmm.set_memory(memory_mb, vm=Path(record["directory"]) / "vm")


def _refuse(spec: SandboxSpec) -> None:
    """Raises Unsupported for what no machine can do."""
    if spec.mounts:
        raise Unsupported(
            f"mounts={spec.mounts[0].source!r}",
            reason="a machine shares no file system with its host",
            available=["files.write", "images.import_oci", "substrate='container'"],
        )
    if spec.runtime:
        raise Unsupported(
            f"runtime={spec.runtime!r}",
            reason="a machine has a monitor, not an OCI runtime",
            available=[f"vmm={name!r}" for name in VMMS],
        )
    if spec.vmm and spec.vmm not in VMMS:
        raise Unsupported(f"vmm={spec.vmm!r}", reason="there is no such monitor here", available=tuple(VMMS))


def choose(spec: SandboxSpec, *, state: StateDir) -> tuple[Vmm, Accelerator]:
    """The monitor and what accelerates it. Blocks, for seconds at a host's first. Raises Unsupported, HostUnfit."""
    vmm = VMMS[spec.vmm or _fitting(spec, state)]
    if spec.accelerated is False:
        if not vmm.emulates:
            raise Unsupported(
                "accelerated=False", reason=f"{vmm.name} has KVM and nothing else", available=["vmm='qemu'"]
            )
        vmm.program()
        return vmm, Accelerator(name="tcg", why="emulation was asked for")
    found = vmm.accelerator()
    if spec.accelerated and found.name != "kvm":
        raise Unsupported(
            "accelerated=True",
            reason=f"{found.why}; a guest would be emulated",
            available=["accelerated=None, which emulates"],
        )
    return vmm, found


def _fitting(spec: SandboxSpec, state: StateDir) -> str:
    """The monitor of who names none: a snapshot's own; Firecracker where it and a KVM that boots guests are; QEMU."""
    found = snapshot.find(spec.image, state=state)
    if found is not None:
        return str(found[1]["machine"]["vmm"])
    if spec.accelerated is False:
        return "qemu"
    try:
        VMMS["firecracker"].accelerator()
    except HostUnfit:
        return "qemu"
    return "firecracker"


async def _launch(spec: SandboxSpec, *, sandbox_id: str, state: StateDir, trajectory: Path) -> Launched:
    vmm, accelerator = await asyncio.to_thread(partial(choose, spec, state=state))
    boot, record, held = await asyncio.to_thread(
        _prepare, spec, vmm, accelerator, sandbox_id=sandbox_id, state=state
    )
    directory = state.sandboxes / sandbox_id
    plan = vmm.plan(boot, vm=directory / "vm")
    keeper = await asyncio.to_thread(own_keeper, state)
    seat = Seat.of(sandbox_id)
    network = network_order(spec, sandbox_id=sandbox_id, tap=Tap(owner=seat.user or 0, group=seat.user or 0))
    record |= machine_record(
        spec,
        seat,
        plan,
        sandbox_id=sandbox_id,
        directory=directory,
        runtime=vmm.name,
        accelerator=accelerator.name,
        trajectory=trajectory,
        limits={"pids": "guest", "disk": "guest" if record["disk_mb"] is not None else "none"},
    )
    record["notes"] = [*record["notes"], *plan.notes]
    order = machine_order(
        spec,
        seat,
        plan,
        record=record,
        leases=held,
        network=network,
        memory_mb=boot.memory_mb,
        cpus=boot.cpus,
    )
    answer = await run_order(keeper, order)
    await started(vmm.start(boot, vm=directory / "vm"), keeper, sandbox_id=sandbox_id)
    return Launched(
        sandbox_id=sandbox_id,
        keeper=keeper,
        guest=plan.guest,
        user=record["user"],
        workdir=record["workdir"],
        envs=record["envs"],
        expires=answer["expires"],
        runtime=vmm.name,
        limits=record["limits"],
        notes=tuple(record["notes"]),
        oom_kills=cgroups.OomCounter(seat.cgroup).read,
        patience=PATIENCE_S,
        own_kernel=True,
        greet=partial(_become_its_own, sandbox_id, record) if boot.restore is not None else None,
    )


def _prepare(
    spec: SandboxSpec, vmm: Vmm, accelerator: Accelerator, *, sandbox_id: str, state: StateDir
) -> tuple[Boot, dict[str, Any], list[str]]:
    """The machine, its part of the record, and the leases on what it is restored from. Blocks.

    Raises HostUnfit, ImageNotFound, ImageRejected, InvalidRequest, Unsupported.
    """
    found = snapshot.find(spec.image, state=state)
    if found is not None:
        return _restored(spec, vmm, accelerator, *found, sandbox_id=sandbox_id)
    kernel = find_kernel()
    root = rootfs.machine_root(spec.image, layers=spec.layers, state=state)
    user = spec.user or "user"
    workdir = spec.workdir or ("/home/user" if user == "user" else "/root")
    homes = {"/home/user": host.USER_ID, "/root": 0}
    homes.setdefault(workdir, host.USER_ID if user == "user" else 0)
    arguments = ["--layers", str(len(root.layers)), "--pids", str(spec.pids)]
    arguments += ["--disk", str(spec.disk_mb)] if spec.disk_mb is not None else ["--disk-device"]
    for path, owner in homes.items():
        if path not in ("/", "/tmp"):
            arguments += ["--home", f"{quote(path)}:{owner}"]
    arguments += ["--boot-env", f"RORQUAL_SANDBOX={sandbox_id}"]
    if has_network(spec):
        arguments += ["--net", f"{MACHINE}/{MACHINE_PREFIX},{MACHINE_GATEWAY},{GATEWAY}"]
    boot = Boot(
        sandbox_id=sandbox_id,
        kernel=kernel,
        initrd=initrd(kernel, guest_binary(), (*vmm.modules, *(["virtio_net"] if has_network(spec) else []))),
        layers=root.layers,
        arguments=tuple(arguments),
        memory_mb=_machine_memory(spec),
        cpus=max(1, math.ceil(spec.cpu)),
        accelerator=accelerator.name,
        user=Seat.of(sandbox_id).user,
        disk=snapshot.empty_disk() if spec.disk_mb is None else None,
        network=_INTERFACE if has_network(spec) else None,
    )
    record = {
        "user": user,
        "workdir": workdir,
        "image_envs": dict(root.envs),
        "root_image": spec.image,
        "envs": {**root.envs, **secret_envs(list(spec.secrets)), **spec.envs},
        "cpu": spec.cpu,
        "memory_mb": spec.memory_mb,
        "pids": spec.pids,
        "disk_mb": spec.disk_mb,
        "notes": [*root.notes, _words(vmm, accelerator)],
        "machine": {
            "vmm": vmm.name,
            "accelerator": accelerator.name,
            "memory_mb": boot.memory_mb,
            "cpus": boot.cpus,
            "kernel": kernel.release,
            "layers": [str(layer) for layer in root.layers],
            "disk": boot.disk is not None,
            "network": has_network(spec),
        },
    }
    return boot, record, []


def _restored(
    spec: SandboxSpec,
    vmm: Vmm,
    accelerator: Accelerator,
    place: Path,
    image: dict[str, Any],
    *,
    sandbox_id: str,
) -> tuple[Boot, dict[str, Any], list[str]]:
    """As `_prepare`, for a memory snapshot: memory, CPUs and disk are what they were."""
    machine, was = image["machine"], image["record"]
    if machine["vmm"] != vmm.name or machine["accelerator"] != accelerator.name:
        raise Unsupported(
            f"image={spec.image!r}",
            reason=f"{machine['vmm']} with {machine['accelerator']} took it, and it cannot go on in {vmm.name} "
            f"with {accelerator.name}",
            available=[f"vmm={machine['vmm']!r}, accelerated={machine['accelerator'] == 'kvm'}"],
        )
    if spec.layers:
        raise Unsupported(f"layers={list(spec.layers)}", reason="a machine's memory goes with its own root")
    for name, default in (("memory_mb", 512), ("disk_mb", 512), ("pids", 256)):
        if getattr(spec, name) not in (default, was[name]):
            raise InvalidRequest(
                f"{name}: {getattr(spec, name)!r}, and the snapshot's machine has {was[name]!r}, which stays"
            )
    if machine["network"] != has_network(spec):
        raise Unsupported(
            f"image={spec.image!r} with{'' if has_network(spec) else 'out'} a network",
            reason="its machine was taken the other way, and a running kernel keeps its interfaces",
            available=["network=NetworkPolicy()" if machine["network"] else "network='offline'"],
        )
    snapshot.check_restorable(machine, vmm, name=spec.image)
    boot = Boot(
        sandbox_id=sandbox_id,
        kernel=find_kernel(),
        initrd=place,
        layers=tuple(Path(layer) for layer in machine["layers"]),
        arguments=(),
        memory_mb=machine["memory_mb"],
        cpus=machine["cpus"],
        accelerator=accelerator.name,
        user=Seat.of(sandbox_id).user,
        disk=place / memory.DISK if machine["disk"] else None,
        restore=place,
        network=_INTERFACE if machine["network"] else None,
        ram=machine.get("ram", ""),
    )
    user = spec.user or was["user"]
    record = {
        "user": user,
        "workdir": spec.workdir or was["workdir"],
        "image_envs": dict(image["envs"]),
        "root_image": image["parent"],
        "envs": {**image["envs"], **secret_envs(list(spec.secrets)), **spec.envs},
        "cpu": spec.cpu,
        **{key: was[key] for key in ("memory_mb", "pids", "disk_mb")},
        "notes": [
            f"goes on from a memory snapshot of {image['sandbox']}, with entropy, identity and clock of its own",
            _words(vmm, accelerator),
        ],
        "machine": {key: value for key, value in machine.items() if key not in ("ram", "ram_bytes")},
    }
    return boot, record, [str(place / leases.FILE)]


def _machine_memory(spec: SandboxSpec) -> int:
    if spec.memory_mb < MIN_MEMORY_MB:
        raise InvalidRequest(
            f"memory_mb: {spec.memory_mb} is too little for a machine with its own kernel: at least {MIN_MEMORY_MB}"
        )
    return spec.memory_mb


def _words(vmm: Vmm, accelerator: Accelerator) -> str:
    how = "runs with KVM" if accelerator.name == "kvm" else f"emulated, not accelerated: {accelerator.why}"
    return f"{vmm.name} {vmm.version()}: {how}"


async def _become_its_own(sandbox_id: str, record: Mapping[str, Any], guest: GuestClient) -> None:
    """A restored machine gets its own entropy, name, machine id and clock before anything else is asked of it."""
    await guest.refresh(
        hostname=sandbox_id, machine_id=secrets.token_hex(16), entropy=secrets.token_bytes(64), clock=True
    )
    await guest.make_dir(record["workdir"], user=record["user"])
