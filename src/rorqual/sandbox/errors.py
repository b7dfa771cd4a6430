"""Everything the sandbox room raises, and why a sandbox ends.

    SandboxError
    ├── Unsupported          the substrate or this host cannot do it; `available` names what can
    ├── InvalidRequest       an argument is wrong; nothing was started
    ├── HostUnfit            the host lacks something (a runtime, a kernel feature); `fix` is a command
    ├── LaunchFailed         the runtime refused to start the sandbox; `stage` names the step
    ├── SandboxNotFound      no live sandbox has this id
    ├── SandboxEnded         the sandbox is over; `cause` says why
    ├── CommandNotFound      no command with this id runs, or ran recently, in the sandbox
    ├── TrajectoryError      the trajectory log cannot be read or written
    ├── TrajectoryMismatch   a restarted client asks for something else than the log has at that number
    ├── UnknownOutcome       it was begun, and nobody can tell how it ended; asking again runs it
    ├── EdgeError            the conversation with an edge daemon failed
    │   ├── EdgeUnreachable  nobody answers there, or not in time
    │   ├── EdgeRefused      it refused the request: the token, the host name, a size; `status`
    │   ├── EdgeFull         it has no room; `used`, `asked`, `limit`, `retry_after`
    │   └── EdgeLost         the connection broke while a call was under way: it may or may not have been done
    ├── ImageError
    │   ├── ImageNotFound    no image with this name on this host
    │   └── ImageRejected    an archive that is malformed, hostile or too large; nothing of it was kept
    └── GuestError           the conversation with the guest agent failed
        ├── GuestGone        the connection or the agent died
        ├── GuestProtocolError   a malformed or forged frame; the connection was closed
        ├── GuestRefused     the agent refused a call (limits, unknown command, busy); `errno`
        └── GuestFileError   a file call failed inside the sandbox; `errno` and `path`

A command's failure is a result (`exit_code`, `timed_out`, `oom`), never an exception; a sandbox's failure is
an exception with a cause. Causes (DESIGN.md, rule 4) are the strings of `Cause`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal

Cause = Literal["exited", "timeout", "oom", "evicted", "infra", "policy", "killed"]
"""exited: its first process ended by itself. timeout: its lifetime was over. oom: the memory limit killed it.
evicted: the host needed the room. infra: our side failed (keeper or agent died). policy: it broke a rule.
killed: somebody asked for it (`kill()`, leaving the `with` block, the client's death)."""


class SandboxError(Exception):
    """Base of everything this room raises."""


class Unsupported(SandboxError):
    """What was asked for cannot be done here. Nothing was started, nothing was downgraded."""

    def __init__(self, feature: str, *, reason: str, available: Sequence[str] = ()) -> None:
        self.feature = feature
        self.reason = reason
        self.available = tuple(available)
        have = f" Available: {', '.join(self.available)}." if self.available else ""
        super().__init__(f"{feature} is not supported: {reason}.{have}")


class InvalidRequest(SandboxError, ValueError):
    """An argument is wrong."""


class HostUnfit(SandboxError):
    """The host lacks something. `fix` is the command that would change it, or ''."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}{f' Fix: {fix}' if fix else ''}")


class LaunchFailed(SandboxError):
    """The sandbox did not start. `stage` is the step that failed (mounts, runtime, agent)."""

    def __init__(self, sandbox_id: str, *, stage: str, detail: str) -> None:
        self.sandbox_id = sandbox_id
        self.stage = stage
        self.detail = detail
        super().__init__(f"{sandbox_id}: could not start ({stage}): {detail}")


class SandboxNotFound(SandboxError):
    """No live sandbox has this id on this host."""

    def __init__(self, sandbox_id: str, *, cause: str = "") -> None:
        self.sandbox_id = sandbox_id
        self.cause = cause
        why = f"it ended with cause {cause}" if cause else "Sandbox.list() names the live ones"
        super().__init__(f"no live sandbox {sandbox_id!r}: {why}")


class SandboxEnded(SandboxError):
    """The sandbox is over. `cause` is one of `Cause`."""

    def __init__(self, sandbox_id: str, *, cause: Cause, detail: str = "") -> None:
        self.sandbox_id = sandbox_id
        self.cause: Cause = cause
        self.detail = detail
        super().__init__(f"{sandbox_id} has ended: {cause}{f' ({detail})' if detail else ''}")


class CommandNotFound(SandboxError):
    """No command with this id."""

    def __init__(self, sandbox_id: str, command_id: int) -> None:
        self.sandbox_id = sandbox_id
        self.command_id = command_id
        super().__init__(f"{sandbox_id}: no command {command_id}; commands.list() names those that run")


class TrajectoryError(SandboxError):
    """The trajectory log cannot be read or written."""


class EdgeError(SandboxError):
    """Base of the errors of an edge daemon."""


class EdgeUnreachable(EdgeError):
    """Nobody answers at the edge's address, or not in time."""

    def __init__(self, address: str, why: str) -> None:
        self.address = address
        super().__init__(
            f"no edge answers at {address}: {why}. Start one with `rorqual edge`, or pass edge='local'"
        )


class EdgeRefused(EdgeError):
    """The edge refused the request before it looked at it. `status` is HTTP's number for why."""

    def __init__(self, why: str, *, status: int) -> None:
        self.status = status
        super().__init__(why)


class EdgeFull(EdgeError):
    """The edge has no room for what was asked. Nothing was started."""

    def __init__(self, edge: str, *, what: str, used: int, asked: int, limit: int, retry_after: int) -> None:
        self.what = what
        self.used = used
        self.asked = asked
        self.limit = limit
        self.retry_after = retry_after
        """Seconds after which it is worth to try again."""
        super().__init__(
            f"the edge {edge!r} is full: {used} {what} are in use and {asked} were asked for, of {limit}. "
            f"Try again in {retry_after} s, or elsewhere"
        )


class EdgeLost(EdgeError):
    """The connection to the edge broke while a call was under way."""

    def __init__(self, call: str, sandbox_id: str) -> None:
        self.call = call
        self.sandbox_id = sandbox_id
        super().__init__(
            f"{sandbox_id}: the connection to the edge broke while {call} was under way; "
            "trajectory.list() tells whether it was done"
        )


class TrajectoryMismatch(SandboxError):
    """A client that goes through a log again asks for something else than the log has at that number.

    `expected` and `asked` hold the kind and what the two must have in common. Nothing was done.
    """

    def __init__(
        self, sandbox_id: str, *, seq: int, expected: Mapping[str, object], asked: Mapping[str, object]
    ) -> None:
        self.sandbox_id = sandbox_id
        self.seq = seq
        self.expected = dict(expected)
        self.asked = dict(asked)
        super().__init__(
            f"{sandbox_id}: at number {seq} the log has {_call(expected)}, and the client asks for {_call(asked)}. "
            "Ask in the order of the log, or use connect(id), which goes on live."
        )


class UnknownOutcome(SandboxError):
    """It is in the log that it was begun, and nobody can tell whether, or how, it ended. It was not run again.

    The place in the log is passed: asking the same once more runs it, asking what comes next goes on. `running` is its
    id when it still runs: `commands.connect(running)`, `commands.kill(running)`. `stdout`, `stderr`: what is known.
    """

    def __init__(
        self,
        sandbox_id: str,
        *,
        seq: int,
        kind: str,
        request: Mapping[str, object],
        detail: str,
        running: int | None = None,
        stdout: str = "",
        stderr: str = "",
    ) -> None:
        self.sandbox_id = sandbox_id
        self.seq = seq
        self.kind = kind
        self.request = dict(request)
        self.detail = detail
        self.running = running
        self.stdout = stdout
        self.stderr = stderr
        super().__init__(
            f"{sandbox_id}: the outcome of number {seq} ({kind}) is unknown: {detail}. It was not run again; "
            "ask once more to run it, or go on with what comes next."
        )


def _call(fields: Mapping[str, object]) -> str:
    rest = ", ".join(f"{key}={_short(value)}" for key, value in fields.items() if key != "kind")
    return f"{fields['kind']}({rest})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:90]}...{text[-20:]}"


class ImageError(SandboxError):
    """Base of image errors."""


class ImageNotFound(ImageError):
    """No image with this name on this host."""

    def __init__(
        self,
        name: str,
        *,
        known: Sequence[str],
        make: str = "images.build_debian(name) or images.import_oci(path)",
    ) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(
            f"no image {name!r} on this host; there are: {', '.join(known) or 'none'}. Make one with {make}"
        )


class ImageRejected(ImageError):
    """An archive that is malformed, hostile or too large. Nothing of it was kept."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(f"{source}: {reason}")


# --- guest agent: raised by sandbox/_guest.py and sandbox/_protocol.py --------------------------------


class GuestError(SandboxError):
    """Base of the errors of one guest connection."""


class GuestGone(GuestError):
    """The connection to the guest agent ended: the agent died, its sandbox died, or the host closed it."""


class GuestProtocolError(GuestError):
    """The guest sent bytes the protocol does not allow. The connection is closed and must not be reused."""


class GuestRefused(GuestError):
    """The agent refused a call: `errno` says why in numbers, the text says it in words."""

    def __init__(self, message: str, *, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class GuestFileError(GuestError):
    """A file call failed inside the guest. Carries `errno` and `path`, both as the guest saw them."""

    def __init__(self, errno: int, path: str, *, call: str = "") -> None:
        super().__init__(f"{call + ' ' if call else ''}{path}: {os.strerror(errno)} (errno {errno})")
        self.errno = errno
        self.path = path
        self.call = call


# --- end of the guest agent's block --------------------------------------------------------------------
