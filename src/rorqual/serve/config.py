"""ServeConfig: every bound of the server, read once at the edge."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from rorqual.engine import StoreConfig, WindowStrategy

__all__ = ["ServeConfig", "key_digest"]


def key_digest(key: str) -> str:
    """What the server keeps of an API key, and the name of its holder inside: SHA-256 in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Bounds and names. Raises ValueError, naming the field."""

    model_name: str = "rorqual"
    """The id clients ask for."""
    max_running: int = 32
    """Requests in the engine at once, prefilling ones included."""
    max_waiting: int = 256
    """Requests in the queue; the next one gets 429."""
    kv_bytes: int = 2 << 30
    """Cache of all running requests, as projected for their longest possible answers; what they do not use of it
    keeps prefixes. At most the engine's own."""
    kv_disk: str | None = None
    """Directory that keeps prefixes and conversations across restarts. None: nothing is written."""
    kv_disk_bytes: int = 16 << 30
    """Prefixes on disk; beyond it least recently used ones go."""
    kv_disk_bytes_per_second: int | None = None
    """What may be written over time; the rest stays in memory until the server ends. None: no bound."""
    kv_window: Literal["full", "periodic", "zero"] = "periodic"
    """What a restart finds beside the pages on disk (engine/store.py)."""
    unit_tokens: int = 8192
    """A long prompt is kept, on disk too, whenever it has passed a multiple of this; a multiple of 128."""
    replay_bytes: int = 64 << 20
    """Token ids kept of answers, so that a history is given back exactly as it was sampled. 0: none."""
    keep_alive_seconds: float = 10.0
    """A stream says `: keep-alive` when it had nothing to say for so long."""
    drain_seconds: float = 10.0
    """How long running requests may go on after the first signal to stop."""
    max_body_bytes: int = 8 << 20
    """Largest request body."""
    key_digests: frozenset[str] = frozenset()
    """`key_digest` of each accepted API key; empty: no key is asked for."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call, compared exactly."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may have, without the port, compared exactly; empty: any. It stops pages of other
    sites that rebind their name to this address."""
    strict_reasoning: bool = False
    """Answer 400 as DeepSeek's API does when a tool conversation comes back without its reasoning."""
    response_bytes: int = 64 << 20
    """Stored answers of /v1/responses, for `previous_response_id`. 0: none."""
    text_bytes: int = 64 << 20
    """Token ids of known prompts, so that only what follows them is tokenised. 0: none."""
    session_bytes: int = 64 << 20
    """Names and token ids of sessions."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_running", 1),
            ("max_waiting", 1),
            ("kv_bytes", 1),
            ("kv_disk_bytes", 1),
            ("replay_bytes", 0),
            ("text_bytes", 0),
            ("session_bytes", 0),
            ("drain_seconds", 0),
            ("response_bytes", 0),
            ("max_body_bytes", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
        rate = self.kv_disk_bytes_per_second
        if rate is not None and rate < 1:
            raise ValueError(f"kv_disk_bytes_per_second is {rate}, expected 1 or more")
        if self.unit_tokens < 1 or self.unit_tokens % 128:
            raise ValueError(f"unit_tokens is {self.unit_tokens}, expected a multiple of 128")
        if self.kv_window not in ("full", "periodic", "zero"):
            raise ValueError(f"kv_window is {self.kv_window!r}, expected full, periodic or zero")
        if self.keep_alive_seconds <= 0:
            raise ValueError(f"keep_alive_seconds is {self.keep_alive_seconds}, expected more than 0")
        for origin in self.cors_origins:
            if "*" in origin or not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError(f"cors_origins: {origin!r} is no origin: write it like https://example.org")
        for host in self.allowed_hosts:
            if not host or any(mark in host for mark in "/*@ ") or (":" in host and not host.startswith("[")):
                raise ValueError(
                    f"allowed_hosts: {host!r} is no host name: write it like example.org or [::1]"
                )

    def store_config(self) -> StoreConfig | None:
        """What the engine is to keep on disk; None: nothing."""
        if self.kv_disk is None:
            return None
        return StoreConfig(
            directory=self.kv_disk,
            window=WindowStrategy(self.kv_window),
            limit_bytes=self.kv_disk_bytes,
            bytes_per_second=self.kv_disk_bytes_per_second,
            sync="later",  # a step waits for no disk
        )
