"""Secrets that the sandbox uses and never has: described here, injected by the gateway's proxy (proxy.py).

The value travels from `create(secrets=...)` through the keeper's private socket to the gateway process and lives
there in memory. It is in no record, no trajectory, no variable of the sandbox and no error text: what is written
anywhere is `Secret.public()`. Inside, `secret_url(name)` stands for `https://<host>`: the proxy adds the header.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.sandbox.errors import InvalidRequest, Unsupported
from rorqual.sandbox.network.addresses import GATEWAY, PROXY_PORT
from rorqual.sandbox.network.policy import parse_rule

MIN_VALUE = 8
"""Shorter values cannot be told from chance in an answer, so they could not be blacked out."""
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_FORBIDDEN_HEADERS = {"host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Secret:
    """A credential for one host. Raises InvalidRequest, whose text never holds the value."""

    host: str
    """The only host that ever gets it: 'api.github.com', over TLS, its certificate checked."""
    value: str = field(repr=False)
    header: str = "Authorization"
    format: str = "{}"
    """The header's value, with {} where the secret goes: 'Bearer {}'."""
    port: int = 443
    methods: Sequence[str] = ()
    """Allowed request methods; none: every one but CONNECT and TRACE."""
    paths: Sequence[str] = ()
    """Allowed paths: exact ('/user'), or everything below one ('/repos/*'). None: every path."""
    max_body: int = 64 << 20
    """Bytes a request's body may have."""
    ca: str = ""
    """PEM file with the authorities that may sign the host's certificate; '' is the system's."""

    def __post_init__(self) -> None:
        rule = parse_rule(self.host, where="secret: host")
        if rule.port is not None or rule.subdomains or rule.name == "*" or rule.cidr is not None:
            raise InvalidRequest(f"secret: host {self.host!r} must be one host name, without port or '*'")
        object.__setattr__(self, "host", rule.name)
        if not isinstance(self.value, str) or not re.fullmatch(r"[!-~]([ -~]*[!-~])?", self.value):
            raise InvalidRequest("secret: value must be printable ASCII without spaces at its ends")
        if len(self.value) < MIN_VALUE:
            raise InvalidRequest(f"secret: value is shorter than {MIN_VALUE} characters")
        if not _TOKEN.fullmatch(self.header) or self.header.lower() in _FORBIDDEN_HEADERS:
            raise InvalidRequest(f"secret: header {self.header!r} is not a header a credential may go into")
        if self.format.count("{}") != 1 or not re.fullmatch(r"[ -~]*", self.format):
            raise InvalidRequest("secret: format must hold {} once, and printable ASCII")
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 1 <= self.port <= 65535:
            raise InvalidRequest(f"secret: port {self.port!r} must be a number from 1 to 65535")
        if isinstance(self.methods, str) or isinstance(self.paths, str):
            raise InvalidRequest("secret: methods and paths must be lists")
        object.__setattr__(self, "methods", tuple(method.upper() for method in self.methods))
        object.__setattr__(self, "paths", tuple(self.paths))
        for method in self.methods:
            if not _TOKEN.fullmatch(method):
                raise InvalidRequest(f"secret: {method!r} is not a method")
        for path in self.paths:
            if not re.fullmatch(r"/[!-)+-~]*\*?", path) or "?" in path:
                raise InvalidRequest(f"secret: path {path!r} must start with '/', with '*' at its end alone")
        if isinstance(self.max_body, bool) or not isinstance(self.max_body, int) or self.max_body < 0:
            raise InvalidRequest(f"secret: max_body {self.max_body!r} must be bytes, 0 or more")

    def public(self) -> dict[str, Any]:
        """Everything but the value: what records and logs hold."""
        return {
            "host": self.host,
            "header": self.header,
            "format": self.format,
            "port": self.port,
            "methods": list(self.methods),
            "paths": list(self.paths),
            "max_body": self.max_body,
            "ca": self.ca,
        }


def plain_secrets(secrets: Mapping[str, Secret | Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """As JSON has it, the values among it: what is sent to an edge. Never written down."""
    if not isinstance(secrets, Mapping):
        return secrets
    return {
        name: {**secret.public(), "value": secret.value} if isinstance(secret, Secret) else secret
        for name, secret in secrets.items()
    } or None


def check_secrets(secrets: Mapping[str, Secret | Mapping[str, Any]] | None) -> dict[str, Secret]:
    """The checked mapping, of Secrets or of their fields. Raises InvalidRequest."""
    if secrets is not None and not isinstance(secrets, Mapping):
        raise InvalidRequest("secrets: must be a mapping of names to Secrets")
    result: dict[str, Secret] = {}
    for name, secret in (secrets or {}).items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest(f"secrets: {name!r} is not a name for one (A-Z, 0-9 and '_')")
        if isinstance(secret, Mapping):
            unknown = sorted({str(key) for key in secret} - set(Secret.__dataclass_fields__))
            if unknown or not {"host", "value"} <= set(secret):
                raise InvalidRequest(f"secrets: {name}: needs host and value; unknown: {unknown}")
            secret = Secret(**secret)
        if not isinstance(secret, Secret):
            raise InvalidRequest(f"secrets: {name} must be a Secret, not {type(secret).__name__}")
        result[name] = secret
    return result


def secret_url(name: str) -> str:
    """What the sandbox uses in place of `https://<host>` for the secret `name`: the same in every sandbox."""
    return f"http://{GATEWAY}:{PROXY_PORT}/{name}"


def secret_envs(names: Sequence[str]) -> dict[str, str]:
    """The variables a sandbox gets: RORQUAL_SECRET_<NAME>_URL for each."""
    return {f"RORQUAL_SECRET_{name}_URL": secret_url(name) for name in names}


class Vault:
    """The values that this process gave to its sandboxes, so that a fork can be given them too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, dict[str, Secret]] = {}

    def put(self, sandbox_id: str, secrets: Mapping[str, Secret]) -> None:
        if secrets:
            with self._lock:
                self._held[sandbox_id] = dict(secrets)

    def copy(self, parent_id: str, sandbox_id: str, names: Sequence[str]) -> None:
        """Gives a fork its parent's. Raises Unsupported when this process does not have them."""
        if not names:
            return
        with self._lock:
            held = self._held.get(parent_id, {})
        if set(names) - set(held):
            raise Unsupported(
                f"fork of {parent_id}, which has secrets,",
                reason="only the process that gave it the secrets can pass them on",
                available=["fork() in the process that called create()"],
            )
        self.put(sandbox_id, held)

    def get(self, sandbox_id: str) -> dict[str, Secret]:
        with self._lock:
            return dict(self._held.get(sandbox_id, {}))

    def drop(self, sandbox_id: str) -> None:
        with self._lock:
            self._held.pop(sandbox_id, None)


vault = Vault()
