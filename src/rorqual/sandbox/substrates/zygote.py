"""What runs inside a function's sandbox: PID 1 with Python warm, one worker per slot, one child per call.

Read as text by function.py and executed by the image's own Python (3.9 or newer): standard library only, imports
nothing of ours. Three kinds of process, each trusting only what is above it:
  zygote  imports the modules, makes every mount read-only, keeps `workers` workers alive
  worker  holds one connection to the client; prepares the next call's child, feeds it, reads it, kills it, answers
  child   PID 1 of its own process namespace; no capability, no descriptor but its own pipes; runs the code
The worker parses nothing that a child wrote: it counts bytes and passes them on. A child is prepared (namespaces,
mounts, ids, filter) before its call arrives, from a process that never ran anybody's code (spec/sandbox.md, 1.2, 8).

Frames both ways: two big-endian u32 (bytes of JSON head, bytes of blob), the head, the blob.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import linecache
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types
from typing import Any, NoReturn

FRAME = struct.Struct("!II")
MAX_FRAME = 16 << 20
CONFIG = "/.rorqual/function.json"
LISTENER = 3
_REQUEST, _RESULT = 3, 4
"""A child's only descriptors beside 0, 1 and 2."""
_CHUNK = 1 << 16
_TEXT = 1 << 16
"""Characters of a traceback that are kept."""
_NEWNS, _NEWIPC, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS = 1, 4, 22, 24, 38
_CLOSE_RANGE, _MOUNT_SETATTR = 436, 442  # the same numbers on every architecture
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, step: str) -> None:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{step}: {os.strerror(errno)}")


def mount(fstype: str, target: str, flags: int, data: str) -> None:
    done = libc.mount(fstype.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode())
    check(done, f"mount {fstype} at {target}")


