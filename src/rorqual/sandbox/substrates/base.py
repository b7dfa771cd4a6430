"""The one interface behind which every substrate stands, and the launch through the keeper that they share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox.errors import LaunchFailed
from rorqual.sandbox.images.unpack import Bounds
from rorqual.sandbox.keeper.client import KeeperClient
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.records import Snapshot
from rorqual.sandbox.state import StateDir

if TYPE_CHECKING:
    from rorqual.sandbox._session import Session

_LAUNCH_DEADLINE_S = 120.0
"""96 launches at once on two cores take a few seconds; a runtime that hangs must not hang its caller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """A running sandbox, as its substrate hands it over."""

    sandbox_id: str
    keeper: KeeperClient
    guest: str
    """Where the guest agent answers: an address of _dial.py."""
    user: str
    """The default user, as it turned out on this host."""
    workdir: str
    envs: dict[str, str]
    """Variables of every command: the image's, then the request's."""
    expires: float
    """End of its lifetime, epoch seconds."""
    runtime: str
    """What runs it: 'crun', 'runc', ..."""
    limits: dict[str, str]
    """What holds each limit: 'cgroup', 'rlimit', 'tmpfs' or 'none'."""
    notes: tuple[str, ...]
    """Everything that is not as on a well-equipped host, in sentences."""
    oom_kills: Callable[[], int]
    """How many processes the memory limit has killed so far."""
    own_kernel: bool = False
    """A machine: what its own kernel has killed for want of memory counts, too."""
    patience: float = 20.0
    """Seconds its guest agent may take to answer at first."""
    greet: Callable[[GuestClient], Awaitable[None]] | None = None
    """What its first client does before anybody uses it."""


class Substrate(Protocol):
    """One kind of environment."""

    name: str
    snapshots: str
    """What `snapshot` and `fork` carry over: 'disk', 'memory' (which has the disk, too) or ''."""

    def capabilities(self) -> frozenset[str]:
        """What `require=[...]` may name."""

    async def launch(
        self, spec: SandboxSpec, *, sandbox_id: str, state: StateDir, trajectory: Path
    ) -> Launched:
        """Starts a sandbox; returns when its guest agent's socket exists.

        Raises:
            Unsupported, ImageNotFound, HostUnfit, LaunchFailed. Nothing is left behind in any of these cases.
        """

    async def take(
        self, session: Session, record: Mapping[str, Any], *, name: str, state: StateDir, bounds: Bounds
    ) -> tuple[Snapshot, list[int]]:
        """Makes an image of a live sandbox. name: the image's; '' for a fork's, which goes with its last user.

        Returns with the lease on it, which the caller gives back.
        Raises ImageRejected, SandboxEnded, SandboxError. Nothing is kept then.
        """


async def run_order(keeper: KeeperClient, order: Mapping[str, Any]) -> dict[str, Any]:
    """Has the keeper launch it; returns its answer when the first process runs.

    Raises LaunchFailed. Whatever was begun is ended, also when the caller is cancelled.
    """
    sandbox_id = order["id"]
    future = keeper.request("launch", order=order)
    try:
        # Not wait_for(), which loses a cancellation that meets the answer.
        async with asyncio.timeout(_LAUNCH_DEADLINE_S):
            answer: dict[str, Any] = await asyncio.wrap_future(future)
    except BaseException as error:  # cancelled or too slow: whatever the keeper has begun, it ends
        detail = "the launch was cancelled"
        end = keeper.request("kill", sandbox=sandbox_id, cause="killed", detail=detail)
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(end)), timeout=10.0)
        if isinstance(error, TimeoutError):
            raise LaunchFailed(
                sandbox_id, stage="runtime", detail=f"no answer in {_LAUNCH_DEADLINE_S:g} s"
            ) from error
        raise
    if "error" in answer:
        raise LaunchFailed(sandbox_id, stage=answer["error"]["stage"], detail=answer["error"]["detail"])
    if order["keep"]:
        keeper.keeps = True
    return answer
