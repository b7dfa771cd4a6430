"""The function substrate, the host's side: a zygote in a sandbox, a cgroup per slot, a connection per worker.

The sandbox is launched as a container is (keeper/launch.py), so that the keeper owns its life, its cgroups and its
end; its first process is zygote.py instead of the guest agent. The zygote gets what it needs to make namespaces and
nothing of the host; its calls get nothing. A worker is moved into its slot's cgroup before it prepares a call, so
that each call is born under its limits: moving a process costs more than a call.
Trusts no byte that comes back: frames are bounded and checked (decision 0014).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.sandbox import bundle, host, images, seccomp
from rorqual.sandbox.errors import GuestGone, GuestProtocolError, HostUnfit, LaunchFailed, Unsupported
from rorqual.sandbox.images.unpack import Bounds
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.keeper.client import KeeperClient, own_keeper
from rorqual.sandbox.limits import FunctionSpec, SandboxSpec
from rorqual.sandbox.records import Snapshot
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates import zygote
from rorqual.sandbox.substrates.base import Launched
from rorqual.sandbox.substrates.container import launch_order, start, variants, worth_trying

if TYPE_CHECKING:
    from rorqual.sandbox._session import Session

CAPABILITIES = (
    "CAP_KILL",  # the end of a call, which is another user
    "CAP_SETGID",  # the call's user
    "CAP_SETPCAP",  # empties the bounding set
    "CAP_SETUID",
    "CAP_SYS_ADMIN",  # namespaces and mounts, inside its own user namespace
)
MAX_REQUEST = 1 << 20
"""Bytes of code and arguments, and of stdin, of one call."""
MAX_OUTPUT = 1 << 20
"""Bytes kept of each stream, and of the value."""
ZYGOTE_MB = 1024
"""Memory of the zygote and its imports."""
WORKER_MB = 16
"""Memory of a worker, which lives in its slot beside the call: its own pages and the output it holds."""
LIFETIME_S = 30 * 86400.0
_HELLO_S = 120.0
"""Imports may take long."""
_MODULE = Path(zygote.__file__)


class Functions:
    """The substrate as the registry knows it: what `require` may name, and where to turn."""

    name = "function"
    snapshots = ""

    def capabilities(self) -> frozenset[str]:
        return frozenset({"calls", "imports", "trajectory", "network:offline"})

    async def launch(
        self, spec: SandboxSpec, *, sandbox_id: str, state: StateDir, trajectory: Path
    ) -> Launched:
        raise Unsupported(
            "Sandbox.create(substrate='function')",
            reason="a function runs calls and keeps nothing between them, so it has no commands, files or terminals",
            available=["Sandbox.function(image=..., imports=...)", "substrate='container'"],
        )

    async def take(
        self, session: Session, record: Mapping[str, Any], *, name: str, state: StateDir, bounds: Bounds
    ) -> tuple[Snapshot, list[int]]:
        raise Unsupported("a function's snapshot", reason="nothing of a call outlives it", available=[])


@dataclass(frozen=True, kw_only=True, slots=True)
class Zygote:
    """A running function's sandbox."""

    launched: Launched
    slots: tuple[str, ...]
    """Cgroup of each slot."""
    socket: Path


async def launch(spec: FunctionSpec, *, sandbox_id: str, state: StateDir, trajectory: Path) -> Zygote:
    """Starts the zygote of a function.

    Raises:
        Unsupported, ImageNotFound, HostUnfit, LaunchFailed. Nothing is left behind in any of these cases.
    """
    if spec.network != "offline":
        raise Unsupported(
            f"network={spec.network!r}", reason="calls have no network at all", available=["offline"]
        )
    plan = host.plan()
    if plan.rootless or not plan.has_cgroups:
        raise HostUnfit(
            "the function substrate holds its calls by cgroups, and this user may not write any.",
            fix="run as root",
        )
    if plan.id_base is None:
        raise HostUnfit(
            "the function substrate needs a user namespace of its own, and no host id is free for one."
        )
    filter_program = seccomp.compiled(seccomp.function_profile())
    root = images.root_file_system(spec.image, state=state)
    await asyncio.to_thread(images.prepare, root, state=state)
    if root.leases and plan.id_base != root.id_base:
        raise HostUnfit(
            f"the files of {spec.image!r} belong to other host ids: take the snapshot again here."
        )
    keeper = await asyncio.to_thread(own_keeper, state)
    failure: LaunchFailed | None = None
    for variant in variants(plan):
        if failure is not None and not worth_trying(failure, variant):
            continue
        order = function_order(
            spec, variant, root, filter_program, sandbox_id=sandbox_id, state=state, trajectory=trajectory
        )
        try:
            launched = await start(order, variant, keeper)
        except LaunchFailed as error:
            failure = failure or error
            continue
        try:
            slots = cgroups.make_slots(
                order["cgroup"],
                spec.workers,
                memory=(spec.memory_mb + WORKER_MB) << 20,
                pids=spec.pids + 1,
                cpu=spec.cpu,
            )
        except (OSError, KeyError) as error:
            await end(keeper, sandbox_id, cause="infra", detail=f"no cgroup for its calls: {error}")
            raise LaunchFailed(
                sandbox_id, stage="limits", detail=f"no cgroup for its calls: {error}"
            ) from error
        return Zygote(
            launched=launched, slots=tuple(slots), socket=Path(launched.guest.removeprefix("unix:"))
        )
    assert failure is not None
    raise failure


