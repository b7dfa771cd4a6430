"""Memory snapshots of machines, as images: <state>/images/<name>/{image.json, lease, state, ram, disk}.

image.json has origin 'memory' and under "machine" what the next VMM must be like: monitor, version, accelerator,
memory, CPUs, layers. `state` is the monitor's (devices); `ram` and `disk` are sparse files, absent where there is none.
Files and memory are of one moment: the machine is stopped for both. A fork's snapshot has a hidden name and a lease and
goes with its last user, as a container's does (keeper/leases.py). Owns that format.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.sandbox.errors import HostUnfit, ImageNotFound, ImageRejected, SandboxEnded, SandboxError
from rorqual.sandbox.host import find_program
from rorqual.sandbox.images import snapshots, store
from rorqual.sandbox.keeper import leases
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.machines import memory
from rorqual.sandbox.machines.vmm import Vmm
from rorqual.sandbox.records import Snapshot
from rorqual.sandbox.state import StateDir, cache_dir

if TYPE_CHECKING:
    from rorqual.sandbox._session import Session

ORIGIN = "memory"
DISK_GIB = 64
"""Size of the file system of disk_mb=None; the host's disk is filled as it is."""


async def take(
    session: Session, record: Mapping[str, Any], vmm: Vmm, *, name: str, state: StateDir
) -> tuple[Snapshot, list[int]]:
    """Stops the machine, writes it down and lets it go on. name: the image's; '' for a fork's.

    Returns with the lease, which the caller gives back.
    Raises:
        SandboxError: the disk is full, or the monitor refused; the machine runs on and nothing is kept.
        SandboxEnded: it ended meanwhile.
    """
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
    final = name or f"{leases.FORK_PREFIX}{secrets.token_hex(6)}"
    held: list[int] = []
    try:
        (building / leases.FILE).touch(mode=0o600)
        held = leases.take([str(building / leases.FILE)])
        machine, seconds = await _write(session, record, vmm, building, durable=bool(name))
        size = _size(building) + (int(machine["ram_bytes"]) if "ram" in machine else 0)
        image = {
            "origin": ORIGIN,
            "size_bytes": size,
            "entries": 0,
            "digest": "",
            "envs": record["image_envs"],
            "parent": record["root_image"],
            "sandbox": record["id"],
            "machine": {**record["machine"], **machine},
            "record": {
                key: record[key]
                for key in ("image", "user", "workdir", "pids", "disk_mb", "memory_mb", "cpu")
            },
        }
        memory.moved(building, state.images / final)
        await asyncio.shield(
            asyncio.to_thread(partial(store.install, building, name=final, state=state, record=image))
        )
    except BaseException as error:
        leases.give(held)
        for place in (building, state.images / final):
            memory.let_go(place)
        await asyncio.shield(asyncio.to_thread(remove_tree, str(building)))
        if not name:
            await asyncio.shield(asyncio.to_thread(leases.remove_unused, str(state.images / final)))
        if isinstance(error, OSError):
            raise SandboxError(f"{record['id']}: its snapshot cannot be written: {error}") from error
        raise
    snapshot = Snapshot(
        name=final,
        sandbox_id=record["id"],
        parent=image["parent"],
        size_bytes=size,
        entries=0,
        seconds=seconds,
        memory=True,
    )
    return snapshot, held


async def _write(
    session: Session, record: Mapping[str, Any], vmm: Vmm, building: Path, *, durable: bool
) -> tuple[dict[str, Any], float]:
    directory = Path(record["directory"])
    await session.keeper_call("hold")
    try:
        start = time.monotonic()
        machine = await vmm.snapshot(int(record["init_pid"]), building, vm=directory / "vm", durable=durable)
        return machine, time.monotonic() - start
    except SandboxError as error:
        if session.ended is not None and not isinstance(error, SandboxEnded):
            raise session.end_error() from error
        raise
    finally:
        with contextlib.suppress(SandboxError):
            await asyncio.shield(session.keeper_call("release"))


def _size(place: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in place.iterdir())


def find(name: str, *, state: StateDir) -> tuple[Path, dict[str, Any]] | None:
    """The directory and the record of a memory snapshot; None when this is another kind of image.

    Raises:
        ImageRejected: its record, its files or the layers below it are damaged or gone.
    """
    if name in store.BASE_NAMES:
        return None
    fork = snapshots.FORK_NAME.fullmatch(name)
    place = state.images / name if fork else store.image_directory(name, state=state)
    if not (place / "image.json").is_file():
        if fork:
            raise ImageNotFound(name, known=())
        return None
    record = snapshots.read(place)
    if record.get("origin") != ORIGIN:
        return None
    machine = record.get("machine")
    if not isinstance(machine, dict) or not isinstance(record.get("record"), dict):
        raise ImageRejected(name, "its image.json does not describe a machine")
    wanted = [place / memory.STATE, *(Path(layer) for layer in machine.get("layers", ()))]
    wanted += [place / memory.RAM] if "ram_bytes" in machine and "ram" not in machine else []
    wanted += [place / memory.DISK] if machine.get("disk") else []
    for path in wanted:
        if not path.is_file():
            raise ImageRejected(name, f"{path} is gone: take the snapshot again")
    ram = place / memory.RAM
    if ram.is_file() and ram.stat().st_size != int(machine["memory_mb"]) << 20:
        raise ImageRejected(
            name, f"{ram} has {ram.stat().st_size} bytes, and the machine {machine['memory_mb']} MiB"
        )
    return place, record


def empty_disk() -> Path:
    """An empty ext4 file system of DISK_GIB as a sparse file in the cache, which the keeper copies for each machine.

    Raises HostUnfit.
    """
    target = cache_dir() / "guests" / f"ext4-{DISK_GIB}g.img"
    if target.is_file():
        return target
    program = find_program("mkfs.ext4")
    if program is None:
        raise HostUnfit("disk_mb=None needs mkfs.ext4.", fix="apt-get install e2fsprogs")
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".building-{os.getpid()}-{secrets.token_hex(4)}.img")
    try:
        with temporary.open("wb") as file:
            file.truncate(DISK_GIB << 30)
        options = ["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"]
        done = subprocess.run(
            [program, *options, str(temporary)], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise HostUnfit(f"mkfs.ext4 failed: {done.stderr.strip()[:200]}")
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def check_restorable(machine: Mapping[str, Any], vmm: Vmm, *, name: str) -> None:
    """Raises ImageRejected when this monitor cannot go on with what another version of it has written."""
    made, have = machine.get("version"), vmm.version()
    if made != have:
        raise ImageRejected(name, f"{vmm.name} {made} took it, and this host has {have}: take it again")
