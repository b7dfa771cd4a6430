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
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rorqual.sandbox import prune
from rorqual.sandbox._address import edge_place
from rorqual.sandbox._async.commands import AsyncCommands
from rorqual.sandbox._async.files import AsyncFiles
from rorqual.sandbox._async.function import AsyncFunction
from rorqual.sandbox._async.ports import AsyncPorts
from rorqual.sandbox._async.pty import AsyncPty
from rorqual.sandbox._async.screen import AsyncScreen
from rorqual.sandbox._ended import ended_session
from rorqual.sandbox._forward import Forward
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox._metrics import measure
from rorqual.sandbox._reattach import forward_of
from rorqual.sandbox._replay import Replay, replay
from rorqual.sandbox._session import Session
from rorqual.sandbox._snapshots import drop_fork, to_its_end
from rorqual.sandbox.errors import (
    GuestError,
    GuestGone,
    InvalidRequest,
    LaunchFailed,
    SandboxError,
    SandboxNotFound,
    Unsupported,
)
from rorqual.sandbox.images import Bounds, store
from rorqual.sandbox.keeper import cgroups, leases
from rorqual.sandbox.keeper.client import KeeperDied, keeper_at
from rorqual.sandbox.limits import FunctionSpec, Mount, SandboxSpec, parse_mounts, without_secrets
from rorqual.sandbox.machines import channel as channels
from rorqual.sandbox.network import NetworkPolicy, Secret
from rorqual.sandbox.network.policy import parse_policy, plain_policy
from rorqual.sandbox.network.secret import check_secrets, plain_secrets, vault
from rorqual.sandbox.records import Metrics, NetworkEvent, NetworkLog, Paused, SandboxInfo, Snapshot
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates import Launched, substrate
from rorqual.sandbox.trajectory import Log, TrajectoryEntry, open_log

EDGE = "local"
"""The part of a sandbox's id that names its edge, when no daemon made it."""
MAX_FORK = 100
_OF_THE_EDGE = ("cls", "edge", "token", "lease")
"""What `create` does not hand to the maker of the sandbox."""
_BOUNDS = Bounds()


class AsyncTrajectory:
    """The log of one sandbox; readable after its end."""

    def __init__(self, log: Log, sandbox_id: str) -> None:
        self._log = log
        self._id = sandbox_id

    async def list(self, *, after: int = 0) -> builtins.list[TrajectoryEntry]:
        """Every entry with a number above `after`, in order, those included that were just finished."""
        await self._log.flush()
        return await asyncio.to_thread(self._log.read, self._id, after=after)

    async def replay(self, *, into: AsyncSandbox) -> Replay:
        """Does everything in it again, in order, in a fresh sandbox, and reports what came out otherwise.

        into: another sandbox, made with the same arguments. Commands run with the same text, user, directory,
        variables and input; files are written and read; what concerns the life of the old sandbox (pause, snapshot,
        fork, set_timeout) and what the log has not whole is skipped, and said so.
        Raises SandboxEnded: `into` ended. InvalidRequest: it is the same sandbox.
        """
        if into.id == self._id:
            raise InvalidRequest(
                f"into: {self._id} is the sandbox whose trajectory this is; give a fresh one"
            )
        return await replay(await self.list(), commands=into.commands, files=into.files)


