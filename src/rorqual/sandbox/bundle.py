"""The OCI configuration of a sandbox (runtime-spec 1.0). Pure: a request in, a dictionary out.

Isolation, all of it here: seven namespaces, no_new_privs, six capabilities for the agent as root of the user
namespace (its commands run as `user` and have none), the seccomp allow-list, masked and read-only kernel
files, no device but null, zero, full, random, urandom, tty and a private devpts, cgroup limits.
"""

from __future__ import annotations

import resource
from typing import Any

from rorqual.sandbox import seccomp
from rorqual.sandbox.limits import SandboxSpec

GUEST = "/.rorqual/guest"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CAPABILITIES = (
    "CAP_CHOWN",  # files.write for another user
    "CAP_DAC_OVERRIDE",  # file calls as root of the sandbox
    "CAP_FOWNER",  # chmod of what a user wrote
    "CAP_KILL",  # the kill of a command of any user
    "CAP_SETGID",  # commands as `user`
    "CAP_SETUID",
)
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/kpagecgroup",  # reading it crashed a kernel (spec/sandbox.md, 1.3)
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/sysvipc",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
    "/sys/block",
    "/sys/bus",
    "/sys/class",
    "/sys/dev",
    "/sys/firmware",
    "/sys/fs",
    "/sys/hypervisor",
    "/sys/kernel",
    "/sys/module",
    "/sys/power",
)
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
NAMESPACES = ("mount", "pid", "ipc", "uts", "network", "cgroup")
"""Always; `user` comes from the configuration (root) or from the launcher (rootless)."""


def oci_config(
    spec: SandboxSpec, *, sandbox_id: str, cgroup: str, id_map: tuple[int, int] | None, has_cgroups: bool
) -> dict[str, Any]:
    """The whole config.json.

    id_map: (first host id, count) of the container's user namespace, or None when the launcher made one
    already. has_cgroups: False leaves memory and process limits to rlimits (rootless without delegation).
    """
    linux: dict[str, Any] = {
        "namespaces": [{"type": name} for name in NAMESPACES],
        "maskedPaths": list(MASKED),
        "readonlyPaths": list(READONLY),
        "seccomp": seccomp.profile(),
        "rootfsPropagation": "private",
    }
    if id_map is not None:
        mapping = [{"containerID": 0, "hostID": id_map[0], "size": id_map[1]}]
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = mapping
        linux["gidMappings"] = mapping
    if has_cgroups:
        memory = spec.memory_mb << 20
        linux["cgroupsPath"] = cgroup
        linux["resources"] = {
            "memory": {"limit": memory, "swap": memory},  # swap is the sum of both: no swap
            "pids": {"limit": spec.pids},
            "cpu": {"quota": max(1000, int(spec.cpu * 100_000)), "period": 100_000},
        }
    return {
        "ociVersion": "1.0.0",
        "hostname": "sandbox",
        "root": {"path": "rootfs", "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [GUEST, "--listen-fd", "3"],
            "env": [
                f"PATH={PATH}",
                "HOME=/root",
                "LANG=C.UTF-8",
                "TERM=xterm-256color",
                f"RORQUAL_SANDBOX={sandbox_id}",
            ],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
            "rlimits": rlimits(),
        },
        "mounts": mounts(),
        "linux": linux,
    }


def rlimits() -> list[dict[str, Any]]:
    """Open files and core dumps. Where no cgroup holds memory and processes: see `late_rlimits`."""
    _, files_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 65536 if files_hard == resource.RLIM_INFINITY else min(65536, files_hard)
    limits = [("RLIMIT_NOFILE", files), ("RLIMIT_CORE", 0)]
    return [{"type": name, "soft": value, "hard": value} for name, value in limits]


def late_rlimits(spec: SandboxSpec, *, has_cgroups: bool) -> dict[str, int]:
    """What the keeper sets on the agent once it runs: runc itself does not start under a small address space."""
    return {} if has_cgroups else {"RLIMIT_AS": spec.memory_mb << 20, "RLIMIT_NPROC": spec.pids}


def mounts() -> list[dict[str, Any]]:
    """The kernel's file systems; everything else was mounted by the launcher (keeper/launch.py)."""

    def entry(target: str, fstype: str, *options: str) -> dict[str, Any]:
        return {"destination": target, "type": fstype, "source": fstype, "options": list(options)}

    return [
        entry("/proc", "proc", "nosuid", "noexec", "nodev"),
        entry("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=64k"),
        entry("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
        entry("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=64m"),
        entry("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        entry("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    ]
