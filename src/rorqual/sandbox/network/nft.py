"""libnftables in this process, and the rules: one table in the router's namespace, one on the host, one per machine.

The library is what the nft program is made of (Debian's nftables depends on it); through it a transaction costs 0.1 ms
and no process. Owns every line of nft text. Every packet of a sandbox is judged by its own two chains, `f<n>` on the
way out and `t<n>` on the way back, so that a change of the policy reaches open connections: a connection carries the
number of the policy that let it pass (its conntrack mark), and one with an older number is judged again.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, collapse_addresses
from typing import Any

from rorqual.sandbox.network.addresses import (
    DNS_PORT,
    GATEWAY,
    MACHINE,
    PROTECTED,
    PROXY_PORT,
)
from rorqual.sandbox.network.policy import Compiled, Ports

TABLE = "inet rorqual"
CONNECTIONS = 2048
"""Open connections of one sandbox: conntrack's table belongs to the whole host."""
ADDRESSES = 1 << 18
"""Addresses that are open at one time to all sandboxes of a gateway (guests.MAX_KNOWN bounds each of them)."""
REFUSED = 1 << 14
"""Refused destinations that are remembered for all of them."""
BURST = 256
REFUSED_S = 3600
OLD_S = 86400
"""How long a connection may be silent after a change of the policy and still be known as an old one."""
_JSON = 1 << 4


class NftError(OSError):
    """The kernel or the library refused a transaction; nothing of it is in force."""


class Nft:
    """One netlink socket in the network namespace of the thread that makes it. Not thread-safe."""

    def __init__(self, *, json_output: bool = False) -> None:
        self._context: int | None = None
        library = ctypes.CDLL("libnftables.so.1")
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
        self._library = library
        context = library.nft_ctx_new(ctypes.c_uint32(0))
        if not context:
            raise NftError("libnftables: no context")
        self._context = context
        library.nft_ctx_buffer_error(ctypes.c_void_p(context))
        library.nft_ctx_buffer_output(ctypes.c_void_p(context))
        if json_output:
            library.nft_ctx_output_set_flags(ctypes.c_void_p(context), ctypes.c_uint(_JSON))

    def run(self, text: str) -> str:
        """Runs the commands as one transaction; returns what they print. Raises NftError."""
        context = ctypes.c_void_p(self._context)
        status = self._library.nft_run_cmd_from_buffer(context, text.encode())
        error = self._library.nft_ctx_get_error_buffer(context) or b""
        output: bytes = self._library.nft_ctx_get_output_buffer(context) or b""
        if status:
            raise NftError(
                error.decode(errors="replace").strip().splitlines()[0] if error else "nft: refused"
            )
        return output.decode(errors="replace")

    def objects(self, command: str) -> list[dict[str, Any]]:
        """What a `list` command prints, without the header. For a context with json_output."""
        return [item for item in json.loads(self.run(command))["nftables"] if "metainfo" not in item]

    def close(self) -> None:
        """Idempotent. Tables with the owner flag go with it."""
        if self._context is not None:
            self._library.nft_ctx_free(ctypes.c_void_p(self._context))
            self._context = None


