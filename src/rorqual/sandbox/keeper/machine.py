"""One launch of a virtual machine: what happens between the keeper's fork and the exec of its VMM, and why it ended.

Order of the child: process group, death signal -> cgroup -> descriptors -> network namespace -> jail (root only) ->
user -> exec. An order of kind "machine" has, beside what every order has (id, directory, keep, timeout, cgroup,
trajectory, leases, userns: null, record):
    argv, env     the VMM's; `{name}` in an argument is the number of the descriptor `name` of `files`
    files         by name, opened before the user changes:
                  {"path": p, "write": bool}; with "copy": name, a copy of it in the sandbox's directory, to write
                  {"memfd": bytes, "fill": path or null}, memory without a name, which goes with the VMM
                  {"tap": name}, an interface of the VMM's network namespace
    limits        {"memory": bytes | null, "pids": n | null, "cpu": CPUs | null} of the VMM, in the sandbox's cgroup
    user          the uid and gid the VMM runs as (root only), or null
    shown         host directories the VMM sees, read-only; null: no jail, the host's root
    devices       device nodes it may open, of DEVICES
    chroot        the files of a VMM whose own jailer makes the jail and changes the user (keeper/chroot.py), or null
    links         also links to the descriptors, by their names, in the VMM's directory
    network       null: none but lo; otherwise keeper/network.py's business
The VMM starts in `<directory>/vm`, which is its user's, and which the jail shows as /vm; there it makes its sockets.
Its stdout is the guest's console and its stderr its complaints: the keeper keeps the last TAIL bytes of each in memory,
so that no guest fills the host's disk with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import resource
import signal
import stat
import struct
from typing import Any

from rorqual.sandbox.keeper import cgroups, chroot, linux
from rorqual.sandbox.keeper.sparse import copy_sparse

TAIL = 16 << 10
STAGES = ("start", "cgroup", "files", "namespaces", "network", "jail", "user", "exec")
DEVICES = ("null", "zero", "full", "random", "urandom", "kvm", "net/tun")
_CLONE_NEWNET = 0x40000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUTS = 0x04000000
_MS_MOVE = 8192
_MS_NOEXEC = 8
_PR_SET_NO_NEW_PRIVS = 38
_JAIL = "/mnt"
_PANIC = re.compile(rb"Kernel panic - not syncing: ([^\r\n]*)")
_AGENT = re.compile(rb"rorqual-guest: ([^\r\n]*)")


class Tail:
    """The last bytes of a pipe."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._kept = b""

    def read(self) -> bool:
        """Takes what is there; False once the other end is closed."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._kept = (self._kept + data)[-TAIL:]
        return bool(data)

    def drain(self) -> None:
        """What a dead process has left, at most a pipe's capacity."""
        for _ in range(20):
            before = self._kept
            if not self.read() or self._kept == before:
                return

    @property
    def text(self) -> bytes:
        return self._kept

    def close(self) -> None:
        os.close(self.fd)


class Started:
    """The pipe that closes at the VMM's exec, and with what its output is read."""

    def __init__(self) -> None:
        self.exec_read, self.exec_write = os.pipe2(os.O_CLOEXEC)
        console, self.console_write = os.pipe2(os.O_CLOEXEC)
        errors, self.errors_write = os.pipe2(os.O_CLOEXEC)
        self.console, self.errors = Tail(console), Tail(errors)

        self._said = b""

    def ran(self) -> bool | None:
        """Whether the VMM runs; None while that is open. Call when `exec_read` is readable."""
        data = os.read(self.exec_read, 16)
        self._said += data
        return None if data else self._said == b"exec"

    def forked(self) -> None:
        """In the keeper, after the fork: the child's ends are the child's."""
        for fd in (self.exec_write, self.console_write, self.errors_write):
            os.close(fd)


def verdict(status: int, *, console: bytes, errors: bytes, oom_killed: bool) -> tuple[str, str]:
    """(cause, detail) of a machine that nobody asked to end, from its VMM's wait status and last words."""
    code = os.waitstatus_to_exitcode(status)
    panics = _PANIC.findall(console)
    if panics:
        reason = panics[-1].decode("utf-8", "replace")[:200]
        if "Out of memory" in reason or "deadlocked on memory" in reason:
            return "oom", f"the guest's kernel panicked: {reason}"
        if "Attempted to kill init" in reason:
            words = _AGENT.findall(console)
            last = words[-1].decode("utf-8", "replace")[:200] if words else reason
            return "infra", f"the guest agent died, and its kernel panicked: {last}"
        return "infra", f"the guest's kernel panicked: {reason}"
    if code == -signal.SIGKILL and oom_killed:
        return "oom", "the host's memory limit killed its VMM"
    if code < 0:
        return "infra", f"its VMM died of signal {-code}"
    if code:
        words = errors.decode("utf-8", "replace").strip().splitlines()
        return "infra", f"its VMM exited with {code}: {words[-1][:200] if words else 'no message'}"
    return "exited", "the machine was switched off or rebooted"