def function_order(
    spec: FunctionSpec,
    plan: host.HostPlan,
    root: images.RootFs,
    program: bytes,
    *,
    sandbox_id: str,
    state: StateDir,
    trajectory: Path,
) -> dict[str, Any]:
    """The container's launch order with the zygote in the agent's place, and less of a house around it."""
    whole = SandboxSpec(
        substrate="function",
        image=spec.image,
        timeout=LIFETIME_S,
        cpu=spec.cpu * spec.workers + 1,
        memory_mb=(spec.memory_mb + WORKER_MB) * spec.workers + ZYGOTE_MB,
        pids=(spec.pids + 1) * spec.workers + 8,
        disk_mb=16,  # the mount points; calls write to their own
        envs=spec.envs,
        user="user",
    )
    order = launch_order(
        whole, plan, root, _MODULE, sandbox_id=sandbox_id, state=state, trajectory=trajectory
    )
    home = order["record"]["workdir"]
    envs = {"PATH": bundle.PATH, "HOME": home, "LANG": "C.UTF-8", "USER": "user", "TMPDIR": "/tmp"}
    config = {
        "workers": spec.workers,
        "imports": list(spec.imports),
        "uid": host.USER_ID,
        "home": home,
        "envs": envs | order["record"]["envs"],
        "scratch": f"size={spec.memory_mb}m,nr_inodes=16384",
        "program": program.hex(),
    }
    order["files"] = [
        {"path": zygote.CONFIG, "text": json.dumps(config)},
        {"path": "/.rorqual/zygote.py", "text": _MODULE.read_text(encoding="utf-8")},
    ]
    order["binds"] = [item for item in order["binds"] if item["target"] != bundle.GUEST]
    oci = order["config"]
    oci["process"]["args"] = [spec.python, "-I", "/.rorqual/zygote.py"]
    oci["process"]["capabilities"] = {
        kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")
    }
    oci["mounts"] = [
        item for item in oci["mounts"] if item["destination"] in ("/proc", "/dev", "/dev/shm")
    ]  # no terminals, queues and no /sys: calls would meet in them
    linux = oci["linux"]
    del linux["seccomp"]  # zygote.py gives it to each call; the zygote itself has to mount
    linux["maskedPaths"] = linux[
        "readonlyPaths"
    ] = []  # each call mounts a /proc of its own, with processes only
    order["record"] |= {
        "cpu": spec.cpu,
        "memory_mb": spec.memory_mb,
        "pids": spec.pids,
        "limits": order["record"]["limits"]
        | {"disk": "tmpfs", "memory": "cgroup", "pids": "cgroup", "cpu": "cgroup"},
        "notes": [
            *order["record"]["notes"],
            f"function: {spec.workers} calls at once; cpu, memory_mb and pids are those of one call",
        ],
    }
    return order


async def end(keeper: KeeperClient, sandbox_id: str, *, cause: str, detail: str) -> Mapping[str, Any]:
    """Ends a function's sandbox; returns the keeper's answer."""
    future = keeper.request("kill", sandbox=sandbox_id, cause=cause, detail=detail)
    return await asyncio.wait_for(asyncio.wrap_future(future), timeout=30.0)


