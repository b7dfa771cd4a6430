"""`AsyncSandbox`: create, connect, list, kill. E2B's nouns, DSec's substrates.

A sandbox lives until its timeout, its `kill()`, the end of the `with` block, or the end of the client process
(unless `keep=True`), whichever comes first; it always ends with a cause, and the cause is the last row of its
trajectory.
"""

# ruff: noqa: ASYNC109 -- `timeout` is a lifetime, not a wait

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rorqual.sandbox import prune
from rorqual.sandbox._async.commands import AsyncCommands
from rorqual.sandbox._async.files import AsyncFiles
from rorqual.sandbox._async.pty import AsyncPty
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import GuestError, InvalidRequest, LaunchFailed, SandboxNotFound, Unsupported
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.keeper.client import KeeperDied, keeper_at
from rorqual.sandbox.limits import Mount, SandboxSpec, parse_mounts
from rorqual.sandbox.records import SandboxInfo
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates import Launched, substrate
from rorqual.sandbox.trajectory import Log, TrajectoryEntry, open_log

EDGE = "local"
"""The part of a sandbox's id that names its host; a later issue puts the edge's name here."""
CONNECT_S = 20.0


class AsyncTrajectory:
    """The log of one sandbox; readable after its end."""

    def __init__(self, log: Log, sandbox_id: str) -> None:
        self._log = log
        self._id = sandbox_id

    async def list(self, *, after: int = 0) -> builtins.list[TrajectoryEntry]:
        """Every entry with a number above `after`, in order, those included that were just finished."""
        await self._log.flush()
        return await asyncio.to_thread(self._log.read, self._id, after=after)