def receive(sock: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """One frame from the client; None when it has hung up."""
    head = read_exactly(sock, FRAME.size)
    if head is None:
        return None
    sizes = FRAME.unpack(head)
    if sum(sizes) > MAX_FRAME:
        return None
    text, blob = read_exactly(sock, sizes[0]), read_exactly(sock, sizes[1])
    if text is None or blob is None:
        return None
    return json.loads(text), blob


def read_exactly(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(min(count - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def send(sock: socket.socket, head: dict[str, Any], blob: bytes = b"") -> None:
    text = json.dumps(head).encode()
    sock.sendall(FRAME.pack(len(text), len(blob)) + text + blob)


# --- the zygote --------------------------------------------------------------------------------------------


def close_the_house() -> None:
    """Every mount read-only and without setuid; no capability can be gained back by an exec."""
    attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)  # struct mount_attr: RDONLY | NOSUID
    recursive = 0x8000
    size = ctypes.c_size_t(len(attributes))
    check(
        libc.syscall(_MOUNT_SETATTR, -100, b"/", recursive, attributes, size), "read-only mounts (Linux 5.12)"
    )
    for capability in range(64):
        if libc.prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break  # EINVAL: past the last one of this kernel


def main() -> None:
    with open(CONFIG, encoding="utf-8") as file:
        config = json.load(file)
    failure, stage = "", "mounts"
    try:
        close_the_house()
        stage = "imports"
        for name in config["imports"]:
            importlib.import_module(name)
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"[:_TEXT]
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    config["program"] = bytes.fromhex(config["program"])
    gc.collect()
    gc.freeze()
    listener = socket.socket(fileno=LISTENER)
    workers: set[int] = set()
    while True:
        try:
            while len(workers) < config["workers"]:
                pid = os.fork()
                if pid == 0:
                    with contextlib.suppress(BaseException):
                        Worker(listener, config, (stage, failure)).run()
                    os._exit(0)
                workers.add(pid)
        except OSError:  # the process limit: calls are ending, and their places come back
            time.sleep(0.05)
        try:
            pid, _ = os.wait()
        except ChildProcessError:
            continue
        if pid in workers:
            workers.discard(pid)
            end_orphans(workers)


def end_orphans(workers: set[int]) -> None:
    """A worker that was killed leaves its call's process to us: it ends with the worker."""
    # Without this file (CONFIG_PROC_CHILDREN) their parent-death signal alone ends them.
    with contextlib.suppress(FileNotFoundError), open("/proc/self/task/1/children", encoding="ascii") as file:
        for pid in map(int, file.read().split()):
            if pid not in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


# --- the worker --------------------------------------------------------------------------------------------


class Child:
    """One prepared call, seen from its worker: its process and our ends of its pipes."""

    def __init__(self, pid: int, request: int, stdin: int, streams: tuple[int, int, int]) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.request, self.stdin = request, stdin
        self.streams = streams  # stdout, stderr, result
        self.ready = False
        for fd in (request, stdin, *streams):
            os.set_blocking(fd, False)

    def close(self) -> None:
        for fd in (self.pidfd, self.request, self.stdin, *self.streams):
            with contextlib.suppress(OSError):
                os.close(fd)


class Worker:
    def __init__(self, listener: socket.socket, config: dict[str, Any], failure: tuple[str, str]) -> None:
        self.config = config
        self.failure = failure
        self.conn, _ = listener.accept()
        listener.close()

    def run(self) -> None:
        send(
            self.conn, {"python": sys.version.split()[0], "stage": self.failure[0], "error": self.failure[1]}
        )
        if receive(self.conn) is None:  # the client has put us into our slot's cgroup now
            return
        try:
            check(libc.unshare(_NEWNET), "unshare(network)")
            self.own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            child = self.prepare()
            error = self.first_word(child)
        except OSError as failure:
            error = str(failure)
        send(self.conn, {"error": error})
        while not error:
            request = receive(self.conn)
            if request is None:
                break
            head, blob = request
            answer, data = self.call(child, head, blob)
            send(self.conn, answer, data)
            child = self.prepare()

    def first_word(self, child: Child) -> str:
        """'' when the child got as far as waiting for its call; otherwise why it did not."""
        ready, _, _ = select.select([child.streams[2]], [], [], 30.0)
        if ready and os.read(child.streams[2], 1) == b"R":
            child.ready = True
            return ""
        with contextlib.suppress(BlockingIOError):
            return os.read(child.streams[1], _CHUNK).decode(errors="replace").strip() or "it died"
        return "no answer in 30 s"

    def prepare(self) -> Child:
        (req, req_w), (stdin, stdin_w) = os.pipe(), os.pipe()
        (out_r, out), (err_r, err), (res_r, res) = os.pipe(), os.pipe(), os.pipe()
        # Back to our own process namespace first: a second unshare would be refused, and the last one is dead.
        check(libc.setns(self.own, _NEWPID), "setns")
        check(libc.unshare(_NEWPID), "unshare(processes)")
        pid = os.fork()
        if pid == 0:
            become_call(self.config, req, stdin, out, err, res)
        for fd in (req, stdin, out, err, res):
            os.close(fd)
        return Child(pid, req_w, stdin_w, (out_r, err_r, res_r))

    def call(self, child: Child, head: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        begun = time.monotonic()
        deadline = begun + head["timeout"]
        out_fd, err_fd, res_fd = child.streams
        limits = {out_fd: head["max_output"], err_fd: head["max_output"], res_fd: head["max_value"] + 2}
        kept = {fd: bytearray() for fd in child.streams}
        seen = dict.fromkeys(child.streams, 0)
        writes = {
            child.request: memoryview(blob)[: head["payload"]],
            child.stdin: memoryview(blob)[head["payload"] :],
        }
        poll = select.poll()
        for fd in (*child.streams, child.pidfd, self.conn.fileno()):
            poll.register(fd, select.POLLIN)
        for fd in writes:
            poll.register(fd, select.POLLOUT)
        timed_out = running = True
        while running:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for fd, _ in poll.poll(left * 1000 + 1):
                if fd == child.pidfd:
                    running = timed_out = False
                elif fd == self.conn.fileno():  # hung up, or it spoke out of turn: nobody wants this call
                    os.kill(child.pid, signal.SIGKILL)
                    os._exit(0)
                elif fd in writes:
                    try:
                        writes[fd] = writes[fd][os.write(fd, writes[fd]) if writes[fd] else 0 :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        writes[fd] = memoryview(b"")
                    if not writes[fd]:
                        poll.unregister(fd)
                        os.close(fd)
                        del writes[fd]
                        if fd == child.request:
                            child.request = -1
                        else:
                            child.stdin = -1
                elif not self.take(fd, kept, seen, limits):
                    poll.unregister(fd)
        os.kill(child.pid, signal.SIGKILL)  # not yet reaped, so the number is still its own
        _, status = os.waitpid(child.pid, 0)  # its whole namespace is dead when this returns
        for fd in child.streams:
            while self.take(fd, kept, seen, limits):
                pass
        child.close()
        out, err, result = (bytes(kept[fd]) for fd in child.streams)
        if not child.ready:  # its first byte says that it was set up
            child.ready, result = result[:1] == b"R", result[1:]
        answer = {
            "exit": os.waitstatus_to_exitcode(status),
            "timed_out": timed_out,
            "seconds": time.monotonic() - begun,
            "stdout": len(out),
            "stderr": len(err),
            "value": len(result),
            "cut": seen[out_fd] > len(out) or seen[err_fd] > len(err),
            "ready": child.ready,
        }
        return answer, out + err + result

    def take(self, fd: int, kept: dict[int, bytearray], seen: dict[int, int], limits: dict[int, int]) -> bool:
        """Reads once; keeps what fits. False when there is nothing more for now."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        seen[fd] += len(data)
        kept[fd] += data[: limits[fd] - len(kept[fd])]
        return bool(data)


# --- the child ---------------------------------------------------------------------------------------------


def become_call(config: dict[str, Any], req: int, stdin: int, out: int, err: int, res: int) -> NoReturn:
    """In the forked child: gives up everything, then waits for its call and runs it."""
    try:
        for fd, target in ((stdin, 0), (out, 1), (err, 2)):
            os.dup2(fd, target)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 512) for fd in (req, res)]
        os.dup2(high[0], _REQUEST, inheritable=False)
        os.dup2(high[1], _RESULT, inheritable=False)
        first, last = ctypes.c_uint(_RESULT + 1), ctypes.c_uint(0xFFFFFFFF)
        if libc.syscall(_CLOSE_RANGE, first, last, 0) < 0:  # before Linux 5.9
            os.closerange(_RESULT + 1, 1 << 16)
        libc.prctl(_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        os.setsid()
        check(libc.unshare(_NEWNS | _NEWIPC), "unshare(mounts, ipc)")
        uid, bound = config["uid"], config["scratch"]
        flags = _NOSUID | _NODEV
        mount("tmpfs", "/tmp", flags, f"mode=1777,{bound}")
        mount("tmpfs", config["home"], flags, f"mode=700,uid={uid},gid={uid},{bound}")
        mount("tmpfs", "/dev/shm", flags | _NOEXEC, f"mode=1777,{bound}")
        mount("proc", "/proc", flags | _NOEXEC, "subset=pid")
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # when the memory limit kills, it kills the call, not its worker
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.umask(0o022)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # and every capability is gone
        libc.prctl(_DUMPABLE, ctypes.c_ulong(1), 0, 0, 0)  # so that /proc/self is its own
        os.chdir(config["home"])
        os.environ.clear()
        os.environ.update(config["envs"])
        check(libc.prctl(_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "no_new_privs")
        program = ctypes.create_string_buffer(config["program"])

        class Filter(ctypes.Structure):  # struct sock_fprog
            _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

        whole = Filter(len(config["program"]) // 8, ctypes.addressof(program))
        check(libc.prctl(_SECCOMP, ctypes.c_ulong(2), ctypes.byref(whole), 0, 0), "seccomp")
        os.write(_RESULT, b"R")
        data = bytearray()
        while part := os.read(_REQUEST, 1 << 20):
            data += part
        os.close(_REQUEST)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(2, f"{error}".encode())
        os._exit(70)
    if not data:  # the worker is gone
        os._exit(0)
    serve(json.loads(data))


def serve(request: dict[str, Any]) -> NoReturn:
    """Runs the code; writes one JSON document; ends, and with it every process of the call."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv[:] = [""]
    linecache.cache["<call>"] = (
        len(request["code"]),
        None,
        request["code"].splitlines(keepends=True),
        "<call>",
    )
    status, document = 0, {}
    try:
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed()  # Python's own generator is seeded anew by fork, numpy's is not
        value = evaluate(request, main.__dict__)
        try:
            text = json.dumps({"value": value})
        except (TypeError, ValueError, RecursionError) as error:
            kind = type(value).__name__
            raise TypeError(f"the value, of type {kind}, is not JSON: {error}") from None
    except SystemExit as error:
        text = "{}"
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if error.code is not None and not isinstance(error.code, int):
            with contextlib.suppress(BaseException):
                sys.stderr.write(f"{error.code}\n")
    except BaseException as error:
        status, document = 1, {"error": described(error)}
        text = json.dumps(document)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    if os.getpid() == 1:  # a fork of the code that fell through has no say in the value
        with contextlib.suppress(OSError):
            rest = memoryview(text.encode())
            while rest:
                rest = rest[os.write(_RESULT, rest) :]
    os._exit(status & 0xFF)


def described(error: BaseException) -> dict[str, str]:
    """Type, message, traceback. The objects are the call's: nothing of them may surprise us."""
    try:
        message = str(error)[:_TEXT]
    except BaseException as second:
        message = f"<no message: {type(second).__name__}>"
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != "<call>":
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace))[-_TEXT:]
    except BaseException as second:
        text = f"<no traceback: {type(second).__name__}>"
    return {"type": type(error).__name__, "message": message, "traceback": text}


def evaluate(request: dict[str, Any], space: dict[str, Any]) -> Any:
    """The value: what the named function returns, else the last expression, else `result`."""
    space["args"] = request["args"]
    tree = ast.parse(request["code"], "<call>")
    last = None
    if not request["name"] and tree.body and isinstance(tree.body[-1], ast.Expr):
        last = compile(ast.Expression(tree.body.pop().value), "<call>", "eval")
    exec(compile(tree, "<call>", "exec"), space)
    if request["name"]:
        return space[request["name"]](*request["args"])
    return eval(last, space) if last is not None else space.get("result")


if __name__ == "__main__":
    main()
