"""What the microvm substrate asks of a monitor (VMM). machines/qemu.py and machines/firecracker.py answer.

A VMM is started by the keeper (keeper/machine.py) with the order that `plan` describes. In `<sandbox>/vm`, where it
runs, it makes its control socket and the sockets of the guest agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rorqual.sandbox.machines.kernel import Kernel


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """How this host runs a guest's instructions."""

    name: str
    """'kvm' or 'tcg' (emulation)."""
    why: str
    """What was tried, and what came of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Boot:
    """One machine to start."""

    sandbox_id: str
    kernel: Kernel
    initrd: Path
    layers: tuple[Path, ...]
    """EROFS images, the top one first; serial numbers layer0, layer1, ..."""
    arguments: tuple[str, ...]
    """The guest agent's, after '--' on the kernel's command line; the VMM adds its transport."""
    memory_mb: int
    cpus: int
    accelerator: str
    user: int | None = None
    """uid and gid of the VMM; None: ours."""
    disk: Path | None = None
    """A raw ext4 image for the writable layer, serial number 'disk'; None: it is in the guest's memory."""
    network: Mapping[str, Any] | None = None
    """None: no interface; otherwise {"tap": name of the tap in the VMM's namespace, "mac": address}."""
    restore: Path | None = None
    """Directory of a memory snapshot of this VMM, instead of a boot."""
    ram: str = ""
    """restore: a file to map copy-on-write in place of the snapshot's own memory file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A VMM's part of the keeper's order; the fields are keeper/machine.py's."""

    argv: list[str]
    files: dict[str, dict[str, Any]]
    shown: list[str]
    devices: list[str]
    guest: str
    """Address of the guest agent (_dial.py)."""
    overhead_mb: int
    """Memory the VMM needs beside the guest's."""
    env: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/bin:/bin"})
    chroot: dict[str, Any] | None = None
    """A jailer of the VMM's own makes the jail and changes the user: the files in its root (keeper/chroot.py)."""
    notes: tuple[str, ...] = ()
    """What `info()` is to say about how it is held."""
    links: bool = False
    """Links to the descriptors of `files`, by their names, in the VMM's directory."""


class Vmm(Protocol):
    """One monitor."""

    name: str
    modules: tuple[str, ...]
    """Kernel modules its devices need (initrd.py)."""
    emulates: bool
    """It can do without KVM."""

    def program(self) -> str:
        """Its path. Raises HostUnfit."""

    def version(self) -> str:
        """As it says itself. Raises HostUnfit."""

    def accelerator(self) -> Accelerator:
        """What it can use here, found out by booting a guest, once per boot of this host. Blocks. Raises HostUnfit."""

    def plan(self, boot: Boot, *, vm: Path) -> Plan:
        """vm: `<sandbox>/vm` as the host sees it. Raises HostUnfit, ImageRejected."""

    async def start(self, boot: Boot, *, vm: Path) -> None:
        """What is left to do once the VMM runs. Raises SandboxError."""

    async def snapshot(self, pid: int, target: Path, *, vm: Path, durable: bool) -> dict[str, Any]:
        """Stops the machine, writes its memory and devices into the directory `target`, and lets it go on.

        durable: False: for children that start at once from this process; what need not be on disk need not be.
        Returns what `plan` needs to find in the snapshot's record, under "machine". Raises SandboxError; the machine
        then runs on.
        """

    async def set_memory(self, memory_mb: int, *, vm: Path) -> int:
        """Has the guest give memory back, or gives it some, by its balloon; returns the MiB it has then."""