class AsyncSandbox:
    """One sandbox. Make it with `create` or `connect`; use it as a context manager."""

    commands: AsyncCommands
    files: AsyncFiles
    pty: AsyncPty
    trajectory: AsyncTrajectory

    def __init__(self, session: Session, *, state: StateDir, owned: bool) -> None:
        self._session = session
        self._state = state
        self._owned = owned
        self._closed = False
        self.commands = AsyncCommands(session)
        self.files = AsyncFiles(session)
        self.pty = AsyncPty(session)
        self.trajectory = AsyncTrajectory(session.log, session.id)

    @classmethod
    async def create(
        cls,
        *,
        substrate: str = "container",
        image: str = "base",
        timeout: float = 300.0,
        cpu: float = 1.0,
        memory_mb: int = 512,
        pids: int = 256,
        disk_mb: int | None = 512,
        network: str = "offline",
        envs: Mapping[str, str] | None = None,
        workdir: str | None = None,
        mounts: Sequence[Mount | Mapping[str, Any]] | Mapping[str, str] = (),
        user: str = "",
        runtime: str = "",
        metadata: Mapping[str, str] | None = None,
        require: Sequence[str] = (),
        keep: bool = False,
        trajectory: str | Path | None = None,
    ) -> AsyncSandbox:
        """Starts a sandbox and returns when its guest agent has answered.

        timeout: seconds it may live. cpu: CPUs. memory_mb, disk_mb: MiB; the disk is memory-backed and
        counted in memory_mb as it fills, disk_mb=None puts it on the host's disk, unlimited. user: default
        user inside ('user' or 'root'; '' is 'user' where the host can give two ids). mounts: host paths shown
        inside. require: capabilities it must have. keep: outlive this process. trajectory: the log's file, by
        default the state directory's.
        runtime: 'crun' or 'runc', when it must be that one. Fields and defaults: limits.SandboxSpec.

        Raises:
            InvalidRequest: an argument is wrong.
            Unsupported: the substrate cannot do it; the error names what can.
            ImageNotFound: no such image.
            HostUnfit: the host lacks something; `fix` is a command.
            LaunchFailed: it did not start; nothing is left of it.
        """
        spec = SandboxSpec(
            substrate=substrate,
            image=image,
            timeout=timeout,
            cpu=cpu,
            memory_mb=memory_mb,
            pids=pids,
            disk_mb=disk_mb,
            network=network,
            envs=dict(envs or {}),
            workdir=workdir,
            mounts=parse_mounts(mounts),
            user=user,
            runtime=runtime,
            metadata=dict(metadata or {}),
            keep=keep,
        )
        kind = _substrate(spec, require)
        state = StateDir.from_environment()
        state.prepare()
        await asyncio.to_thread(prune.reap_once, state)
        log_path = Path(trajectory) if trajectory is not None else state.trajectory
        log = open_log(log_path)
        sandbox_id = f"sb-{EDGE}-{secrets.token_hex(6)}"
        seq = await log.begin(sandbox=sandbox_id, kind="created", request=asdict(spec))
        try:
            launched = await kind.launch(
                spec, sandbox_id=sandbox_id, state=state, trajectory=log_path.absolute()
            )
            session = await _connect(launched, log)
        except BaseException as error:
            log.finish(sandbox=sandbox_id, seq=seq, result={"error": f"{type(error).__name__}: {error}"})
            raise
        log.finish(sandbox=sandbox_id, seq=seq, result={"runtime": launched.runtime})
        return cls(session, state=state, owned=not keep)

    @classmethod
    async def connect(cls, sandbox_id: str) -> AsyncSandbox:
        """A second hold on a live sandbox of this host and user, from this or another process.

        Leaving its `with` block does not end the sandbox.

        Raises:
            SandboxNotFound: no live sandbox has this id; `cause` when its end is in the trajectory log.
        """
        state = StateDir.from_environment()
        record = _record(state, sandbox_id)
        if record is None:
            raise SandboxNotFound(sandbox_id, cause=await asyncio.to_thread(_logged_cause, state, sandbox_id))
        try:
            keeper = await asyncio.to_thread(keeper_at, Path(record["keeper"]))
            answer = await asyncio.wrap_future(keeper.request("status", sandbox=sandbox_id))
        except KeeperDied as error:
            raise SandboxNotFound(sandbox_id, cause="infra") from error
        if "gone" in answer:
            raise SandboxNotFound(sandbox_id, cause=await asyncio.to_thread(_logged_cause, state, sandbox_id))
        cgroup = record["cgroup"]
        launched = Launched(
            sandbox_id=sandbox_id,
            keeper=keeper,
            guest_socket=state.sandboxes / sandbox_id / "guest.sock",
            user=record["user"],
            workdir=record["workdir"],
            envs=record["envs"],
            expires=answer["expires"],
            runtime=record["runtime"],
            limits=record["limits"],
            notes=tuple(record["notes"]),
            oom_kills=cgroups.OomCounter(cgroup).read,
        )
        log = open_log(Path(record["trajectory"]))
        try:
            session = await _connect(launched, log, kill_on_failure=False)
        except LaunchFailed as error:
            raise SandboxNotFound(sandbox_id) from error
        return cls(session, state=state, owned=False)

    @classmethod
    async def list(cls) -> builtins.list[SandboxInfo]:
        """Every live sandbox of this host and user, oldest first."""
        return _live(StateDir.from_environment())

    @property
    def id(self) -> str:
        """'sb-<edge>-<12 hex digits>'."""
        return self._session.id

    @property
    def cause(self) -> str | None:
        """Why it ended, one of errors.Cause; None while it lives."""
        return self._session.ended[0] if self._session.ended is not None else None

    async def info(self) -> SandboxInfo:
        """What it is and what holds its limits. Raises SandboxEnded when it is over."""
        with self._session.alive():
            record = _record(self._state, self.id)
            if record is None:
                await asyncio.wait_for(self._session.over.wait(), timeout=5.0)
                raise self._session.end_error()
            return _info(record)

    async def set_timeout(self, timeout: float) -> None:
        """Sets its remaining lifetime, seconds from now."""
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 30 * 86400:
            raise InvalidRequest(f"timeout: {timeout!r} must be seconds above 0, at most 30 days")
        session = self._session
        with session.alive():
            seq = await session.log.begin(sandbox=self.id, kind="set_timeout", request={"timeout": timeout})
            request = session.launched.keeper.request("set_timeout", sandbox=self.id, seconds=timeout)
            answer = await asyncio.wrap_future(request)
            session.log.finish(sandbox=self.id, seq=seq, result={"ok": "gone" not in answer})
            if "gone" in answer:
                raise session.end_error()

    async def kill(self) -> bool:
        """Ends it with cause `killed` and removes everything of it; False when it was over. Idempotent.

        Finishes even when the caller is cancelled meanwhile.
        """
        return await asyncio.shield(asyncio.ensure_future(self._kill()))

    async def close(self) -> None:
        """Lets go without ending it (what leaving the block of a connected or kept sandbox does).
        Idempotent."""
        self._closed = True
        await self._session.close()

    @classmethod
    async def attach(cls, sandbox_id: str, *, fast_forward: bool = True) -> AsyncSandbox:
        """Unsupported yet: replaying the log for a restarted client. `connect` and `trajectory.list` are there."""
        raise Unsupported(
            f"attach({sandbox_id!r}, fast_forward={fast_forward})",
            reason="this version does not replay a trajectory",
            available=["Sandbox.connect(id)", "trajectory.list()"],
        )

    async def pause(self) -> None:
        """Unsupported here."""
        raise self._unsupported("pause")

    async def resume(self) -> None:
        """Unsupported here."""
        raise self._unsupported("resume")

    async def snapshot(self) -> str:
        """Unsupported here."""
        raise self._unsupported("snapshot")

    async def fork(self, *, count: int = 1) -> builtins.list[AsyncSandbox]:
        """Unsupported here."""
        raise self._unsupported(f"fork(count={count})")

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned:
            await self.kill()
        else:
            await self.close()

    def __del__(self) -> None:
        if self._owned and not self._closed and self._session.ended is None:
            warnings.warn(f"{self.id} was dropped without kill()", ResourceWarning, stacklevel=2)
            self._session.launched.keeper.request(
                "kill", sandbox=self.id, cause="killed", detail="its client dropped it"
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.cause or 'alive'}>"

    async def _kill(self) -> bool:
        session = self._session
        alive = session.ended is None
        self._closed = True
        try:
            if alive:
                request = session.launched.keeper.request(
                    "kill", sandbox=self.id, cause="killed", detail="kill() was called"
                )
                answer = await asyncio.wait_for(asyncio.wrap_future(request), timeout=30.0)
                alive = "gone" not in answer
                if session.ended is None:
                    session.ended = (answer.get("cause", "killed"), answer.get("detail", ""))
                    session.over.set()
        except KeeperDied:
            alive = False
        finally:
            await session.close()
        return alive

    def _unsupported(self, feature: str) -> Unsupported:
        names = sorted(substrate("container").capabilities())
        return Unsupported(feature, reason="the container substrate does not have it yet", available=names)


