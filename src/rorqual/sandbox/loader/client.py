"""The client's side of the layer holder: starts one per state directory, asks it for mounts. Standard library only.

`connect` and `trees` are what a launch child calls; `prepare` starts the holder where none lives and has it mount,
before the launch, so that an error has a name. One idle connection per process keeps the holder alive.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

_TIMEOUT_S = 60.0
_BOOT = """
import sys, types
for name, path in (("rorqual", {0!r}), ("rorqual.sandbox", {1!r})):
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
from rorqual.sandbox.loader.holder import main
main()
"""


class HolderError(Exception):
    """The holder refused, or does not answer."""


_lock = threading.Lock()
_connections: dict[str, tuple[int, socket.socket]] = {}
"""Holder directory -> (process id, connection): a forked child makes its own."""


def connect(directory: str) -> socket.socket:
    """Raises OSError when no holder listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(_TIMEOUT_S)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{fd}/holder.sock")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(fd)
    return sock


def ask(sock: socket.socket, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """(answer, descriptors). Raises HolderError with the holder's words, OSError when it is gone."""
    sock.sendall(json.dumps(request).encode() + b"\n")
    line, fds = b"", []
    try:
        while not line.endswith(b"\n"):
            data, more, _, _ = socket.recv_fds(sock, 1 << 16, 253)
            fds += more
            if not data:
                raise ConnectionResetError("the layer holder ended")
            line += data
        for fd in fds:
            os.set_inheritable(fd, False)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise HolderError(answer["error"])
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return answer, fds


def trees(directory: str, names: list[str]) -> list[int]:
    """Detached mounts of these layers, as descriptors for move_mount. Raises HolderError, OSError."""
    sock = connect(directory)
    try:
        return ask(sock, {"op": "trees", "layers": names})[1]
    finally:
        sock.close()


def prepare(directory: str, layers: str, names: list[str]) -> list[str]:
    """Has a holder mount these layers, starting it where none lives. Returns how each is mounted.

    Raises:
        HolderError: it cannot; the text says what and why.
    """
    with _lock:
        for attempt in (1, 2):
            sock = _connection(directory, layers)
            try:
                answer, _ = ask(sock, {"op": "prepare", "layers": names})
                how: list[str] = answer["layers"]
                return how
            except OSError as error:
                _connections.pop(directory, None)
                sock.close()
                if attempt == 2:
                    raise HolderError(f"the layer holder does not answer: {error}") from error
        raise AssertionError


def status(directory: str) -> dict[str, Any]:
    """What a living holder says of itself. Raises OSError when there is none."""
    sock = connect(directory)
    try:
        return ask(sock, {"op": "status"})[0]
    finally:
        sock.close()


def close_all() -> None:
    """Lets go of every holder; without a client and a keeper they end."""
    with _lock:
        for _, sock in _connections.values():
            sock.close()
        _connections.clear()


def _connection(directory: str, layers: str) -> socket.socket:
    pid, sock = _connections.get(directory, (0, None))
    if sock is not None and pid == os.getpid():
        return sock
    if sock is not None:
        sock.close()
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        fd = os.open(f"{directory}/start", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # two clients at once start one holder
            try:
                sock = connect(directory)
            except OSError:
                _start(directory, layers)
                sock = connect(directory)
        finally:
            os.close(fd)
    except OSError as error:
        raise HolderError(f"the layer holder cannot be started in {directory}: {error}") from error
    _connections[directory] = (os.getpid(), sock)
    return sock


def _start(directory: str, layers: str) -> None:
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = _BOOT.format(package, f"{package}/sandbox")
    log = os.open(f"{directory}/holder.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        # An intermediate process, so that the holder is nobody's child and leaves no zombie in a client.
        read, write = os.pipe2(os.O_CLOEXEC)
        with open(read, "rb") as pipe:
            spawn = (
                "import os,sys\n"
                "if os.fork(): os._exit(0)\n"
                "os.setsid()\n"
                "os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', *sys.argv[1:]])"
            )
            try:
                subprocess.run(
                    [sys.executable, "-I", "-S", "-c", spawn, code, directory, layers],
                    stdin=subprocess.DEVNULL,
                    stdout=write,
                    stderr=log,
                    cwd="/",
                    check=True,
                )
            finally:
                os.close(write)
            line = pipe.readline()
    except (OSError, subprocess.CalledProcessError) as error:
        raise HolderError(f"the layer holder does not start: {error}") from error
    finally:
        os.close(log)
    if line != b"ready\n":
        with open(f"{directory}/holder.log", encoding="utf-8", errors="replace") as file:
            words = file.read().strip().splitlines()
        text = line.decode(errors="replace").strip() or (words[-1] if words else "no message")
        raise HolderError(f"the layer holder does not start: {text}")
