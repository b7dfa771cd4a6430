"""What a sandbox is given: the request of `create()`, checked. Owns the numbers' bounds and their error
texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import InvalidRequest
from rorqual.sandbox.network.policy import OFFLINE, NetworkPolicy, parse_policy

MAX_STACKED = 32
"""Images that may lie on one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A host directory or file shown inside the sandbox."""

    source: str
    """Absolute path on the host; must exist."""
    target: str
    """Absolute path inside."""
    readonly: bool = True
    """Writable mounts let the sandbox change the host's files: ask for it by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSpec:
    """A checked request. Sizes in MiB, times in seconds."""

    substrate: str = "container"
    image: str = "base"
    layers: Sequence[str] = ()
    """Images that lie on `image`, the later ones over the earlier ones."""
    timeout: float = 300.0
    """Lifetime from the start; then the sandbox ends with cause `timeout`."""
    cpu: float = 1.0
    """CPUs of time per second of wall clock."""
    memory_mb: int = 512
    """Everything the sandbox holds in memory, its memory-backed disk included."""
    pids: int = 256
    """Processes and threads."""
    disk_mb: int | None = 512
    """Writable disk, memory-backed and counted in memory_mb as it fills; None: the host's disk, without
    limit."""
    network: str | NetworkPolicy | Mapping[str, Any] = OFFLINE
    """A policy's name, a policy, or its fields; kept as a policy, 'offline' as the word."""
    secrets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What may be written down of each secret (Secret.public()); the values are not here."""
    envs: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
    """Default working directory; None is the user's home."""
    mounts: Sequence[Mount] = ()
    runtime: str = ""
    """'crun' or 'runc'; empty: whichever works here, crun first."""
    vmm: str = ""
    """The monitor of a microvm, when it must be that one: 'qemu', 'firecracker'; empty: what suits this host."""
    accelerated: bool | None = None
    """A machine's CPU: True, with KVM or not at all; False, emulated; None, with KVM where it boots a guest."""
    firmware: str = "bios"
    """A full machine's: 'bios' or 'uefi'."""
    cloud_init: Mapping[str, Any] | None = None
    """A full machine's seed for cloud-init (machines/cloud_init.py: check); {}: a user and our guest agent."""
    channel: str = "auto"
    """How a full machine is reached: 'agent', 'qemu-guest-agent', 'console', 'screen' (by nothing else), 'auto'."""
    console: Mapping[str, str] | None = None
    """{'user', 'password'} for the login on a full machine's serial console; None: root, without a password."""
    user: str = ""
    """Default user of commands and files: `user` (uid 1000) or `root` (of the sandbox, not of the host).
    Empty: `user` where the host has ids for two, else `root`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    keep: bool = False
    """Outlive the client, until `timeout` or `kill()`."""

    def __post_init__(self) -> None:
        _number("timeout", self.timeout, low=0.1, high=30 * 86400, unit="seconds")
        _number("cpu", self.cpu, low=0.01, high=1024, unit="CPUs")
        _number("memory_mb", self.memory_mb, low=16, high=1 << 24, unit="MiB")
        _number("pids", self.pids, low=8, high=1 << 20, unit="processes")
        if self.disk_mb is not None:
            _number("disk_mb", self.disk_mb, low=1, high=1 << 24, unit="MiB")
        _machine_fields(self)
        if self.accelerated not in (True, False, None):
            raise InvalidRequest(f"accelerated: {self.accelerated!r} must be True, False or None")
        for name, value in self.envs.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
                raise InvalidRequest(f"envs: {name!r} is not a variable name, or its value holds a NUL byte")
        if self.workdir is not None and not self.workdir.startswith("/"):
            raise InvalidRequest(f"workdir: {self.workdir!r} must be an absolute path inside the sandbox")
        if not re.fullmatch(r"([a-z_][a-z0-9_-]{0,31})?", self.user):
            raise InvalidRequest(f"user: {self.user!r} is not a user name")
        if self.network != OFFLINE:
            policy = parse_policy(self.network)
            object.__setattr__(self, "network", OFFLINE if policy.name == OFFLINE else policy)
        for mount in self.mounts:
            _check_mount(mount)
        if isinstance(self.layers, str) or not all(isinstance(name, str) for name in self.layers):
            raise InvalidRequest(f"layers: {self.layers!r} must be a sequence of image names")
        if len(self.layers) > MAX_STACKED:
            raise InvalidRequest(f"layers: {len(self.layers)} names (at most {MAX_STACKED})")


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionSpec:
    """A checked request for a function. Every limit but `workers` is that of one call."""

    image: str = "base"
    python: str = "python3"
    """The image's Python, 3.9 or newer: a name in its PATH or an absolute path inside."""
    imports: Sequence[str] = ()
    """Modules that every call finds imported. They are imported by the zygote, before any limit of a call holds."""
    memory_mb: int = 256
    """Everything a call holds in memory, its /tmp, home and /dev/shm included."""
    cpu: float = 1.0
    pids: int = 32
    timeout: float = 30.0
    """Seconds a call may run, unless it is given its own."""
    workers: int = 2
    """Calls that run at the same time; the others wait."""
    envs: Mapping[str, str] = field(default_factory=dict)
    network: str = "offline"

    def __post_init__(self) -> None:
        if isinstance(self.imports, str) or not all(
            isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
            for name in self.imports
        ):
            raise InvalidRequest(f"imports: {self.imports!r} must be a sequence of module names")
        if not re.fullmatch(r"/?[A-Za-z0-9._+-]+(/[A-Za-z0-9._+-]+)*", self.python):
            raise InvalidRequest(
                f"python: {self.python!r} is neither a program's name nor an absolute path inside"
            )
        _number("workers", self.workers, low=1, high=256, unit="calls at once")
        for name, value in (("workers", self.workers), ("pids", self.pids), ("memory_mb", self.memory_mb)):
            if not isinstance(value, int):
                raise InvalidRequest(f"{name}: {value!r} must be a whole number")
        _number("pids", self.pids, low=1, high=1 << 16, unit="processes")
        call_timeout(self.timeout)
        SandboxSpec(image=self.image, memory_mb=self.memory_mb, cpu=self.cpu, envs=self.envs)


