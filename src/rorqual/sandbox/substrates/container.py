"""The container substrate: an OCI runtime, overlays, namespaces, cgroups, and the guest agent as PID 1.

Turns a request into the keeper's launch order, and checks afterwards that the limits are really in force.
Tries the runtimes in order of preference and remembers which one works here: a runtime that starts a
container without its limits counts as one that does not work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.sandbox import bundle, host, images
from rorqual.sandbox.errors import HostUnfit, InvalidRequest, LaunchFailed, Unsupported
from rorqual.sandbox.images.unpack import Bounds
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.keeper.client import KeeperClient, own_keeper
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.network.order import guest_files, network_capabilities, network_order, network_record
from rorqual.sandbox.network.secret import secret_envs
from rorqual.sandbox.records import Snapshot
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates import gvisor
from rorqual.sandbox.substrates.base import Launched, run_order

if TYPE_CHECKING:
    from rorqual.sandbox._session import Session

log = logging.getLogger(__name__)

_CAPABILITIES = frozenset(
    {"commands", "files", "pty", "background", "reattach", "trajectory", "mounts", "network:offline", "ports"}
)
_NEED_FREEZER = frozenset({"pause", "disk_snapshot", "disk_fork", "commit"})
"""Files and processes must stand still together: where no freezer cgroup can be used, none of these is offered."""


def guest_binary() -> Path:
    """The agent's binary. Raises HostUnfit when it was not built."""
    path = Path(__file__).resolve().parents[1] / "_bin" / "rorqual-guest"
    if not path.is_file():
        raise HostUnfit(
            f"the guest agent is not built ({path}).", fix=f"make -C native/guest CC=cc OUT={path}"
        )
    return path


class Container:
    """See the module."""

    name = "container"
    snapshots = "disk"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._proven: dict[tuple[str, ...], host.HostPlan] = {}

    def capabilities(self) -> frozenset[str]:
        names = _CAPABILITIES | network_capabilities()
        return names | _NEED_FREEZER if cgroups.can_freeze() else names

    async def launch(
        self, spec: SandboxSpec, *, sandbox_id: str, state: StateDir, trajectory: Path
    ) -> Launched:
        plan = host.plan()
        if spec.runtime == gvisor.NAME:
            plan = gvisor.plan(spec, plan)
        elif spec.runtime:
            names = [name for name, _ in plan.runtimes]
            plan = plan.with_runtime(spec.runtime)
            if not plan.runtimes:
                raise Unsupported(
                    f"runtime={spec.runtime!r}", reason="it is not on this host", available=names
                )
        spec = _with_user(spec, plan)
        root = await asyncio.to_thread(_root, spec, state)
        if root.leases and (plan.rootless or plan.id_base != root.id_base):
            raise HostUnfit(
                f"the files of {spec.image!r} belong to host ids from {root.id_base}, and sandboxes here get "
                f"{plan.id_base}: take the snapshot again on this host."
            )
        guest = guest_binary()
        keeper = await asyncio.to_thread(own_keeper, state)
        key = tuple(path for _, path in plan.runtimes)
        with self._lock:
            ways = [self._proven[key]] if key in self._proven else variants(plan)
        failure: LaunchFailed | None = None
        for variant in ways:
            if failure is not None and not worth_trying(failure, variant):
                continue
            try:
                launched = await _launch(
                    spec,
                    variant,
                    root,
                    guest,
                    keeper,
                    sandbox_id=sandbox_id,
                    state=state,
                    trajectory=trajectory,
                )
            except LaunchFailed as error:
                failure = failure or error
                log.warning(
                    "a way to launch does not work here", extra={"sandbox": sandbox_id, "reason": str(error)}
                )
                continue
            with self._lock:
                self._proven[key] = variant
            return launched
        assert failure is not None
        raise failure

    async def take(
        self, session: Session, record: Mapping[str, Any], *, name: str, state: StateDir, bounds: Bounds
    ) -> tuple[Snapshot, list[int]]:
        from rorqual.sandbox._snapshots import take  # which imports this package

        return await take(session, record, name=name, state=state, bounds=bounds)


def _root(spec: SandboxSpec, state: StateDir) -> images.RootFs:
    """Its layers are mounted by the layer holder when this returns."""
    root = images.root_file_system(spec.image, layers=spec.layers, state=state)
    images.prepare(root, state=state)
    return root


