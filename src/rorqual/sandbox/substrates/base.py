"""The one interface behind which every substrate stands. A later issue adds function, microvm and fullvm
here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rorqual.sandbox.keeper.client import KeeperClient
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.state import StateDir


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


class Substrate(Protocol):
    """One kind of environment."""

    name: str

    def capabilities(self) -> frozenset[str]:
        """What `require=[...]` may name."""

    async def launch(
        self, spec: SandboxSpec, *, sandbox_id: str, state: StateDir, trajectory: Path
    ) -> Launched:
        """Starts a sandbox; returns when its guest agent's socket exists.

        Raises:
            Unsupported, ImageNotFound, HostUnfit, LaunchFailed. Nothing is left behind in any of these cases.
        """