def call_timeout(seconds: Any) -> float:
    """The checked deadline of one call. Raises InvalidRequest."""
    _number("timeout", seconds, low=0.01, high=86400, unit="seconds")
    return float(seconds)


_MACHINE_FIELDS = {"firmware": "bios", "cloud_init": None, "channel": "auto", "console": None}
_HIDDEN = ("cloud_init", "console")


def without_secrets(spec: SandboxSpec) -> dict[str, Any]:
    """The request as it goes into the log: what may hold a password is left as the names of its fields."""
    request = asdict(spec)
    for name in _HIDDEN:
        if request[name] is not None:
            request[name] = sorted(request[name])
    return request


def _machine_fields(spec: SandboxSpec) -> None:
    if spec.substrate != "fullvm":
        for name, default in _MACHINE_FIELDS.items():
            if getattr(spec, name) != default:
                raise InvalidRequest(f"{name}: is for substrate='fullvm', not for {spec.substrate!r}")
        return
    if spec.firmware not in ("bios", "uefi"):
        raise InvalidRequest(f"firmware: {spec.firmware!r} must be 'bios' or 'uefi'")
    channels = ("auto", "agent", "qemu-guest-agent", "console", "screen")
    if spec.channel not in channels:
        raise InvalidRequest(f"channel: {spec.channel!r} must be one of {', '.join(channels)}")
    login = spec.console or {}
    if set(login) - {"user", "password"} or not all(
        isinstance(value, str) and "\n" not in value and len(value) < 256 for value in login.values()
    ):
        raise InvalidRequest("console: must have 'user' and 'password', texts of one line")
    if spec.cloud_init is not None:
        from rorqual.sandbox.machines import cloud_init

        cloud_init.check(spec.cloud_init)


def _number(name: str, value: Any, *, low: float, high: float, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{name}: {value!r} must be a number from {low:g} to {high:g} ({unit})")


def _check_mount(mount: Mount) -> None:
    parts = mount.target.split("/")
    if not mount.target.startswith("/") or ".." in parts or not mount.target.strip("/"):
        raise InvalidRequest(
            f"mounts: target {mount.target!r} must be an absolute path below /, without '..'"
        )
    if mount.target.strip("/").split("/")[0] in {"proc", "sys", "dev", ".rorqual"}:
        raise InvalidRequest(f"mounts: target {mount.target!r} would hide a system directory of the sandbox")
    if not mount.source.startswith("/") or not Path(mount.source).exists():
        raise InvalidRequest(f"mounts: source {mount.source!r} must be an existing absolute path on the host")


def parse_mounts(mounts: Sequence[Mount | Mapping[str, Any]] | Mapping[str, str]) -> tuple[Mount, ...]:
    """Accepts Mount objects, mappings with their fields, or {source: target} (read-only).

    Raises:
        InvalidRequest: an entry has other fields.
    """
    if isinstance(mounts, Mapping):
        return tuple(Mount(source=str(source), target=str(target)) for source, target in mounts.items())
    result = []
    for item in mounts:
        if isinstance(item, Mount):
            result.append(item)
            continue
        try:
            result.append(Mount(**item))
        except TypeError as error:
            raise InvalidRequest(f"mounts: {dict(item)!r}: fields are source, target, readonly") from error
    return tuple(result)
