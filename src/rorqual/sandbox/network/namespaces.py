"""Network namespaces and the links in them: the router, its uplink to the host, a pair per sandbox, taps.

No namespace gets a name: each lives by the processes and descriptors in it, so that nothing is left at any kind of
death, and a link goes with either of its ends. A namespace belongs to a thread: the gateway's main thread, and every
thread it starts later, are in the router's; `Host` is one thread that stays in the host's. Links are made with ip(8)
in batches, by a child of a thread that is in the right namespace.
Sources: network_namespaces(7), setns(2), ip-link(8), linux/if_tun.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from rorqual.sandbox.network import nft
from rorqual.sandbox.network.addresses import (
    GATEWAY,
    GUEST_PREFIX,
    MACHINE_GATEWAY,
    MACHINE_PREFIX,
    TAP_MAC,
    uplink_addresses,
)

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_RTMGRP_IPV4 = 0x10 | 0x40  # RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE
UPLINKS = 8192
TAP = "tap0"

_libc = ctypes.CDLL(None, use_errno=True)


class NetworkRefused(OSError):
    """A step failed; its one argument says which, and what to do."""


def _check(result: int, step: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise NetworkRefused(f"{step}: {os.strerror(number)}")


def unshare_network() -> None:
    """Moves the calling thread, and those it starts later, into a new network namespace."""
    _check(_libc.unshare(ctypes.c_int(CLONE_NEWNET)), "unshare(CLONE_NEWNET)")


def enter(fd: int) -> None:
    """Moves the calling thread into the network namespace `fd`."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(CLONE_NEWNET)), "setns")


def inside(fd: int | None, work: Callable[[], T]) -> T:
    """Runs `work` in a thread of its own in the namespace `fd`, or in a new one when None."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if fd is None:
                unshare_network()
            else:
                enter(fd)
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def ip(*lines: str) -> None:
    """Runs one batch of ip(8) in the calling thread's namespace. Raises NetworkRefused with its first complaint."""
    text = "\n".join(lines) + "\n"
    try:
        done = subprocess.run(
            ["ip", "-batch", "-"], input=text, text=True, capture_output=True, timeout=30, check=False
        )
    except FileNotFoundError as error:
        raise NetworkRefused("there is no program ip. Fix: apt-get install iproute2") from error
    if done.returncode:
        words = (done.stderr.strip() or "no reason given").splitlines()[0]
        raise NetworkRefused(f"ip: {words}")


def _ip_json(*words: str) -> list[dict[str, Any]]:
    done = subprocess.run(["ip", "-j", "-4", *words], text=True, capture_output=True, timeout=30, check=False)
    found: list[dict[str, Any]] = (
        json.loads(done.stdout) if done.returncode == 0 and done.stdout.strip() else []
    )
    return found


def sysctl(name: str, value: int) -> None:
    """Writes /proc/sys/net/<name> of the calling thread's namespace. A kernel without IPv6 has no such names."""
    path = Path("/proc/sys/net") / name
    if name.startswith("ipv6/") and not path.exists():
        return
    path.write_text(f"{value}\n", encoding="ascii")


class Host:
    """One thread in the namespace that traffic leaves through, started before the others leave it."""

    def __init__(self, namespace: str = "") -> None:
        self._started_in = os.stat("/proc/self/ns/net").st_ino
        self._fd = os.open(namespace or "/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="host", initializer=enter, initargs=(self._fd,))
        self.pool.submit(os.getpid).result()
        self.interface = ""
        self._nft: nft.Nft | None = None
        self.mtu = 1500

    def is_namespace(self, fd: int) -> bool:
        """Whether `fd` is the host's namespace: the one this process was started in, or the configured one."""
        return os.fstat(fd).st_ino in (self._started_in, os.fstat(self._fd).st_ino)

    def call(self, work: Callable[[], T]) -> T:
        return self.pool.submit(work).result()

    def watch(self) -> socket.socket:
        """A netlink socket that has something to read whenever the host's addresses or routes change."""

        def make() -> socket.socket:
            sock = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
            )
            sock.bind((0, _RTMGRP_IPV4))
            return sock

        return self.call(make)

    def networks(self) -> set[IPv4Network]:
        """The host's own addresses, and the networks it is a part of."""

        def look() -> set[IPv4Network]:
            found: set[IPv4Network] = set()
            for link in _ip_json("addr", "show"):
                for item in link.get("addr_info", ()):
                    if item.get("family") == "inet":
                        interface = IPv4Interface(f"{item['local']}/{item['prefixlen']}")
                        found |= {interface.network, IPv4Network(interface.ip)}
            for route in _ip_json("route", "show", "scope", "link"):
                with contextlib.suppress(ValueError):
                    found.add(IPv4Network(route["dst"]))
            return found

        return self.call(look)

    def connect(self, router_pid: int) -> None:
        """Makes the uplink: a link `rqu<n>` here, `wan` in the router's namespace, and the host's rules.

        Raises:
            NetworkRefused: the host does not forward, or a step failed; nothing is left then.
        """
        if not self.interface:
            self.call(lambda: self._connect(router_pid))

    def _connect(self, router_pid: int) -> None:
        devices = sorted({route["dev"] for route in _ip_json("route", "show", "default") if "dev" in route})
        for device in devices or ["all"]:
            if (
                Path(f"/proc/sys/net/ipv4/conf/{device}/forwarding").read_text(encoding="ascii").strip()
                != "1"
            ):
                raise NetworkRefused(
                    "this host does not forward packets, which a sandbox with a network needs. "
                    f"Fix: sysctl -w net.ipv4.conf.{device}.forwarding=1",
                )
        mtus = [link["mtu"] for link in _ip_json("link", "show") if link["ifname"] in devices]
        self.mtu = min(mtus, default=1500)
        start = int.from_bytes(os.urandom(2), "little")
        for attempt in range(64):
            number = (start + attempt * 127) % UPLINKS
            here, there = uplink_addresses(number)
            name = f"rqu{number}"
            try:  # the name is the lock: two keepers cannot both have it
                ip(
                    f"link add {name} mtu {self.mtu} type veth peer name wan mtu {self.mtu} netns {router_pid}"
                )
            except NetworkRefused as error:
                if "exist" in str(error).lower() and attempt < 63:
                    continue
                raise
            try:
                self._nft = nft.Nft()
                self._nft.run(nft.host_rules(number, name, there))
                sysctl(f"ipv6/conf/{name}/disable_ipv6", 1)
                ip(f"addr add {here}/30 dev {name}", f"link set {name} up")
                sysctl(f"ipv4/conf/{name}/forwarding", 1)
                sysctl(f"ipv4/conf/{name}/route_localnet", 0)
                self.interface = name
                self.router_address, self.host_address = there, here
                return
            except OSError:
                if self._nft is not None:
                    self._nft.close()
                ip(f"link del {name}")
                raise

    def close(self) -> None:
        """Idempotent; the kernel does the same when the process dies."""

        def end() -> None:
            if self._nft is not None:
                self._nft.close()
            if self.interface:
                with contextlib.suppress(OSError):
                    ip(f"link del {self.interface}")
                self.interface = ""

        self.call(end)
        self.pool.shutdown()


