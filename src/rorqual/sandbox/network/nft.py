"""libnftables in this process, and the rules: one table in the router's namespace, one on the host, one per machine.

The library is what the nft program is made of (Debian's nftables depends on it); through it a transaction costs 0.1 ms
and no process. Owns every line of nft text. Every packet of a sandbox is judged by its own two chains, `f<n>` on the
way out and `t<n>` on the way back, so that a change of the policy reaches open connections: a connection carries the
number of the policy that let it pass (its conntrack mark), and one with an older number is judged again.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network
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
ADDRESSES = 8192
"""Addresses that names of one sandbox may stand for at one time."""
REFUSED = 512
"""Refused destinations that are remembered per sandbox."""
REFUSED_S = 3600
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
    """The router's table before there is any sandbox: nothing passes."""
    return f"""
table {TABLE} {{
  set protected {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {_join(PROTECTED)} }}
  }}
  set conns {{ type ipv4_addr; size 65535; flags dynamic; }}
  set pairs {{ type ifname . ipv4_addr; }}
  map from {{ type ifname : verdict; }}
  map back {{ type ifname : verdict; }}
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
    """The chains and sets of a sandbox, which pass nothing until `set_policy`.

    x: refused on the way out, answered and counted. y: on the way back, that is, of a connection that a new policy
    cut: the packet becomes the reset that tells the sandbox, whose kernel takes it since it is the next in order; what
    comes too often after that is answered with a reset to the other side.
    """
    return f"""
