"""Where the sandbox room keeps things: the state directory (durable) and the run directory (gone after a
reboot).

state: $RORQUAL_STATE, else $XDG_STATE_HOME/rorqual, else ~/.local/state/rorqual.
    trajectory.db        the trajectory log
    images/<name>/       root file systems
run: /run/rorqual for root, else $XDG_RUNTIME_DIR/rorqual, else /tmp/rorqual-<uid>; below it a directory per
state
    directory, named by a hash, since a Unix socket's path must be short.
    keepers/<n>/         lock, keeper.sock, one per client process
    sandboxes/<id>/      record.json, guest.sock, launch.err, runtime/, disk/
cache: `cache_dir()`; what takes long to make or fetch and is the same for every state directory.
    kernels/ bin/ guests/
Owns the paths and nothing else. The environment is read in `StateDir.from_environment` and `cache_dir` alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox.errors import HostUnfit


@dataclass(frozen=True, kw_only=True, slots=True)
class StateDir:
    """The two directories. Equal values share one keeper in a process."""

    root: Path
    """Durable state."""
    run: Path
    """Sockets, locks and records of live sandboxes."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> StateDir:
        env = os.environ if environ is None else environ
        if env.get("RORQUAL_STATE"):
            root = Path(env["RORQUAL_STATE"]).expanduser()
        elif env.get("XDG_STATE_HOME"):
            root = Path(env["XDG_STATE_HOME"]) / "rorqual"
        else:
            root = Path(env.get("HOME") or os.path.expanduser("~")) / ".local/state/rorqual"
        root = root.absolute()
        if os.geteuid() == 0:
            base = Path("/run/rorqual")
        elif env.get("XDG_RUNTIME_DIR") and os.access(env["XDG_RUNTIME_DIR"], os.W_OK):
            base = Path(env["XDG_RUNTIME_DIR"]) / "rorqual"
        else:
            base = Path(f"/tmp/rorqual-{os.geteuid()}")
        return cls(root=root, run=base / hashlib.sha256(str(root).encode()).hexdigest()[:12])

    @property
    def trajectory(self) -> Path:
        return self.root / "trajectory.db"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def keepers(self) -> Path:
        return self.run / "keepers"

    @property
    def sandboxes(self) -> Path:
        return self.run / "sandboxes"

    def prepare(self) -> None:
        """Makes the directories, 0700, and refuses a run directory that somebody else owns.

        Raises:
            HostUnfit: a directory cannot be made, or belongs to another user.
        """
        try:
            for path in (self.root, self.images, self.run.parent, self.run, self.keepers, self.sandboxes):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.run.parent.lstat().st_uid
        except OSError as error:
            raise HostUnfit(
                f"cannot make the state directory: {error}.",
                fix="export RORQUAL_STATE=<a writable directory>",
            ) from error
        if owner != os.geteuid():
            raise HostUnfit(
                f"{self.run.parent} belongs to user {owner}, not to you.",
                fix="export XDG_RUNTIME_DIR=<a directory of yours>",
            )


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """$RORQUAL_CACHE, else $XDG_CACHE_HOME/rorqual, else ~/.cache/rorqual; made when missing.

    Whoever adds to it writes under a temporary name beside the final one and renames: two processes may make the same
    thing at once, and either's is good.

    Raises:
        HostUnfit: it cannot be made.
    """
    env = os.environ if environ is None else environ
    if env.get("RORQUAL_CACHE"):
        path = Path(env["RORQUAL_CACHE"]).expanduser()
    elif env.get("XDG_CACHE_HOME"):
        path = Path(env["XDG_CACHE_HOME"]) / "rorqual"
    else:
        path = Path(env.get("HOME") or os.path.expanduser("~")) / ".cache/rorqual"
    path = path.absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostUnfit(
            f"cannot make the cache directory: {error}.", fix="export RORQUAL_CACHE=<a writable directory>"
        ) from error
    return path
