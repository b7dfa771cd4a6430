"""The door of a sandbox that no socket can be handed into: a listener on the host, and a relay inside for each client.

The keeper accepts; the runtime's `exec` starts the relay in the sandbox with the client's connection as its stdin and
stdout, and stays until it ends. Bounded: MAX_CLIENTS relays a sandbox, the next clients wait in the listener's queue.
Owns the listener and the relays' processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import Any

from rorqual.sandbox.keeper import launch

MAX_CLIENTS = 16
"""A relay costs the host some 20 MB (runsc's own process) while its client is connected."""


class Door:
    """Of one sandbox. `listener` is watched by the keeper's loop, which calls `knock`."""

    def __init__(self, directory: str, order: dict[str, Any]) -> None:
        self._argv: list[str] = order["argv"]
        self._errors = directory + "/door.err"
        with open(directory + "/relay.json", "w", encoding="utf-8") as file:
            json.dump(order["process"], file)
        self.relays: set[int] = set()
        self.closed = False
        self.listener = launch.listen(directory, "guest.sock")

    @property
    def open(self) -> bool:
        return len(self.relays) < MAX_CLIENTS

    def knock(self) -> int:
        """Lets one client in; the process id of its relay, 0 when it could not be started."""
        client, _ = self.listener.accept()
        with client:
            errors = os.open(self._errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                pid = os.posix_spawn(
                    self._argv[0],
                    self._argv,
                    {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, client.fileno(), 0),
                        (os.POSIX_SPAWN_DUP2, client.fileno(), 1),
                        (os.POSIX_SPAWN_DUP2, errors, 2),
                    ],
                    setpgroup=0,
                    setsigdef=[signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM, signal.SIGCHLD],
                )
            except OSError:
                return 0
            finally:
                os.close(errors)
        self.relays.add(pid)
        return pid

    def close(self) -> None:
        """The sandbox is over: nobody comes in any more, and the relays end."""
        self.closed = True
        self.listener.close()
        for pid in self.relays:  # not yet reaped: `reaped` takes them out
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Doors:
    """The doors of all sandboxes of one keeper."""

    def __init__(self) -> None:
        self._by_relay: dict[int, Door] = {}

    def knock(self, door: Door) -> None:
        """A client is at the door."""
        with contextlib.suppress(OSError):
            if pid := door.knock():
                self._by_relay[pid] = door

    def reaped(self, pid: int) -> Door | None:
        """Whose relay this was."""
        door = self._by_relay.pop(pid, None)
        if door is not None:
            door.relays.discard(pid)
        return door
