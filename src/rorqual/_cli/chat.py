"""`rorqual chat [TARGET]`: a conversation in the terminal, with a server or with a model directory.

A model directory is served in this process, on a loopback port, so that both are one path. Owns the command; the
conversation is talk.py's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from rorqual._cli.embedded import RAISED_DIR
from rorqual._cli.exits import UNFIT, WRONG_USE, CliError
from rorqual._cli.talk import Talk, TalkConfig
from rorqual._cli.talk_screen import Screen

__all__ = ["register"]

READY_SECONDS = 120
HISTORY_LINES = 1000


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(chat)


def chat(
    target: Annotated[
        str | None, typer.Argument(help="URL of a server, or a model directory. Default: the embedded model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for. Default: the server's first.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="NAME of the environment variable that holds the server's API key.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a list of function tools; you type the results of calls.", dir_okay=False
        ),
    ] = None,
    thinking: Annotated[bool, typer.Option(help="Let the model think.")] = True,
    show_reasoning: Annotated[
        bool, typer.Option("--show-reasoning", help="Show reasoning instead of folding it.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", min=0, max=2)] = None,
) -> None:
    """Talk to a model. Ctrl-C stops the answer, Ctrl-D leaves, /help tells the rest."""
    key = _api_key(api_key_env)
    offered = _tools(tools) if tools is not None else None
    with ExitStack() as stack:
        if target is not None and target.startswith(("http://", "https://")):
            url = target.rstrip("/").removesuffix("/v1")
        elif target is not None and "://" in target:
            raise CliError(f"{target} is no http:// or https:// URL, nor a model directory", code=WRONG_USE)
        else:
            url = stack.enter_context(_served(Path(target) if target else RAISED_DIR))
        headers = {"authorization": f"Bearer {key}"} if key else {}
        client = stack.enter_context(
            httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(10, read=600))
        )
        config = TalkConfig(
            model=model or _first_model(client, url),
            system=system,
            tools=offered,
            thinking=thinking,
            max_tokens=max_tokens,
            temperature=temperature,
        )
        stack.enter_context(_line_editing())
        screen = Screen(show_reasoning=show_reasoning)
        Talk(client, config, screen).run()


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise CliError(f"--api-key-env {variable}: this environment variable holds no key", code=WRONG_USE)
    return key


def _tools(path: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CliError(f"--tools {path}: {error.strerror or error}", code=WRONG_USE) from error
    except ValueError as error:
        raise CliError(f"--tools {path}: not JSON: {error}", code=WRONG_USE) from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise CliError(f"--tools {path}: must hold a list of function tools", code=WRONG_USE)
    return tools


def _first_model(client: httpx.Client, url: str) -> str:
    try:
        response = client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        hint = ": name the key's variable with --api-key-env" if code in (401, 403) else ""
        raise CliError(f"{url}/v1/models answered {code}{hint}", code=UNFIT) from error
    except httpx.HTTPError as error:
        raise CliError(f"no server at {url}: {error or type(error).__name__}", code=UNFIT) from error
    except (ValueError, LookupError, TypeError) as error:
        raise CliError(f"{url}/v1/models lists no model: name one with --model", code=UNFIT) from error


@contextmanager
def _served(directory: Path) -> Iterator[str]:
    """URL of a server of our own, in this process."""
    from rorqual._cli.serve import check_installed, open_service

    if not directory.is_dir():
        raise CliError(f"{directory}: no such model directory", code=WRONG_USE)
    check_installed()
    from rorqual.serve import ServeConfig, Server, open_socket

    name = "rorqual-embedded" if directory == RAISED_DIR else directory.resolve().name
    service = open_service(directory, ServeConfig(model_name=name, drain_seconds=0))
    ready = threading.Event()
    server = Server(service, on_ready=ready.set)
    with open_socket("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="rorqual-server")
        thread.start()
        try:
            if not ready.wait(READY_SECONDS):
                raise CliError(f"the model in {directory} did not start", code=UNFIT)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def _line_editing() -> Iterator[None]:
    """Editing and history of input lines, where there is a terminal. The history is the user's alone (0600)."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "rorqual"
    path = state / "chat_history"
    with suppress(OSError):  # a home that cannot be written is no reason not to talk
        state.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(path)