def make_router() -> None:
    """Turns the calling (main) thread's new namespace into the router: forwards, speaks no IPv6."""
    unshare_network()
    for name, value in (
        ("ipv6/conf/all/disable_ipv6", 1),
        ("ipv6/conf/default/disable_ipv6", 1),
        ("ipv4/conf/default/rp_filter", 1),
        ("ipv4/conf/default/accept_redirects", 0),
        ("ipv4/conf/default/send_redirects", 0),
        ("ipv4/ip_forward", 1),
        ("ipv4/icmp_ratelimit", 0),  # a refused packet is always answered, or clients would wait
    ):
        sysctl(name, value)
    # Until there is an uplink, packets must have somewhere to go, or the rules that refuse them would not see them.
    ip("link set lo up", "route add default dev lo")


def finish_uplink(host: Host) -> None:
    """The router's end of the uplink."""
    ip(
        f"addr add {host.router_address}/30 dev wan",
        "link set dev wan up",
        f"route replace default via {host.host_address}",
    )


def new_namespace() -> int:
    """A descriptor of a new network namespace, which lives as long as it."""
    return inside(None, lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))


def attach(fd: int, interface: str, address: str, *, mtu: int) -> None:
    """Connects the namespace `fd` to the router: `interface` there, eth0 with `address` here. No IPv6 on it."""

    def prepare() -> None:
        sysctl("ipv6/conf/default/disable_ipv6", 1)

    def finish() -> None:
        ip(
            "link set lo up",
            f"addr add {address}/{GUEST_PREFIX} dev eth0",
            "link set eth0 up",
            f"route add default via {GATEWAY}",
        )

    inside(fd, prepare)
    ip(
        f"link add {interface} mtu {mtu} type veth peer name eth0 mtu {mtu} netns /proc/{os.getpid()}/fd/{fd}",
        f"addr add {GATEWAY}/32 dev {interface}",
        f"link set {interface} up",
        f"route add {address}/32 dev {interface} src {GATEWAY}",
    )
    inside(fd, finish)


def add_tap(fd: int, *, owner: int, group: int, mtu: int) -> None:
    """`tap0` in the VMM's namespace, which a process of this owner may open, and the translation to eth0."""

    def make() -> None:
        try:
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NetworkRefused(f"/dev/net/tun: {error.strerror}. Fix: modprobe tun") from error
        try:
            request = struct.pack("16sH22x", TAP.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
            fcntl.ioctl(tun, _TUNSETIFF, request)
            fcntl.ioctl(tun, _TUNSETOWNER, owner)
            fcntl.ioctl(tun, _TUNSETGROUP, group)
            fcntl.ioctl(tun, _TUNSETPERSIST, 1)
        finally:
            os.close(tun)
        rules = nft.Nft()
        try:
            rules.run(nft.machine_rules())
        finally:
            rules.close()
        sysctl("ipv4/ip_forward", 1)
        sysctl("ipv4/icmp_ratelimit", 0)
        ip(
            f"link set {TAP} address {TAP_MAC} mtu {mtu}",
            f"addr add {MACHINE_GATEWAY}/{MACHINE_PREFIX} dev {TAP}",
            f"link set {TAP} up",
        )

    inside(fd, make)


def detach(interface: str) -> None:
    """Removes a sandbox's link; gone already when its namespace is."""
    with contextlib.suppress(NetworkRefused):
        ip(f"link del {interface}")
