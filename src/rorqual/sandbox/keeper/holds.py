"""Pause, resume and snapshot, as the keeper does them: freeze, wait until frozen, copy, let go.

A sandbox stands still while it is paused or while a copy of its disk is under way. A client may also hold one (`hold`,
`release`): it counts as still for everybody and is not frozen, since that client stops the machine and drives its VMM;
the hold ends with its client at the latest. Nothing here blocks the keeper's loop: freezing is asked for and looked at
in `tick`, a copy runs in a forked child (layers.py). Killing a frozen sandbox thaws it (cgroups.thaw), so that the kill
is felt. Owns the freezer; never removes anything of a sandbox.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rorqual.sandbox.keeper import cgroups, layers, linux

if TYPE_CHECKING:
    from rorqual.sandbox.keeper.main import Entry, Peer

FREEZE_S = 10.0
"""A process in the middle of a long system call may take a while; longer than this is an error."""
POLL_S = 0.001


@dataclass(kw_only=True)
class Hold:
    """What keeps one sandbox still."""

    freezer: cgroups.Freezer
    paused: bool = False
    copies: dict[int, tuple[Peer, int, str]] = field(default_factory=dict)
    """Process id of a copy -> who waits for it, and its destination."""
    freezing: list[_Wait] = field(default_factory=list)
    thawing: list[tuple[Peer, int]] = field(default_factory=list)
    holder: Peer | None = None
    """The client that holds it now."""
    holding: list[tuple[Peer, int]] = field(default_factory=list)
    """Clients that want to hold it, in order."""

    @property
    def still(self) -> bool:
        return self.frozen or self.holder is not None

    @property
    def frozen(self) -> bool:
        """What the freezer is to do."""
        wanted = self.paused or bool(self.copies)
        wanted = wanted or any(wait.request["op"] == "snapshot" for wait in self.freezing)
        return wanted and self.holder is None


@dataclass(kw_only=True, eq=False)
class _Wait:
    peer: Peer
    request: dict[str, Any]
    deadline: float


class Holds:
    """The holds of all sandboxes of one keeper."""

    def __init__(
        self, changed: Callable[[Entry], None], answered: Callable[[Peer, dict[str, Any]], None]
    ) -> None:
        self._entries: dict[str, Entry] = {}
        self._changed = changed
        self._answer = answered
        self._copying: dict[int, Entry] = {}

    @property
    def waiting(self) -> bool:
        """Whether `tick` must be called soon."""
        return any(entry.hold is not None and entry.hold.freezing for entry in self._entries.values())

    def handle(self, entry: Entry, peer: Peer, request: dict[str, Any]) -> None:
        """`pause`, `resume`, `snapshot`, `hold` and `release`."""
        number = request["id"]
        hold = entry.hold
        if hold is None:
            hold = Hold(freezer=cgroups.Freezer(entry.order["cgroup"]))
            entry.hold = hold
            self._entries[entry.id] = entry
        if request["op"] == "hold":
            hold.holding.append((peer, number))
            self._next_holder(entry, hold)
            return
        if request["op"] == "release":
            if hold.holder is peer:
                self._let_go(entry, hold)
            self._answer(peer, {"id": number})
            return
        if not hold.freezer.available and request["op"] != "resume":
            self._answer(peer, {"id": number, "error": {"stage": "freezer", "detail": "no freezer here"}})
            return
        if request["op"] == "resume":
            was = hold.paused
            hold.paused = False
            hold.thawing.append((peer, number))
            self._apply(entry, force=was)
            return
        if request["op"] == "pause":
            hold.paused = True
        hold.freezing.append(_Wait(peer=peer, request=request, deadline=time.monotonic() + FREEZE_S))
        self._apply(entry, force=True)
        self.tick()

    def peer_gone(self, peer: Peer) -> None:
        """A client's end is the end of what it held."""
        for entry in list(self._entries.values()):
            hold = entry.hold
            if hold is None:
                continue
            hold.holding = [item for item in hold.holding if item[0] is not peer]
            if hold.holder is peer:
                self._let_go(entry, hold)

    def _let_go(self, entry: Entry, hold: Hold) -> None:
        hold.holder = None
        for wait in hold.freezing:
            wait.deadline = time.monotonic() + FREEZE_S
        self._next_holder(entry, hold)
        self._apply(entry)

    def _next_holder(self, entry: Entry, hold: Hold) -> None:
        """Copies go first: they need the freezer, which a hold lets go of."""
        if hold.holder is None and hold.holding and not hold.copies:
            hold.holder, number = hold.holding.pop(0)
            self._apply(entry, force=True)
            self._answer(hold.holder, {"id": number})

    def tick(self) -> None:
        """Goes on with whatever has come to a standstill, and gives up on what does not."""
        now = time.monotonic()
        for entry in list(self._entries.values()):
            hold = entry.hold
            if hold is None or not hold.freezing:
                continue
            try:
                frozen = hold.holder is None and hold.freezer.frozen()
            except OSError:
                frozen = False
            waits, hold.freezing = hold.freezing, []
            for wait in waits:
                pausing = wait.request["op"] == "pause"
                if pausing and not hold.paused:  # somebody resumed it meanwhile
                    self._answer(wait.peer, {"id": wait.request["id"], "paused": False})
                elif frozen and pausing:
                    self._answer(wait.peer, {"id": wait.request["id"], "paused": True})
                elif frozen:
                    self._copy(entry, hold, wait)
                elif now > wait.deadline and hold.holder is None:
                    hold.paused = hold.paused and not pausing
                    detail = f"it did not come to a standstill in {FREEZE_S:g} s"
                    self._answer(
                        wait.peer, {"id": wait.request["id"], "error": {"stage": "freezer", "detail": detail}}
                    )
                else:
                    hold.freezing.append(wait)
            self._apply(entry)

    def reaped(self, pid: int, status: int) -> bool:
        """Whether the process was a copy; tells who waits for it how it went."""
        entry = self._copying.pop(pid, None)
        if entry is None:
            return False
        hold = entry.hold
        assert hold is not None
        peer, number, destination = hold.copies.pop(pid)
        report = {"error": {"stage": "copy", "detail": f"it ended with {os.waitstatus_to_exitcode(status)}"}}
        with (
            contextlib.suppress(OSError, ValueError),
            open(destination + "/copied.json", encoding="utf-8") as file,
        ):
            report = json.load(file)
        self._answer(peer, {"id": number, **report})
        self._next_holder(entry, hold)
        self._apply(entry)
        return True

    def abort(self, entry: Entry) -> None:
        """Ends the copies of a sandbox."""
        for pid in entry.hold.copies if entry.hold is not None else ():
            os.kill(pid, signal.SIGKILL)

    def ended(self, entry: Entry) -> None:
        """The sandbox is over: nobody waits for it any more. Its copies go, too; `reaped` answers for them."""
        self._entries.pop(entry.id, None)
        self.abort(entry)
        if entry.hold is not None:
            numbers = [(wait.peer, wait.request["id"]) for wait in entry.hold.freezing]
            for peer, number in [*numbers, *entry.hold.thawing, *entry.hold.holding]:
                self._answer(peer, {"id": number, "gone": True})
            entry.hold.freezing.clear()
            entry.hold.thawing.clear()
            entry.hold.holding.clear()

    def _apply(self, entry: Entry, *, force: bool = False) -> None:
        """Makes the freezer say what the hold says. force: tell everybody even when nothing changed."""
        hold = entry.hold
        if hold is None or entry.id not in self._entries:
            return
        try:
            if not hold.freezer.available:
                pass
            elif hold.frozen:
                hold.freezer.freeze()
            else:
                hold.freezer.thaw()
        except OSError as error:
            answer = {"error": {"stage": "freezer", "detail": str(error)}}
            for peer, number in hold.thawing:
                self._answer(peer, {"id": number, **answer})
            hold.thawing.clear()
            return
        state = (hold.still, hold.paused)
        if force or entry.stillness != state:
            entry.stillness = state
            self._changed(entry)
        if not hold.still:
            for peer, number in hold.thawing:
                self._answer(peer, {"id": number, "paused": False})
            hold.thawing.clear()

    def _copy(self, entry: Entry, hold: Hold, wait: _Wait) -> None:
        request = wait.request
        if entry.disk is None:
            detail = "its disk was not handed over at the launch"
            self._answer(wait.peer, {"id": request["id"], "error": {"stage": "copy", "detail": detail}})
            return
        targets = [overlay["target"] for overlay in entry.order["overlays"]]
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            _run_copy(entry.disk, targets, request)
            os._exit(70)
        self._copying[pid] = entry
        hold.copies[pid] = (wait.peer, request["id"], request["destination"])


def _run_copy(disk: int, targets: list[str], request: dict[str, Any]) -> None:
    """In the forked child: copies, and leaves its report in <destination>/copied.json."""
    report: dict[str, Any]
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
        budget = layers.Budget(max_bytes=request["max_bytes"], max_entries=request["max_entries"])
        made = layers.copy_uppers(disk, request["destination"], targets, budget=budget)
        if request["durable"]:
            layers.flush(request["destination"])
        report = {"layers": made, "size_bytes": budget.size_bytes, "entries": budget.entries}
    except (OSError, layers.LayerRefused) as error:
        report = {"error": {"stage": "copy", "detail": str(error)}}
    with contextlib.suppress(OSError):
        temporary = request["destination"] + "/copied.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(report, file)
        os.rename(temporary, request["destination"] + "/copied.json")
    os._exit(0)