def _with_user(spec: SandboxSpec, plan: host.HostPlan) -> SandboxSpec:
    if not spec.user:
        return replace(spec, user="user" if plan.has_user else "root")
    if spec.user == "user" and not plan.has_user:
        raise HostUnfit(
            "user='user' needs a second user id, and this host maps only yours.", fix=plan.notes[-1]
        )
    return spec


def variants(plan: host.HostPlan) -> list[host.HostPlan]:
    """Every runtime with idmapped layers, then every runtime without, each saying what differs."""
    result = [plan.with_runtime(name) for name, _ in plan.runtimes]
    if plan.idmap:
        note = "idmapped mounts do not work here: system files belong to nobody inside, read-only"
        result += [replace(item, idmap=False, notes=(*item.notes, note)) for item in result]
    return result


def worth_trying(failure: LaunchFailed, variant: host.HostPlan) -> bool:
    if failure.stage == "mounts":
        return "idmapped" in failure.detail and not variant.idmap
    return failure.stage in ("runtime", "limits")


async def _launch(
    spec: SandboxSpec,
    plan: host.HostPlan,
    root: images.RootFs,
    guest: Path,
    keeper: KeeperClient,
    *,
    sandbox_id: str,
    state: StateDir,
    trajectory: Path,
) -> Launched:
    order = launch_order(spec, plan, root, guest, sandbox_id=sandbox_id, state=state, trajectory=trajectory)
    return await start(order, plan, keeper)


async def start(order: dict[str, Any], plan: host.HostPlan, keeper: KeeperClient) -> Launched:
    """Has the keeper launch it; returns when its first process runs under its memory limit. Raises LaunchFailed."""
    sandbox_id, cgroup, record = order["id"], order["cgroup"], order["record"]
    answer = await run_order(keeper, order)
    if plan.has_cgroups:
        held = memory_limit(cgroup)
        if held != order["config"]["linux"]["resources"]["memory"]["limit"]:
            detail = f"{plan.runtimes[0][0]} started the sandbox without its memory limit (found {held})"
            await asyncio.wrap_future(
                keeper.request("kill", sandbox=sandbox_id, cause="infra", detail=detail)
            )
            raise LaunchFailed(sandbox_id, stage="limits", detail=detail)
    holder = "cgroup" if plan.has_cgroups else "rlimit"
    return Launched(
        sandbox_id=sandbox_id,
        keeper=keeper,
        guest=order["record"]["guest"],
        user=record["user"],
        workdir=record["workdir"],
        expires=answer["expires"],
        runtime=plan.runtimes[0][0],
        envs=record["envs"],
        limits={"memory": holder, "pids": holder} | record["limits"],
        notes=tuple(record["notes"]),
        oom_kills=cgroups.OomCounter(cgroup).read,
    )


def memory_limit(cgroup: str) -> int | None:
    """The limit in force, in bytes; None when there is none."""
    points = cgroups.hierarchies()
    for key, name in (("memory", "memory.limit_in_bytes"), ("unified", "memory.max")):
        if key in points:
            with contextlib.suppress(OSError, ValueError):
                return int(Path(f"{points[key]}{cgroup}/{name}").read_text(encoding="ascii"))
    return None


