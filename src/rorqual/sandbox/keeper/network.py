"""The keeper's side of sandbox networks: starts the gateway process with the first sandbox that has one, and asks it.

Nothing here blocks the loop: a request is answered through its callback, also when the gateway dies (then with
`error`, and its sandboxes are named to `lost`). Owns the process; never touches a link or a rule: network/gateway.py
does. A keeper without networked sandboxes has no gateway. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

Answered = Callable[[dict[str, Any]], None]

STOP_S = 2.0
_MAX_LINE = 8 << 20


class Gateway:
    """One gateway process and its conversation."""

    def __init__(self, key: str, sock: socket.socket, pid: int) -> None:
        self.key = key
        self.sock = sock
        self.pid = pid
        self.buffer = b""
        self.waiting: dict[int, Answered] = {}
        self.sandboxes: set[str] = set()
        self.error = ""


class Networks:
    """The gateways of one keeper: one, unless its sandboxes are configured to leave by different namespaces."""

    def __init__(self, selector: selectors.BaseSelector, lost: Callable[[str, str], None]) -> None:
        self._selector = selector
        self._lost = lost
        self._gateways: dict[str, Gateway] = {}
        self._of: dict[str, Gateway] = {}
        self._number = 0

    def prepare(self, order: dict[str, Any], done: Answered) -> None:
        """Asks for room for a sandbox; the secrets' values leave the order here. Answer: `guest` and `netns`."""
        wish = order["network"]
        secrets = wish.pop("secrets", {})
        try:
            gateway = self._gateway(wish["gateway"])
        except OSError as error:
            done({"error": f"the gateway did not start: {error}"})
            return
        gateway.sandboxes.add(order["id"])
        self._of[order["id"]] = gateway
        fields = {key: wish.get(key, 0) for key in ("policy", "tap", "owner", "group")}
        self._send(gateway, "prepare", order["id"], done, secrets=secrets, **fields)

    def request(self, op: str, sandbox: str, done: Answered, **fields: Any) -> None:
        """`attach` (pid), `policy` (policy) and `log`. Answers with `error` when the sandbox has no network."""
        gateway = self._of.get(sandbox)
        if gateway is None:
            done({"error": "it was created without a network and without secrets", "none": True})
        else:
            self._send(gateway, op, sandbox, done, **fields)

    def drop(self, sandbox: str) -> None:
        """The sandbox is over. Idempotent."""
        gateway = self._of.pop(sandbox, None)
        if gateway is not None:
            gateway.sandboxes.discard(sandbox)
            self._send(gateway, "drop", sandbox, lambda _: None)

    def read(self, gateway: Gateway) -> None:
        """Called by the loop when the gateway said something, or died."""
        try:
            data = gateway.sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data or len(gateway.buffer) > _MAX_LINE:
            self._end(gateway, gateway.error or "its network gateway died")
            return
        *lines, gateway.buffer = (gateway.buffer + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "ready" in answer:
                gateway.error = answer.get("error", "")
            else:
                done = gateway.waiting.pop(answer.pop("id"), None)
                if done is not None:
                    done(answer)

    def reaped(self, pid: int) -> bool:
        """Whether the process was a gateway; its socket tells the rest."""
        for gateway in self._gateways.values():
            if gateway.pid == pid:
                gateway.pid = 0
                return True
        return False

    def close(self) -> None:
        """Ends the gateways: they take their links and rules with them. Waits STOP_S at most."""
        for gateway in list(self._gateways.values()):
            gateway.sock.close()
            deadline = time.monotonic() + STOP_S
            while gateway.pid:
                with contextlib.suppress(ChildProcessError):
                    if os.waitpid(gateway.pid, os.WNOHANG)[0] == 0:
                        if time.monotonic() > deadline:
                            os.kill(gateway.pid, signal.SIGKILL)
                        time.sleep(0.002)
                        continue
                break
        self._gateways.clear()

    def _gateway(self, config: dict[str, Any]) -> Gateway:
        key = json.dumps(config["options"], sort_keys=True)
        gateway = self._gateways.get(key)
        if gateway is not None:
            return gateway
        ours, theirs = socket.socketpair()
        options = {**config["options"], "keeper": os.getpid()}
        argv = [*config["argv"], json.dumps(options)]
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            pid = os.posix_spawn(
                argv[0],
                argv,
                {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, null, 1),
                ],
                setsid=True,
                setsigdef=[signal.SIGPIPE, signal.SIGCHLD],
            )
        except OSError:
            ours.close()
            raise
        finally:
            os.close(null)
            theirs.close()
        ours.settimeout(10.0)
        gateway = self._gateways[key] = Gateway(key, ours, pid)
        self._selector.register(ours, selectors.EVENT_READ, gateway)
        return gateway

    def _send(self, gateway: Gateway, op: str, sandbox: str, done: Answered, **fields: Any) -> None:
        self._number += 1
        gateway.waiting[self._number] = done
        document = {"id": self._number, "op": op, "sandbox": sandbox, **fields}
        with contextlib.suppress(OSError):  # `read` sees the end and answers
            gateway.sock.sendall(json.dumps(document).encode() + b"\n")

    def _end(self, gateway: Gateway, detail: str) -> None:
        self._selector.unregister(gateway.sock)
        gateway.sock.close()
        self._gateways.pop(gateway.key, None)
        if gateway.pid:  # it hung up but lives: it must not
            with contextlib.suppress(ProcessLookupError):
                os.kill(gateway.pid, signal.SIGKILL)
        waiting, gateway.waiting = gateway.waiting, {}
        for done in waiting.values():
            done({"error": detail})
        for sandbox in list(gateway.sandboxes):
            self._of.pop(sandbox, None)
            self._lost(sandbox, detail)
