"""The client's side of the keeper: starts one per process and state directory, and talks to it from any
thread or loop.

Thread-safe: requests go out under a lock, one reader thread resolves futures and calls the `ended` callbacks.
Owns the keeper process; never touches a sandbox itself. After a fork the child starts its own keeper.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rorqual.sandbox import prune
from rorqual.sandbox.errors import HostUnfit, SandboxError
from rorqual.sandbox.state import StateDir

Ended = Callable[[str, str], None]
"""Called in the reader thread with (cause, detail)."""
Still = Callable[[bool, bool], None]
"""Called in the reader thread with (it stands still, it was paused) whenever that changes."""

# Skips the `__init__` of rorqual.sandbox, which loads asyncio and the whole SDK: 20 ms instead of 90 ms to
# ready.
_BOOT = """
import sys, types
for name, path in (("rorqual", {0!r}), ("rorqual.sandbox", {1!r})):
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
from rorqual.sandbox.keeper.main import main
main()
"""


class KeeperDied(SandboxError):
    """The keeper process is gone; its sandboxes are being reaped."""


class KeeperClient:
    """A connection to one keeper: our own (`start`) or another client's (`join`)."""

    def __init__(
        self,
        sock: socket.socket,
        directory: Path,
        process: subprocess.Popen[bytes] | None,
        *,
        on_death: Callable[[], object] | None = None,
    ) -> None:
        self.directory = directory
        self._sock = sock
        self._process = process
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._ended: dict[str, list[Ended]] = {}
        self._over: dict[str, tuple[str, str]] = {}
        self._still: dict[str, list[Still]] = {}
        self.dead = False
        self.keeps = False
        self._closing = False
        self._on_death = on_death
        self._thread = threading.Thread(target=self._read, name="rorqual-keeper", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, state: StateDir) -> KeeperClient:
        """Starts a keeper. Raises HostUnfit when it does not come up."""
        directory = state.keepers / f"{os.getpid()}-{secrets.token_hex(4)}"
        directory.mkdir(mode=0o700)
        package = Path(__file__).resolve().parents[2]
        code = _BOOT.format(str(package), str(package / "sandbox"))
        ours, theirs = socket.socketpair()
        log = os.open(directory / "keeper.log", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, str(directory), str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C at the terminal is the client's to handle
                cwd="/",
            )
        finally:
            os.close(log)
            theirs.close()
        assert process.stdout is not None
        with process.stdout as pipe:
            ready = pipe.readline()
        if ready != b"ready\n":
            ours.close()
            process.wait()
            text = (directory / "keeper.log").read_text(errors="replace").strip()
            raise HostUnfit(
                f"the sandbox keeper did not start: {text.splitlines()[-1] if text else 'no message'}"
            )
        return cls(ours, directory, process, on_death=lambda: prune.reap(state))

    @classmethod
    def join(cls, directory: Path) -> KeeperClient:
        """Connects to a keeper of another client of this user."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            sock.connect(f"/proc/self/fd/{fd}/keeper.sock")
        except OSError as error:
            sock.close()
            raise KeeperDied(f"no keeper answers in {directory}: {error}") from error
        finally:
            os.close(fd)
        return cls(sock, directory, None)

    def request(self, op: str, **fields: Any) -> Future[dict[str, Any]]:
        """Sends one request; the future holds the answer, or raises KeeperDied."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self.dead:
                future.set_exception(KeeperDied("the sandbox keeper is gone"))
                return future
            number = next(self._numbers)
            self._pending[number] = future
            try:
                self._sock.sendall(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
            except OSError as error:
                del self._pending[number]
                future.set_exception(KeeperDied(f"the sandbox keeper is gone: {error}"))
        return future

    def watch(self, sandbox_id: str, callback: Ended) -> None:
        """Calls back once when the sandbox ends; at once when it already has."""
        with self._lock:
            over = self._over.get(sandbox_id)
            if over is None and self.dead:
                over = ("infra", "the sandbox keeper died")
            if over is None:
                self._ended.setdefault(sandbox_id, []).append(callback)
        if over is not None:
            callback(*over)

    def unwatch(self, sandbox_id: str, callback: Ended) -> None:
        """Takes one callback back; those of other holds on the same sandbox stay."""
        with self._lock:
            callbacks = self._ended.get(sandbox_id, [])
            with contextlib.suppress(ValueError):
                callbacks.remove(callback)
            if not callbacks:
                self._ended.pop(sandbox_id, None)
                self._over.pop(sandbox_id, None)

    def watch_still(self, sandbox_id: str, callback: Still) -> None:
        """Calls back each time the sandbox is brought to a standstill or runs again."""
        with self._lock:
            self._still.setdefault(sandbox_id, []).append(callback)

    def unwatch_still(self, sandbox_id: str, callback: Still) -> None:
        with self._lock:
            callbacks = self._still.get(sandbox_id, [])
            with contextlib.suppress(ValueError):
                callbacks.remove(callback)
            if not callbacks:
                self._still.pop(sandbox_id, None)

    def _read(self) -> None:
        buffer = b""
        while True:
            try:
                data = self._sock.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._dispatch(json.loads(line))
        with self._lock:
            self.dead = True
            pending, self._pending = self._pending, {}
            ended, self._ended = self._ended, {}
        for future in pending.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(KeeperDied("the sandbox keeper died"))
        for callbacks in ended.values():
            for callback in callbacks:
                callback("infra", "the sandbox keeper died")
        if self._process is not None:
            with contextlib.suppress(ChildProcessError):
                self._process.wait()
        if self._on_death is not None and not self._closing:
            self._on_death()  # it was killed: what it kept is reaped here, not at the next start

    def _dispatch(self, document: dict[str, Any]) -> None:
        if document.get("event") == "ended":
            verdict = (document["cause"], document["detail"])
            with self._lock:
                callbacks = self._ended.pop(document["sandbox"], None)
                if callbacks is None:
                    self._over[document["sandbox"]] = verdict
                    while len(self._over) > 4096:
                        self._over.pop(next(iter(self._over)))
            for callback in callbacks or ():
                callback(*verdict)
            return
        if document.get("event") == "still":
            with self._lock:
                listening = list(self._still.get(document["sandbox"], ()))
            for tell in listening:
                tell(document["still"], document["paused"])
            return
        with self._lock:
            future = self._pending.pop(document["id"], None)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(document)

    def close(self) -> None:
        """Lets go of the keeper. It ends the sandboxes that are not kept, then itself; waits for that up to
        10 s."""
        lives_on = self.keeps and not self.dead  # asked before the reader takes our hanging up for a death
        self._closing = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            if self._process is not None and not self.keeps:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=10.0)
            # A dead keeper's sandboxes are being reaped in that thread: the process must not end in the middle.
            self._thread.join(timeout=0.2 if lives_on else 10.0)
        self._sock.close()