def launch_order(
    spec: SandboxSpec,
    plan: host.HostPlan,
    root: images.RootFs,
    guest: Path,
    *,
    sandbox_id: str,
    state: StateDir,
    trajectory: Path,
) -> dict[str, Any]:
    """Everything the keeper needs, as JSON (keeper/launch.py executes it)."""
    runtime, runtime_path = plan.runtimes[0]
    directory = state.sandboxes / sandbox_id
    owner, user = plan.host_id(0), plan.host_id(host.USER_ID)
    shift = f"0 {plan.id_base} {host.ID_COUNT}" if plan.idmap else ""
    cgroup = f"/rorqual-{sandbox_id}" if plan.has_cgroups else ""
    home = "/home/user" if spec.user == "user" else "/root"
    workdir = spec.workdir or home
    binds = [
        _bind(source, target, readonly=True) for source, target in (*root.binds, (str(guest), bundle.GUEST))
    ]
    inside = user if spec.user == "user" else owner
    for mount in spec.mounts:
        item = _bind(mount.source, mount.target, readonly=mount.readonly)
        if plan.idmap:  # the owner of the mounted directory is the sandbox's default user inside
            stat = os.stat(mount.source)
            item |= {"uid_map": f"{stat.st_uid} {inside} 1", "gid_map": f"{stat.st_gid} {inside} 1"}
        binds.append(item)
    pairs = {(item["uid_map"], item["gid_map"]) for item in binds if item["uid_map"]}
    if shift:
        pairs.add((shift, shift))
    directories = [{"path": "/home/user", "uid": user, "gid": user, "mode": 0o755}] if plan.has_user else []
    mounted = {mount.target.rstrip("/") for mount in spec.mounts}
    if workdir not in ("/home/user", "/root", "/", "/tmp") and workdir.rstrip("/") not in mounted:
        directories.append({"path": workdir, "uid": inside, "gid": inside, "mode": 0o755})
    disk_dir = str(directory / "disk")
    id_map = (plan.id_base, host.ID_COUNT) if plan.id_base is not None else None
    command = [runtime_path, "--root", f"{directory}/runtime"]
    if not plan.has_cgroups and runtime == "runc":
        command += ["--rootless=true"]
    if not plan.has_cgroups and runtime == "crun":
        command += ["--cgroup-manager=disabled"]
    command += [
        "run",
        "--detach",
        "--bundle",
        "/mnt/bundle",
        "--pid-file",
        f"{directory}/init.pid",
        "--preserve-fds",
        "1",
    ]
    order: dict[str, Any] = {
        "id": sandbox_id,
        "directory": str(directory),
        "keep": spec.keep,
        "timeout": spec.timeout,
        "cgroup": cgroup,
        "trajectory": str(trajectory),
        "userns": {"uid_map": plan.uid_map, "gid_map": plan.gid_map} if plan.rootless else None,
        "userxattr": plan.rootless,
        "hide": list(plan.hide) if runtime == "crun" else [],
        "disk_mb": spec.disk_mb,
        "disk_dir": disk_dir,
        "idmap": shift,
        "idmaps": sorted(pairs),
        "owner": owner,
        "overlays": [
            {
                "target": target,
                "lower": list(lower),
                "plain": root.plain.get(target, 0),
                "uid": owner,
                "gid": owner,
            }
            for target, lower in root.overlays
        ],
        "holder": images.holder_directory(state),
        "seeded": bool(root.leases),
        "leases": list(root.leases),
        "directories": directories,
        "files": guest_files(spec),
        "network": network_order(spec, sandbox_id=sandbox_id),
        "binds": binds,
        "config": bundle.oci_config(
            spec, sandbox_id=sandbox_id, cgroup=cgroup, id_map=id_map, has_cgroups=plan.has_cgroups
        ),
        "rlimits": bundle.late_rlimits(spec, has_cgroups=plan.has_cgroups),
        "runtime": [*command, sandbox_id],
        "env": {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "XDG_RUNTIME_DIR": str(directory)},
        "record": {
            "id": sandbox_id,
            "substrate": spec.substrate,
            "image": spec.image,
            "layers": list(spec.layers),
            "runtime": runtime,
            "rootless": plan.rootless,
            "user": spec.user,
            "workdir": workdir,
            "envs": {**root.envs, **secret_envs(list(spec.secrets)), **spec.envs},
            "cpu": spec.cpu,
            "memory_mb": spec.memory_mb,
            "pids": spec.pids,
            "disk_mb": spec.disk_mb,
            **network_record(spec),
            "metadata": dict(spec.metadata),
            "created": time.time(),
            "spec": asdict(spec),
            "id_base": plan.id_base,
            "cgroup": cgroup,
            "guest": f"unix:{directory}/guest.sock",
            "trajectory": str(trajectory),
            "limits": {
                "memory": "cgroup" if cgroup else "rlimit",
                "pids": "cgroup" if cgroup else "rlimit",
                "cpu": "cgroup" if cgroup else "none",
                "disk": "tmpfs" if spec.disk_mb is not None else "none",
            },
            "notes": [*plan.notes, *root.notes],
        },
    }
    return gvisor.adapt(order) if runtime == gvisor.NAME else order


def _bind(source: str, target: str, *, readonly: bool) -> dict[str, Any]:
    if ".." in target.split("/"):
        raise InvalidRequest(f"{target}: '..' in a path inside the sandbox")
    return {"source": source, "target": target, "readonly": readonly, "uid_map": "", "gid_map": ""}
