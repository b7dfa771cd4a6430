"""`rorqual edge`: this host's sandboxes behind a socket."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual._cli.exits import DONE, INTERRUPTED, UNFIT, WRONG_USE, CliError

if TYPE_CHECKING:
    import socket

    from rorqual.sandbox.state import StateDir

__all__ = ["register"]

TOKEN = "RORQUAL_EDGE_TOKEN"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("edge")(edge)


def edge(
    name: Annotated[
        str | None, typer.Option(help="In the id of each sandbox it makes. Default: from the host's name.")
    ] = None,
    socket_path: Annotated[
        Path | None,
        typer.Option("--socket", help="Unix socket, for this user alone. Default: in the run directory."),
    ] = None,
    listen: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT to listen on, too; needs a token. Port 0: a free one.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"SHA-256 of each accepted token, in hex, one a line. Besides it: ${TOKEN}."),
    ] = None,
    max_sandboxes: Annotated[int, typer.Option(help="Sandboxes at once.", min=1)] = 1000,
    max_memory_mb: Annotated[
        int | None,
        typer.Option(help="Sum of their memory limits, in MiB. Default: what the host has.", min=1),
    ] = None,
    max_body_mb: Annotated[int, typer.Option(help="Largest request that is no file, in MiB.", min=1)] = 8,
    max_file_mb: Annotated[int, typer.Option(help="Largest file that is written, in MiB.", min=1)] = 4096,
    mount_root: Annotated[
        list[str] | None,
        typer.Option(
            help="Host directory below which clients may mount; may be repeated. Default: none where a token is "
            "asked for, else all."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name that the Host header may have; may be repeated. Default: loopback's, --listen's."
        ),
    ] = None,
    end_on_stop: Annotated[
        bool, typer.Option("--end-on-stop", help="End the sandboxes at an orderly stop.")
    ] = False,
    audit_log: Annotated[
        Path | None, typer.Option(help="File for a line of JSON per request. Default: stderr.")
    ] = None,
) -> None:
    """Keep sandboxes for clients of this host or of others: Sandbox.create(edge=...), or any language over HTTP.

    Ends on Ctrl-C (exit code 130) or SIGTERM (0). The sandboxes live on, and an edge of the same name takes them up.
    """
    check_installed()
    os.environ.pop("RORQUAL_EDGE", None)  # this process is the edge: what it does, it does itself
    from rorqual.sandbox.edge import (
        Edge,
        EdgeConfig,
        Server,
        default_name,
        home_of,
        only_one,
        tcp_socket,
        unix_socket,
    )
    from rorqual.sandbox.state import StateDir

    places = [_place(text) for text in listen or []]
    digests = _tokens(token_file)
    if places and not digests:
        raise CliError(f"--listen needs a token: set {TOKEN}, or pass --token-file", code=WRONG_USE)
    roots = mount_root if mount_root is not None else ([] if digests else ["/"])
    config = EdgeConfig(
        name=name or default_name(),
        max_sandboxes=max_sandboxes,
        max_memory_mb=max_memory_mb or _host_memory_mb(),
        token_digests=digests,
        allowed_hosts=tuple(
            allowed_host or ("localhost", "127.0.0.1", "[::1]", *(host for host, _ in places))
        ),
        mount_roots=tuple(roots),
        max_body_bytes=max_body_mb << 20,
        max_file_bytes=max_file_mb << 20,
        end_on_stop=end_on_stop,
    )
    state = StateDir.from_environment()
    state.prepare()
    home = home_of(state, config.name)
    with ExitStack() as stack:
        stack.enter_context(only_one(home))
        stack.callback(_log_to(audit_log))
        path = (socket_path or home / "edge.sock").absolute()
        sockets: list[socket.socket] = [stack.enter_context(unix_socket(path))]
        stack.callback(lambda: path.unlink(missing_ok=True))
        addresses = [f"unix:{path}"]
        for host, port in places:
            sock = stack.enter_context(tcp_socket(host.strip("[]"), port))
            sockets.append(sock)
            addresses.append(f"http://{host}:{sock.getsockname()[1]}")
        server = Server(
            Edge(config, state=state),
            on_ready=lambda: _say(f"edge {config.name} at {' and '.join(addresses)}"),
        )
        server.run(sockets=sockets)
    if server.signal is None:
        raise CliError("the edge ended by itself", code=1)
    _say(f"stopped; {_left(state, config.name)}")
    raise typer.Exit(INTERRUPTED if server.signal == signal.SIGINT else DONE)


def _say(text: str) -> None:
    sys.stderr.write(f"rorqual: {text}\n")
    sys.stderr.flush()


def _left(state: StateDir, name: str) -> str:
    count = sum(1 for place in state.sandboxes.glob(f"sb-{name}-*") if place.is_dir())
    if not count:
        return "no sandbox is left"
    return f"{count} {'sandbox lives' if count == 1 else 'sandboxes live'} on; `rorqual edge --name {name}` takes up"


def _place(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise CliError(f"--listen {text}: expected HOST:PORT, as in 127.0.0.1:8700", code=WRONG_USE)
    return host, int(port)


def _tokens(file: Path | None) -> frozenset[str]:
    from rorqual.sandbox.edge import token_digest

    digests = set()
    if file is not None:
        try:
            lines = file.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CliError(f"--token-file {file}: {error}", code=WRONG_USE) from error
        digests |= {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}
        if not digests:
            raise CliError(f"--token-file {file}: no token in it", code=WRONG_USE)
    if os.environ.get(TOKEN):
        digests.add(token_digest(os.environ[TOKEN]))
    return frozenset(digests)


def _host_memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def _log_to(path: Path | None) -> Callable[[], None]:
    """Sends the room's log to stderr and the audit log where it is wanted; returns what undoes that."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(logging.Formatter("rorqual: %(levelname)s %(message)s"))
    room = logging.getLogger("rorqual.sandbox")
    room.addHandler(stream)
    trail: logging.Handler = logging.StreamHandler(sys.stderr)
    if path is not None:
        trail = logging.FileHandler(path, encoding="utf-8")
    audit = logging.getLogger("rorqual.edge.audit")
    audit.addHandler(trail)
    audit.setLevel(logging.INFO)
    audit.propagate = False

    def undo() -> None:
        room.removeHandler(stream)
        audit.removeHandler(trail)
        trail.close()

    return undo


def check_installed() -> None:
    """Raises CliError naming the extra, if a package of the edge is missing."""
    for module in ("fastapi", "uvicorn", "pydantic", "prometheus_client", "websockets"):
        try:
            import_module(module)
        except ImportError as error:
            raise CliError(
                f"the edge needs {module} ({error}): pip install 'rorqual[edge]'", code=UNFIT
            ) from error
