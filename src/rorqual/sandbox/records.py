"""What the SDK returns: results, infos, entries. Frozen, and the same for `Sandbox` and `AsyncSandbox`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandResult:
    """How a command ended. A command's failure is data, not an exception."""

    stdout: str
    """Decoded as UTF-8, what is not UTF-8 as U+FFFD; at most `max_output` bytes, from the start."""
    stderr: str
    exit_code: int
    """0..255; 128 + signal when a signal ended it; 126 and 127 as in a shell."""
    timed_out: bool
    """Its deadline passed: its whole process group was killed; stdout and stderr hold what it had printed."""
    truncated: bool
    """It printed more than `max_output` on a stream; the rest was read and dropped."""
    oom: bool
    """The sandbox's memory limit killed a process while the command ran."""
    seq: int
    """Its number in the trajectory log."""
    duration: float
    """Seconds, as the guest agent measured them."""
    stdout_bytes: int
    """Bytes it wrote, kept or not."""
    stderr_bytes: int
    error: str
    """Why it could not be started (no such directory, user or program), or ''."""
    cached: bool = False
    """It ran before, and this is what the trajectory log has of it (`Sandbox.attach`)."""

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and not self.timed_out


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandInfo:
    """One line of `commands.list()`."""

    id: int
    """Process id inside the sandbox; what `connect` and `kill` take."""
    command: str
    running: bool
    pty: bool
    started: float
    """Seconds ago."""
    exit_code: int | None
    """None while it runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of the sandbox, not followed when it is a link."""

    path: str
    name: str
    type: Literal["file", "dir", "symlink", "other"]
    size: int
    mode: int
    uid: int
    gid: int
    mtime: float
    target: str | None
    """Where a symlink points."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxInfo:
    """What a live sandbox is. Sizes in MiB, times in epoch seconds."""

    id: str
    substrate: str
    image: str
    runtime: str
    rootless: bool
    user: str
    workdir: str
    cpu: float
    memory_mb: int
    pids: int
    disk_mb: int | None
    network: str
    created: float
    expires: float
    paused: bool
    """It stands still; the next call resumes it."""
    metadata: Mapping[str, str]
    limits: Mapping[str, str]
    """What holds each limit: 'cgroup', 'rlimit', 'tmpfs', 'machine' (its size), 'guest' (its kernel) or 'none'."""
    notes: tuple[str, ...]
    """What this host does differently, in sentences."""
    accelerator: str = ""
    """A machine's: 'kvm', or 'tcg' when it is emulated; '' for what is no machine."""
    channel: str = ""
    """How a full machine is reached: 'agent', 'qemu-guest-agent', 'console' or 'screen'; '' for all others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkEvent:
    """Something that a sandbox's policy refused, as often as it was tried."""

    kind: Literal["dns", "address", "secret"]
    what: str
    """The name; 'address:port/protocol'; or the request's method and path."""
    reason: str
    count: int
    """Queries, packets or requests."""
    first: float
    """Epoch seconds; for an address the same as `last`."""
    last: float


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkLog:
    """What `network_log()` returns."""

    events: tuple[NetworkEvent, ...]
    """At most 512 of names and requests and 512 of addresses: of more, the latest and the first, respectively."""
    counters: Mapping[str, int]
    """sent, received and refused _packets and _bytes; dns_answered, _refused, _limited; secret_requests, _refused."""


class Address(NamedTuple):
    """Where a forward of a port listens on the host."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """'http://host:port'."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What a sandbox uses. None where this host or its substrate does not tell. A machine's are its monitor's."""

    cpu_seconds: float
    """Of all its processes since its start."""
    memory_bytes: int
    """Charged to it now, its memory-backed disk included."""
    memory_peak_bytes: int | None
    memory_limit_bytes: int
    pids: int
    """Processes and threads now."""
    oom_kills: int | None
    """Processes the memory limit has killed."""
    disk_bytes: int | None
    """In its writable layer now; None on the host's disk (disk_mb=None) and in machines."""
    output_bytes: int
    """Printed by commands that have ended, kept or not."""
    network_received_bytes: int | None
    """None without a network."""
    network_sent_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatistics:
    """What a warm pool has and has done."""

    size: int
    ready: int
    """Sandboxes that wait."""
    making: int
    """Sandboxes under way."""
    warm: int
    """Requests served by one that waited."""
    cold: int
    """Requests for which one had to be made."""
    failed: int
    """Sandboxes that could not be made; tried again after a while."""
    last_error: str
    """Why, when the last try failed; '' otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenSize:
    """Of a machine's screen, in pixels."""

    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Paused:
    """What a pause gave back."""

    memory_before: int
    """Bytes of memory charged to it when it stood still; 0 when unknown."""
    memory_after: int
    """After the kernel was asked to take back what it can."""
    seconds: float
    """From the call to the standstill, without the reclaim."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A sandbox at one moment, as an image: what `create(image=...)` takes. Of a machine its memory is in it, too."""

    name: str
    """An image of this host: `images.images()` lists it, `images.remove_image(name)` removes it."""
    sandbox_id: str
    """Whose files these are."""
    parent: str
    """The image under it."""
    size_bytes: int
    """What the sandbox had written, without what it shares with its image."""
    entries: int
    """Files and directories written or removed."""
    seconds: float
    """How long it stood still for the copy."""
    memory: bool = False
    """Processes and memory are in it: `create(substrate="microvm", image=...)` goes on where it was taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionFailure:
    """The exception that ended the code of a call, as text."""

    type: str
    message: str
    traceback: str
    """From the first line of the code on; at most 64 Ki characters, from the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionResult:
    """How a call ended. Its failure is data, not an exception."""

    value: Any
    """JSON: what the function returned, the last expression of the code, or its `result`; None when it failed."""
    stdout: str
    """At most 1 MiB, from the start; what is not UTF-8 as U+FFFD."""
    stderr: str
    exit_code: int
    """0; 1 after an exception; what `sys.exit` was given; 128 + signal when a signal ended it."""
    timed_out: bool
    """Its deadline passed: every process of it was killed; stdout and stderr hold what it had printed."""
    oom: bool
    """The memory limit killed a process of it."""
    truncated: bool
    """It printed more than is kept of a stream; the rest was read and dropped."""
    error: FunctionFailure | None
    """The exception, or why there is no value."""
    seconds: float
    """From the worker's receipt of the call to the death of its last process."""
    seq: int
    """Its number in the trajectory log."""

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and self.error is None and not self.timed_out


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of `doctor()`."""

    name: str
    ok: bool
    why: str
    """What was tried and what came of it."""
    fix: str
    """The command that would change it, or ''."""
