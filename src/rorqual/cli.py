"""`rorqual ...`: the command line. Owns the list of commands and the way out; each command is a module of
`_cli`.

Exit codes: 0 done, 1 the task failed, 2 wrong use, 3 the host lacks something, 130 interrupted. An error is
one line on stderr; `--debug` or RORQUAL_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from rorqual import __version__
from rorqual._cli import chat, cost, demo, doctor, edge, evaluate, model, run, runs, sandbox, serve, train
from rorqual._cli.exits import INTERRUPTED, describe

__all__ = ["app", "main"]

COMMANDS = (run, chat, demo, runs, serve, sandbox, edge, train, evaluate, model, cost, doctor)
"""Modules with `register(app)`, in the order of `rorqual --help`."""

app = typer.Typer(
    name="rorqual",
    help="An agent that works in real sandboxes, with its own V4 model or any OpenAI-compatible one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"rorqual {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An agent that works in real sandboxes, with its own V4 model or any OpenAI-compatible one."""
    if debug:
        os.environ["RORQUAL_DEBUG"] = "1"


for command in COMMANDS:
    command.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: parse, run, exit."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except KeyboardInterrupt:
        sys.stderr.write("rorqual: interrupted\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output is gone: nothing can be said, and Python's own flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("RORQUAL_DEBUG"):
            traceback.print_exc()
        text, code = describe(error)
        sys.stderr.write(f"rorqual: {text}\n")
        if code == INTERRUPTED:
            # CPython 3.11 remembers an interrupt that passed through an exec() of text (dataclasses do that while
            # torch is imported), even one that was caught, and `python -m` then kills itself by SIGINT instead of
            # exiting with our code. The next exec() of text forgets it.
            exec("")
        sys.exit(code)


if __name__ == "__main__":
    main()