def _substrate(spec: SandboxSpec, require: Sequence[str]) -> Any:
    kind = substrate(spec.substrate)
    missing = [name for name in require if name not in kind.capabilities()]
    if missing:
        raise Unsupported(
            f"require={missing}",
            reason=f"the {spec.substrate} substrate does not have it",
            available=sorted(kind.capabilities()),
        )
    return kind


async def _connect(launched: Launched, log: Log, *, kill_on_failure: bool = True) -> Session:
    """Shakes hands with the agent; a sandbox whose agent does not answer is ended."""
    try:
        guest = await GuestClient.connect(launched.guest_socket, timeout=CONNECT_S)
    except BaseException as error:
        detail = f"the guest agent did not answer: {error}"
        if kill_on_failure:
            request = launched.keeper.request(
                "kill", sandbox=launched.sandbox_id, cause="infra", detail=detail
            )
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(request)), timeout=10.0)
        if isinstance(error, GuestError | OSError | TimeoutError):
            raise LaunchFailed(launched.sandbox_id, stage="agent", detail=detail) from error
        raise
    return Session(launched=launched, guest=guest, log=log, envs=launched.envs)


def _record(state: StateDir, sandbox_id: str) -> dict[str, Any] | None:
    if not sandbox_id or "/" in sandbox_id or sandbox_id.startswith("."):
        raise InvalidRequest(f"sandbox id: {sandbox_id!r} is not one (sb-<edge>-<12 hex digits>)")
    try:
        record: dict[str, Any] = json.loads((state.sandboxes / sandbox_id / "record.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record


def _live(state: StateDir) -> list[SandboxInfo]:
    infos = []
    if state.sandboxes.is_dir():
        for place in state.sandboxes.iterdir():
            record = _record(state, place.name)
            if record is not None and record["init_pid"] and Path(f"/proc/{record['init_pid']}").exists():
                infos.append(_info(record))
    return sorted(infos, key=lambda info: info.created)


def _logged_cause(state: StateDir, sandbox_id: str) -> str:
    if not state.trajectory.is_file():
        return ""
    entries = open_log(state.trajectory).read(sandbox_id)
    return str((entries[-1].result or {}).get("cause", "")) if entries and entries[-1].kind == "ended" else ""


def _info(record: Mapping[str, Any]) -> SandboxInfo:
    return SandboxInfo(
        id=record["id"],
        substrate=record["substrate"],
        image=record["image"],
        runtime=record["runtime"],
        rootless=record["rootless"],
        user=record["user"],
        workdir=record["workdir"],
        cpu=record["cpu"],
        memory_mb=record["memory_mb"],
        pids=record["pids"],
        disk_mb=record["disk_mb"],
        network=record["network"],
        created=record["created"],
        expires=record["expires"],
        metadata=record["metadata"],
        limits=record["limits"],
        notes=tuple(record["notes"]),
    )
