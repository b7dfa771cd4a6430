"""Network policies: what a sandbox may reach, by host name and by CIDR; the named ones; how a name is judged.

A rule is a host name ('pypi.org'), a name with its subdomains left open ('*.pythonhosted.org', which does not match
pythonhosted.org itself), an IPv4 address or CIDR, or '*' (everything public), each with ':port' or without. Order:
`deny` wins; then the protected ranges (addresses.PROTECTED, the host and its networks) are refused, so that no name can
lead there, but for what `allow` names in them by a CIDR that lies within (0.0.0.0/0 does not open them); then the other
CIDRs, names and '*'; the rest is refused. IPv6 is not routed.
User's own policies and the gateway's settings: networks.toml (`load`). Owns the rules' syntax; never touches a packet.
Source: spec/sandbox.md, 2 (item 6) and 4.2.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import InvalidRequest

MAX_RULES = 512
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
Ports = tuple[int | None, ...]
"""(None,) is every port, () none."""
_POLICY_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One parsed rule."""

    name: str = ""
    """Lower case, without the '*.'; '*' for everything public; '' for a CIDR."""
    subdomains: bool = False
    """It stands for the names below `name`."""
    cidr: IPv4Network | None = None
    port: int | None = None
    """None: every port."""

    def matches(self, name: str) -> bool:
        """Whether a host name (lower case, no final dot) is meant."""
        if self.subdomains:
            return name.endswith("." + self.name)
        return bool(self.name) and self.name in ("*", name)


