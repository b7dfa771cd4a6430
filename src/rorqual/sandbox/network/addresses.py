"""The numbers of the sandbox network, and the addresses nobody reaches without asking for them by CIDR.

Every sandbox of a keeper has an address of its own in GUESTS and sees the same gateway, GATEWAY, where the name
server and the secret proxy listen. Machines sit behind one more translation in their VMM's namespace and all have
MACHINE, so that a snapshot's network is right wherever it is restored. UPLINKS holds the /30s between a keeper's
router and its host. All of it lies in 198.18.0.0/15, which RFC 2544 keeps for benchmarks: no network routes it.
Standard library only: the keeper loads it.
"""

from __future__ import annotations

from ipaddress import IPv4Network

GATEWAY = "198.18.0.1"
GUESTS = "198.18.0.0/16"
GUEST_PREFIX = 16
UPLINKS = "198.19.0.0/17"
MACHINE, MACHINE_GATEWAY, MACHINE_PREFIX = "198.19.255.2", "198.19.255.1", 30
MACHINE_MAC, TAP_MAC = "02:72:6f:72:71:02", "02:72:6f:72:71:01"
"""Of the guest's interface and of the host's end: the same everywhere, since a restored memory knows both."""
DNS_PORT = 53
PROXY_PORT = 8080
RESOLV_CONF = f"nameserver {GATEWAY}\noptions timeout:3 attempts:2 single-request-reopen\n"

PROTECTED = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier NAT; also where some clouds put metadata (100.100.100.200)
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local: 169.254.169.254 and its like
        "168.63.129.16/32",  # a cloud's host agent, at a public address
        "172.16.0.0/12",
        "192.0.0.0/24",  # 192.0.0.192 is a metadata address too
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
"""Private, local and special ranges. The host's own addresses and networks join them at run time."""


def guest_address(number: int) -> str:
    """The address of the keeper's sandbox number 2, 3, ... 65534."""
    return str(IPv4Network(GUESTS)[number])


def uplink_addresses(number: int) -> tuple[str, str]:
    """(the host's, the router's) of uplink number 0..8191, both of one /30."""
    first = IPv4Network(UPLINKS)[4 * number]
    return str(first + 1), str(first + 2)
