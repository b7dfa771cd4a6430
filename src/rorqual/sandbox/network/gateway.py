"""The gateway process: one for all networked sandboxes of a keeper, started with the first of them.

It is the router (its main thread's network namespace), the name server and the secret proxy. The keeper speaks one
JSON document a line over fd 0: `prepare`, `attach`, `policy`, `log`, `drop`; the answer bears the request's `id`, and
`error` when it failed. When the keeper dies, so does this process (PDEATHSIG), and with it the namespace, every link
and the host's rules. Memory holds secrets: no core is dumped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from ipaddress import IPv4Network
from typing import Any

from rorqual.sandbox.network import namespaces, nft
from rorqual.sandbox.network.addresses import (
    GATEWAY,
    GUEST_PREFIX,
    MACHINE,
    MACHINE_GATEWAY,
    MACHINE_MAC,
    MACHINE_PREFIX,
    PROTECTED,
)
from rorqual.sandbox.network.guests import MAX_KNOWN, Guest
from rorqual.sandbox.network.policy import Compiled, Ports, parse_policy
from rorqual.sandbox.network.resolver import Resolver

LAST = 65534
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_MAX_LINE = 4 << 20
REFRESH_S = 0.05


class Gateway:
    """See the module. Made in the main thread, whose namespace becomes the router."""

    def __init__(self, *, namespace: str, resolvers: tuple[str, ...]) -> None:
        self.host = namespaces.Host(namespace)
        namespaces.make_router()
        self.rules = nft.Nft()
        self.reader = nft.Nft(json_output=True)
        self.rules.run(nft.router_rules())
        self.guests: dict[str, Guest] = {}
        self.by_address: dict[str, Guest] = {}
        self.numbers: set[int] = set()
        self.next = 2
        self.epoch = 0
        self.protected: list[IPv4Network] = []
        self.watch = self.host.watch()
        self.refresh_protected()
        self.resolver = Resolver(
            self.host,
            guests=self.by_address.get,
            protected=lambda: self.protected,
            opener=self.open_addresses,
            resolvers=resolvers,
        )
        self.fixed = bool(resolvers)
        self.proxy: Any = None
        self.uplink = asyncio.Lock()
        self.refreshing: asyncio.Task[None] | None = None
        self.stale = False

    def refresh_protected(self) -> bool:
        """Reads the host's addresses and networks; True when they are others than before."""
        networks = self.host.networks()
        networks.discard(IPv4Network("0.0.0.0/0"))
        protected = [*PROTECTED, *sorted(networks)]
        if protected == self.protected:
            return False
        self.rules.run(nft.protect(networks))
        self.protected = protected
        return True

    async def judge_again(self) -> None:
        """Raises the number of every policy, so that open connections are judged by what is protected now."""
        for guest in list(self.guests.values()):
            if guest.id in self.guests:
                self.set_policy(guest, guest.policy)
                await asyncio.sleep(0)  # names are answered in between

    async def open_addresses(self, guest: Guest, addresses: list[str], ports: Ports, seconds: int) -> None:
        if guest.id not in self.guests:
            raise nft.NftError("the sandbox is over")
        if guest.open_addresses() + len(addresses) > MAX_KNOWN:
            raise nft.NftError(f"more than {MAX_KNOWN} addresses are open")
        text = nft.add_addresses(guest.epoch, addresses, ports, seconds)
        try:
            self.rules.run(text)
        except nft.NftError:  # an element ran out between two of its lines
            self.rules.run(text)

    def set_policy(self, guest: Guest, policy: Compiled) -> None:
        known, fresh = guest.still_allowed(policy)
        self.rules.run(nft.set_policy(guest.number, self.epoch + 1, policy, self.protected, known, fresh))
        self.epoch += 1
        guest.epoch, guest.policy = self.epoch, policy

    async def connect_uplink(self) -> None:
        async with self.uplink:
            if not self.host.interface:
                await asyncio.to_thread(self.host.connect, os.getpid())
                namespaces.finish_uplink(self.host)

    async def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Room for a sandbox: its chains, and for a machine its namespace with a tap."""
        policy = Compiled.of(parse_policy(request["policy"]))
        secrets = dict(request["secrets"])
        if policy.allow:
            await self.connect_uplink()
        if secrets and self.proxy is None:
            from rorqual.sandbox.network.proxy import (
                SecretProxy,
            )  # ssl and h11: only who has a secret pays for them

            resolve = self.resolver.addresses if self.fixed else None
            self.proxy = SecretProxy(self.host, guests=self.by_address.get, resolve=resolve)
            await self.proxy.start()
        guest = Guest(id=request["sandbox"], number=self._number(), policy=policy, secrets=secrets)
        self.guests[guest.id] = self.by_address[guest.address] = guest
        try:
            self.rules.run(nft.add_guest(guest.number, guest.interface, guest.address))
            self.set_policy(guest, policy)
            if not request["tap"]:
                return {
                    "guest": {
                        "address": guest.address,
                        "prefix": GUEST_PREFIX,
                        "gateway": GATEWAY,
                        "dns": GATEWAY,
                        "mac": "",
                        "mtu": self.host.mtu,
                    },
                    "netns": "",
                }
            guest.namespace = await asyncio.to_thread(namespaces.new_namespace)
            await self._attach(guest, guest.namespace)
            owner = {"owner": int(request["owner"]), "group": int(request["group"])}
            await asyncio.to_thread(namespaces.add_tap, guest.namespace, mtu=self.host.mtu, **owner)
            return {
                "guest": {
                    "address": MACHINE,
                    "prefix": MACHINE_PREFIX,
                    "gateway": MACHINE_GATEWAY,
                    "dns": GATEWAY,
                    "mac": MACHINE_MAC,
                    "mtu": self.host.mtu,
                },
                "netns": f"/proc/{os.getpid()}/fd/{guest.namespace}",
            }
        except BaseException:
            await self.drop({"sandbox": guest.id})
            raise

    def _number(self) -> int:
        for _ in range(LAST):
            number, self.next = self.next, self.next + 1 if self.next < LAST else 2
            if number not in self.numbers:
                self.numbers.add(number)
                return number
        raise OSError("no address is left for another sandbox")

    async def _attach(self, guest: Guest, fd: int) -> None:
        await asyncio.to_thread(namespaces.attach, fd, guest.interface, guest.address, mtu=self.host.mtu)
        guest.attached = True

    async def attach(self, request: dict[str, Any]) -> dict[str, Any]:
        """Connects the namespace of a container's first process."""
        guest = self.guests[request["sandbox"]]
        fd = os.open(f"/proc/{int(request['pid'])}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if self.host.is_namespace(fd) or os.fstat(fd).st_ino == os.stat("/proc/self/ns/net").st_ino:
                raise OSError("the runtime gave the sandbox the host's network namespace")
            await self._attach(guest, fd)
        finally:
            os.close(fd)
        return {}

    async def policy(self, request: dict[str, Any]) -> dict[str, Any]:
        guest = self.guests[request["sandbox"]]
        policy = Compiled.of(parse_policy(request["policy"]))
        if policy.allow:
            await self.connect_uplink()
        self.set_policy(guest, policy)
        return {}

    async def log(self, request: dict[str, Any]) -> dict[str, Any]:
        """What was refused, and counters."""
        guest = self.guests[request["sandbox"]]
        now = time.time()
        rows = guest.events.rows()
        found = nft.refused(self.reader.objects(f"list set {nft.TABLE} refused"), guest.interface)
        for address, protocol, port, packets, age in found:
            rows.append(
                {
                    "kind": "address",
                    "what": f"{address}:{port}/{protocol}",
                    "reason": "the policy does not allow this address",
                    "count": packets,
                    "first": now - age,
                    "last": now - age,
                }
            )
        counters = guest.counters()
        for name, word in (("sent", "sent"), ("received", "received"), ("stopped", "refused")):
            packets, size = nft.counted(self.reader.objects(f"list set {nft.TABLE} {name}"), guest.interface)
            counters |= {f"{word}_packets": packets, f"{word}_bytes": size}
        return {"rows": sorted(rows, key=lambda row: row["last"]), "counters": counters}

    async def drop(self, request: dict[str, Any]) -> dict[str, Any]:
        """Everything of a sandbox. Idempotent."""
        guest = self.guests.pop(request["sandbox"], None)
        if guest is None:
            return {}
        del self.by_address[guest.address]
        guest.secrets.clear()
        if guest.namespace is not None:
            os.close(guest.namespace)
        with contextlib.suppress(nft.NftError):
            self.rules.run(nft.remove_guest(guest.number, guest.interface, guest.address))
        if guest.attached:
            await asyncio.to_thread(namespaces.detach, guest.interface)
        self.numbers.discard(guest.number)
        return {}

    async def serve(self, control: socket.socket) -> None:
        """Until the keeper hangs up."""
        await self.resolver.start()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.watch, self._changed)
        reader, writer = await asyncio.open_connection(sock=control, limit=_MAX_LINE)
        tasks: set[asyncio.Task[None]] = set()
        writer.write(b'{"ready": true}\n')
        while line := await reader.readline():
            task = asyncio.create_task(self._handle(json.loads(line), writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        loop.remove_reader(self.watch)

    def _changed(self) -> None:
        """The host's addresses or routes changed: a burst of messages is read as one."""
        with contextlib.suppress(OSError):
            while self.watch.recv(1 << 16):
                pass
        self.stale = True
        if self.refreshing is None or self.refreshing.done():
            self.refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def _refresh(self) -> None:
        while self.stale:
            await asyncio.sleep(REFRESH_S)
            self.stale = False
            try:
                if self.refresh_protected():
                    await self.judge_again()
            except OSError:  # the older set stays in force
                logging.getLogger(__name__).exception("the host's addresses could not be read")

    async def _handle(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        ops = {
            "prepare": self.prepare,
            "attach": self.attach,
            "policy": self.policy,
            "log": self.log,
            "drop": self.drop,
        }
        try:
            answer = await ops[request["op"]](request)
        except KeyError as error:
            answer = {"error": f"{request.get('op')}: unknown {error}"}
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        writer.write(json.dumps({"id": request["id"], **answer}).encode() + b"\n")


def main() -> None:
    """argv: the options as JSON. fd 0: the keeper."""
    options = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != options["keeper"]:
        return
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=os.dup(0))
    try:
        gateway = Gateway(namespace=options["namespace"], resolvers=tuple(options["resolvers"]))
    except OSError as error:
        control.sendall(json.dumps({"ready": False, "error": str(error)}).encode() + b"\n")
        return
    try:
        asyncio.run(gateway.serve(control))
    finally:
        gateway.host.close()