def parse_rule(text: object, *, where: str = "network") -> Rule:
    """Raises InvalidRequest, which names the rule."""
    if not isinstance(text, str) or not text:
        raise InvalidRequest(f"{where}: {text!r} is not a rule: a host name, '*.name', an IPv4 CIDR or '*'")
    if "://" in text:
        raise InvalidRequest(
            f"{where}: {text!r} is a URL; a rule is its host's name, with ':port' or without"
        )
    target, colon, port_text = text.strip().lower().rpartition(":")
    if not colon:
        target, port_text = port_text, ""
    if ":" in target or "[" in target:
        try:
            IPv6Network(text.strip().strip("[]"), strict=False)
        except ValueError:
            raise InvalidRequest(
                f"{where}: {text!r} has more than one ':'; a rule is 'target:port'"
            ) from None
        raise InvalidRequest(f"{where}: {text!r}: IPv6 is not routed; sandboxes reach IPv4 addresses only")
    port: int | None = None
    if colon and port_text != "*":
        if not re.fullmatch(r"[0-9]{1,5}", port_text) or not 1 <= int(port_text) <= 65535:
            raise InvalidRequest(f"{where}: {text!r}: the port must be a number from 1 to 65535")
        port = int(port_text)
    if target == "*":
        return Rule(name="*", port=port)
    if re.fullmatch(r"[0-9./]+", target):
        try:
            return Rule(cidr=IPv4Network(target, strict=True), port=port)
        except ValueError as error:
            raise InvalidRequest(f"{where}: {text!r}: {error}") from None
    target = target.removesuffix(".")
    try:
        target = target if target.isascii() else target.encode("idna").decode("ascii")
    except UnicodeError:
        raise InvalidRequest(f"{where}: {text!r} is not a host name") from None
    if len(target) > 253 or not _NAME.fullmatch(target):
        raise InvalidRequest(
            f"{where}: {text!r} is not a host name ('*' may only be the first label, as in '*.example.org')"
        )
    return Rule(name=target.removeprefix("*."), subdomains=target.startswith("*."), port=port)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkPolicy:
    """What a sandbox may reach. An empty one reaches nothing, as 'offline' does, but can be widened while it runs.

    Raises InvalidRequest when a rule is none.
    """

    allow: Sequence[str] = ()
    deny: Sequence[str] = ()
    """Wins over `allow`. A name here is refused by the name server; its addresses are not looked up."""
    name: str = "custom"
    """What `info().network` says."""

    def __post_init__(self) -> None:
        for field in ("allow", "deny"):
            rules = getattr(self, field)
            if isinstance(rules, str) or not isinstance(rules, Sequence):
                raise InvalidRequest(f"network: {field} must be a list of rules, not {rules!r}")
            if len(rules) > MAX_RULES:
                raise InvalidRequest(f"network: {field} has {len(rules)} rules; at most {MAX_RULES}")
            object.__setattr__(self, field, tuple(rules))
            for text in rules:
                rule = parse_rule(text, where=f"network: {field}")
                if field == "deny" and rule.name and rule.port is not None:
                    raise InvalidRequest(
                        f"network: deny: {text!r}: a name is denied whole; "
                        f"to close a port, deny '0.0.0.0/0:{rule.port}'"
                    )
        if not isinstance(self.name, str) or not _POLICY_NAME.fullmatch(self.name):
            raise InvalidRequest(f"network: {self.name!r} is not a policy's name (a-z, 0-9, '-', '_')")

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "allow": list(self.allow), "deny": list(self.deny)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """A policy's rules, parsed once and sorted by what they are."""

    allow: tuple[Rule, ...]
    deny: tuple[Rule, ...]

    @classmethod
    def of(cls, policy: NetworkPolicy) -> Compiled:
        return cls(
            allow=tuple(parse_rule(rule) for rule in policy.allow),
            deny=tuple(parse_rule(rule) for rule in policy.deny),
        )

    def ports(self, name: str) -> Ports:
        """The ports `name` may be reached on, (None,) for all; () when it may not even be looked up."""
        if any(rule.matches(name) for rule in self.deny):
            return ()
        found = {rule.port for rule in self.allow if rule.matches(name)}
        return (None,) if None in found else tuple(sorted(port for port in found if port is not None))

    def cidrs(self, kind: str) -> list[tuple[IPv4Network, int | None]]:
        """The CIDR rules of 'allow' or 'deny'."""
        rules: tuple[Rule, ...] = getattr(self, kind)
        return [(rule.cidr, rule.port) for rule in rules if rule.cidr is not None]

    def opened(self, protected: Sequence[IPv4Network]) -> list[tuple[IPv4Network, int | None]]:
        """The CIDR rules of 'allow' that lie within a protected range, and so open that part of it."""
        return [
            (cidr, port)
            for cidr, port in self.cidrs("allow")
            if any(cidr.subnet_of(network) for network in protected)
        ]

    def opens(self, address: IPv4Address, protected: Sequence[IPv4Network]) -> bool:
        return any(address in cidr for cidr, _ in self.opened(protected))

    def denies(self, address: IPv4Address) -> bool:
        return any(address in cidr for cidr, port in self.cidrs("deny") if port is None)


