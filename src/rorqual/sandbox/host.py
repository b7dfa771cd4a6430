"""What this host lets a container be made of: runtimes, ids, cgroups. Looks; `doctor` tries.

Owns the choice between root and rootless, and the host ids a sandbox's users become:
  root      container ids 0..65535 are host ids ID_BASE.., which no account has; lower layers are idmapped
  mounts rootless  the caller is `user` (1000) inside, /etc/subuid gives the other ids; without newuidmap only
  root exists
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.keeper import cgroups

ID_BASE = 0x70010000
"""First host id of a sandbox: above systemd's container range (ends at 0x6FFFFFFF), below 2^31."""
ID_COUNT = 65536
USER_ID = 1000
RUNTIMES = ("crun", "runc")
"""In order of preference: crun starts in a third of runc's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostPlan:
    """How containers are launched here."""

    rootless: bool
    runtimes: tuple[tuple[str, str], ...]
    """(name, path), the preferred one first."""
    id_base: int | None
    """Root: first host id of the container's user namespace. None: no user namespace can be made."""
    idmap: bool
    """Root: lower layers are idmapped (Linux 5.19 and newer)."""
    uid_map: str
    gid_map: str
    """Rootless: lines 'inside outside count' for newuidmap and newgidmap."""
    has_user: bool
    """Whether a second user, `user`, can exist inside."""
    has_cgroups: bool
    hide: tuple[str, ...]
    """Mount points to take away from the runtime in its private namespace."""
    notes: tuple[str, ...] = ()

    def with_runtime(self, name: str) -> HostPlan:
        return replace(self, runtimes=tuple(item for item in self.runtimes if item[0] == name))

    def host_id(self, inside: int) -> int:
        """The id the launcher uses for a container id (the launcher itself is inside when rootless)."""
        return inside if self.rootless or self.id_base is None else self.id_base + inside


def find_program(name: str) -> str | None:
    """Looks in PATH, and in the sbin directories that a user's PATH lacks on Debian. An empty PATH finds
    nothing."""
    path = os.environ.get("PATH", "")
    return shutil.which(name, path=f"{path}:/usr/sbin:/sbin") if path else None


def find_runtimes() -> tuple[tuple[str, str], ...]:
    """Raises HostUnfit when the host has no OCI runtime."""
    found = tuple((name, path) for name in RUNTIMES if (path := find_program(name)))
    if not found:
        raise HostUnfit("no OCI runtime in PATH (crun or runc).", fix="apt-get install crun runc")
    return found


def _mapped(id_base: int) -> bool:
    """Whether this process's own user namespace has the ids id_base..id_base+65535."""
    for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines():
        inside, _, count = (int(part) for part in line.split())
        if inside <= id_base and id_base + ID_COUNT <= inside + count:
            return True
    return False


def _subordinate(path: str, name: str, own_id: int) -> tuple[int, int] | None:
    """First range of at least 65536 ids that /etc/subuid or /etc/subgid gives this user."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            owner, _, rest = line.partition(":")
            first, _, count = rest.partition(":")
            if (
                owner in (name, str(own_id))
                and first.isdigit()
                and count.isdigit()
                and int(count) >= ID_COUNT
            ):
                return int(first), int(count)
    return None


def keep_id_map(own_id: int, first: int) -> str:
    """The caller as 1000 inside, subordinate ids around it."""
    return (
        f"0 {first} {USER_ID}\n{USER_ID} {own_id} 1\n{USER_ID + 1} {first + USER_ID} {ID_COUNT - USER_ID - 1}"
    )


def plan() -> HostPlan:
    """Raises HostUnfit when no container can be made at all."""
    runtimes = find_runtimes()
    points = cgroups.hierarchies()
    hide: tuple[str, ...] = ()
    if "unified" in points and "memory" in points:
        hide = (points["unified"],)  # hybrid: the limits are in v1
    if os.geteuid() == 0:
        notes = []
        id_base: int | None = next((base for base in (ID_BASE, ID_COUNT) if _mapped(base)), None)
        if id_base is None:
            notes.append(
                "no spare host ids here: root of the sandbox is root of this (already confined) host"
            )
        memory = points.get("memory") or points.get("unified")
        has_cgroups = memory is not None and os.access(memory, os.W_OK)
        if not has_cgroups:
            notes.append(
                "cgroups are not writable: memory and processes are held by rlimits, CPU is not held"
            )
        return HostPlan(
            rootless=False,
            runtimes=runtimes,
            id_base=id_base,
            idmap=id_base is not None,
            uid_map="",
            gid_map="",
            has_user=True,
            has_cgroups=has_cgroups,
            hide=hide,
            notes=tuple(notes),
        )
    uid, gid = os.geteuid(), os.getegid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    notes = ["rootless without cgroup delegation: memory and processes are held by rlimits, CPU is not held"]
    subuid, subgid = _subordinate("/etc/subuid", name, uid), _subordinate("/etc/subgid", name, gid)
    helpers = find_program("newuidmap") and find_program("newgidmap")
    if subuid and subgid and helpers:
        uid_map, gid_map, has_user = keep_id_map(uid, subuid[0]), keep_id_map(gid, subgid[0]), True
    else:
        uid_map, gid_map, has_user = f"0 {uid} 1", f"0 {gid} 1", False
        notes.append(
            "one user only: commands run as root of the sandbox, which is you outside. For a second user: "
            f"apt-get install uidmap; usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
        )
    return HostPlan(
        rootless=True,
        runtimes=runtimes,
        id_base=None,
        idmap=False,
        uid_map=uid_map,
        gid_map=gid_map,
        has_user=has_user,
        has_cgroups=False,
        hide=hide,
        notes=tuple(notes),
    )
