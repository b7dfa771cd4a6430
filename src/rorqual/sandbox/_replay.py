"""Deterministic replay: everything a trajectory has, done again in a fresh sandbox, and what came out otherwise.

Owns the order and the comparison. Background commands run beside the rest, as they did, and are compared when all is
done. A log that lacks something (input over 1 MiB, a text that was cut) is not guessed at: the row is skipped, with
its reason. Spec: sandbox.md 1.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rorqual.sandbox._forward import digest
from rorqual.sandbox.errors import GuestFileError, GuestRefused
from rorqual.sandbox.records import CommandResult
from rorqual.sandbox.trajectory import TrajectoryEntry

if TYPE_CHECKING:
    from rorqual.sandbox._async.commands import AsyncCommandHandle, AsyncCommands
    from rorqual.sandbox._async.files import AsyncFiles

BACKGROUND_S = 60.0
"""How long a background command that had ended in the log may take in the replay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that came out otherwise."""

    seq: int
    """The row's number in the log that was replayed."""
    kind: str
    what: str
    """'exit_code', 'stdout', 'stderr', 'timed_out', 'errno', 'content' or 'entries'."""
    then: Any
    """What the log has: a number, or the sha256 of a text."""
    now: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What a replay did."""

    done: int
    """Rows that were done again."""
    differences: tuple[Difference, ...]
    skipped: Mapping[int, str]
    """Number of a row that was not done again -> why."""

    @property
    def same(self) -> bool:
        """Everything was done again, with the same outcome."""
        return not self.differences and not self.skipped


async def replay(entries: list[TrajectoryEntry], *, commands: AsyncCommands, files: AsyncFiles) -> Replay:
    """Does the rows again through `commands` and `files` of a fresh sandbox."""
    run = _Run(commands, files)
    for entry in entries:
        if entry.kind in ("created", "ended") or (
            entry.kind == "resume" and entry.request.get("by") == "call"
        ):
            continue
        if entry.request.get("cut"):
            run.skipped[entry.seq] = f"the log keeps only the start of {', '.join(entry.request['cut'])}"
        elif (step := getattr(run, f"_{entry.kind}", None)) is None:
            run.skipped[entry.seq] = f"{entry.kind} concerns the life of the old sandbox"
        elif (why := await step(entry)) is not None:
            run.skipped[entry.seq] = why
        else:
            run.done += 1
    await run.finish()
    run.differences.sort(key=lambda difference: difference.seq)
    return Replay(done=run.done, differences=tuple(run.differences), skipped=run.skipped)


class _Run:
    """One replay. A step returns why it was skipped, or None."""

    def __init__(self, commands: AsyncCommands, files: AsyncFiles) -> None:
        self._commands = commands
        self._files = files
        self._running: dict[int, tuple[TrajectoryEntry, AsyncCommandHandle]] = {}
        self._pids: dict[int, int] = {}
        self.done = 0
        self.differences: list[Difference] = []
        self.skipped: dict[int, str] = {}

    def _compare(self, entry: TrajectoryEntry, what: str, then: Any, now: Any) -> None:
        if then != now:
            self.differences.append(Difference(seq=entry.seq, kind=entry.kind, what=what, then=then, now=now))

    def _compare_result(self, entry: TrajectoryEntry, now: CommandResult) -> None:
        then = entry.result or {}
        self._compare(entry, "exit_code", then["exit_code"], now.exit_code)
        self._compare(entry, "timed_out", then["timed_out"], now.timed_out)
        for name, text in (("stdout", now.stdout), ("stderr", now.stderr)):
            self._compare(entry, name, then.get(f"{name}_text_sha256"), digest(text.encode()))

    async def _command(self, entry: TrajectoryEntry) -> str | None:
        request, result = entry.request, entry.result or {}
        fed: str | bytes | bool = bool(request.get("stdin"))
        if request.get("input_sha256"):
            if digest(entry.input) != request["input_sha256"]:
                return "its input is over what the log keeps"
            fed = entry.input
        cmd: Any = request["cmd"].split("\0") if request.get("list") else request["cmd"]
        options: dict[str, Any] = {
            "cwd": request["cwd"],
            "user": request["user"],
            "envs": request.get("envs"),
            "timeout": request["timeout"],
            "stdin": fed,
        }
        if request.get("background"):
            handle = await self._commands.run(cmd, background=True, **options)
            self._running[entry.seq] = (entry, handle)
            if "pid" in result:
                self._pids[result["pid"]] = entry.seq
            return None
        if "exit_code" not in result:
            return "its outcome is not in the log"
        if fed is True:
            options["stdin"] = b""
        self._compare_result(entry, await self._commands.run(cmd, **options))
        return None

    def _handle(self, pid: int) -> AsyncCommandHandle | None:
        seq = self._pids.get(pid)
        return self._running[seq][1] if seq is not None else None

    async def _stdin(self, entry: TrajectoryEntry) -> str | None:
        handle = self._handle(entry.request["id"])
        if handle is None:
            return "the log does not tell which command it fed"
        if len(entry.input) != entry.request["size"]:
            return "its input is over what the log keeps"
        code = 0
        try:
            if entry.input:
                await handle.send_stdin(entry.input)
            if entry.request["eof"]:
                await handle.close_stdin()
        except GuestRefused as error:
            code = error.errno
        self._compare(entry, "errno", (entry.result or {}).get("errno", 0), code)
        return None

    async def _kill(self, entry: TrajectoryEntry) -> str | None:
        handle = self._handle(entry.request["command"])
        if handle is None:
            return "the log does not tell which command it killed"
        await handle.kill(signal=entry.request["signal"])
        return None

    async def _write(self, entry: TrajectoryEntry) -> str | None:
        request = entry.request
        if digest(entry.input) != request["sha256"]:
            return "its content is over what the log keeps"
        write = self._files.write(
            request["path"],
            entry.input,
            mode=request["mode"],
            append=request["append"],
            user=request.get("owner"),
        )
        return await self._same_errno(entry, write)

    async def _make_dir(self, entry: TrajectoryEntry) -> str | None:
        made = self._files.make_dir(entry.request["path"], user=entry.request.get("owner"))
        return await self._same_errno(entry, made)

    async def _remove(self, entry: TrajectoryEntry) -> str | None:
        gone = self._files.remove(entry.request["path"], recursive=entry.request["recursive"])
        return await self._same_errno(entry, gone)

    async def _rename(self, entry: TrajectoryEntry) -> str | None:
        return await self._same_errno(entry, self._files.rename(entry.request["old"], entry.request["new"]))

    async def _read(self, entry: TrajectoryEntry) -> str | None:
        result = entry.result or {}
        content = None

        async def read() -> None:
            nonlocal content
            content = await self._files.read(
                entry.request["path"], format="bytes", max_bytes=entry.request["max_bytes"]
            )

        await self._same_errno(entry, read())
        if content is not None and "sha256" in result:
            self._compare(entry, "content", result["sha256"], digest(content))
        return None

    async def _list(self, entry: TrajectoryEntry) -> str | None:
        found = (entry.result or {}).get("found")
        names: list[str] = []

        async def look() -> None:
            names.extend(one.name for one in await self._files.list(entry.request["path"]))

        await self._same_errno(entry, look())
        if found is not None:
            self._compare(entry, "entries", sorted(one["name"] for one in found), sorted(names))
        return None

    async def _stat(self, entry: TrajectoryEntry) -> str | None:
        return await self._same_errno(entry, self._files.get_info(entry.request["path"]))

    async def _same_errno(self, entry: TrajectoryEntry, call: Any) -> str | None:
        code = 0
        try:
            await call
        except GuestFileError as error:
            code = error.errno
        if entry.result is not None:
            self._compare(entry, "errno", entry.result.get("errno", 0), code)
        return None

    async def finish(self) -> None:
        """Waits for the background commands that had ended, ends those that had not, compares."""
        for seq, (entry, handle) in self._running.items():
            if "exit_code" not in (entry.result or {}):
                await handle.kill()
                self.skipped[seq] = "it ran in the background, and its end is not in the log"
                continue
            try:
                async with asyncio.timeout(BACKGROUND_S):
                    self._compare_result(entry, await handle.wait())
            except TimeoutError:
                await handle.kill()
                self._compare(entry, "exit_code", (entry.result or {})["exit_code"], None)
