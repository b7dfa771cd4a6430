"""The edge daemon: one per host, HTTP and WebSocket in front of the sandbox SDK. See docs/sandbox-edge.md.

Needs the extra `edge` (fastapi, uvicorn, websockets, prometheus-client). Files, top down: `server.py` (sockets,
signals), `guard.py` (hosts, tokens, sizes), `app.py` (paths), `channel.py` and `streams.py` (the Python SDK's
connection), `calls.py` (the plain calls), `edge.py` (tenancies, leases, admission), `adopt.py` and `book.py` (the
restart), `transfer.py` (file contents).
"""

from __future__ import annotations

from rorqual.sandbox.edge.app import create_app
from rorqual.sandbox.edge.config import EdgeConfig, default_name, token_digest
from rorqual.sandbox.edge.edge import Edge, home_of
from rorqual.sandbox.edge.server import Server, only_one, tcp_socket, unix_socket

__all__ = [
    "Edge",
    "EdgeConfig",
    "Server",
    "create_app",
    "default_name",
    "home_of",
    "only_one",
    "tcp_socket",
    "token_digest",
    "unix_socket",
]