def router_rules() -> str:
    """The router's table before there is any sandbox: nothing passes.

    Sets are shared, since libnftables reads the list of all of them for each change: what belongs to one sandbox has
    its interface or the number of its policy in the key. x: refused on the way out: counted, remembered (a burst of
    destinations a sandbox, then one a second), answered. y: refused on the way back, that is, of a connection that a
    new policy cut: the packet becomes the reset that tells the sandbox, whose kernel takes it since it is the next in
    order; what comes too often after that is answered with a reset to the other side.
    """
    return f"""
table {TABLE} {{
  set protected {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {_join(PROTECTED)} }}
  }}
  set conns {{ type ipv4_addr; size 65535; flags dynamic; }}
  set pairs {{ type ifname . ipv4_addr; }}
  set sent {{ type ifname; counter; }}
  set received {{ type ifname; counter; }}
  set stopped {{ type ifname; counter; }}
  set names {{ type mark . ipv4_addr; size {ADDRESSES}; flags timeout; }}
  set ports {{ type mark . ipv4_addr . inet_service; size {ADDRESSES}; flags timeout; }}
  set old {{ type mark . ipv4_addr; size {ADDRESSES}; flags timeout; }}
  set oldports {{ type mark . ipv4_addr . inet_service; size {ADDRESSES}; flags timeout; }}
  set refused {{
    type ifname . ipv4_addr . inet_proto . inet_service; size {REFUSED}; flags dynamic, timeout; timeout {REFUSED_S}s;
  }}
  set notes {{ type ifname; size 65535; flags dynamic, timeout; timeout {REFUSED_S}s; }}
  set resets {{ type ifname; size 65535; flags dynamic, timeout; timeout 60s; }}
  map from {{ type ifname : verdict; }}
  map back {{ type ifname : verdict; }}
  chain remember {{
    update @refused {{ iifname . ip daddr . meta l4proto . th dport counter }}
  }}
  chain x {{
    iifname @stopped
    update @notes {{ iifname limit rate 1/second burst {BURST} packets }} jump remember
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain y {{
    meta l4proto tcp update @resets {{ oifname limit rate 20/second burst 20 packets }} tcp flags set rst accept
    tcp flags & rst != rst reject with tcp reset
    drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    meta nfproto != ipv4 drop
    ct state invalid drop
    iifname "wan" meta l4proto icmp ct state related accept
    meta l4proto != {{ tcp, udp }} drop
    iifname . ip saddr @pairs iifname vmap @from
    iifname "wan" oifname vmap @back
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    meta nfproto != ipv4 drop
    iifname . ip saddr @pairs ip daddr {GATEWAY} udp dport {DNS_PORT} accept
    iifname . ip saddr @pairs ip daddr {GATEWAY} tcp dport {{ {DNS_PORT}, {PROXY_PORT} }} accept
    iifname != "wan" meta l4proto tcp reject with tcp reset
  }}
  chain nat {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "wan" masquerade
  }}
}}
"""


def protect(networks: Iterable[IPv4Network]) -> str:
    """Makes these, with PROTECTED, the protected ranges."""
    elements = sorted({*PROTECTED, *networks})
    return f"flush set {TABLE} protected\nadd element {TABLE} protected {{ {_join(elements)} }}\n"


def add_guest(number: int, interface: str, address: str) -> str:
    """A sandbox's chains, which pass nothing until `set_policy`, and its places in the shared sets."""
    return f"""
add chain {TABLE} f{number}
add chain {TABLE} t{number}
{_places("add", number, interface, address)}
"""


def remove_guest(number: int, interface: str, address: str) -> str:
    """The names of its policies run out by themselves."""
    return f"""
{_places("delete", number, interface, address)}
flush chain {TABLE} f{number}
flush chain {TABLE} t{number}
delete chain {TABLE} f{number}
delete chain {TABLE} t{number}
"""


def _places(verb: str, number: int, interface: str, address: str) -> str:
    there, back = (f" : goto f{number}", f" : goto t{number}") if verb == "add" else ("", "")
    return f"""
{verb} element {TABLE} pairs {{ "{interface}" . {address} }}
{verb} element {TABLE} from {{ "{interface}"{there} }}
{verb} element {TABLE} back {{ "{interface}"{back} }}
{verb} element {TABLE} sent {{ "{interface}" }}
{verb} element {TABLE} received {{ "{interface}" }}
{verb} element {TABLE} stopped {{ "{interface}" }}
"""


def set_policy(
    number: int,
    epoch: int,
    policy: Compiled,
    protected: Sequence[IPv4Network],
    known: Sequence[tuple[str, Ports]],
    fresh: Sequence[tuple[str, Ports, int]],
) -> str:
    """Replaces the rules of a sandbox, in one transaction.

    epoch: the policy's number, greater than any before. protected: what only a CIDR within it opens. known: addresses
    that allowed names stood for at any time and the ports they may be reached on: connections to them stay. fresh:
    those that still stand, with their seconds.
    """
    lines = [_element("old", "oldports", epoch, address, ports, OLD_S) for address, ports in known]
    lines += [_element("names", "ports", epoch, address, ports, seconds) for address, ports, seconds in fresh]
    lines += [f"flush chain {TABLE} {kind}{number}" for kind in ("f", "t")]
    for chain in (f"f{number}", f"t{number}"):
        rules = _rules(epoch, policy, protected, out=chain.startswith("f"))
        lines += [f"add rule {TABLE} {chain} {rule}" for rule in rules]
    return "\n".join(line for line in lines if line) + "\n"


