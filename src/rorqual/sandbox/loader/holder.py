"""The layer holder's loop: mounts each layer once, hands out copies of the mounts, keeps the loader alive.

<run>/layers/{lock, holder.sock, holder.log, m/}. Requests are one JSON line each over the socket (0700 directory):
{"op": "trees", "layers": [names]} answers with detached mounts as descriptors, in order. A name is a file or directory
of <state>/layers: <64 hex>.erofs or <64 hex>.lazy, nothing else. Lives while a client is connected or a keeper of its
run directory lives, and IDLE_S longer. The worker that serves FUSE is a child: when it dies, the next one takes the
connection over and the kernel sends again what it had not answered.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import selectors
import signal
import socket
import sys
import time
from typing import Any

from rorqual.sandbox.keeper import linux
from rorqual.sandbox.keeper.erofs import mount_erofs
from rorqual.sandbox.keeper.launch import listen
from rorqual.sandbox.loader import fuse
from rorqual.sandbox.loader.events import EventLog

NAME = re.compile(r"[0-9a-f]{64}\.(erofs|lazy)")
MAX_LAYERS = 200
"""Of one request: a message carries at most 253 descriptors."""
IDLE_S = 5.0
_TICK_S = 1.0
_RESTARTS = 5
"""Within _RESTART_S, then the holder gives up: reads of remote layers fail instead of hanging."""
_RESTART_S = 10.0
_MAX_LINE = 1 << 16


class Holder:
    def __init__(self, directory: str, layers: str) -> None:
        self.directory = directory
        self.layers = layers
        self.lock = os.open(f"{directory}/lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.events = EventLog(layers)
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
        self.place = f"{directory}/m"
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.place, 0o700)
        linux.mount("tmpfs", self.place, fstype="tmpfs", data="size=4m,mode=700")
        os.mkdir(f"{self.place}/remote", 0o700)
        self.mounted: dict[str, str] = {}
        """Layer -> how it is mounted: 'file', 'loop' or 'lazy'."""
        self.identities: dict[str, tuple[int, int]] = {}
        """Layer -> device and inode of what was mounted."""
        self.fuse_fd: int | None = None
        self.can_resend = False
        self.worker = 0
        self.starts: list[float] = []
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        self.selector = selectors.DefaultSelector()
        self.wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.wake, selectors.EVENT_READ, "wake")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/holder.sock")  # of a dead one: we hold the lock
        self.listener = listen(directory, "holder.sock")
        self.selector.register(self.listener, selectors.EVENT_READ, "listen")
        self.peers: dict[socket.socket, bytes] = {}

    # -- loop
    # ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        needed = time.monotonic()
        checked = 0.0
        while True:
            for key, _ in self.selector.select(_TICK_S):
                if key.data == "wake":
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wake, 4096)
                    if not self.reap():
                        return
                elif key.data == "listen":
                    peer = self.listener.accept()[0]
                    peer.settimeout(10.0)
                    self.peers[peer] = b""
                    self.selector.register(peer, selectors.EVENT_READ, "peer")
                elif isinstance(key.fileobj, socket.socket):
                    self.read(key.fileobj)
            now = time.monotonic()
            if self.peers:
                needed = now
            if now - checked >= _TICK_S:
                checked = now
                self.forget_removed()
                if not os.path.exists(f"{self.directory}/holder.sock"):
                    return  # the run directory was taken away: nobody can reach us
                if not self.peers and now - needed >= IDLE_S:
                    if not self.keeper_lives():
                        return
                    needed = now

    def keeper_lives(self) -> bool:
        """A keeper holds its lock as long as it lives, and lives as long as its sandboxes."""
        keepers = os.path.join(os.path.dirname(self.directory), "keepers")
        try:
            names = os.listdir(keepers)
        except FileNotFoundError:
            return False
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(f"{keepers}/{name}/lock", os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return True
                finally:
                    os.close(fd)
        return False

    def read(self, peer: socket.socket) -> None:
        try:
            data = peer.recv(_MAX_LINE)
        except OSError:
            data = b""
        if not data or len(self.peers[peer]) > _MAX_LINE:
            self.drop(peer)
            return
        *lines, self.peers[peer] = (self.peers[peer] + data).split(b"\n")
        for line in lines:
            fds: list[int] = []
            try:
                answer = self.handle(json.loads(line), fds)
            except (OSError, ValueError, KeyError, TypeError) as error:
                answer = {"error": str(error)}
            try:
                socket.send_fds(peer, [json.dumps(answer).encode() + b"\n"], fds)
            except OSError:
                self.drop(peer)
                return
            finally:
                for fd in fds:
                    os.close(fd)

    def drop(self, peer: socket.socket) -> None:
        self.selector.unregister(peer)
        del self.peers[peer]
        peer.close()

    def handle(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        op = request["op"]
        if op == "status":
            return {"pid": os.getpid(), "worker": self.worker, "mounted": self.mounted}
        if op not in ("trees", "prepare"):
            raise ValueError(f"unknown operation {op!r}")
        names = request["layers"]
        if not isinstance(names, list) or len(names) > MAX_LAYERS:
            raise ValueError(f"at most {MAX_LAYERS} layers at once")
        for name in names:
            self.mount(name)
            if op == "trees":
                fds.append(linux.open_tree(f"{self.place}/{name}"))
        return {"layers": [self.mounted[name] for name in names]}

    # -- mounts
    # ------------------------------------------------------------------------------------------------

    def mount(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is not the name of a layer")
        source, target = f"{self.layers}/{name}", f"{self.place}/{name}"
        identity = _identity(source)
        if identity is None:
            raise FileNotFoundError(2, f"layer {name[:12]} is not on this host: {source}")
        if name in self.mounted:
            if self.identities[name] == identity:
                return
            self.forget(name)  # removed, and here again
        with contextlib.suppress(FileExistsError):
            os.mkdir(target, 0o700)
        if name.endswith(".erofs"):
            self.mounted[name] = mount_erofs(source, target)
        elif os.path.exists(f"{source}/complete"):
            self.mounted[name] = mount_erofs(f"{source}/meta.erofs", target, devices=[f"{source}/data"])
        else:
            self.serve()
            self.mount_lazy(f"{source}/meta.erofs", target, f"{self.place}/remote/{name}")
            self.mounted[name] = "lazy"
        self.identities[name] = identity

    def mount_lazy(self, meta: str, target: str, data: str) -> None:
        """In a child: the mount waits for the loader, and when that dies, we are the one who starts the next."""
        read, write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                mount_erofs(meta, target, devices=[data])
                os._exit(0)
            except BaseException as error:
                os.write(write, str(error).encode()[:4000])
            os._exit(1)
        os.close(write)
        with open(read, "rb") as pipe:
            while True:
                ended, status = os.waitpid(-1, 0)
                if ended == pid:
                    break
                if not self.ended(ended, status):
                    os.kill(pid, signal.SIGKILL)
                    raise OSError(errno.EIO, "the loader dies again and again: see layer_events()")
            if status:
                raise OSError(errno.EIO, pipe.read().decode(errors="replace") or "the mount was killed")

    def forget_removed(self) -> None:
        """Lets go of layers that were removed from the store; sandboxes that have them keep them."""
        for name in list(self.mounted):
            if _identity(f"{self.layers}/{name}") != self.identities[name]:
                self.forget(name)

    def forget(self, name: str) -> None:
        linux.umount(f"{self.place}/{name}")
        os.rmdir(f"{self.place}/{name}")
        del self.mounted[name], self.identities[name]

    # -- the loader
    # ------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Makes the FUSE mount and its server, once."""
        if self.fuse_fd is not None:
            return
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,max_read=1048576"
            flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
            linux.mount("rorqual", f"{self.place}/remote", fstype="fuse", flags=flags, data=data)
            self.can_resend = fuse.handshake(fd)
        except BaseException:
            os.close(fd)
            raise
        self.fuse_fd = fd
        self.start_worker()

    def start_worker(self) -> None:
        assert self.fuse_fd is not None
        self.starts = [*self.starts[-_RESTARTS:], time.monotonic()]
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(0)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                self.listener.close()
                for peer in self.peers:
                    peer.close()
                fuse.Server(self.fuse_fd, self.layers, report=self.events.report).run()
            except BaseException as error:
                with contextlib.suppress(BaseException):
                    self.events.report("loader", detail=repr(error))
            os._exit(1)
        self.worker = pid

    def reap(self) -> bool:
        """False when remote layers cannot be served any more."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return True
            if not self.ended(pid, status):
                return False

    def ended(self, pid: int, status: int) -> bool:
        """A child has ended: replaces the loader, if it was that. False when it cannot be."""
        if pid != self.worker:
            return True
        code = os.waitstatus_to_exitcode(status)
        recent = len(self.starts) > _RESTARTS and time.monotonic() - self.starts[0] < _RESTART_S
        self.events.report("loader", detail=f"the loader died ({code}); {'giving up' if recent else 'again'}")
        if recent or self.fuse_fd is None:
            return False
        self.start_worker()
        try:
            fuse.resend(self.fuse_fd)
        except OSError as error:
            self.events.report("loader", detail=f"reads under way are lost: {error}")
            return False
        return True


def _identity(path: str) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def main() -> None:
    directory, layers = sys.argv[1], sys.argv[2]
    os.umask(0o077)
    try:
        holder = Holder(directory, layers)
    except OSError as error:
        os.write(1, f"{error}\n".encode())
        sys.exit(1)
    os.write(1, b"ready\n")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    holder.run()
