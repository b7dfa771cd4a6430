"""Two waits that a launch need not have: the kernel's before the first move into a cgroup, the runtime's second exec.

A move into a cgroup takes the kernel's lock of thread groups, and who takes it first after a while waits for an RCU
grace period, 8 to 20 ms here; for about 10 ms after it moves are quick. `Nudge` has a small process make a move that
changes nothing (into the cgroup it is in) when a launch begins: the wait goes on beside the mounts, not after them.

crun copies itself at each start, against containers that overwrite it (CVE-2019-5736), and executes the copy. `Sealed`
starts it from a sealed copy in memory that the keeper made once: what crun looks for, and nobody can write to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time

from rorqual.sandbox.keeper import cgroups, linux

MOVES = 6
PAUSE_S = 0.004
"""Six moves, 4 ms apart: the window stays open until the runtime is there."""
_ADD_SEALS = 1033
_SEALS = 0xF
"""F_ADD_SEALS; against sealing, shrinking, growing, writing. fcntl(2); Python 3.11 has no names for them."""


class Nudge:
    """Opens the window for quick moves. Idle until `now`; nothing at all where no cgroup is ours."""

    def __init__(self) -> None:
        self._pipe = -1
        self._tried = False

    def now(self) -> None:
        """Begins, and does not wait."""
        if not self._tried:
            self._tried = True
            self._start()
        if self._pipe >= 0:
            with contextlib.suppress(OSError):  # full: it is at it
                os.write(self._pipe, b"x")

    def _start(self) -> None:
        file = _own_procs()
        if not file:
            return
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError:
            os.close(theirs)
            os.close(ours)
            return
        if pid == 0:
            with contextlib.suppress(BaseException):
                _move(theirs, file)
            os._exit(0)
        os.close(theirs)
        os.set_blocking(ours, False)
        self._pipe = ours


def _move(pipe: int, file: str) -> None:
    """The process: one byte, a few moves."""
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    keep = os.dup2(pipe, 3, inheritable=False) if pipe != 3 else 3
    for fd in (0, 1, 2):  # the owner's socket among them: it must be seen to close when the keeper dies
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    os.closerange(4, 1 << 16)
    me = str(os.getpid()).encode()
    while os.read(keep, 4096):
        for _ in range(MOVES):
            fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):
                os.write(fd, me)
            os.close(fd)
            time.sleep(PAUSE_S)


def _own_procs() -> str:
    """cgroup.procs of a cgroup this process is in and may write; '' when there is none."""
    points = cgroups.hierarchies()
    with contextlib.suppress(OSError), open("/proc/self/cgroup", encoding="utf-8") as lines:
        for line in lines:
            _, names, path = line.rstrip("\n").split(":", 2)
            name = names.split(",")[0].removeprefix("name=") or "unified"
            file = f"{points.get(name, '')}{path.rstrip('/')}/cgroup.procs"
            if name in points and os.access(file, os.W_OK):
                return file
    return ""


class Sealed:
    """Copies of runtimes in memory, one each, renewed when the file on disk is another one."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[tuple[int, int, int], int]] = {}

    def path(self, program: str) -> str:
        """What to execute for `program`: its sealed copy, or itself when it cannot be copied or copies are no use."""
        if os.path.basename(program) != "crun":
            return program
        try:
            seen = os.stat(program)
            identity = (seen.st_dev, seen.st_ino, seen.st_mtime_ns)
            made = self._made.get(program)
            if made is None or made[0] != identity:
                if made is not None:
                    os.close(made[1])
                made = self._made[program] = (identity, _seal(program))
        except OSError:
            return program
        return f"/proc/self/fd/{made[1]}"


def _seal(program: str) -> int:
    """A descriptor, open for reading, of a copy that can never change. Raises OSError."""
    fd = os.memfd_create(os.path.basename(program), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(program, "rb") as source:
            while sent := os.sendfile(fd, source.fileno(), None, 1 << 20):
                assert sent > 0
        fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)