def _rules(epoch: int, policy: Compiled, protected: Sequence[IPv4Network], *, out: bool) -> list[str]:
    address, port, refuse = ("ip daddr", "th dport", "goto x") if out else ("ip saddr", "th sport", "goto y")
    count = "iifname @sent" if out else "oifname @received"
    accept = f"ct mark set {epoch} {count} accept"
    rules = [f"ct mark {epoch} {count} accept"]
    if out:
        rules += [
            f'oifname != "wan" {refuse}',  # another sandbox
            f"ct state new add @conns {{ ip saddr ct count over {CONNECTIONS} }} {refuse}",
        ]
    else:
        rules += ["ct state != established drop"]

    def among(cidrs: Sequence[tuple[IPv4Network, int | None]], verdict: str) -> list[str]:
        found: dict[int | None, list[IPv4Network]] = {}
        for cidr, one in cidrs:
            found.setdefault(one, []).append(cidr)
        return [
            f"{address} {{ {_join(collapse_addresses(networks))} }} {'' if one is None else f'{port} {one} '}{verdict}"
            for one, networks in found.items()
        ]

    rules += [
        *among(policy.cidrs("deny"), refuse),
        *among(policy.opened(protected), accept),
        f"{address} @protected {refuse}",
        *among(policy.cidrs("allow"), accept),
        f"{port} {{ {DNS_PORT}, 853 }} {refuse}",  # names are asked at the gateway
        f"meta mark set {epoch}",
        f"meta mark . {address} . {port} @ports {accept}",
        f"meta mark . {address} @names {accept}",
    ]
    ports = policy.ports("*") if any(rule.name == "*" for rule in policy.allow) else ()
    for allowed in ports:
        rules.append(accept if allowed is None else f"{port} {allowed} {accept}")
    rules += [
        f"ct state established meta mark . {address} . {port} @oldports {accept}",
        f"ct state established meta mark . {address} @old {accept}",
        refuse,
    ]
    return rules


def _element(any_port: str, with_port: str, epoch: int, address: str, ports: Ports, seconds: int) -> str:
    """Adds an address for so long. An element's time cannot be changed by adding it again: it is added (or was there),
    deleted, and added."""
    if not ports:
        return ""
    keys = [f"{epoch} . {address}" + (f" . {port}" if port else "") for port in ports]
    name = any_port if ports == (None,) else with_port
    add = f"add element {TABLE} {name} {{ {', '.join(f'{key} timeout {seconds}s' for key in keys)} }}"
    return f"{add}\ndelete element {TABLE} {name} {{ {', '.join(keys)} }}\n{add}"


def add_addresses(epoch: int, addresses: Iterable[str], ports: Ports, seconds: int) -> str:
    """Opens the addresses of a name to the sandbox with this policy; one that is open already gets the new time."""
    return "\n".join(_element("names", "ports", epoch, address, ports, seconds) for address in addresses)


def host_rules(number: int, interface: str, router: str) -> str:
    """The host's table of one keeper. Its owner is the netlink socket: it vanishes at any death of the gateway."""
    return f"""
table ip rorqual_{number} {{
  flags owner;
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname "{interface}" ct state != {{ established, related }} drop
    iifname "{interface}" ip saddr != {router} drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "{interface}" ip saddr != {router} drop
  }}
  chain nat {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {router} oifname != "{interface}" masquerade
  }}
}}
"""


def machine_rules() -> str:
    """A VMM's namespace: the guest's one address becomes the sandbox's own."""
    return f"""
table ip machine {{
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "tap0" oifname "eth0" ip saddr {MACHINE} accept
    iifname "eth0" oifname "tap0" ct state established,related accept
  }}
  chain input {{ type filter hook input priority filter; policy drop;
  }}
  chain nat {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "eth0" masquerade
  }}
}}
"""


def refused(objects: Sequence[dict[str, Any]], interface: str) -> list[tuple[str, str, int, int, float]]:
    """(address, protocol, port, packets, seconds since the last) of a sandbox's elements of the set `refused`."""
    found = []
    for element in _elements(objects):
        name, address, protocol, port = element["val"]["concat"]
        if name == interface:
            packets = element.get("counter", {}).get("packets", 1)
            age = max(0.0, REFUSED_S - float(element.get("expires", REFUSED_S)))
            found.append((str(address), str(protocol), int(port), int(packets), age))
    return found


def counted(objects: Sequence[dict[str, Any]], interface: str) -> tuple[int, int]:
    """(packets, bytes) of a sandbox in one of the sets `sent`, `received`, `stopped`."""
    for element in _elements(objects):
        if element.get("val") == interface:
            return int(element["counter"]["packets"]), int(element["counter"]["bytes"])
    return 0, 0


def _elements(objects: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in objects:
        for element in item.get("set", {}).get("elem", []):
            yield element.get("elem", {}) if isinstance(element, dict) else {}


def _join(networks: Iterable[IPv4Network]) -> str:
    return ", ".join(str(network) for network in networks)
