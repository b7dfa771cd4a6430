"""Where an edge is: its address and the token, from the caller's arguments or the environment.

Owns the forms of an address: `unix:/path`, `http://host:port`, `https://host:port`. `$RORQUAL_EDGE` and
`$RORQUAL_EDGE_TOKEN` are read here alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from rorqual.sandbox.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgePlace:
    """One edge, as a client reaches it."""

    address: str
    """As it was given, for error texts."""
    socket: str
    """Path of its Unix socket, or ''."""
    url: str
    """Base URL without a slash at the end; on a Unix socket its host is only for show."""
    token: str = field(default="", repr=False)


def edge_place(
    edge: str | None, token: str | None, *, environ: Mapping[str, str] | None = None
) -> EdgePlace | None:
    """The edge that is meant, or None for this process: 'local', or nothing named here or in $RORQUAL_EDGE.

    Raises:
        InvalidRequest: not an address, or a token that no header can hold.
    """
    env = os.environ if environ is None else environ
    address = env.get("RORQUAL_EDGE", "") if edge is None else edge
    if address in ("", "local"):
        return None
    secret = env.get("RORQUAL_EDGE_TOKEN", "") if token is None else token
    if not (secret.isascii() and secret.isprintable()):
        raise InvalidRequest("token: it must be printable ASCII without line breaks")
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/") or "\0" in path:
            raise InvalidRequest(
                f"edge: {address!r} must name an absolute path, as in unix:/run/rorqual/edge.sock"
            )
        return EdgePlace(address=address, socket=path, url="http://localhost", token=secret)
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username is not None:
        raise InvalidRequest(f"edge: {address!r} is not unix:/path, http://host:port or https://host:port")
    return EdgePlace(address=address, socket="", url=address.rstrip("/"), token=secret)