class AsyncSandbox:
    """One sandbox. Make it with `create` or `connect`; use it as a context manager."""

    commands: AsyncCommands
    files: AsyncFiles
    pty: AsyncPty
    screen: AsyncScreen
    trajectory: AsyncTrajectory
    _keeps_forks = False
    """An edge's forks outlive it, as all that it makes."""

    def __init__(self, session: Session, *, state: StateDir, owned: bool) -> None:
        self._session = session
        self._state = state
        self._owned = owned
        self._closed = False
        self.commands = AsyncCommands(session)
        self.files = AsyncFiles(session)
        self.pty = AsyncPty(session)
        self.screen = AsyncScreen(session, self._record)
        self.trajectory = AsyncTrajectory(session.log, session.id)

    @classmethod
    async def create(
        cls,
        *,
        substrate: str = "container",
        image: str | Snapshot = "base",
        layers: Sequence[str] = (),
        timeout: float = 300.0,
        cpu: float = 1.0,
        memory_mb: int = 512,
        pids: int = 256,
        disk_mb: int | None = 512,
        network: str | Mapping[str, Any] | NetworkPolicy = "offline",
        secrets: Mapping[str, Secret | Mapping[str, Any]] | None = None,
        envs: Mapping[str, str] | None = None,
        workdir: str | None = None,
        mounts: Sequence[Mount | Mapping[str, Any]] | Mapping[str, str] = (),
        user: str = "",
        runtime: str = "",
        vmm: str = "",
        accelerated: bool | None = None,
        firmware: str = "bios",
        cloud_init: Mapping[str, Any] | None = None,
        channel: str = "auto",
        console: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        require: Sequence[str] = (),
        keep: bool = False,
        trajectory: str | Path | None = None,
        edge: str | None = None,
        token: str | None = None,
        lease: float = 60.0,
    ) -> AsyncSandbox:
        """Starts a sandbox and returns when its guest agent has answered.

        timeout: seconds it may live. cpu: CPUs. memory_mb, disk_mb: MiB; the disk is memory-backed and
        counted in memory_mb as it fills, disk_mb=None puts it on the host's disk, unlimited. user: default
        user inside ('user' or 'root'; '' is 'user' where the host can give two ids). mounts: host paths shown
        inside. require: capabilities it must have. keep: outlive this process. trajectory: the log's file, by
        default the state directory's.
        runtime: 'crun' or 'runc', when it must be that one. vmm: a microvm's monitor, likewise. accelerated: True: a
        machine with KVM, or Unsupported; False: emulated; None: with KVM where that boots a guest.
        firmware, cloud_init, channel, console: a full machine's (docs/sandbox-machines.md).
        Fields and defaults: limits.SandboxSpec.
        image: a name of `images.images()`, or what `snapshot()` returned. layers: images on top of it, such as
        a workspace and a toolkit, the later over the earlier, all below what a snapshot had written.
        network: 'offline', the name of another policy ('pypi', 'open', your own), or a NetworkPolicy. secrets:
        credentials it can use and never sees, by a name (docs/sandbox-network.md).
        edge, token: the daemon that makes it, 'unix:/path' or 'http://host:port'; None: $RORQUAL_EDGE and
        $RORQUAL_EDGE_TOKEN, and this process where there is none; 'local': this process. lease: seconds after which
        an edge ends it when this client is not heard any more, unless `keep`.

        Raises:
            InvalidRequest: an argument is wrong.
            EdgeError: the edge cannot be reached, refuses the token, or is full.
            Unsupported: the substrate cannot do it; the error names what can.
            ImageNotFound: no such image.
            HostUnfit: the host lacks something; `fix` is a command.
            LaunchFailed: it did not start; nothing is left of it.
        """
        arguments = {name: value for name, value in locals().items() if name not in _OF_THE_EDGE}
        arguments |= {"network": plain_policy(network), "secrets": plain_secrets(secrets)}
        if (place := edge_place(edge, token)) is not None:
            from rorqual.sandbox import _remote

            return await _remote.create(place, arguments, lease=lease)
        return await cls._create(arguments)

    @classmethod
    async def _create(cls, arguments: Mapping[str, Any], *, edge: str = EDGE) -> AsyncSandbox:
        """`create` in this process, with all of its arguments but the edge's."""
        require, trajectory = arguments["require"], arguments["trajectory"]
        spec = _spec(
            {name: value for name, value in arguments.items() if name not in ("require", "trajectory")}
        )
        kind = _require(spec.substrate, require)
        asked = [name for name in require if name in channels.CHANNELS]
        if asked and spec.channel in ("auto", asked[0]):  # no other will do
            spec = replace(spec, channel=asked[0])
        elif asked:
            raise InvalidRequest(f"require: {asked[0]!r}, and channel={spec.channel!r} was asked for")
        state = StateDir.from_environment()
        state.prepare()
        await asyncio.to_thread(prune.reap_once, state)
        path = Path.cwd() / trajectory if trajectory is not None else state.trajectory
        held = check_secrets(arguments["secrets"])
        return await cls._start(kind, spec, state=state, trajectory=path, edge=edge, held=held)

    @classmethod
    async def function(
        cls,
        *,
        image: str | Snapshot = "base",
        python: str = "python3",
        imports: Sequence[str] = (),
        memory_mb: int = 256,
        cpu: float = 1.0,
        pids: int = 32,
        timeout: float = 30.0,
        workers: int = 2,
        envs: Mapping[str, str] | None = None,
        network: str = "offline",
        require: Sequence[str] = (),
        trajectory: str | Path | None = None,
        edge: str | None = None,
        token: str | None = None,
    ) -> AsyncFunction:
        """Starts a pool for stateless calls: `fn(code_or_function, *args)`. Returns when a call is prepared.

        Every call gets fresh process, mount and ipc namespaces, a fresh /tmp, home and /dev/shm, no capability and
        no network, and these limits for itself; nothing of it is there for the next. imports: modules that every
        call finds imported. workers: calls at once; the others wait. Fields and defaults: limits.FunctionSpec.
        edge, token: as `create`; a function of an edge ends with its connection.

        Raises:
            InvalidRequest, Unsupported, ImageNotFound: as `create`.
            HostUnfit: not root, no cgroups, or no ids for a user namespace.
            LaunchFailed: Python did not start or an import failed; nothing is left of it.
        """
        arguments = {name: value for name, value in locals().items() if name not in _OF_THE_EDGE}
        if (place := edge_place(edge, token)) is not None:
            from rorqual.sandbox import _remote_function

            return await _remote_function.create(place, arguments)
        return await cls._function(**arguments)

    @classmethod
    async def _function(
        cls,
        *,
        image: str | Snapshot,
        python: str,
        imports: Sequence[str],
        memory_mb: int,
        cpu: float,
        pids: int,
        timeout: float,
        workers: int,
        envs: Mapping[str, str] | None,
        network: str,
        require: Sequence[str],
        trajectory: str | Path | None,
        edge: str = EDGE,
    ) -> AsyncFunction:
        """`function` in this process."""
        spec = FunctionSpec(
            image=image.name if isinstance(image, Snapshot) else image,
            python=python,
            imports=imports if isinstance(imports, str) else tuple(imports),
            memory_mb=memory_mb,
            cpu=cpu,
            pids=pids,
            timeout=timeout,
            workers=workers,
            envs=dict(envs or {}),
            network=network,
        )
        _require("function", require)
        state = StateDir.from_environment()
        state.prepare()
        await asyncio.to_thread(prune.reap_once, state)
        path = Path.cwd() / trajectory if trajectory is not None else state.trajectory
        made = AsyncFunction(spec, state=state, trajectory=path, edge=edge)
        await made.start()
        return made

    @classmethod
    async def _start(
        cls,
        kind: Any,
        spec: SandboxSpec,
        *,
        state: StateDir,
        trajectory: Path,
        edge: str = EDGE,
        forked_from: str = "",
        held: Mapping[str, Secret] | None = None,
    ) -> AsyncSandbox:
        log = open_log(trajectory)
        sandbox_id = f"sb-{edge}-{secrets.token_hex(6)}"
        request = without_secrets(spec) | ({"forked_from": forked_from} if forked_from else {})
        seq = await log.begin(sandbox=sandbox_id, kind="created", request=request)
        try:
            if forked_from:
                vault.copy(forked_from, sandbox_id, list(spec.secrets))
            vault.put(sandbox_id, held or {})
            launched = await kind.launch(spec, sandbox_id=sandbox_id, state=state, trajectory=trajectory)
            if spec.secrets:
                launched.keeper.watch(sandbox_id, lambda *_: vault.drop(sandbox_id))
            session = await _connect(launched, log)
        except BaseException as error:
            vault.drop(sandbox_id)
            log.finish(sandbox=sandbox_id, seq=seq, result={"error": f"{type(error).__name__}: {error}"})
            raise
        made = {"runtime": launched.runtime, "user": launched.user, "workdir": launched.workdir}
        log.finish(sandbox=sandbox_id, seq=seq, result=made)
        return cls(session, state=state, owned=not spec.keep)

    @classmethod
    async def connect(
        cls, sandbox_id: str, *, edge: str | None = None, token: str | None = None
    ) -> AsyncSandbox:
        """A second hold on a live sandbox of this host and user, or of an edge, from this or another process.

        Leaving its `with` block does not end the sandbox. A paused one is resumed. edge, token: as `create`.

        Raises:
            SandboxNotFound: no live sandbox has this id; `cause` when its end is in the trajectory log.
        """
        if (place := edge_place(edge, token)) is not None:
            from rorqual.sandbox import _remote

            return await _remote.connect(place, sandbox_id)
        state = StateDir.from_environment()
        record = _record(state, sandbox_id)
        if record is None:
            raise SandboxNotFound(sandbox_id, cause=await asyncio.to_thread(_logged_cause, state, sandbox_id))
        if record["substrate"] == "function":
            raise Unsupported(
                f"connect({sandbox_id!r})",
                reason="it is a function, whose calls belong to the client that made it",
                available=["Sandbox.function()"],
            )
        try:
            keeper = await asyncio.to_thread(keeper_at, Path(record["keeper"]))
            answer = await asyncio.wrap_future(keeper.request("status", sandbox=sandbox_id))
        except KeeperDied as error:
            raise SandboxNotFound(sandbox_id, cause="infra") from error
        if answer.get("still"):  # the agent could not even shake hands
            await asyncio.wrap_future(keeper.request("resume", sandbox=sandbox_id))
        if "gone" in answer:
            raise SandboxNotFound(sandbox_id, cause=await asyncio.to_thread(_logged_cause, state, sandbox_id))
        cgroup = record["cgroup"]
        launched = Launched(
            sandbox_id=sandbox_id,
            keeper=keeper,
            guest=record["guest"],
            user=record["user"],
            workdir=record["workdir"],
            envs=record["envs"],
            expires=answer["expires"],
            runtime=record["runtime"],
            limits=record["limits"],
            notes=tuple(record["notes"]),
            oom_kills=cgroups.OomCounter(cgroup).read,
            patience=record.get("patience", 20.0),
            own_kernel=record.get("own_kernel", False),
        )
        log = open_log(Path(record["trajectory"]))
        try:
            session = await _connect(launched, log, kill_on_failure=False)
        except LaunchFailed as error:
            raise SandboxNotFound(sandbox_id) from error
        return cls(session, state=state, owned=False)

    @classmethod
    async def list(cls, *, edge: str | None = None, token: str | None = None) -> builtins.list[SandboxInfo]:
        """Every live sandbox of this host and user, or of an edge (see `create`), oldest first."""
        if (place := edge_place(edge, token)) is not None:
            from rorqual.sandbox import _remote

            return await _remote.live(place)
        return _live(StateDir.from_environment())

    @classmethod
    async def logged(
        cls, sandbox_id: str, *, after: int = 0, edge: str | None = None, token: str | None = None
    ) -> builtins.list[TrajectoryEntry]:
        """The trajectory of a sandbox of this host or of an edge, alive or over, without touching it.

        Raises:
            SandboxNotFound: nothing of it is in the log.
        """
        if (place := edge_place(edge, token)) is not None:
            from rorqual.sandbox import _remote

            return await _remote.logged(place, sandbox_id, after=after)
        state = StateDir.from_environment()
        record = _record(state, sandbox_id)
        path = Path(record["trajectory"]) if record is not None else state.trajectory
        entries: builtins.list[TrajectoryEntry] = []
        if path.is_file():
            entries = await asyncio.to_thread(open_log(path).read, sandbox_id, after=after)
        if not entries and not after:
            raise SandboxNotFound(sandbox_id)
        return entries

    @property
    def id(self) -> str:
        """'sb-<edge>-<12 hex digits>'."""
        return self._session.id

    @property
    def ports(self) -> AsyncPorts:
        """TCP ports inside, from the host; with `network="offline"`, too."""
        return AsyncPorts(self._session)

    @property
    def cause(self) -> str | None:
        """Why it ended, one of errors.Cause; None while it lives."""
        return self._session.ended[0] if self._session.ended is not None else None

    async def info(self) -> SandboxInfo:
        """What it is and what holds its limits. Raises SandboxEnded when it is over."""
        return _info(await self._record())

    async def metrics(self) -> Metrics:
        """What it uses now, measured on the host; a paused one stays paused. Raises SandboxEnded."""
        record = await self._record()
        printed = await self._session.log.output_bytes(self.id)
        return await asyncio.to_thread(measure, record, output_bytes=printed)

    async def set_timeout(self, timeout: float) -> None:
        """Sets its remaining lifetime, seconds from now."""
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 30 * 86400:
            raise InvalidRequest(f"timeout: {timeout!r} must be seconds above 0, at most 30 days")
        session = self._session
        entry = session.forwarded("set_timeout", {"timeout": timeout})
        if entry is not None and entry.result is not None:
            return
        with session.alive():
            seq = await session.log.begin(sandbox=self.id, kind="set_timeout", request={"timeout": timeout})
            request = session.launched.keeper.request("set_timeout", sandbox=self.id, seconds=timeout)
            answer = await asyncio.wrap_future(request)
            session.log.finish(sandbox=self.id, seq=seq, result={"ok": "gone" not in answer})
            if "gone" in answer:
                raise session.end_error()

    async def update_network(self, network: str | Mapping[str, Any] | NetworkPolicy) -> None:
        """Replaces what it may reach, at once and for open connections too: those not allowed any more are reset.

        Its forks have the new policy. To begin with nothing and widen later, create it with NetworkPolicy().

        Raises:
            InvalidRequest: not a policy. Unsupported: it was created offline, without any interface.
            SandboxError: the host refused; the old policy is in force.
        """
        policy = parse_policy(network)
        session = self._session
        if self._known("network", {"policy": policy.to_dict()}) is not None:
            return
        record = await self._record()
        if not record.get("networked"):
            raise Unsupported(
                "update_network()",
                reason="it was created offline and has no interface",
                available=["create(network=NetworkPolicy())"],
            )
        request = {"policy": policy.to_dict()}
        seq = await session.log.begin(sandbox=self.id, kind="network", request=request)
        result: dict[str, Any] = {"error": "abandoned"}
        try:
            await session.keeper_call("network", policy=policy.to_dict())
            result = {"ok": True}
        except SandboxError as error:
            result = {"error": str(error)}
            raise
        finally:
            session.log.finish(sandbox=self.id, seq=seq, result=result)

    async def network_log(self) -> NetworkLog:
        """What it was refused (names, addresses, uses of a secret), oldest first, and counters. Bounded.

        Raises Unsupported when it has no network. A paused sandbox stays paused.
        """
        if not (await self._record()).get("networked"):
            raise Unsupported(
                "network_log()",
                reason="it was created offline: nothing can be tried and refused",
                available=[],
            )
        answer = await self._session.keeper_call("network_log")
        events = tuple(NetworkEvent(**row) for row in answer["rows"])
        return NetworkLog(events=events, counters=answer["counters"])

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
    async def attach(
        cls,
        sandbox_id: str,
        *,
        fast_forward: bool = True,
        trajectory: str | Path | None = None,
        edge: str | None = None,
        token: str | None = None,
    ) -> AsyncSandbox:
        """For a restarted client: as `connect`, and what it asks again is answered from the log, not done again.

        Calls are answered in the order of the log; at its end the sandbox goes on live. A command that still runs is
        taken over, with its output from the start. One that is over can be attached too: its log is answered, then
        every call raises SandboxEnded. The calls raise, beside what they always do:
            TrajectoryMismatch: the client asks for something else than the log has there. Nothing was done.
            UnknownOutcome: it was begun and nobody can tell how it ended. Nothing was done again.
        fast_forward=False is `connect`. trajectory: the file of the log, for an ended one made with its own.
        edge, token: as `create`.

        Raises:
            SandboxNotFound: neither alive, nor ended in the log.
        """
        if not fast_forward:
            return await cls.connect(sandbox_id, edge=edge, token=token)
        if (place := edge_place(edge, token)) is not None:
            from rorqual.sandbox import _remote

            return await _remote.attach(place, sandbox_id)
        state = StateDir.from_environment()
        try:
            made = await cls.connect(sandbox_id, edge="local")
        except SandboxNotFound:
            path = Path.cwd() / trajectory if trajectory is not None else state.trajectory
            if not path.is_file():
                raise
            log = open_log(path)
            made = cls(
                ended_session(sandbox_id, await asyncio.to_thread(log.read, sandbox_id), log),
                state=state,
                owned=False,
            )
        try:
            made._session.forward = Forward(sandbox_id, await made.trajectory.list())
        except BaseException:
            await made.close()
            raise
        return made

    async def pause(self, *, reclaim: bool = True) -> Paused:
        """Stops every process of it, and with `reclaim` asks the kernel to take back memory it can do without.

        The next call that needs its inside resumes it, from any client: commands, files, pty, connect. `info`,
        `list`, `set_timeout`, `trajectory` and `kill` leave it paused. A call that is under way when the pause
        comes resumes it at once; a command that runs does not. Lifetimes and command timeouts go on counting.

        Raises:
            Unsupported: no freezer cgroup can be used here (rootless).
            SandboxError: it did not come to a standstill in 10 s.
        """
        session = self._session
        if (known := self._known("pause", {"reclaim": reclaim})) is not None:
            return Paused(**known["report"])
        record = await self._ready("pause")
        seq = await session.log.begin(sandbox=self.id, kind="pause", request={"reclaim": reclaim})
        result: dict[str, Any] = {"error": "abandoned"}
        try:
            start = time.monotonic()
            answer = await session.keeper_call("pause")
            seconds = time.monotonic() - start
            before = after = cgroups.memory_used(record["cgroup"])
            if reclaim and answer["paused"]:
                await asyncio.to_thread(cgroups.reclaim, record["cgroup"])
                after = cgroups.memory_used(record["cgroup"])
            report = Paused(memory_before=before, memory_after=after, seconds=seconds)
            result = {"paused": answer["paused"], "report": asdict(report)}
        except SandboxError as error:
            result = {"error": str(error)}
            raise
        finally:
            session.log.finish(sandbox=self.id, seq=seq, result=result)
        return report

    async def resume(self) -> None:
        """Lets a paused sandbox go on. Needed only for what runs inside: every call resumes it by itself."""
        if self._known("resume", {}) is None:
            await self._ready("pause")
            await self._session.resume(by="resume()")

    async def set_memory(self, memory_mb: int) -> int:
        """Has a machine give memory back to the host, or lets it have it again, up to what it was created with.

        Returns the MiB it has when it has given what it could within 10 s. memory_mb: 16 or more.
        Raises:
            Unsupported: not a machine with a balloon. InvalidRequest: more than it was created with.
        """
        if (known := self._known("set_memory", {"memory_mb": memory_mb})) is not None:
            return int(known["memory_mb"])
        record = await self._ready("balloon")
        kind: Any = substrate(record["substrate"])
        seq = await self._session.log.begin(
            sandbox=self.id, kind="set_memory", request={"memory_mb": memory_mb}
        )
        result: dict[str, Any] = {"error": "abandoned"}
        try:
            await self._session.awake()
            have: int = await kind.set_memory(record, memory_mb)
            result = {"memory_mb": have}
        except SandboxError as error:
            result = {"error": str(error)}
            raise
        finally:
            self._session.log.finish(sandbox=self.id, seq=seq, result=result)
        return have

    async def snapshot(self, *, bounds: Bounds = _BOUNDS) -> Snapshot:
        """It as it is now, as an image `snap-<12 hex digits>`; `create(image=...)` starts from it.

        It stands still for the copy. Contained: everything written outside of mounts, /dev and /proc; of a machine
        also its memory, processes included, and `create` goes on there. Not contained otherwise: processes, memory,
        /dev/shm, the variables given to `create`.

        Raises:
            Unsupported: no freezer cgroup can be used here (rootless).
            ImageRejected: more was written than `bounds` allow, or something no layer can hold.
        """
        return await self._take("snapshot", name=f"snap-{secrets.token_hex(6)}", bounds=bounds)

    async def commit(self, name: str, *, bounds: Bounds = _BOUNDS) -> Snapshot:
        """As `snapshot`, under a name of your choice; an image of that name gives way.

        Raises:
            InvalidRequest: not a name for an image.
            ImageError: the older image is in use, or others are built on it.
        """
        if store.image_directory(name, state=self._state).name in store.BASE_NAMES:
            raise InvalidRequest(f"image: {name!r} is this host's own; choose another name")
        return await self._take("commit", name=name, bounds=bounds)

    async def fork(
        self, *, count: int = 1, timeout: float | None = None, keep: bool = False, bounds: Bounds = _BOUNDS
    ) -> builtins.list[AsyncSandbox]:
        """`count` new sandboxes with the files of this one, which runs on; all or none.

        Of containers no process and no memory is carried over; of machines both, with entropy, identity and clock of
        each child's own, and one copy of the memory until they write. They get this one's limits, variables and mounts,
        an id, a host name and a trajectory of their own, and share one copy of the files until they write.
        timeout: their lifetime from now, in seconds; None: what this one was created with. keep: as `create`.

        Raises:
            Unsupported, ImageRejected: as `snapshot`. LaunchFailed: one did not start; none is left.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_FORK:
            raise InvalidRequest(f"count: {count!r} must be a whole number from 1 to {MAX_FORK}")
        if (known := self._known("fork", {"count": count})) is not None:
            return [await self.attach(child, edge="local") for child in known["children"]]
        record = await self._ready("fork")
        session = self._session
        spec = SandboxSpec(
            **record["spec"]
            | {"mounts": parse_mounts(record["spec"]["mounts"]), "keep": keep or self._keeps_forks}
        )
        if timeout is not None:
            spec = replace(spec, timeout=timeout)
        seq = await session.log.begin(sandbox=self.id, kind="fork", request={"count": count})
        result: dict[str, Any] = {"error": "abandoned"}
        try:
            kind = substrate(record["substrate"])
            taken, held = await kind.take(session, record, name="", state=self._state, bounds=bounds)
            drop = partial(drop_fork, taken.name, held, state=self._state)
            spec = replace(spec, image=taken.name, layers=())
            children: builtins.list[AsyncSandbox] = []
            try:
                children = await self._start_all(spec, count, Path(record["trajectory"]))
            finally:
                try:
                    await to_its_end(drop)
                except BaseException:  # cancelled when all had started: nobody will ever hold them
                    await asyncio.shield(asyncio.gather(*[child.kill() for child in children]))
                    await asyncio.to_thread(drop)
                    raise
            result = {"children": [child.id for child in children]}
        except SandboxError as error:
            result = {"error": str(error)}
            raise
        finally:
            session.log.finish(sandbox=self.id, seq=seq, result=result)
        return children

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

    async def _record(self) -> dict[str, Any]:
        with self._session.alive():
            record = _record(self._state, self.id)
            if record is None:
                await asyncio.wait_for(self._session.over.wait(), timeout=5.0)
                raise self._session.end_error()
            return record

    async def _ready(self, capability: str) -> dict[str, Any]:
        """Its record, when it can do that. Raises Unsupported, SandboxEnded."""
        record = await self._record()
        kind = substrate(record["substrate"])
        names = kind.capabilities()
        if capability in ("snapshot", "fork"):
            capability = f"{kind.snapshots}_{capability}"
        if capability == "balloon" and capability not in names:
            reason = f"a {record['substrate']} has no balloon"
            raise Unsupported("set_memory()", reason=reason, available=["substrate='microvm'"])
        if capability not in names or not (record["cgroup"] or capability.startswith(("memory", "balloon"))):
            raise Unsupported(
                capability,
                reason="it needs a freezer cgroup, and this sandbox has none (rootless, or cgroups not writable)",
                available=sorted(names - {"pause", "disk_snapshot", "disk_fork", "commit"}),
            )
        return record

    def _known(self, kind: str, request: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a change of its life that was made before. Raises SandboxError as it did, UnknownOutcome."""
        entry = self._session.forwarded(kind, request)
        if entry is None:
            return None
        result = entry.result
        if result is None or result.get("error") == "abandoned":
            forward = forward_of(self._session)
            raise forward.unknown(entry, "its client was gone, or had given it up, before it was over")
        if "error" in result:
            raise SandboxError(result["error"])
        return result

    async def _take(self, kind: str, *, name: str, bounds: Bounds) -> Snapshot:
        if (known := self._known(kind, {"image": name})) is not None:
            return Snapshot(**known)
        record = await self._ready("snapshot")
        log = self._session.log
        seq = await log.begin(sandbox=self.id, kind=kind, request={"image": name})
        result: dict[str, Any] = {"error": "abandoned"}
        try:
            kind_of = substrate(record["substrate"])
            taken, held = await kind_of.take(
                self._session, record, name=name, state=self._state, bounds=bounds
            )
            leases.give(held)
            result = asdict(taken)
        except SandboxError as error:
            result = {"error": str(error)}
            raise
        finally:
            log.finish(sandbox=self.id, seq=seq, result=result)
        return taken

    async def _start_all(
        self, spec: SandboxSpec, count: int, trajectory: Path
    ) -> builtins.list[AsyncSandbox]:
        """All or none, also when the caller is cancelled."""
        kind = substrate(spec.substrate)
        tasks = [
            asyncio.create_task(
                self._start(
                    kind,
                    spec,
                    state=self._state,
                    trajectory=trajectory,
                    edge=self.id[3:-13],
                    forked_from=self.id,
                )
            )
            for _ in range(count)
        ]
        try:
            # Not gather(): that is over with the first cancelled one, and a second cancellation of the others
            # would have them return before what they had begun is gone.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            return [task.result() for task in tasks]
        except BaseException:
            for task in tasks:
                task.cancel()
            ended = await asyncio.shield(asyncio.gather(*tasks, return_exceptions=True))
            for child in ended:
                if isinstance(child, AsyncSandbox):
                    await child.kill()
            raise


