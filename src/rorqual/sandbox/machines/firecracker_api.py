"""Firecracker's API over its Unix socket: what we ask of a VMM, typed, and its refusals as our errors.

    async with FirecrackerApi(directory / "api.sock") as api:
        await api.wait_ready(timeout=5.0)
        await api.put(Drive(drive_id="root", path_on_host="root.img", is_read_only=True))
        await api.start()

The VMM may be taken over by its guest: its answers are data, bounded in size and time, and no link is followed to its
socket. Paths in requests are the VMM's (relative to its working directory, or inside its jail).
Owns requests and answers; starts no process. Source: Firecracker 1.12, src/firecracker/swagger/firecracker.yaml.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rorqual.sandbox.errors import SandboxError

if TYPE_CHECKING:
    import httpx  # loaded with the first request: it takes 70 ms

REQUEST_S = 20.0
"""Any request but those that move a guest's memory."""
MEMORY_S = 300.0
"""Snapshot and load: as long as the disk takes."""
MAX_ANSWER = 1 << 20


class FirecrackerError(SandboxError):
    """Firecracker refused a request, or did not answer. `request` names it; `status` is HTTP's, 0 without an answer."""

    def __init__(self, request: str, reason: str, *, status: int = 0) -> None:
        self.request = request
        self.reason = reason
        self.status = status
        super().__init__(f"Firecracker: {request}: {reason}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineConfig:
    """Shape of the machine."""

    PATH: ClassVar[str] = "/machine-config"
    vcpu_count: int
    """1 to 32."""
    mem_size_mib: int
    smt: bool = False
    track_dirty_pages: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BootSource:
    """What it boots: a vmlinux, an initrd or None, a command line."""

    PATH: ClassVar[str] = "/boot-source"
    kernel_image_path: str
    initrd_path: str | None = None
    boot_args: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drive:
    """A virtio block device; in the guest /dev/vda, vdb, ... in the order of the requests."""

    PATH: ClassVar[str] = "/drives/{drive_id}"
    drive_id: str
    path_on_host: str
    is_read_only: bool
    is_root_device: bool = False
    cache_type: Literal["Unsafe", "Writeback"] = "Unsafe"
    io_engine: Literal["Sync", "Async"] = "Sync"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vsock:
    """The guest's vsock device. `uds_path`: the socket on which the host asks for a port."""

    PATH: ClassVar[str] = "/vsock"
    guest_cid: int
    uds_path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkInterface:
    """A virtio network device on a tap that exists."""

    PATH: ClassVar[str] = "/network-interfaces/{iface_id}"
    iface_id: str
    host_dev_name: str
    guest_mac: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Balloon:
    """What the guest gives back. `deflate_on_oom`: before its kernel kills for want of memory, it takes it again."""

    PATH: ClassVar[str] = "/balloon"
    amount_mib: int
    deflate_on_oom: bool = True
    stats_polling_interval_s: int = 0
    """0: no statistics, and none can be asked for later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entropy:
    """A virtio entropy device, fed by the host's generator."""

    PATH: ClassVar[str] = "/entropy"


Device = MachineConfig | BootSource | Drive | Vsock | NetworkInterface | Balloon | Entropy
State = Literal["Not started", "Running", "Paused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BalloonStats:
    """MiB, as the guest's driver says; the guest is not trusted."""

    target_mib: int
    actual_mib: int
    free_memory: int | None
    """Bytes; None from a driver that does not tell."""
    available_memory: int | None


def body(request: Device) -> dict[str, Any]:
    """The request as JSON; what is None is left out."""
    assert is_dataclass(request)
    pairs = ((field.name, getattr(request, field.name)) for field in fields(request))
    return {name: value for name, value in pairs if value is not None}


def config_file(devices: list[Device]) -> dict[str, Any]:
    """The same requests as one document for `--config-file`."""
    document: dict[str, Any] = {"drives": [], "network-interfaces": []}
    for device in devices:
        key = device.PATH.split("/")[1]
        if isinstance(device, Drive | NetworkInterface):
            document[key].append(body(device))
        else:
            document[key] = body(device)
    return document


class FirecrackerApi:
    """One VMM's API. Use as an async context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._client: httpx.AsyncClient | None = None
        self._fd = -1

    async def __aenter__(self) -> FirecrackerApi:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Idempotent. The VMM runs on."""
        client, self._client = self._client, None
        try:
            if client is not None:
                await client.aclose()
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    async def wait_ready(self, *, timeout: float) -> str:  # noqa: ASYNC109 - public
        """Until it answers: its version. Raises FirecrackerError when it does not in `timeout` s."""
        loop = asyncio.get_running_loop()
        end, pause = loop.time() + timeout, 0.001
        while True:
            try:
                return str((await self._ask("GET", "/version"))["firecracker_version"])
            except FirecrackerError as error:
                if error.status or loop.time() > end:
                    raise
            except KeyError as error:
                raise FirecrackerError("GET /version", "the answer names no version") from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.05)

    async def state(self) -> State:
        found = (await self._ask("GET", "/")).get("state")
        if found not in ("Not started", "Running", "Paused"):
            raise FirecrackerError("GET /", f"an unknown state: {found!r:.80}")
        return found  # type: ignore[no-any-return]

    async def put(self, device: Device) -> None:
        """Configures it, before the start."""
        content = body(device)
        await self._ask("PUT", device.PATH.format_map(content), content)

    async def start(self) -> None:
        await self._ask("PUT", "/actions", {"action_type": "InstanceStart"})

    async def pause(self) -> None:
        """Its vCPUs stand still. Allowed when they do already."""
        await self._ask("PATCH", "/vm", {"state": "Paused"})

    async def resume(self) -> None:
        await self._ask("PATCH", "/vm", {"state": "Resumed"})

    async def create_snapshot(self, *, state: str, memory: str) -> None:
        """Of a paused machine: device state and guest memory, into two files the VMM makes."""
        content = {"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory}
        await self._ask("PUT", "/snapshot/create", content, deadline=MEMORY_S)

    async def load_snapshot(
        self, *, state: str, memory: str, resume: bool, taps: dict[str, str] | None = None
    ) -> None:
        """Into a VMM that has configured nothing. `memory` is mapped privately: it must stay as it is while this
        machine lives, and any number may be made from it. taps: interface -> tap of this one."""
        content: dict[str, Any] = {
            "snapshot_path": state,
            "mem_backend": {"backend_path": memory, "backend_type": "File"},
            "resume_vm": resume,
        }
        if taps:
            content["network_overrides"] = [
                {"iface_id": name, "host_dev_name": tap} for name, tap in taps.items()
            ]
        await self._ask("PUT", "/snapshot/load", content, deadline=MEMORY_S)

    async def memory_mb(self) -> int:
        """The machine's memory, of a restored one too."""
        try:
            return _number((await self._ask("GET", "/machine-config"))["mem_size_mib"])
        except (KeyError, TypeError) as error:
            raise FirecrackerError("GET /machine-config", f"an answer that does not fit: {error}") from error

    async def set_balloon(self, amount_mib: int) -> None:
        """How much the guest shall give back; it does so as it can."""
        await self._ask("PATCH", "/balloon", {"amount_mib": amount_mib})

    async def balloon(self) -> BalloonStats:
        """Raises FirecrackerError when there is no balloon, or no statistics of it."""
        got = await self._ask("GET", "/balloon/statistics")
        try:
            return BalloonStats(
                target_mib=_number(got["target_mib"]),
                actual_mib=_number(got["actual_mib"]),
                free_memory=_number(got["free_memory"]) if "free_memory" in got else None,
                available_memory=_number(got["available_memory"]) if "available_memory" in got else None,
            )
        except (KeyError, TypeError) as error:
            raise FirecrackerError(
                "GET /balloon/statistics", f"an answer that does not fit: {error}"
            ) from error

    async def _ask(
        self, method: str, path: str, content: dict[str, Any] | None = None, *, deadline: float = REQUEST_S
    ) -> dict[str, Any]:
        import httpx

        name = f"{method} {path}"
        try:
            async with asyncio.timeout(deadline), self._open().stream(method, path, json=content) as answer:
                data = b""
                async for part in answer.aiter_bytes():
                    data += part
                    if len(data) > MAX_ANSWER:
                        raise FirecrackerError(name, f"an answer of more than {MAX_ANSWER} bytes", status=502)
                status = answer.status_code
        except TimeoutError as error:
            raise FirecrackerError(name, f"no answer in {deadline:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            raise FirecrackerError(name, f"it is gone: {error or type(error).__name__}") from error
        try:
            got = json.loads(data) if data else {}
        except ValueError as error:
            raise FirecrackerError(name, f"an answer that is not JSON: {data[:80]!r}", status=502) from error
        if not isinstance(got, dict):
            raise FirecrackerError(name, f"an answer that is no object: {data[:80]!r}", status=502)
        if not 200 <= status < 300:
            raise FirecrackerError(
                name, str(got.get("fault_message", f"status {status}"))[:2000], status=status
            )
        return got

    def _open(self) -> httpx.AsyncClient:
        """The connection, through a descriptor of the socket: its path may be longer than 107 bytes."""
        import httpx

        if self._client is None:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            if not stat.S_ISSOCK(os.fstat(self._fd).st_mode):
                raise OSError(errno.ENOTSOCK, "not a socket", str(self._path))
            transport = httpx.AsyncHTTPTransport(uds=f"/proc/self/fd/{self._fd}", retries=0)
            self._client = httpx.AsyncClient(
                transport=transport, base_url="http://firecracker", timeout=None, trust_env=False
            )
        return self._client


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise TypeError(f"{value!r:.40} is not a size")
    return value
