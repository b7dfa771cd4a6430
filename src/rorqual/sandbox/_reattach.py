"""What a restarted client gets for a command that is in the log: its result, or the command itself, if it still runs.

The order of the questions: is the result in the log; does the guest know the command (it keeps what runs and the last
256 that ended); can it be proved that it never started. Only then it is started, under the number it has; in every
other case the caller gets UnknownOutcome. Input is counted in the guest, so that none of it is fed twice.
Owns the answers; _forward.py owns the matching. Spec: sandbox.md 1.2 (client fast-forwarding).
"""

from __future__ import annotations

import errno
from typing import Any

from rorqual.sandbox._forward import Forward, digest, head
from rorqual.sandbox._guest import GuestProcess
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import GuestGone, GuestRefused
from rorqual.sandbox.records import CommandResult
from rorqual.sandbox.trajectory import TrajectoryEntry

GUEST_KEEPS = 256
"""Ended commands that the agent remembers (MAX_ENDED of native/guest/guest.h)."""


def forward_of(session: Session) -> Forward:
    """The forward of a session that has one."""
    assert session.forward is not None
    return session.forward


def cached(session: Session, entry: TrajectoryEntry) -> CommandResult:
    """The result of a finished row. Raises UnknownOutcome, or SandboxEnded when that was the end of the command."""
    result = entry.result or {}
    if "abandoned" in result:
        if session.ended is not None and result["abandoned"] == GuestGone.__name__:
            raise session.end_error()
        raise forward_of(session).unknown(
            entry, f"its client gave it up ({result['abandoned']}) and killed it"
        )
    out, err, missing = head(entry)
    return CommandResult(
        stdout=out.decode("utf-8", "replace"),
        stderr=err.decode("utf-8", "replace"),
        exit_code=result["exit_code"],
        timed_out=result["timed_out"],
        truncated=result["truncated"] or missing,
        oom=result["oom"],
        seq=entry.seq,
        duration=result["duration"],
        stdout_bytes=result.get("stdout_bytes", len(out)),
        stderr_bytes=result.get("stderr_bytes", len(err)),
        error=result["error"],
        cached=True,
    )


async def reattach(session: Session, entry: TrajectoryEntry) -> GuestProcess | None:
    """The command of an unfinished row, running or just ended; None when it provably never started.

    Raises UnknownOutcome.
    """
    forward = forward_of(session)
    if session.ended is not None:
        raise forward.unknown(entry, f"the sandbox ended ({session.ended[0]}) before it was known")
    tag, known = session.tag(entry.seq), 0
    try:
        for _ in range(2):  # the second list comes after whatever the dead client had sent
            infos = await session.guest.list()
            known = sum(not info.running for info in infos)
            for info in infos:
                if info.tag == tag:
                    return await session.guest.attach(info.pid)
    except GuestRefused:  # it was the oldest, and gave way between the two steps
        raise forward.unknown(entry, "the guest has just forgotten it") from None
    except GuestGone as error:
        raise await session.verdict(error) from error
    if known >= GUEST_KEEPS:
        raise forward.unknown(entry, f"{GUEST_KEEPS} commands have ended since, and the guest keeps no more")
    agent = entry.request.get("agent")  # '': a guest without our agent, whose list proves nothing
    if not agent or agent != session.guest.info.boot_id:
        raise forward.unknown(entry, "the guest agent is not the one that was asked to run it")
    return None


async def rest_of_input(
    session: Session, entry: TrajectoryEntry, pid: int, data: bytes
) -> tuple[bytes, bool]:
    """What of its input a reattached command has not had yet, and whether its input was closed."""
    try:
        taken, closed = await session.guest.stdin_at(pid)
    except GuestRefused:
        return b"", True  # it has ended
    except GuestGone as error:
        raise await session.verdict(error) from error
    if taken > len(data):
        detail = f"it has taken {taken} bytes of input, and the log has {len(data)}"
        raise forward_of(session).unknown(entry, detail, running=pid)
    return data[taken:], closed


async def type_in(
    session: Session, process: GuestProcess | None, pid: int, data: bytes, *, eof: bool
) -> None:
    """Feeds a command or a terminal, logged before it is sent. `eof` closes the input after it.

    Raises GuestRefused: its input is closed. SandboxEnded, TrajectoryMismatch, UnknownOutcome.
    """
    request: dict[str, Any] = {"id": pid, "size": len(data), "eof": eof, "input_sha256": digest(data)}
    entry = session.forwarded("stdin", request)
    if entry is not None and entry.result is not None:
        if "errno" in entry.result:
            raise GuestRefused(f"stdin of command {pid}: it was refused then", errno=entry.result["errno"])
        return
    with session.alive():
        if entry is not None:
            data = await _not_typed_yet(session, entry, pid, data)
        if process is None:
            raise GuestRefused(f"stdin of command {pid}: it has ended", errno=errno.EPIPE)
        seq = (
            entry.seq
            if entry
            else await session.log.begin(sandbox=session.id, kind="stdin", request=request, input=data)
        )
    try:
        if data:
            await process.send_stdin(data)
        if eof:
            await process.close_stdin()
    except GuestGone as error:
        raise await session.verdict(error) from error
    except GuestRefused as error:
        session.log.finish(sandbox=session.id, seq=seq, result={"errno": error.errno})
        raise
    session.log.finish(sandbox=session.id, seq=seq, result={"ok": True})


async def _not_typed_yet(session: Session, entry: TrajectoryEntry, pid: int, data: bytes) -> bytes:
    """What of an unfinished row of input has not reached the command."""
    rows = [row for row in session.log.read(session.id) if row.seq < entry.seq]
    before = sum(row.request["size"] for row in rows if row.kind == "stdin" and row.request["id"] == pid)
    try:
        taken, _ = await session.guest.stdin_at(pid)
    except GuestRefused as error:
        raise forward_of(session).unknown(entry, "the command has ended since") from error
    except GuestGone as error:
        raise await session.verdict(error) from error
    if not before <= taken <= before + len(data):
        raise forward_of(session).unknown(entry, "others have fed the command since", running=pid)
    return data[taken - before :]
