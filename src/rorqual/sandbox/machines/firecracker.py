"""Firecracker as a VMM of the microvm substrate: the program, its command line, what boots in it.

A machine is configured through the API, never by a file, so that a refusal is an answer (firecracker_api.py). Its
devices are virtio over MMIO, named to the guest in ACPI tables. One that is restored has the file names of its
snapshot, which is why each VMM has a working directory of its own with the same names in it.
Owns no process: substrates/microvm.py starts it through the keeper.
Source: Firecracker 1.12, docs/getting-started.md, docs/snapshotting/snapshot-support.md.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.host import find_program
from rorqual.sandbox.state import cache_dir

API_SOCKET = "api.sock"
VSOCK_SOCKET = "v.sock"
"""Both in the VMM's working directory: a snapshot remembers the name, and every child has a directory of its own."""
GUEST_CID = 3
AGENT_PORT = 1024
FIX = "python scripts/fetch_firecracker.py"
KNOWN = (1, 12)
"""What this was written and tested against; a snapshot of another version is refused by Firecracker itself."""
_ARGS = (
    "console=ttyS0 8250.nr_uarts=1 quiet loglevel=4 reboot=k panic=1 pci=off nomodule "
    "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd random.trust_cpu=on"
)


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
