"""The keeper's loop: launches sandboxes, watches them, ends them, cleans up after them.

Speaks one JSON document a line over Unix sockets: fd 0 is the owner (the client process whose death ends its
sandboxes), `keeper.sock` in its directory is for other clients of the same user. Single-threaded; the only
blocking work is the removal of an ended sandbox. Follows no symlinks and trusts only its own user
(directories are 0700).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from typing import Any

from rorqual.sandbox.keeper import cgroups, door, holds, launch, leases, linux, machine, network, quick
from rorqual.sandbox.keeper.removal import remove_tree

MAX_LINE = 4 << 20
MAX_FILES = 1 << 18
"""Descriptors that a keeper asks for, where the host's hard limit allows them."""
GRACE_S = 5.0
"""Seconds between the SIGKILL of a sandbox and giving up on its reaping."""


class Peer:
    """One connected client."""

    def __init__(self, sock: socket.socket, *, owner: bool) -> None:
        self.sock = sock
        self.owner = owner
        self.buffer = b""

    def send(self, document: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(document).encode() + b"\n")


class Entry:
    """One sandbox."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.id: str = order["id"]
        self.directory: str = order["directory"]
        self.keep: bool = order["keep"]
        self.deadline = time.monotonic() + order["timeout"]
        self.expires = time.time() + order["timeout"]
        self.runtime_pid = 0
        self.init_pid = 0
        self.asked_cause = ""
        self.asked_detail = ""
        self.waiters: list[tuple[Peer, int]] = []
        self.reply: tuple[Peer, int] | None = None
        self.channel: socket.socket | None = None
        """Where the launcher hands over `disk`."""
        self.disk: int | None = None
        """Descriptor of the directory with the overlays' upper layers, which no path leads to."""
        self.door: door.Door | None = None
        self.leases: list[int] = []
        self.hold: holds.Hold | None = None
        self.stillness = (False, False)
        """(stands still, was paused), as last told to the clients."""
        self.started: machine.Started | None = None
        """Of a machine: the pipes of its VMM."""


