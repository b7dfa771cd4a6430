"""Sandboxes: one SDK, four substrates, every command in a log. See docs/sandbox.md.

    from rorqual.sandbox import Sandbox
    with Sandbox.create(timeout=300, memory_mb=512) as sb:
        print(sb.commands.run("python3 -c 'print(6*7)'").stdout)

Imports nothing of ours, and no torch. Files, top down: `_async/` (the SDK), `_sync/` (generated twin), `_session.py`
(what one client holds), `_guest.py` and `_protocol.py` (the agent's language), `substrates/` (the environments),
`keeper/` (the process that owns them), `images/`, `trajectory.py`, `doctor.py`, `prune.py`.
"""

from __future__ import annotations

from rorqual.sandbox._async.commands import AsyncCommandHandle
from rorqual.sandbox._async.function import AsyncFunction
from rorqual.sandbox._async.pool import AsyncWarmPool
from rorqual.sandbox._async.ports import AsyncForward, AsyncPortStream
from rorqual.sandbox._async.pty import AsyncPtyHandle
from rorqual.sandbox._async.sandbox import AsyncSandbox
from rorqual.sandbox._async.screen import AsyncScreen
from rorqual.sandbox._guest import PtySize
from rorqual.sandbox._replay import Difference, Replay
from rorqual.sandbox._sync.commands import CommandHandle
from rorqual.sandbox._sync.function import Function
from rorqual.sandbox._sync.pool import WarmPool
from rorqual.sandbox._sync.ports import Forward, PortStream
from rorqual.sandbox._sync.pty import PtyHandle
from rorqual.sandbox._sync.sandbox import Sandbox
from rorqual.sandbox._sync.screen import Screen
from rorqual.sandbox.doctor import doctor
from rorqual.sandbox.errors import (
    CommandNotFound,
    EdgeError,
    EdgeFull,
    EdgeLost,
    EdgeRefused,
    EdgeUnreachable,
    GuestError,
    GuestFileError,
    GuestGone,
    GuestProtocolError,
    GuestRefused,
    HostUnfit,
    ImageError,
    ImageNotFound,
    ImageRejected,
    InvalidRequest,
    LaunchFailed,
    SandboxEnded,
    SandboxError,
    SandboxNotFound,
    TrajectoryError,
    TrajectoryMismatch,
    UnknownOutcome,
    Unsupported,
)
from rorqual.sandbox.limits import Mount
from rorqual.sandbox.network import NetworkPolicy, Secret, secret_url
from rorqual.sandbox.prune import Pruned, prune
from rorqual.sandbox.records import (
    Address,
    Check,
    CommandInfo,
    CommandResult,
    FileEntry,
    FunctionFailure,
    FunctionResult,
    Metrics,
    NetworkEvent,
    NetworkLog,
    Paused,
    PoolStatistics,
    SandboxInfo,
    ScreenSize,
    Snapshot,
)
from rorqual.sandbox.substrates import SUBSTRATES
from rorqual.sandbox.trajectory import TrajectoryEntry

__all__ = [
    "SUBSTRATES",
    "Address",
    "AsyncCommandHandle",
    "AsyncForward",
    "AsyncFunction",
    "AsyncPortStream",
    "AsyncPtyHandle",
    "AsyncSandbox",
    "AsyncScreen",
    "AsyncWarmPool",
    "Check",
    "CommandHandle",
    "CommandInfo",
    "CommandNotFound",
    "CommandResult",
    "Difference",
    "EdgeError",
    "EdgeFull",
    "EdgeLost",
    "EdgeRefused",
    "EdgeUnreachable",
    "FileEntry",
    "Forward",
    "Function",
    "FunctionFailure",
    "FunctionResult",
    "GuestError",
    "GuestFileError",
    "GuestGone",
    "GuestProtocolError",
    "GuestRefused",
    "HostUnfit",
    "ImageError",
    "ImageNotFound",
    "ImageRejected",
    "InvalidRequest",
    "LaunchFailed",
    "Metrics",
    "Mount",
    "NetworkEvent",
    "NetworkLog",
    "NetworkPolicy",
    "Paused",
    "PoolStatistics",
    "PortStream",
    "Pruned",
    "PtyHandle",
    "PtySize",
    "Replay",
    "Sandbox",
    "SandboxEnded",
    "SandboxError",
    "SandboxInfo",
    "SandboxNotFound",
    "Screen",
    "ScreenSize",
    "Secret",
    "Snapshot",
    "TrajectoryEntry",
    "TrajectoryError",
    "TrajectoryMismatch",
    "UnknownOutcome",
    "Unsupported",
    "WarmPool",
    "doctor",
    "prune",
    "secret_url",
]
