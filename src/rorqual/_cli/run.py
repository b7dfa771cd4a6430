"""`rorqual run "TASK"`: the agent on the user's own task, in a fresh sandbox."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual._cli.exits import DONE, FAILED, WRONG_USE, CliError
from rorqual._cli.session import default_runs_dir, progress, run_async, write_json

if TYPE_CHECKING:
    from rorqual.agent import AgentResult, ChatModel

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    task: Annotated[str, typer.Argument(help="What to do; '-' reads it from standard input.")],
    model: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible endpoint. Default: the embedded model.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Name of the model there.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="NAME of the environment variable that holds the API key.")
    ] = None,
    substrate: Annotated[str, typer.Option(help="Kind of sandbox.")] = "container",
    image: Annotated[str, typer.Option(help="Image of the sandbox.")] = "base",
    workdir: Annotated[
        Path | None,
        typer.Option(help="Your directory, shown to the agent as /work and writable. Default: an empty one."),
    ] = None,
    network: Annotated[str, typer.Option(help="Network of the sandbox.")] = "offline",
    timeout: Annotated[float, typer.Option(help="Seconds the sandbox may live.")] = 3600.0,
    command_timeout: Annotated[float, typer.Option(help="Seconds one command may run.")] = 120.0,
    memory_mb: Annotated[int, typer.Option(help="Memory of the sandbox.")] = 1024,
    max_steps: Annotated[int, typer.Option(help="Answers of the model at most.")] = 60,
    max_total_tokens: Annotated[int | None, typer.Option(help="Prompt and written tokens at most.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature. Default: the server's, or 1 for the embedded model."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the embedded model's sampling.")] = 0,
    runs_dir: Annotated[Path | None, typer.Option(help="Where the event log goes.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as one JSON document on stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live view.")] = False,
) -> None:
    """Let the agent work on TASK in a fresh sandbox, and watch it.

    The view goes to stderr, the answer to stdout. Exit code 0: there is an answer; 1: there is none.
    """
    if task == "-":
        task = sys.stdin.read()
    if not task.strip():
        raise CliError("the task is empty: say what should be done", code=WRONG_USE)
    mount = _check_workdir(workdir)
    chat_model = _open_model(model, model_name, api_key_env, temperature=temperature, seed=seed)
    sandbox_options = {
        "substrate": substrate,
        "image": image,
        "network": network,
        "timeout": timeout,
        "memory_mb": memory_mb,
        "workdir": "/work",
    }
    agent_options = {
        "max_steps": max_steps,
        "max_total_tokens": max_total_tokens,
        "command_timeout": command_timeout,
        "runs_dir": runs_dir or default_runs_dir(),
    }
    result = run_async(_work(task, chat_model, mount, sandbox_options, agent_options, quiet=quiet))
    if as_json:
        write_json(to_json(result))
    elif result.answer is not None and (quiet or not (sys.stdout.isatty() and sys.stderr.isatty())):
        sys.stdout.write(result.answer + "\n")
    if result.error and quiet:  # the view has shown it
        sys.stderr.write(f"rorqual: {result.error}\n")
    raise typer.Exit(DONE if result.done else FAILED)


def _check_workdir(workdir: Path | None) -> Path | None:
    if workdir is None:
        return None
    path = workdir.expanduser().resolve()
    if not path.is_dir():
        raise CliError(f"--workdir {workdir}: not a directory", code=WRONG_USE)
    if path in (Path("/"), Path.home().resolve()):
        raise CliError(f"--workdir {workdir}: give the agent a project directory, not {path}", code=WRONG_USE)
    return path


def _open_model(
    url: str | None, name: str | None, api_key_env: str | None, *, temperature: float | None, seed: int
) -> ChatModel:
    if url is None:
        for value, option in ((name, "--model-name"), (api_key_env, "--api-key-env")):
            if value is not None:
                raise CliError(
                    f"{option} needs --model URL: without it the embedded model runs", code=WRONG_USE
                )
        from rorqual._cli.embedded import open_embedded

        return open_embedded(seed=seed, temperature=1.0 if temperature is None else temperature)
    if name is None:
        raise CliError("--model needs --model-name: the name the server knows the model by", code=WRONG_USE)
    from rorqual.agent import RemoteConfig, RemoteModel

    return RemoteModel(RemoteConfig(url=url, model=name, api_key_env=api_key_env, temperature=temperature))


async def _work(
    task: str,
    model: ChatModel,
    mount: Path | None,
    sandbox_options: dict[str, Any],
    agent_options: dict[str, Any],
    *,
    quiet: bool,
) -> AgentResult:
    from rorqual.agent import AsyncAgent, Budget
    from rorqual.agent.view import RunView
    from rorqual.sandbox import AsyncSandbox, Mount

    mounts = [Mount(source=str(mount), target="/work", readonly=False)] if mount else []
    view = None if quiet else RunView(progress())
    try:
        async with await AsyncSandbox.create(mounts=mounts, **sandbox_options) as sandbox:
            with view or nullcontext():
                if view is not None:
                    view.title(f"{model.name} · {sandbox_options['substrate']} {sandbox.id}")
                agent = AsyncAgent(
                    model=model,
                    sandbox=sandbox,
                    budget=Budget(
                        max_steps=agent_options["max_steps"],
                        max_total_tokens=agent_options["max_total_tokens"],
                    ),
                    workdir="/work",
                    command_timeout=agent_options["command_timeout"],
                    runs_dir=agent_options["runs_dir"],
                    on_event=view,
                )
                return await agent.run(task)
    finally:
        await model.aclose()


def to_json(result: AgentResult) -> dict[str, Any]:
    """The result as data; the log holds the rest."""
    return {
        "run": result.run_id,
        "outcome": result.outcome,
        "answer": result.answer,
        "error": result.error,
        "steps": result.steps,
        "recovered": result.recovered,
        "usage": asdict(result.usage),
        "log": str(result.log_path) if result.log_path else None,
    }
