"""Firecracker's jailer, where the host lets us be root: a chroot, ids of its own, no capability.

The keeper's child makes the files of the machine appear in the chroot (`order["chroot"]`, keeper/chroot.py) and execs
the jailer, which copies Firecracker in, makes its device nodes, changes root and user, and execs it. Limits and network
are the keeper's business: its cgroup and network namespace are inherited.
Source: Firecracker 1.12, docs/jailer.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rorqual.sandbox.errors import InvalidRequest


def root(base: Path, sandbox_id: str) -> Path:
    """The directory that the jailed Firecracker sees as /."""
    return base / "firecracker" / sandbox_id / "root"


def argv(
    jailer: Path, firecracker: Path, arguments: Sequence[str], *, sandbox_id: str, user: int, base: Path
) -> list[str]:
    """The jailer's command line; `arguments` are Firecracker's. user: uid and gid. base: where `root` goes.

    Raises InvalidRequest: an id that the jailer would refuse.
    """
    if not sandbox_id.replace("-", "").isalnum() or not sandbox_id.isascii() or len(sandbox_id) > 64:
        raise InvalidRequest(f"{sandbox_id!r}: the jailer takes letters, digits and '-', at most 64")
    if user == 0:
        raise InvalidRequest("a jailed VMM must not run as root: give it a user id above 0")
    if "firecracker" not in firecracker.name:
        raise InvalidRequest(f"{firecracker}: the jailer starts only programs named like 'firecracker'")
    return [
        *(str(jailer), "--id", sandbox_id, "--exec-file", str(firecracker)),
        *("--uid", str(user), "--gid", str(user), "--chroot-base-dir", str(base)),
        *("--", *arguments),
    ]