class Worker:
    """A connection to one worker. One call at a time."""

    def __init__(self, sock: socket.socket, *, python: str) -> None:
        self._sock = sock
        self.python = python

    @classmethod
    async def open(cls, running: Zygote, slot: str) -> Worker:
        """Connects to a free worker, moves it into the slot's cgroup, and waits until it has prepared a call.

        Raises:
            LaunchFailed: its imports or its first preparation failed.
            GuestGone: it hung up. GuestProtocolError: it is not our zygote that answers.
        """
        sandbox_id = running.launched.sandbox_id
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        worker = cls(sock, python="")
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            fd = os.open(running.socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock.connect(f"/proc/self/fd/{fd}/{running.socket.name}")
            except OSError as error:
                raise GuestGone(f"{sandbox_id}: no zygote answers: {error}") from error
            finally:
                os.close(fd)
            sock.setblocking(False)
            pid = await asyncio.wait_for(_sender(sock), timeout=_HELLO_S)
            hello, _ = await asyncio.wait_for(worker.receive(), timeout=10.0)
            if hello.get("error"):
                stage = "imports" if hello.get("stage") == "imports" else "mounts"
                raise LaunchFailed(sandbox_id, stage=stage, detail=str(hello["error"])[:4096])
            try:
                cgroups.join_slot(slot, pid)
            except OSError as error:
                raise LaunchFailed(sandbox_id, stage="limits", detail=f"{slot}: {error}") from error
            await worker.send({}, b"")
            ready, _ = await asyncio.wait_for(worker.receive(), timeout=60.0)
            if ready.get("error"):
                raise LaunchFailed(sandbox_id, stage="namespaces", detail=str(ready["error"])[:4096])
            worker.python = str(hello.get("python"))[:64]
        except TimeoutError as error:
            worker.close()
            raise LaunchFailed(sandbox_id, stage="zygote", detail="it did not answer in time") from error
        except BaseException:
            worker.close()
            raise
        return worker

    async def send(self, head: Mapping[str, Any], blob: bytes) -> None:
        text = json.dumps(head).encode()
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._sock, zygote.FRAME.pack(len(text), len(blob)) + text + blob)
        except OSError as error:
            raise GuestGone(f"the worker hung up: {error}") from error

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """One frame. Raises GuestGone, GuestProtocolError."""
        text_size, blob_size = zygote.FRAME.unpack(await self._exactly(zygote.FRAME.size))
        if text_size > 1 << 16 or blob_size > 3 * MAX_OUTPUT + 16:
            raise GuestProtocolError(f"a frame of {text_size} and {blob_size} bytes")
        text, blob = await self._exactly(text_size), await self._exactly(blob_size)
        try:
            head = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GuestProtocolError(f"a frame's head is not JSON: {error}") from error
        if not isinstance(head, dict):
            raise GuestProtocolError("a frame's head is not an object")
        return head, blob

    async def _exactly(self, count: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < count:
            try:
                part = await loop.sock_recv(self._sock, min(count - len(data), 1 << 18))
            except OSError as error:
                raise GuestGone(f"the worker hung up: {error}") from error
            if not part:
                raise GuestGone("the worker hung up")
            data += part
        return bytes(data)

    def hang_up(self) -> None:
        """Ends the worker, and with it the call that it runs; whoever waits for its answer gets GuestGone."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # a forked child of ours may hold the socket open, too

    def close(self) -> None:
        """Hangs up and closes. Not while somebody waits for an answer. Idempotent."""
        self.hang_up()
        self._sock.close()


async def _sender(sock: socket.socket) -> int:
    """The process id, here, of who sent the bytes that wait in the socket. The kernel says so, not the sender."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def waits() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock, waits)
    try:
        await readable
    finally:
        loop.remove_reader(sock)
    data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(12), socket.MSG_PEEK)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and data:
            pid: int = struct.unpack("3i", content[:12])[0]
            if pid > 0:
                return pid
    raise GuestGone("the zygote hung up before it said who it is")


def checked(head: Mapping[str, Any], blob: bytes) -> tuple[bytes, bytes, bytes]:
    """stdout, stderr, value of an answer. Raises GuestProtocolError when head and blob do not fit together."""
    sizes = [head.get(name) for name in ("stdout", "stderr", "value")]
    numbers = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and size >= 0]
    flags = all(isinstance(head.get(name), bool) for name in ("timed_out", "cut", "ready"))
    status, seconds = head.get("exit"), head.get("seconds")
    fits = len(numbers) == 3 and sum(numbers) == len(blob) and flags
    if not fits or not isinstance(status, int) or not isinstance(seconds, float):
        raise GuestProtocolError("an answer whose parts do not fit together")
    out, err = numbers[0], numbers[0] + numbers[1]
    return blob[:out], blob[out:err], blob[err:]