_keepers: dict[StateDir, KeeperClient] = {}
_joined: dict[Path, KeeperClient] = {}
_registry_lock = threading.Lock()


def own_keeper(state: StateDir) -> KeeperClient:
    """This process's keeper for `state`, started when there is none."""
    with _registry_lock:
        keeper = _keepers.get(state)
        if keeper is None or keeper.dead:
            keeper = _keepers[state] = KeeperClient.start(state)
        return keeper


def keeper_at(directory: Path) -> KeeperClient:
    """The keeper whose directory this is: our own, or another client's, joined once."""
    with _registry_lock:
        for keeper in _keepers.values():
            if keeper.directory == directory and not keeper.dead:
                return keeper
        joined = _joined.get(directory)
        if joined is None or joined.dead:
            joined = _joined[directory] = KeeperClient.join(directory)
        return joined


def close_all() -> None:
    """Closes every keeper of this process: at exit, and in tests that look for leftovers."""
    with _registry_lock:
        keepers = [*_keepers.values(), *_joined.values()]
        _keepers.clear()
        _joined.clear()
    for keeper in keepers:
        keeper.close()


def _after_fork() -> None:
    global _registry_lock
    _registry_lock = threading.Lock()
    _keepers.clear()
    _joined.clear()


atexit.register(close_all)
os.register_at_fork(after_in_child=_after_fork)
