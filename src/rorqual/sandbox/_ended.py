"""A session on a sandbox that is over: its log can still be gone through, and everything else says how it ended."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import GuestGone, SandboxNotFound
from rorqual.sandbox.keeper.client import KeeperClient
from rorqual.sandbox.substrates import Launched
from rorqual.sandbox.trajectory import Log, TrajectoryEntry


class _NoKeeper:
    """Answers as a keeper does about what it does not have."""

    def request(self, op: str, **fields: Any) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        future.set_result({"gone": True})
        return future

    def watch(self, sandbox_id: str, callback: Callable[..., object]) -> None:
        """Nothing will happen to it."""

    unwatch = watch_still = unwatch_still = watch


def ended_session(sandbox_id: str, entries: list[TrajectoryEntry], log: Log) -> Session:
    """Raises SandboxNotFound: the log has nothing of it, or has not seen its end."""
    last = entries[-1] if entries else None
    if last is None or last.kind != "ended":
        raise SandboxNotFound(sandbox_id, cause="" if last is None else "infra")
    request = entries[0].request if entries[0].kind == "created" else {}
    made = (entries[0].result or {}) if entries[0].kind == "created" else {}
    user = made.get("user") or request.get("user") or "user"
    guest = GuestClient()
    guest._fail(GuestGone(f"{sandbox_id} has ended"))
    session = Session(
        launched=Launched(
            sandbox_id=sandbox_id,
            keeper=cast(KeeperClient, _NoKeeper()),
            guest="",
            user=user,
            workdir=made.get("workdir")
            or request.get("workdir")
            or ("/root" if user == "root" else "/home/user"),
            envs={},
            expires=last.started,
            runtime=made.get("runtime", ""),
            limits={},
            notes=(),
            oom_kills=lambda: 0,
        ),
        guest=guest,
        log=log,
        envs={},
    )
    result = last.result or {}
    session.ended = (result.get("cause", "infra"), result.get("detail", ""))
    session.over.set()
    return session