def run(order: dict[str, Any], started: Started) -> None:
    """Runs in the forked child; ends in exec, or writes `stage: reason` to the VMM's stderr and exits 70."""
    stage = "start"
    try:
        os.setpgid(0, 0)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open("/dev/null", os.O_RDWR)
        for target, source in ((0, null), (1, started.console_write), (2, started.errors_write)):
            os.dup2(source, target)
        if order["cgroup"]:
            stage = "cgroup"
            limits = order["limits"]
            cgroups.make(order["cgroup"], memory=limits["memory"], pids=limits["pids"], cpu=limits["cpu"])
            cgroups.join(order["cgroup"], os.getpid())
        stage = "files"
        taps = {name: item for name, item in order["files"].items() if "tap" in item}
        numbers = {
            name: _open(name, item, order) for name, item in order["files"].items() if name not in taps
        }
        home, user = order["directory"] + "/vm", order["user"]
        os.mkdir(home, 0o700)
        for name, number in numbers.items() if order.get("links") else ():
            os.symlink(f"/proc/self/fd/{number}", f"{home}/{name}")
        if user is not None:
            os.chown(home, user, user)
        stage = "namespaces"
        root = os.geteuid() == 0
        if root:
            if order.get("network") is None:
                linux.unshare(_CLONE_NEWNET)
            linux.unshare(linux.CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWUTS)
            linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
        if order.get("network") is not None:
            stage = "network"
            _enter_network(order["network"])
            numbers |= {name: _open_tap(item["tap"]) for name, item in taps.items()}
        argv = [_fill(argument, numbers) for argument in order["argv"]]
        stage = "jail"
        if order.get("chroot") is not None:
            chroot.prepare(home, order["chroot"])
        elif root and order["shown"] is not None:
            _jail(order, home)
            home = "/vm"
        os.chdir(home)
        stage = "user"
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials clears it
        linux.prctl(_PR_SET_NO_NEW_PRIVS, 1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the guest's memory
        os.umask(0o077)
        stage = "exec"
        os.write(started.exec_write, b"exec")  # believed once the other end sees the pipe closed
        os.execve(argv[0], argv, order["env"])
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(started.exec_write, b" failed")
            os.write(2, f"{stage}: {error}\n".encode())
        os._exit(70)


def _open(name: str, item: dict[str, Any], order: dict[str, Any]) -> int:
    """An inheritable descriptor."""
    if "memfd" in item:
        fd = os.memfd_create(f"rorqual-{name}", 0)
        os.ftruncate(fd, item["memfd"])
        if item.get("fill"):
            _copy(item["fill"], fd)
    elif "copy" in item:
        fd = os.open(f"{order['directory']}/{item['copy']}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _copy(item["path"], fd)
        if order["user"] is not None:
            os.fchown(fd, order["user"], order["user"])
    else:
        fd = os.open(item["path"], os.O_RDWR if item.get("write") else os.O_RDONLY)
    os.set_inheritable(fd, True)
    return fd


def _copy(source: str, fd: int) -> None:
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        copy_sparse(reader, fd)
    finally:
        os.close(reader)


def _open_tap(name: str) -> int:
    """TUNSETIFF with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR (linux/if_tun.h)."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000 | 0x4000))
    os.set_inheritable(fd, True)
    return fd


def _fill(argument: str, numbers: dict[str, int]) -> str:
    """Replaces `{name}` by a descriptor's number; braces around anything else (JSON) stay."""
    return re.sub(
        r"\{([a-z][a-z0-9_]*)\}",
        lambda match: str(numbers[match[1]]) if match[1] in numbers else match[0],
        argument,
    )


def _enter_network(network: dict[str, Any]) -> None:
    """setns(2) into the namespace that keeper/network.py has made."""
    fd = os.open(network["netns"], os.O_RDONLY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns {network['netns']}: {os.strerror(error)}")
    os.close(fd)


def _jail(order: dict[str, Any], home: str) -> None:
    """A root of its own: the directories shown, read-only, its devices, its own processes in /proc, and /vm."""
    linux.mount(
        "tmpfs", _JAIL, fstype="tmpfs", flags=linux.MS_NOSUID | linux.MS_NODEV, data="size=1m,mode=755"
    )
    for path in order["shown"]:
        target = _JAIL + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            linux.bind(path, target, readonly=True)
        elif os.path.exists(path):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
            linux.bind(path, target, readonly=True)
    os.mkdir(_JAIL + "/dev", 0o755)
    linux.mount(
        "tmpfs",
        _JAIL + "/dev",
        fstype="tmpfs",
        flags=linux.MS_NOSUID | _MS_NOEXEC,
        data="size=64k,mode=755",
    )
    for name in order["devices"]:
        if name not in DEVICES or not os.path.exists(f"/dev/{name}"):
            raise ValueError(f"/dev/{name}: not there, or not a device a machine may have")
        node = f"{_JAIL}/dev/{name}"
        os.makedirs(os.path.dirname(node), exist_ok=True)
        private = name in ("kvm", "net/tun")
        os.mknod(node, stat.S_IFCHR | (0o600 if private else 0o666), os.stat(f"/dev/{name}").st_rdev)
        os.chmod(node, 0o600 if private else 0o666)
        if private and order["user"] is not None:
            os.chown(node, order["user"], order["user"])
    os.mkdir(_JAIL + "/proc", 0o755)
    flags = linux.MS_NOSUID | linux.MS_NODEV | _MS_NOEXEC
    linux.mount("proc", _JAIL + "/proc", fstype="proc", flags=flags, data="hidepid=2")
    for name in ("vm", "tmp"):
        os.mkdir(f"{_JAIL}/{name}", 0o755)
    linux.mount(home, _JAIL + "/vm", flags=linux.MS_BIND)
    os.chdir(_JAIL)
    linux.mount(_JAIL, "/", flags=_MS_MOVE)
    os.chroot(".")
    os.chdir("/")
