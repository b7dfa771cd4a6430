"""What an edge is told at its start. Owns the bounds, their error texts, and what is kept of a token."""

from __future__ import annotations

import hashlib
import re
import socket
from dataclasses import dataclass, field

from rorqual.sandbox.errors import InvalidRequest

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?")


def token_digest(token: str) -> str:
    """What an edge keeps of a token: SHA-256 in hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def default_name() -> str:
    """The host's name as an edge's name: the first label, what may not be in one as '-'."""
    label = (
        re.sub(r"[^a-z0-9]+", "-", socket.gethostname().partition(".")[0].lower()).strip("-")[:24].strip("-")
    )
    return label if label and label != "local" else "edge"


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeConfig:
    """Bounds and names. Raises InvalidRequest, naming the field."""

    name: str = field(default_factory=default_name)
    """In the middle of every sandbox id it gives: a-z, 0-9 and '-', at most 24."""
    max_sandboxes: int = 1000
    """Sandboxes at once; one more is refused (EdgeFull)."""
    max_memory_mb: int = 4096
    """Sum of the memory limits of its sandboxes, in MiB."""
    token_digests: frozenset[str] = frozenset()
    """`token_digest` of each accepted token; empty: none is asked for."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may have, without the port; empty: any."""
    mount_roots: tuple[str, ...] = ()
    """Host directories below which a client may mount; '/' allows all. Empty: no mounts, no other host path."""
    max_body_bytes: int = 8 << 20
    """Of a request that is not a file's content, and of a channel's message."""
    max_file_bytes: int = 4 << 30
    """Of one file that is written."""
    end_on_stop: bool = False
    """An orderly stop ends the sandboxes; else they live on, and an edge of the same name takes them up again."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name == "local":
            raise InvalidRequest(
                f"name: {self.name!r} must be 1 to 24 of a-z, 0-9 and '-', no '-' at its ends, and not 'local'"
            )
        for what, value in (
            ("max_sandboxes", self.max_sandboxes),
            ("max_memory_mb", self.max_memory_mb),
            ("max_body_bytes", self.max_body_bytes),
            ("max_file_bytes", self.max_file_bytes),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidRequest(f"{what}: {value!r} must be a whole number above 0")
        for root in self.mount_roots:
            if not root.startswith("/"):
                raise InvalidRequest(f"mount_roots: {root!r} must be an absolute path")
        for digest in self.token_digests:
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise InvalidRequest("token_digests: each must be 64 hex digits (SHA-256 of the token)")
