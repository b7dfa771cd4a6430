"""`rorqual serve MODEL_DIR`: the model behind OpenAI's HTTP API."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual._cli.embedded import RAISED_DIR
from rorqual._cli.exits import DONE, INTERRUPTED, UNFIT, WRONG_USE, CliError
from rorqual._cli.model_dir import open_model_dir

if TYPE_CHECKING:
    from rorqual.engine.layout import CacheFormat
    from rorqual.serve import ServeConfig, Service

__all__ = ["check_installed", "open_service", "register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    model_dir: Annotated[Path, typer.Argument(help="Model directory.")] = RAISED_DIR,
    model_name: Annotated[
        str | None, typer.Option(help="The id clients ask for. Default: the directory's name.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="NAME of the environment variable that holds the API keys, separated by commas."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call; may be repeated.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name that the Host header may have; may be repeated. Default on loopback: its names."
        ),
    ] = None,
    strict_reasoning: Annotated[
        bool,
        typer.Option(
            "--strict-reasoning",
            help="Answer 400 as DeepSeek does when a tool conversation lost its reasoning.",
        ),
    ] = False,
    max_running: Annotated[int, typer.Option(help="Requests in the engine at once.", min=1)] = 32,
    max_waiting: Annotated[int, typer.Option(help="Requests in the queue; more get 429.", min=1)] = 256,
    kv_bytes: Annotated[
        str,
        typer.Option(help="The cache: running requests and what they leave as prefixes; 512m, 2g or bytes."),
    ] = "2g",
    kv_disk: Annotated[
        Path | None, typer.Option(help="Directory that keeps prefixes and conversations across restarts.")
    ] = None,
    kv_disk_bytes: Annotated[
        str, typer.Option(help="Prefixes on disk; beyond it least recently used ones go.")
    ] = "16g",
    kv_disk_bytes_per_second: Annotated[
        str | None, typer.Option(help="What may be written over time. Default: no bound.")
    ] = None,
    kv_window: Annotated[
        str, typer.Option(help="What a restart finds beside the pages: full, periodic or zero.")
    ] = "periodic",
    unit_tokens: Annotated[
        int, typer.Option(help="A long prompt is kept whenever it has passed a multiple of this.", min=128)
    ] = 8192,
    cache_format: Annotated[
        str,
        typer.Option(
            help="packed: FP8 rows and FP4 index keys, a quarter of the memory; exact: fp32, as it was trained."
        ),
    ] = "exact",
    max_body_mb: Annotated[int, typer.Option(help="Largest request body, in MiB.", min=1)] = 8,
    keep_alive_seconds: Annotated[float, typer.Option(help="Silence after which a stream says so.")] = 10.0,
    drain_seconds: Annotated[
        float, typer.Option(help="How long running requests may go on after the first signal.", min=0)
    ] = 10.0,
) -> None:
    """Serve a model: http://HOST:PORT/v1 for any OpenAI client, /docs for people.

    Ends on Ctrl-C (exit code 130) or SIGTERM (0): running requests are let finish, a second signal cuts them.
    """
    keys = _api_keys(api_key_env)
    if not keys and not _is_loopback(host):
        raise CliError(
            f"--host {host} is reachable from elsewhere: set keys and name them with --api-key-env NAME",
            code=WRONG_USE,
        )
    if cache_format not in ("exact", "packed"):
        raise CliError(f"--cache-format {cache_format}: expected exact or packed", code=WRONG_USE)
    check_installed()
    from rorqual.serve import ServeConfig, Server, key_digest, open_socket

    name = model_name or ("rorqual-embedded" if model_dir == RAISED_DIR else model_dir.resolve().name)
    try:
        config = ServeConfig(
            model_name=name,
            max_running=max_running,
            max_waiting=max_waiting,
            kv_bytes=_bytes(kv_bytes, "--kv-bytes"),
            kv_disk=None if kv_disk is None else str(kv_disk),
            kv_disk_bytes=_bytes(kv_disk_bytes, "--kv-disk-bytes"),
            kv_disk_bytes_per_second=(
                None
                if kv_disk_bytes_per_second is None
                else _bytes(kv_disk_bytes_per_second, "--kv-disk-bytes-per-second")
            ),
            kv_window=kv_window,  # type: ignore[arg-type]  # checked there
            unit_tokens=unit_tokens,
            keep_alive_seconds=keep_alive_seconds,
            drain_seconds=drain_seconds,
            max_body_bytes=max_body_mb << 20,
            key_digests=frozenset(key_digest(key) for key in keys),
            cors_origins=tuple(cors_origin or ()),
            allowed_hosts=tuple(allowed_host or (_loopback_hosts(host) if _is_loopback(host) else ())),
            strict_reasoning=strict_reasoning,
        )
    except ValueError as error:
        raise CliError(str(error), code=WRONG_USE) from error
    try:
        sock = open_socket(host, port)
    except OSError as error:
        raise CliError(f"cannot listen on {host}:{port}: {error.strerror or error}", code=UNFIT) from error
    with sock:
        service = open_service(model_dir, config, cache_format=cache_format)  # type: ignore[arg-type]
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{sock.getsockname()[1]}"
        server = Server(service, on_ready=lambda: _say(f"serving {name} at {url}/v1 (docs: {url}/docs)"))
        try:
            server.run(sockets=[sock])
        finally:
            service.close()
            service.engine.close()  # writes to disk what it still lacks
    if server.signal is None:
        raise CliError("the server ended by itself", code=1)
    _say("stopped")
    raise typer.Exit(INTERRUPTED if server.signal == signal.SIGINT else DONE)


def _bytes(text: str, option: str) -> int:
    """`2g`, `512m`, `64k` or a number of bytes."""
    found = re.fullmatch(r"([0-9]+)([kmg]?)", text.strip().lower().removesuffix("ib").removesuffix("b"))
    if found is None or not int(found[1]):
        raise CliError(f"{option} {text}: expected bytes, as 2147483648, 512m or 2g", code=WRONG_USE)
    return int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[found[2]]


def _say(text: str) -> None:
    sys.stderr.write(f"rorqual: {text}\n")
    sys.stderr.flush()


def _api_keys(variable: str | None) -> list[str]:
    if variable is None:
        return []
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise CliError(f"--api-key-env {variable}: this environment variable holds no key", code=WRONG_USE)
    return keys


def _loopback_hosts(host: str) -> tuple[str, ...]:
    """What a loopback address answers to: a page elsewhere that rebinds its own name to it is refused."""
    return ("localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_installed() -> None:
    """Raises CliError naming the extra, if a package of the server is missing."""
    for module in (
        "torch",
        "safetensors",
        "tokenizers",
        "fastapi",
        "llguidance",
        "uvicorn",
        "pydantic",
        "prometheus_client",
    ):
        try:
            import_module(module)
        except ImportError as error:
            raise CliError(
                f"serving needs {module} ({error}): pip install 'rorqual[serve]'", code=UNFIT
            ) from error


def open_service(directory: Path, config: ServeConfig, *, cache_format: CacheFormat = "exact") -> Service:
    """The model of a directory, ready to be served. Raises CliError naming what is missing or damaged."""
    from rorqual.serve import Service

    engine, tokenizer = open_model_dir(
        directory,
        kv_bytes=config.kv_bytes,
        cache_format=cache_format,
        store=config.store_config(),
        unit_tokens=config.unit_tokens,
    )
    return Service(engine, tokenizer, config)