def _spec(arguments: Mapping[str, Any]) -> SandboxSpec:
    """The checked request of `create`'s arguments. Raises InvalidRequest."""
    image = arguments["image"]
    given = {
        "image": image.name if isinstance(image, Snapshot) else image,
        "envs": dict(arguments["envs"] or {}),
        "mounts": parse_mounts(arguments["mounts"]),
        "metadata": dict(arguments["metadata"] or {}),
        "secrets": {name: held.public() for name, held in check_secrets(arguments["secrets"]).items()},
    }
    return SandboxSpec(**{**arguments, **given})


def _require(name: str, require: Sequence[str]) -> Any:
    """The substrate, when it has all of these. Raises Unsupported."""
    kind = substrate(name)
    missing = [item for item in require if item not in kind.capabilities()]
    if missing:
        raise Unsupported(
            f"require={missing}",
            reason=f"the {name} substrate does not have it",
            available=sorted(kind.capabilities()),
        )
    return kind


async def _connect(launched: Launched, log: Log, *, kill_on_failure: bool = True) -> Session:
    """Shakes hands with the agent; a sandbox whose agent does not answer is ended."""
    try:
        guest = await _reach(launched)
        if launched.greet is not None:
            try:
                await launched.greet(guest)
            except BaseException:
                await guest.close()
                raise
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
    session = Session(launched=launched, guest=guest, log=log, envs=launched.envs)
    if launched.own_kernel:  # what it has counted so far was not ours
        await session.oom_happened()
    return session


async def _reach(launched: Launched) -> GuestClient:
    """A connection to its agent; GuestGone as soon as the sandbox ends."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[str] = loop.create_future()

    def ended(cause: str, detail: str) -> None:
        def settle() -> None:
            if not over.done():
                over.set_result(f"it ended: {cause} ({detail})")

        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle)

    launched.keeper.watch(launched.sandbox_id, ended)
    connecting = asyncio.ensure_future(
        channels.reach(launched.guest, patience=launched.patience)
        if channels.is_pc(launched.guest)
        else GuestClient.connect(launched.guest, timeout=launched.patience)
    )
    try:
        both: set[asyncio.Future[Any]] = {connecting, over}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            raise GuestGone(over.result())
        return await connecting
    finally:
        launched.keeper.unwatch(launched.sandbox_id, ended)
        over.cancel()
        if not connecting.done():
            connecting.cancel()
            await asyncio.wait([connecting])


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
        paused=record.get("paused", False),
        metadata=record["metadata"],
        limits=record["limits"],
        notes=tuple(record["notes"]),
        accelerator=record.get("accelerator", ""),
        channel=channels.chosen(Path(record["directory"])) if record.get("screen") else "",
    )