table {TABLE} {{
  counter out{number} {{ }}
  counter in{number} {{ }}
  counter no{number} {{ }}
  set a{number} {{ type ipv4_addr; size {ADDRESSES}; flags timeout; }}
  set n{number} {{ type ipv4_addr . inet_service; size {ADDRESSES}; flags timeout; }}
  set oa{number} {{ type ipv4_addr; size {ADDRESSES}; }}
  set on{number} {{ type ipv4_addr . inet_service; size {ADDRESSES}; }}
  set c{number} {{ type ipv4_addr . inet_service; flags interval; }}
  set d{number} {{ type ipv4_addr . inet_service; flags interval; }}
  set r{number} {{
    type ipv4_addr . inet_proto . inet_service; size {REFUSED}; flags dynamic, timeout; timeout {REFUSED_S}s;
  }}
  chain f{number} {{ }}
  chain t{number} {{ }}
  chain x{number} {{
    counter name no{number}
    update @r{number} {{ ip daddr . meta l4proto . th dport counter }}
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain y{number} {{
    meta l4proto tcp limit rate 20/second burst 20 packets tcp flags set rst accept
    tcp flags & rst != rst reject with tcp reset
    drop
  }}
}}
add element {TABLE} pairs {{ "{interface}" . {address} }}
add element {TABLE} from {{ "{interface}" : goto f{number} }}
add element {TABLE} back {{ "{interface}" : goto t{number} }}
"""


def remove_guest(number: int, interface: str, address: str) -> str:
    kinds = ("a", "n", "oa", "on", "c", "d", "r")
    lines = [
        f'delete element {TABLE} pairs {{ "{interface}" . {address} }}',
        f'delete element {TABLE} from {{ "{interface}" }}',
        f'delete element {TABLE} back {{ "{interface}" }}',
        *(f"flush chain {TABLE} {chain}{number}" for chain in ("f", "t", "x", "y")),
        *(f"delete chain {TABLE} {chain}{number}" for chain in ("f", "t", "x", "y")),
        *(f"delete set {TABLE} {kind}{number}" for kind in kinds),
        *(f"delete counter {TABLE} {kind}{number}" for kind in ("out", "in", "no")),
    ]
    return "\n".join(lines) + "\n"


def set_policy(
    number: int,
    epoch: int,
    policy: Compiled,
    known: Sequence[tuple[str, Ports]],
    fresh: Sequence[tuple[str, Ports, int]],
) -> str:
    """Replaces the rules of a sandbox, in one transaction.

    epoch: the policy's number, greater than any before. known: addresses that allowed names stood for at any time
    and the ports they may be reached on: connections to them stay. fresh: those that still stand, with their seconds.
    """
    lines = [f"flush set {TABLE} {kind}{number}" for kind in ("a", "n", "oa", "on", "c", "d")]
    for kind, rules in (("c", policy.cidrs("allow")), ("d", policy.cidrs("deny"))):
        # The ranges of one set may not overlap: a network within another goes with it.
        elements = [f"{cidr} . {'0-65535' if port is None else port}" for cidr, port in _disjoint(rules)]
        if elements:
            lines.append(f"add element {TABLE} {kind}{number} {{ {', '.join(elements)} }}")
    lines += [_element(f"oa{number}", f"on{number}", address, ports) for address, ports in known]
    lines += [add_addresses(number, [address], ports, seconds) for address, ports, seconds in fresh]
    lines += [f"flush chain {TABLE} {kind}{number}" for kind in ("f", "t")]
    lines += _chain(number, epoch, policy, out=True) + _chain(number, epoch, policy, out=False)
    return "\n".join(line for line in lines if line) + "\n"


def _chain(number: int, epoch: int, policy: Compiled, *, out: bool) -> list[str]:
    chain, (address, port) = ("f", ("ip daddr", "th dport")) if out else ("t", ("ip saddr", "th sport"))
    counter = f"counter name {'out' if out else 'in'}{number}"
    accept = f"ct mark set {epoch} {counter} accept"
    refuse = f"goto x{number}" if out else f"goto y{number}"
    rules = [f"ct mark {epoch} {counter} accept"]
    if out:
        rules += [
            'oifname != "wan" ' + refuse,  # another sandbox
            f"ct state new add @conns {{ ip saddr ct count over {CONNECTIONS} }} {refuse}",
        ]
    else:
        rules += ["ct state != established drop"]
    rules += [
        f"{address} . {port} @d{number} {refuse}",
        f"{address} . {port} @c{number} {accept}",
        f"{address} @protected {refuse}",
        f"{port} {{ {DNS_PORT}, 853 }} {refuse}",  # names are asked at the gateway
        f"{address} . {port} @n{number} {accept}",
        f"{address} @a{number} {accept}",
    ]
    ports = policy.ports("*") if any(rule.name == "*" for rule in policy.allow) else ()
    for allowed in ports:
        rules.append(accept if allowed is None else f"{port} {allowed} {accept}")
    rules += [
        f"ct state established {address} . {port} @on{number} {accept}",
        f"ct state established {address} @oa{number} {accept}",
        refuse,
    ]
    return [f"add rule {TABLE} {chain}{number} {rule}" for rule in rules]


def _disjoint(rules: Sequence[tuple[IPv4Network, int | None]]) -> list[tuple[IPv4Network, int | None]]:
    kept: list[tuple[IPv4Network, int | None]] = []
    for cidr, port in sorted(set(rules), key=lambda item: (item[1] is not None, item[0].prefixlen)):
        if not any(cidr.subnet_of(other) and other_port in (None, port) for other, other_port in kept):
            kept.append((cidr, port))
    return kept


def _element(any_port: str, with_port: str, address: str, ports: Ports, option: str = "") -> str:
    if not ports:
        return ""
    if ports == (None,):
        return f"add element {TABLE} {any_port} {{ {address}{option} }}"
    return (
        f"add element {TABLE} {with_port} {{ {', '.join(f'{address} . {port}{option}' for port in ports)} }}"
    )


def add_addresses(number: int, addresses: Iterable[str], ports: Ports, seconds: int) -> str:
    """Opens the addresses of a name for so long; one that is there already gets the new time.

    An element's time cannot be changed by adding it again: it is added (or was there), deleted, and added.
    """
    lines = []
    for address in addresses:
        add = _element(f"a{number}", f"n{number}", address, ports, f" timeout {seconds}s")
        delete = _element(f"a{number}", f"n{number}", address, ports).replace("add ", "delete ", 1)
        lines += [add, delete, add]
    return "\n".join(lines)


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


def refused(objects: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, int, float]]:
    """(address, protocol, port, packets, seconds since the last) of each element of an `r` set."""
    found = []
    for item in objects:
        for element in item.get("set", {}).get("elem", []):
            inner = element.get("elem", element)
            address, protocol, port = inner["val"]["concat"]
            packets = inner.get("counter", {}).get("packets", 1)
            age = max(0.0, REFUSED_S - float(inner.get("expires", REFUSED_S)))
            found.append((str(address), str(protocol), int(port), int(packets), age))
    return found


def _join(networks: Iterable[IPv4Network]) -> str:
    return ", ".join(str(network) for network in networks)
