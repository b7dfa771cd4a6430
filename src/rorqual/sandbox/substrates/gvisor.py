"""gVisor as the runtime of a container: what `runtime="runsc"` changes in the keeper's launch order.

The sandbox's processes run on a kernel of their own in user space (runsc, --platform=ptrace: Debian's build of 2022 has
no other that works without KVM). No socket can be handed in, so the agent listens inside, on a file system of the
sentry's that only root sees, and the keeper's door (keeper/door.py) starts a relay for each client. There is no user
namespace: ids inside are ids of the gofer's files, and the sentry itself runs as nobody. Owns runsc's flags.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rorqual.sandbox import bundle, host
from rorqual.sandbox.errors import HostUnfit, Unsupported
from rorqual.sandbox.limits import SandboxSpec

NAME = "runsc"
SOCKET_DIR = "/.rorqual/run"
SOCKET = SOCKET_DIR + "/guest.sock"
FLAGS = (
    "--platform=ptrace",
    "--network=none",
    "--host-uds=none",
    "--overlay2=none",
    "--file-access=shared",  # write through: a disk snapshot reads the files below it
)
NOTES = (
    "gVisor on ptrace: system calls cost tens of microseconds more than on the host's kernel",
    "Debian's runsc of 2022 refuses a flag of stat that coreutils 9 passes: `ls -l` and `stat` fail, programs do not",
    "processes are not limited in number: gVisor has no such limit, and the host's would count its own threads",
    "memory_mb holds for the sandbox's own kernel, too (about 45 MB); beyond it the sandbox ends with cause oom",
)


def plan(spec: SandboxSpec, whole: host.HostPlan) -> host.HostPlan:
    """The host's plan for runsc. Raises Unsupported, HostUnfit."""
    path = host.find_program(NAME)
    if path is None:
        raise HostUnfit("runtime='runsc': gVisor is not installed.", fix="apt-get install runsc")
    if whole.rootless or not whole.has_cgroups:
        raise Unsupported(
            "runtime='runsc'",
            reason="it needs root and cgroups here",
            available=[name for name, _ in whole.runtimes],
        )
    if spec.network != "offline":
        raise Unsupported(
            f"network={spec.network!r} with runtime='runsc'",
            reason="its own network stack is not connected to a network yet",
            available=["network='offline'", "runtime='crun'"],
        )
    return replace(
        whole, runtimes=((NAME, path),), id_base=None, idmap=False, hide=(), notes=(*whole.notes, *NOTES)
    )


def adapt(order: dict[str, Any]) -> dict[str, Any]:
    """The launch order of an OCI runtime, changed to what runsc can do."""
    config, directory = order["config"], order["directory"]
    program, root = order["runtime"][0], f"{directory}/runtime"
    common = [program, "--root", root, *FLAGS]
    process = config["process"] | {"args": [bundle.GUEST, "--socket", SOCKET]}
    linux = {
        key: value
        for key, value in config["linux"].items()
        if key not in ("seccomp", "uidMappings", "gidMappings")
    }
    linux |= {
        "maskedPaths": [],
        "readonlyPaths": [],
    }  # of the host's /proc and /sys; these are the sentry's own
    linux["namespaces"] = [item for item in linux["namespaces"] if item["type"] not in ("user", "cgroup")]
    linux["resources"] = {key: value for key, value in linux["resources"].items() if key != "pids"}
    mounts = [item for item in config["mounts"] if item["destination"] != "/dev/mqueue"]
    mounts.append(
        {
            "destination": SOCKET_DIR,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["mode=700", "size=64k", "noexec"],
        }
    )
    relay = {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": [bundle.GUEST, "--relay", SOCKET],
        "env": [f"PATH={bundle.PATH}"],
        "cwd": "/",
        "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted")},
    }
    run = ["run", "-detach", "-bundle", "/mnt/bundle", "-pid-file", f"{directory}/init.pid", order["id"]]
    return order | {
        "config": config | {"process": process, "linux": linux, "mounts": mounts},
        "runtime": [*common, *run],
        "rlimits": {},
        "door": {
            "argv": [*common, "exec", "-process", f"{directory}/relay.json", order["id"]],
            "process": relay,
        },
        "record": order["record"] | {"limits": order["record"]["limits"] | {"pids": "none"}},
    }
