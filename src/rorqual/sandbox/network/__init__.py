"""Networks and secrets of a sandbox: policies by name and CIDR, a gateway that holds them, a proxy for credentials.

    Sandbox.create(network="pypi")
    Sandbox.create(network=NetworkPolicy(allow=["*.example.org:443", "10.1.0.0/16:80"]))
    Sandbox.create(secrets={"GITHUB": Secret(host="api.github.com", value=token, format="Bearer {}")})

Files, top down: `policy.py` and `secret.py` (what a user writes), `order.py` (what a substrate asks for), `gateway.py`
(the process: one per keeper, none without need), and in it `namespaces.py` (links), `nft.py` (rules), `resolver.py`
(names), `proxy.py` (credentials), `guests.py` (what it knows of each sandbox), `addresses.py` (numbers). See
docs/sandbox-network.md and docs/decisions/0018-network.md.
"""

from __future__ import annotations

from rorqual.sandbox.network.policy import NetworkPolicy
from rorqual.sandbox.network.secret import Secret, secret_url

__all__ = ["NetworkPolicy", "Secret", "secret_url"]