class Keeper:
    def __init__(self, directory: str, owner_pid: int) -> None:
        self.directory = directory
        self.selector = selectors.DefaultSelector()
        self.entries: dict[str, Entry] = {}
        self.by_pid: dict[int, Entry] = {}
        self.queue: list[Entry] = []
        self.launching = 0
        self.limit = max(2, 2 * len(os.sched_getaffinity(0)))
        self.strays: dict[int, int] = {}
        self.idmaps = launch.Idmaps() if os.geteuid() == 0 else None
        self.doors = door.Doors()
        self.nudge = quick.Nudge()
        self.sealed = quick.Sealed()
        self.owner_alive = True
        self.peers: set[Peer] = set()
        self.unused: dict[str, tuple[float, float]] = {}
        """Directories of forks' layers that may have lost their last user -> (when to look again, the wait before)."""
        self.holds = holds.Holds(self.stillness_changed, lambda peer, document: peer.send(document))
        self.networks = network.Networks(self)
        # Locked before it has its name: a reaper must never meet a lock file of the living that is free.
        self.lock = os.open(directory + "/lock.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(directory + "/lock.new", directory + "/lock")
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.wake = wake_read
        self.selector.register(wake_read, selectors.EVENT_READ, "wake")
        self.listener = launch.listen(directory, "keeper.sock")
        self.selector.register(self.listener, selectors.EVENT_READ, "listen")
        # A forked child of the client may hold our socket's other end open: the pidfd tells of the real
        # death.
        try:
            self.owner_fd = os.pidfd_open(owner_pid)
            self.selector.register(self.owner_fd, selectors.EVENT_READ, "owner")
        except OSError:
            self.owner_alive = os.path.exists(f"/proc/{owner_pid}")
        self.add_peer(socket.socket(fileno=os.dup(0)), owner=True)

    def add_peer(self, sock: socket.socket, *, owner: bool) -> None:
        sock.settimeout(10.0)  # a client that does not read its answers is dropped, not waited for
        peer = Peer(sock, owner=owner)
        self.peers.add(peer)
        self.selector.register(sock, selectors.EVENT_READ, peer)

    def drop_peer(self, peer: Peer) -> None:
        self.peers.discard(peer)
        self.selector.unregister(peer.sock)
        peer.sock.close()
        self.holds.peer_gone(peer)
        if peer.owner:
            self.owner_died()

    def owner_died(self) -> None:
        if not self.owner_alive:
            return
        self.owner_alive = False
        for entry in list(self.entries.values()):
            if not entry.keep:
                self.kill(entry, cause="killed", detail="its client ended")

    # -- loop
    # --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while self.owner_alive or self.entries:
            now = time.monotonic()
            nearest = min((entry.deadline for entry in self.entries.values()), default=now + 3600.0)
            nearest = min([nearest, *(again for again, _ in self.unused.values())])
            # An hour at most: epoll takes no wait above 24.8 days, and lifetimes go up to 30.
            pause = holds.POLL_S if self.holds.waiting else min(nearest - now, 3600.0)
            for key, _ in self.selector.select(max(0.0, pause)):
                # What came before in this batch may have ended a sandbox: its descriptors are closed, or another's.
                now_there = self.selector.get_map().get(key.fd)
                if now_there is None or now_there.data is not key.data:
                    continue
                if key.data == "wake":
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wake, 4096)
                    self.reap()
                elif key.data == "listen":
                    self.add_peer(self.listener.accept()[0], owner=False)
                elif key.data == "owner":
                    self.selector.unregister(key.fileobj)
                    self.owner_died()
                elif isinstance(key.data, Peer) and key.data in self.peers:
                    self.read(key.data)
                elif isinstance(key.data, machine.Tail):
                    if not key.data.read():
                        self.selector.unregister(key.data.fd)
                elif isinstance(key.data, Entry):
                    self.machine_runs(key.data)
                elif isinstance(key.data, door.Door):
                    self.doors.knock(key.data)
                    if not key.data.open:  # watched again when a relay has ended
                        self.selector.modify(key.data.listener, 0, key.data)
                elif isinstance(key.data, network.Gateway):
                    self.networks.read(key.data)
            self.holds.tick()
            now = time.monotonic()
            if any(again <= now for again, _ in self.unused.values()):
                self.remove_unused()
            for entry in list(self.entries.values()):
                if entry.deadline <= now:
                    if entry.asked_cause and entry.runtime_pid:
                        entry.deadline = now + GRACE_S
                        self.signal(entry, force=True)
                    elif entry.asked_cause:
                        self.finish(entry, status=-1)  # SIGKILL did not end it: clean what can be cleaned
                    else:
                        self.kill(entry, cause="timeout", detail="its lifetime was over")
        self.networks.close()
        for pid in children():  # no sandbox is left, so whatever a broken launch orphaned to us goes, too
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.remove_unused()
        remove_tree(self.directory)

    def read(self, peer: Peer) -> None:
        try:
            data = peer.sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data or len(peer.buffer) > MAX_LINE:
            self.drop_peer(peer)
            return
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for line in lines:
            try:
                request = json.loads(line)
                number = int(request["id"])
            except (ValueError, TypeError, KeyError):
                self.drop_peer(peer)  # not a client of ours
                return
            try:
                self.handle(peer, request)
            except Exception as error:
                peer.send({"id": number, "error": {"stage": "keeper", "detail": repr(error)}})

    def handle(self, peer: Peer, request: dict[str, Any]) -> None:
        number, op = request["id"], request["op"]
        if op == "launch":
            entry = Entry(request["order"])
            entry.reply = (peer, number)
            if entry.order["cgroup"]:
                self.nudge.now()
            entry.leases = leases.take(entry.order.get("leases", []))
            try:
                os.mkdir(entry.directory, 0o700)
                self.write_record(entry)
            except OSError:
                leases.give(entry.leases)
                raise
            self.entries[entry.id] = entry
            if entry.order.get("network"):
                self.networks.launch(entry)
            else:
                self.queue.append(entry)
                self.start_queued()
            return
        entry_or_none = self.entries.get(request["sandbox"])
        if entry_or_none is None:
            peer.send({"id": number, "gone": True})
        elif op == "kill":
            entry_or_none.waiters.append((peer, number))
            self.kill(entry_or_none, cause=request["cause"], detail=request["detail"])
        elif op == "set_timeout":
            entry = entry_or_none
            if not entry.asked_cause:
                entry.deadline = time.monotonic() + request["seconds"]
                entry.expires = time.time() + request["seconds"]
                self.write_record(entry)
            peer.send({"id": number, "expires": entry.expires})
        elif op == "adopt":
            entry = entry_or_none
            if not entry.asked_cause:
                entry.order["record"] |= request["record"]
                entry.keep = request["keep"]
                entry.deadline = time.monotonic() + request["seconds"]
                entry.expires = time.time() + request["seconds"]
                self.write_record(entry)
            peer.send({"id": number, "expires": entry.expires})
        elif op == "status":
            still = entry_or_none.stillness[0]
            init_pid, expires = entry_or_none.init_pid, entry_or_none.expires
            peer.send({"id": number, "expires": expires, "init_pid": init_pid, "still": still})
        elif op in ("pause", "resume", "snapshot", "hold", "release"):
            self.holds.handle(entry_or_none, peer, request)
        elif op in ("network", "network_log"):
            self.networks.handle(entry_or_none, peer, request)
        elif op == "console":
            started = entry_or_none.started
            text = started.console.text if started is not None else b""
            peer.send({"id": number, "console": text.decode("utf-8", "replace")})
        elif op == "abort_snapshot":
            self.holds.abort(entry_or_none)
            peer.send({"id": number})
        else:
            raise ValueError(f"unknown operation {op!r}")

    def remove_unused(self) -> None:
        """A launch under way, or a client in the middle of a fork, may hold a lease for a moment: looked at again, with
        doubled waits up to half a minute, since another keeper's sandbox may run on it for long."""
        now = time.monotonic()
        left = {place: wait for place, (_, wait) in self.unused.items() if not leases.remove_unused(place)}
        self.unused = {place: (now + wait, min(2 * wait, 30.0)) for place, wait in left.items()}

    # -- launching
    # ---------------------------------------------------------------------------------------------

    def start_queued(self) -> None:
        while self.queue and self.launching < self.limit:
            entry = self.queue.pop(0)
            self.launching += 1
            is_machine = entry.order.get("kind") == "machine"
            try:
                channel: socket.socket | None = None
                if is_machine:
                    entry.started = machine.Started()
                elif entry.order["cgroup"]:
                    entry.channel, channel = socket.socketpair()
                    entry.channel.setblocking(False)
                if (
                    self.idmaps is not None and not is_machine
                ):  # made here, not in the child, so that the next launch finds them
                    for pair in entry.order["idmaps"]:
                        self.idmaps.fd(*pair)
                program = "" if is_machine else self.sealed.path(entry.order["runtime"][0])
                pid = os.fork()
            except OSError as error:
                self.launching -= 1
                self.fail(entry, stage="fork", detail=str(error))
                continue
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)
                if entry.started is not None:
                    machine.run(entry.order, entry.started)
                launch.run(entry.order, idmaps=self.idmaps, channel=channel, program=program)
                os._exit(70)
            if channel is not None:
                channel.close()
            if entry.started is not None:
                entry.started.forked()
                self.selector.register(entry.started.exec_read, selectors.EVENT_READ, entry)
                for tail in (entry.started.console, entry.started.errors):
                    self.selector.register(tail.fd, selectors.EVENT_READ, tail)
            entry.runtime_pid = pid
            self.by_pid[pid] = entry

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self.holds.reaped(pid, status) or self.networks.reaped(pid):
                continue
            if (left := self.doors.reaped(pid)) is not None:
                if not left.closed:
                    self.selector.modify(left.listener, selectors.EVENT_READ, left)
                continue
            entry = self.by_pid.pop(pid, None)
            if entry is None:
                if len(self.strays) < 1024:
                    self.strays[pid] = status
            elif pid == entry.runtime_pid:
                self.launched(entry, status)
            else:
                self.finish(entry, status)

    def machine_runs(self, entry: Entry) -> None:
        """A machine's launcher has become its VMM, or has died: `reap` tells the latter from the former."""
        assert entry.started is not None
        ran, pid = entry.started.ran(), entry.runtime_pid
        if ran is not None:
            self.selector.unregister(entry.started.exec_read)
        if not ran or self.by_pid.get(pid) is not entry:
            return
        self.launching -= 1
        entry.runtime_pid, entry.init_pid = 0, pid
        self.write_record(entry)
        if entry.asked_cause:
            self.signal(entry)
        self.answer_launch(entry)
        self.start_queued()

    def answer_launch(self, entry: Entry) -> None:
        if entry.reply is not None:
            entry.reply[0].send({"id": entry.reply[1], "init_pid": entry.init_pid, "expires": entry.expires})
            entry.reply = None

    def launched(self, entry: Entry, status: int) -> None:
        """The runtime has exited: either the sandbox runs, or it says why not."""
        self.launching -= 1
        entry.runtime_pid = 0
        try:
            if entry.started is not None:
                raise OSError(f"it ended before its VMM ran: status {os.waitstatus_to_exitcode(status)}")
            if status:
                raise OSError(f"exit status {os.waitstatus_to_exitcode(status)}")
            if entry.channel is not None:
                _, fds, _, _ = socket.recv_fds(entry.channel, 1, 1)
                entry.disk = fds[0] if fds else None
            with open(entry.directory + "/init.pid", encoding="ascii") as file:
                entry.init_pid = int(file.read())
            if entry.order.get("door"):
                entry.door = door.Door(entry.directory, entry.order["door"])
                self.selector.register(entry.door.listener, selectors.EVENT_READ, entry.door)
            for name, value in entry.order["rlimits"].items():
                # Allowed: we own the user namespace it runs in. Its commands inherit them.
                resource.prlimit(entry.init_pid, getattr(resource, name), (value, value))
        except (OSError, ValueError) as error:
            if entry.init_pid and entry.init_pid not in self.strays:
                os.kill(entry.init_pid, signal.SIGKILL)
            if entry.asked_cause:
                self.fail(entry, stage="killed", detail=entry.asked_detail or entry.asked_cause)
            else:
                self.fail(entry, stage="", detail=str(error))
        else:
            entry.order.pop("config", None)  # the runtime's: 60 KB, of thousands that live
            if entry.init_pid in self.strays:
                self.finish(entry, self.strays.pop(entry.init_pid))
            else:
                self.by_pid[entry.init_pid] = entry
                self.write_record(entry)
                if entry.asked_cause:
                    self.signal(entry)
                if entry.order.get("network"):
                    self.networks.running(entry)
                else:
                    self.answer_launch(entry)
        self.start_queued()

    def fail(self, entry: Entry, *, stage: str, detail: str) -> None:
        text = ""
        if entry.started is not None:
            entry.started.errors.drain()
            text = entry.started.errors.text.decode("utf-8", "replace").strip()
        with contextlib.suppress(OSError), open(entry.directory + "/launch.err", encoding="utf-8") as file:
            text = file.read(8192).strip()
        detail = text.splitlines()[-1] if text else detail
        if not stage and entry.started is not None:
            head, _, rest = detail.partition(": ")
            stage, detail = (head, rest) if head in machine.STAGES else ("vmm", detail)
        elif not stage:
            head, colon, rest = detail.partition(": ")
            stage, detail = (
                (head, rest) if colon and "time=" not in head and len(head) < 20 else ("runtime", detail)
            )
        if entry.reply is not None:
            entry.reply[0].send({"id": entry.reply[1], "error": {"stage": stage, "detail": detail}})
            entry.reply = None
        entry.asked_cause = entry.asked_cause or "infra"
        entry.asked_detail = f"{stage}: {detail}"
        self.finish(entry, status=-1)

    def write_record(self, entry: Entry) -> None:
        start = ""
        if entry.init_pid:
            with contextlib.suppress(OSError), open(f"/proc/{entry.init_pid}/stat", encoding="utf-8") as file:
                start = file.read().rpartition(")")[2].split()[19]
        record = {
            **entry.order["record"],
            "keeper": self.directory,
            "userns": entry.order["userns"],
            "init_pid": entry.init_pid,
            "init_start": start,
            "expires": entry.expires,
            "paused": entry.stillness[1],
        }
        temporary = entry.directory + "/record.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(record, file)
        os.rename(temporary, entry.directory + "/record.json")

    def stillness_changed(self, entry: Entry) -> None:
        """Tells every client that a sandbox stands still, or runs again."""
        self.write_record(entry)
        still, paused = entry.stillness
        for peer in self.peers:
            peer.send({"event": "still", "sandbox": entry.id, "still": still, "paused": paused})

    # -- ending
    # ------------------------------------------------------------------------------------------------

    def kill(self, entry: Entry, *, cause: str, detail: str) -> None:
        if not entry.asked_cause:
            entry.asked_cause, entry.asked_detail = cause, detail
            entry.deadline = time.monotonic() + GRACE_S
        if entry in self.queue:
            self.queue.remove(entry)
            self.fail(entry, stage="killed", detail=detail)
        else:
            self.signal(entry)

    def signal(self, entry: Entry, *, force: bool = False) -> None:
        """Kills what there is. A launch is let finish first, since crun and runc work on in children of their own.

        force: the launch has had its time; its whole process group goes.
        """
        if entry.init_pid in self.by_pid:  # not yet reaped, so the number cannot have been reused
            os.kill(entry.init_pid, signal.SIGKILL)
            if entry.hold is not None:
                cgroups.thaw(entry.order["cgroup"])
        elif force and entry.runtime_pid in self.by_pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(entry.runtime_pid, signal.SIGKILL)

    def finish(self, entry: Entry, status: int) -> None:
        """The first process is gone (or never came): name the cause, remove everything, tell everybody."""
        self.entries.pop(entry.id, None)
        self.by_pid.pop(entry.init_pid, None)
        self.holds.ended(entry)
        if entry.door is not None:
            self.selector.unregister(entry.door.listener)
            entry.door.close()
        self.networks.drop(entry)
        if entry.channel is not None:
            entry.channel.close()
        if entry.disk is not None:
            os.close(entry.disk)
            entry.disk = None
        path = entry.order["cgroup"]
        cause, detail = entry.asked_cause, entry.asked_detail
        if entry.started is not None:
            killed = bool(path) and cgroups.OomCounter(path).read() > 0
            said = self.close_machine(entry.started)
            if not cause:
                cause, detail = machine.verdict(status, console=said[0], errors=said[1], oom_killed=killed)
        if not cause:
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGKILL and path and cgroups.OomCounter(path).read():
                cause, detail = "oom", "the memory limit killed its first process"
            elif code < 0:
                cause, detail = "infra", f"its first process died of signal {-code}"
            else:
                cause, detail = "exited", f"its first process exited with {code}"
        if path:
            cgroups.kill_all(path)
            stuck = cgroups.remove(path)
            if stuck:
                detail += f"; cgroups left: {' '.join(stuck)}"
        remove_directory(entry.directory, entry.order["userns"])
        leases.give(entry.leases)
        for path in entry.order.get("leases", []):
            if leases.is_fork(place := os.path.dirname(path)):
                self.unused[place] = (0.0, 0.05)
        self.remove_unused()
        if entry.order["trajectory"]:
            try:
                from rorqual.sandbox import trajectory_store  # sqlite3 is loaded when first needed

                trajectory_store.append_end(
                    entry.order["trajectory"], sandbox=entry.id, cause=cause, detail=detail
                )
            except Exception as error:
                detail += f"; its end is not in the trajectory log: {error}"
        for peer, number in entry.waiters:
            peer.send({"id": number, "cause": cause, "detail": detail})
        for peer in self.peers:
            peer.send({"event": "ended", "sandbox": entry.id, "cause": cause, "detail": detail})

    def close_machine(self, started: machine.Started) -> tuple[bytes, bytes]:
        """Reads what a dead VMM has left in its pipes and closes them: the console's and its own last words."""
        for tail in (started.console, started.errors):
            tail.drain()
            with contextlib.suppress(KeyError):
                self.selector.unregister(tail.fd)
            tail.close()
        with contextlib.suppress(KeyError):
            self.selector.unregister(started.exec_read)
        os.close(started.exec_read)
        return started.console.text, started.errors.text


def children() -> list[int]:
    """Process ids of this process's children; [] where the kernel does not tell."""
    with (
        contextlib.suppress(OSError),
        open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file,
    ):
        return [int(pid) for pid in file.read().split()]
    return []


def remove_directory(directory: str, userns: dict[str, str] | None) -> None:
    """Removes a sandbox's directory. Rootless, files of other container users need the same user namespace.

    Tried again for a moment: the last process of a runtime that was killed may still be writing its state.
    """
    for _ in range(20):
        if remove_tree(directory):
            return
        if userns is not None:
            break
        time.sleep(0.01)
    else:
        return
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            launch.enter_userns(userns["uid_map"], userns["gid_map"])
            remove_tree(directory)
        os._exit(0)
    os.waitpid(pid, 0)


def main() -> None:
    directory, owner_pid = sys.argv[1], int(sys.argv[2])
    os.umask(0o022)
    # A sandbox takes two descriptors, and a shell's usual limit is 1,024. What it starts has limits of its own.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_FILES), hard))
    keeper = Keeper(directory, owner_pid)
    os.write(1, b"ready\n")
    keeper.run()
