"""The keeper's side of sandbox networks: starts the gateway process with the first sandbox that has one, and asks it.

Nothing here blocks the loop: a request is answered through its callback, also when the gateway dies: then with
`error`, and its sandboxes end, since they would have no network any more. Owns the process; never touches a link or a
rule: network/gateway.py does. A keeper without networked sandboxes has no gateway. Standard library only.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rorqual.sandbox.keeper.main import Entry, Keeper, Peer

Answered = Callable[[dict[str, Any]], None]

SHARE = 128
"""Sandboxes of one gateway: a change of its rules takes longer with each (docs/decisions/0018-network.md)."""
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
        self.ending = False
        """It has served its last sandbox."""


class Networks:
    """The gateways of one keeper: one for every SHARE sandboxes that leave by the same namespace."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._gateways: list[Gateway] = []
        self._of: dict[str, Gateway] = {}
        self._number = 0

    def launch(self, entry: Entry) -> None:
        """Has room made for a sandbox, then queues it. The secrets' values leave its order here."""
        wish = entry.order["network"]
        secrets = wish.pop("secrets", {})

        def ready(answer: dict[str, Any]) -> None:
            if self._keeper.entries.get(entry.id) is not entry:
                return
            if entry.asked_cause:
                self._keeper.fail(entry, stage="killed", detail=entry.asked_detail or entry.asked_cause)
            elif "error" in answer:
                self._keeper.fail(entry, stage="network", detail=answer["error"])
            else:
                wish.update(answer)  # `netns` and `guest`, for a machine's launcher
                self._keeper.queue.append(entry)
                self._keeper.start_queued()

        try:
            gateway = self._gateway(wish["gateway"])
        except OSError as error:
            ready({"error": f"the gateway did not start: {error}"})
            return
        gateway.sandboxes.add(entry.id)
        self._of[entry.id] = gateway
        fields = {key: wish[key] for key in ("policy", "tap", "owner", "group")}
        self._send(gateway, "prepare", entry.id, ready, secrets=secrets, **fields)

    def running(self, entry: Entry) -> None:
        """A container runs: gives it its interface, then tells its client. Without it, it may not be used."""

        def attached(answer: dict[str, Any]) -> None:
            if "error" not in answer or self._keeper.entries.get(entry.id) is not entry:
                self._keeper.answer_launch(entry)
                return
            if entry.reply is not None:
                peer, number = entry.reply
                entry.reply = None
                self._answer(peer, number, answer)
            self._keeper.kill(entry, cause="infra", detail=f"network: {answer['error']}")

        self._ask("attach", entry, attached, pid=entry.init_pid)

    def handle(self, entry: Entry, peer: Peer, request: dict[str, Any]) -> None:
        """`network` (policy) and `network_log`."""
        number = request["id"]
        if request["op"] == "network_log":
            self._ask("log", entry, lambda answer: self._answer(peer, number, answer))
            return
        policy = request["policy"]

        def done(answer: dict[str, Any]) -> None:
            if "error" not in answer and self._keeper.entries.get(entry.id) is entry:
                entry.order["record"]["network"] = policy["name"]
                entry.order["record"]["spec"]["network"] = policy  # its forks have what it has
                self._keeper.write_record(entry)
            self._answer(peer, number, answer)

        self._ask("policy", entry, done, policy=policy)

    def drop(self, entry: Entry) -> None:
        """The sandbox is over. Idempotent."""
        gateway = self._of.pop(entry.id, None)
        if gateway is not None:
            gateway.sandboxes.discard(entry.id)
            self._send(gateway, "drop", entry.id, lambda _: None)
            if not gateway.sandboxes and sum(other.key == gateway.key for other in self._gateways) > 1:
                gateway.ending = True
                gateway.sock.shutdown(socket.SHUT_WR)  # it ends; `read` sees that

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
        for gateway in self._gateways:
            if gateway.pid == pid:
                gateway.pid = 0
                return True
        return False

    def close(self) -> None:
        """Ends the gateways: they take their links and rules with them. Waits STOP_S at most."""
        for gateway in self._gateways:
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
        for gateway in self._gateways:
            if gateway.key == key and 0 < len(gateway.sandboxes) < SHARE:
                return gateway
        for gateway in self._gateways:
            if gateway.key == key and not gateway.sandboxes and not gateway.ending:
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
        gateway = Gateway(key, ours, pid)
        self._gateways.append(gateway)
        self._keeper.selector.register(ours, selectors.EVENT_READ, gateway)
        return gateway

    def _answer(self, peer: Peer, number: int, answer: dict[str, Any]) -> None:
        error = {"error": {"stage": "network", "detail": answer["error"]}} if "error" in answer else answer
        peer.send({"id": number, **error})

    def _ask(self, op: str, entry: Entry, done: Answered, **fields: Any) -> None:
        gateway = self._of.get(entry.id)
        if gateway is None:
            done({"error": "it was created without a network and without secrets"})
        else:
            self._send(gateway, op, entry.id, done, **fields)

    def _send(self, gateway: Gateway, op: str, sandbox: str, done: Answered, **fields: Any) -> None:
        self._number += 1
        gateway.waiting[self._number] = done
        document = {"id": self._number, "op": op, "sandbox": sandbox, **fields}
        with contextlib.suppress(OSError):  # `read` sees the end and answers
            gateway.sock.sendall(json.dumps(document).encode() + b"\n")

    def _end(self, gateway: Gateway, detail: str) -> None:
        self._keeper.selector.unregister(gateway.sock)
        gateway.sock.close()
        self._gateways.remove(gateway)
        if gateway.pid:  # it hung up but lives: it must not
            with contextlib.suppress(ProcessLookupError):
                os.kill(gateway.pid, signal.SIGKILL)
        waiting, gateway.waiting = gateway.waiting, {}
        for done in waiting.values():
            done({"error": detail})
        for sandbox in list(gateway.sandboxes):
            self._of.pop(sandbox, None)
            entry = self._keeper.entries.get(sandbox)
            if entry is not None:
                self._keeper.kill(entry, cause="infra", detail=detail)