OFFLINE = "offline"
BUILT_IN: Mapping[str, NetworkPolicy] = {
    OFFLINE: NetworkPolicy(name=OFFLINE),
    "open": NetworkPolicy(name="open", allow=("*",)),
    "pypi": NetworkPolicy(name="pypi", allow=("pypi.org:443", "files.pythonhosted.org:443")),
    "npm": NetworkPolicy(name="npm", allow=("registry.npmjs.org:443",)),
    "debian": NetworkPolicy(
        name="debian",
        allow=tuple(
            f"{name}:{port}"
            for name in ("deb.debian.org", "security.debian.org", "cdn-fastly.deb.debian.org")
            for port in (80, 443)
        ),
    ),
}
"""Policies by name. Under 'open' everything public; the host, private and metadata addresses stay closed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """How the gateway of this host's sandboxes reaches the world."""

    namespace: str = ""
    """Path of the network namespace that traffic leaves through (/run/netns/vpn); '' is the client's own."""
    resolvers: tuple[str, ...] = ()
    """IPv4 addresses of name servers, 'address' or 'address:port'; none: those of /etc/resolv.conf."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """What networks.toml says."""

    policies: Mapping[str, NetworkPolicy]
    gateway: GatewayConfig


def config_file(environ: Mapping[str, str] | None = None) -> Path:
    """$XDG_CONFIG_HOME/rorqual/networks.toml, else ~/.config/rorqual/networks.toml."""
    env = os.environ if environ is None else environ
    home = env.get("XDG_CONFIG_HOME") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".config")
    return Path(home) / "rorqual" / "networks.toml"


def load(path: Path | None = None) -> NetworkConfig:
    """Reads networks.toml: tables [policy.<name>] with `allow` and `deny`, and [gateway]. No file is an empty one.

    Raises:
        InvalidRequest: it is not TOML, or says something unknown; names the file.
    """
    path = path or config_file()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        document = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"{path}: {error}") from error
    unknown = set(document) - {"policy", "gateway"}
    if unknown:
        raise InvalidRequest(
            f"{path}: unknown key {sorted(unknown)[0]!r}; there are [policy.<name>] and [gateway]"
        )
    policies = dict(BUILT_IN)
    tables, gateway = document.get("policy", {}), document.get("gateway", {})
    if not isinstance(tables, dict) or not isinstance(gateway, dict):
        raise InvalidRequest(f"{path}: policy and gateway must be tables")
    try:
        for name, table in tables.items():
            if name in BUILT_IN:
                raise InvalidRequest(f"policy {name!r} is built in; choose another name")
            policies[name] = parse_policy({**table, "name": name})
        return NetworkConfig(policies=policies, gateway=_gateway(gateway))
    except (InvalidRequest, TypeError) as error:
        raise InvalidRequest(f"{path}: {error}") from error


def _gateway(table: Mapping[str, Any]) -> GatewayConfig:
    unknown = set(table) - {"namespace", "resolvers"}
    if unknown:
        raise InvalidRequest(
            f"gateway: unknown key {sorted(unknown)[0]!r}; there are namespace and resolvers"
        )
    namespace, resolvers = table.get("namespace", ""), table.get("resolvers", [])
    if not isinstance(namespace, str) or (namespace and not namespace.startswith("/")):
        raise InvalidRequest(f"gateway: namespace {namespace!r} must be an absolute path, as /run/netns/vpn")
    if not isinstance(resolvers, list):
        raise InvalidRequest("gateway: resolvers must be a list of IPv4 addresses")
    for item in resolvers:
        rule = parse_rule(item, where="gateway: resolvers")
        if rule.cidr is None or rule.cidr.prefixlen != 32:
            raise InvalidRequest(f"gateway: resolvers: {item!r} is not an IPv4 address")
    return GatewayConfig(namespace=namespace, resolvers=tuple(resolvers))


def parse_policy(
    value: str | Mapping[str, Any] | NetworkPolicy, *, config: NetworkConfig | None = None
) -> NetworkPolicy:
    """A policy from its name, a mapping with `allow` and `deny`, or itself.

    Raises:
        InvalidRequest: no such name, or something that is no policy.
    """
    if isinstance(value, NetworkPolicy):
        return value
    if isinstance(value, str):
        known = (config or load()).policies if value not in BUILT_IN else BUILT_IN
        if value not in known:
            raise InvalidRequest(
                f"network={value!r}: no policy has this name; there are {', '.join(sorted(known))}. "
                f"Your own go into {config_file()}, or pass NetworkPolicy(allow=[...])"
            )
        return known[value]
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            f"network: {value!r} is neither a policy's name nor a NetworkPolicy nor a mapping"
        )
    unknown = set(value) - {"allow", "deny", "name"}
    if unknown:
        raise InvalidRequest(
            f"network: unknown key {sorted(map(str, unknown))[0]!r}; there are allow, deny, name"
        )
    return NetworkPolicy(**value)


def plain_policy(value: str | Mapping[str, Any] | NetworkPolicy) -> str | Mapping[str, Any]:
    """As JSON has it: what can be sent to an edge."""
    return value.to_dict() if isinstance(value, NetworkPolicy) else value
