"""What both substrates of machines order of the keeper: the record, the order of kind "machine", the VMM's user.

microvm.py and fullvm.py bring the plan of their monitor and what is theirs alone. Owns what a machine's record says of
who holds which limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rorqual.sandbox import host
from rorqual.sandbox.errors import LaunchFailed, SandboxError
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.keeper.client import KeeperClient
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.machines.vmm import Plan
from rorqual.sandbox.network.order import network_record

_VMM_PIDS = 64
"""Threads of a VMM beside its CPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Where a VMM runs on this host."""

    root: bool
    cgroup: str
    """'': none can be used."""
    user: int | None
    """Host id of the VMM, one to a sandbox but for chance, above those of containers; None: the caller's own."""

    @classmethod
    def of(cls, sandbox_id: str) -> Seat:
        root = os.geteuid() == 0
        number = int.from_bytes(hashlib.sha256(sandbox_id.encode()).digest()[:2], "big")
        return cls(
            root=root,
            cgroup=f"/rorqual-{sandbox_id}" if root and cgroups.hierarchies() else "",
            user=host.ID_BASE + host.ID_COUNT + number if root else None,
        )


def machine_record(
    spec: SandboxSpec,
    seat: Seat,
    plan: Plan,
    *,
    sandbox_id: str,
    directory: Path,
    runtime: str,
    accelerator: str,
    trajectory: Path,
    limits: dict[str, str],
) -> dict[str, Any]:
    """What every machine's record says. limits: who holds `pids` and `disk`."""
    return {
        "id": sandbox_id,
        "directory": str(directory),
        "substrate": spec.substrate,
        "image": spec.image,
        "runtime": runtime,
        "accelerator": accelerator,
        "rootless": not seat.root,
        **network_record(spec),
        "own_kernel": True,
        "metadata": dict(spec.metadata),
        "created": time.time(),
        "spec": asdict(spec),
        "id_base": None,
        "cgroup": seat.cgroup,
        "guest": plan.guest,
        "trajectory": str(trajectory),
        "limits": {"memory": "machine", "cpu": "cgroup" if seat.cgroup else "none", **limits},
    }


def machine_order(
    spec: SandboxSpec,
    seat: Seat,
    plan: Plan,
    *,
    record: dict[str, Any],
    leases: list[str],
    network: dict[str, Any] | None,
    memory_mb: int,
    cpus: int,
) -> dict[str, Any]:
    """The keeper's order (keeper/machine.py). memory_mb, cpus: the machine's own; its VMM gets room beside them."""
    return {
        "kind": "machine",
        "id": record["id"],
        "directory": record["directory"],
        "keep": spec.keep,
        "timeout": spec.timeout,
        "cgroup": seat.cgroup,
        "trajectory": record["trajectory"],
        "leases": leases,
        "userns": None,
        "argv": plan.argv,
        "env": plan.env,
        "files": plan.files,
        "limits": {
            "memory": memory_mb + plan.overhead_mb << 20 if seat.cgroup else None,
            "pids": _VMM_PIDS + cpus,
            "cpu": spec.cpu,
        },
        "user": seat.user if plan.chroot is None else None,
        "shown": plan.shown if seat.root else None,
        "chroot": plan.chroot,
        "links": plan.links,
        "devices": plan.devices,
        "network": network,
        "record": record,
    }


async def started(start: Awaitable[None], keeper: KeeperClient, *, sandbox_id: str) -> None:
    """Waits for the machine to go on; one that does not is ended. Raises LaunchFailed with both words for it."""
    try:
        await start
    except BaseException as error:
        request = keeper.request("kill", sandbox=sandbox_id, cause="infra", detail=f"its VMM: {error}")
        await asyncio.shield(asyncio.wrap_future(request))
        verdicts: list[str] = []
        keeper.watch(sandbox_id, lambda cause, detail: verdicts.append(detail))  # known by now: told at once
        if isinstance(error, SandboxError):
            detail = "; ".join(dict.fromkeys([str(error), *verdicts]))
            raise LaunchFailed(sandbox_id, stage="vmm", detail=detail) from error
        raise
