"""The client's side: what a launch order says of the network, and whether this host can do it at all.

A substrate adds `order["network"] = network_order(...)` (None: no network, and no cost), then `guest_files` and
`secret_envs`. Machines pass a `Tap` and find in `order["network"]` what the gateway made, once it is launched:
`netns` (a path to enter with setns; `tap0` is in it) and `guest` {address, prefix, gateway, dns, mac, mtu}.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.sandbox import host
from rorqual.sandbox.errors import HostUnfit, Unsupported
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.network.addresses import RESOLV_CONF
from rorqual.sandbox.network.policy import NetworkPolicy, load
from rorqual.sandbox.network.secret import vault

# Skips the `__init__` of rorqual.sandbox, as the keeper does (keeper/client.py).
_BOOT = """
import sys, types
sys.path += {2!r}
for name, path in (("rorqual", {0!r}), ("rorqual.sandbox", {1!r}), ("rorqual.sandbox.network", {1!r} + "/network")):
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
from rorqual.sandbox.network.gateway import main
main()
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """A machine's device `tap0`, which a process of this user and group may open."""

    owner: int = 0
    group: int = 0


def lacking() -> HostUnfit | None:
    """What this host lacks for networks, looked at without trying; None when nothing."""
    if os.geteuid() != 0:
        return HostUnfit("networks and secrets need root: a network namespace is made and connected.")
    try:
        ctypes.CDLL("libnftables.so.1")
    except OSError:
        return HostUnfit("libnftables is not on this host.", fix="apt-get install nftables")
    if host.find_program("ip") is None:
        return HostUnfit("the program ip is not on this host.", fix="apt-get install iproute2")
    for module, package in (("dns", "dnspython"), ("h11", "h11")):
        if importlib.util.find_spec(module) is None:
            return HostUnfit(f"the Python package {package} is missing.", fix=f"pip install {package}")
    return None


def network_capabilities() -> frozenset[str]:
    """What a substrate that takes `network_order` may add to its capabilities here."""
    return frozenset({"network:policy", "secrets"}) if lacking() is None else frozenset()


def has_network(spec: SandboxSpec) -> bool:
    return isinstance(spec.network, NetworkPolicy) or bool(spec.secrets)


def network_order(spec: SandboxSpec, *, sandbox_id: str, tap: Tap | None = None) -> dict[str, Any] | None:
    """What `order["network"]` must be.

    Raises:
        Unsupported: rootless. HostUnfit: a program or a package is missing. InvalidRequest: networks.toml is wrong.
    """
    if not has_network(spec):
        return None
    problem = lacking()
    if problem is not None:
        if os.geteuid() != 0:
            what = "secrets" if spec.secrets else f"network={network_name(spec)!r}"
            raise Unsupported(what, reason=problem.what, available=["network='offline'"])
        raise problem
    package = Path(__file__).resolve().parents[2]
    origins = [importlib.util.find_spec(name) for name in ("dns", "h11")]
    paths = sorted(
        {str(Path(spec.origin).parents[1]) for spec in origins if spec is not None and spec.origin}
    )
    gateway = load().gateway
    policy = spec.network if isinstance(spec.network, NetworkPolicy) else NetworkPolicy(name="offline")
    secrets = {
        name: {**secret.public(), "value": secret.value} for name, secret in vault.get(sandbox_id).items()
    }
    missing = sorted(set(spec.secrets) - set(secrets))
    if missing:
        raise Unsupported(
            f"secret {missing[0]}",
            reason="its value is not known to this process",
            available=["create(secrets=...)"],
        )
    return {
        "policy": policy.to_dict(),
        "secrets": secrets,
        "tap": tap is not None,
        "owner": tap.owner if tap is not None else 0,
        "group": tap.group if tap is not None else 0,
        "gateway": {
            "argv": [
                sys.executable,
                "-I",
                "-S",
                "-c",
                _BOOT.format(str(package), str(package / "sandbox"), paths),
            ],
            "options": {"namespace": gateway.namespace, "resolvers": list(gateway.resolvers)},
        },
    }


def network_name(spec: SandboxSpec) -> str:
    """What `info().network` says."""
    return spec.network.name if isinstance(spec.network, NetworkPolicy) else str(spec.network)


def network_record(spec: SandboxSpec) -> dict[str, Any]:
    """The record's fields: `network`, the policy's name, and `networked`, whether there is an interface."""
    return {"network": network_name(spec), "networked": has_network(spec)}


def guest_files(spec: SandboxSpec) -> list[dict[str, str]]:
    """Files of the sandbox's root that a network needs: path and text."""
    return [{"path": "/etc/resolv.conf", "text": RESOLV_CONF}] if has_network(spec) else []
