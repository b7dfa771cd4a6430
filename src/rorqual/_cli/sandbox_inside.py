"""`rorqual sandbox exec | logs | cp | shell`: what happens inside. The terminal is sandbox_shell.py's."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from rorqual._cli.exits import WRONG_USE, CliError
from rorqual._cli.sandbox import As_json, Edge, Id, _pairs, one_line, plain_table, screen
from rorqual._cli.session import run_async, write_json

if TYPE_CHECKING:
    from rorqual.sandbox import CommandResult, TrajectoryEntry

__all__ = ["register"]

FOLLOW_S = 0.25


def register(group: typer.Typer) -> None:
    """Add the commands."""
    context = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    group.command("exec", context_settings=context)(execute)
    for command in (shell, cp, logs):
        group.command(command.__name__)(command)


def execute(
    sandbox_id: Id,
    command: Annotated[
        list[str], typer.Argument(help="One text for the shell, or a program and its arguments.")
    ],
    timeout: Annotated[float | None, typer.Option(help="Seconds until it is killed. Default: none.")] = None,
    workdir: Annotated[str | None, typer.Option(help="Directory inside.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; may be repeated.")] = None,
    user: Annotated[str | None, typer.Option(help="user or root.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Feed it our standard input.")
    ] = False,
    edge: Edge = None,
    as_json: As_json = False,
) -> None:
    """Run a command. Our exit code is the command's own (137: it was killed, at its timeout too).

    Options of ours come before ID.
    """
    from rorqual.sandbox import AsyncSandbox

    cmd: str | list[str] = command[0] if len(command) == 1 else command

    async def work() -> CommandResult:
        async with await AsyncSandbox.connect(sandbox_id, edge=edge) as sandbox:
            handle = await sandbox.commands.run(
                cmd,
                timeout=timeout,
                cwd=workdir,
                envs=_pairs("--env", env),
                user=user,
                background=True,
                stdin=interactive,
                max_output=1 << 20 if as_json else 1 << 40,
                on_stdout=None if as_json else _to(sys.stdout),
                on_stderr=None if as_json else _to(sys.stderr),
            )
            feeding = asyncio.create_task(_feed(handle)) if interactive else None
            try:
                return await handle.wait()
            except asyncio.CancelledError:
                await handle.kill()
                raise
            finally:
                if feeding is not None:
                    feeding.cancel()

    result = run_async(work())
    if as_json:
        write_json(asdict(result))
    elif result.error:
        sys.stderr.write(f"rorqual: {result.error}\n")
    elif result.timed_out:
        sys.stderr.write(f"rorqual: killed after {timeout:g} s\n")
    raise typer.Exit(result.exit_code)


def _to(stream: Any) -> Any:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


async def _feed(handle: Any) -> None:
    """Our standard input, as it comes."""
    from rorqual.sandbox import GuestRefused

    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(0), "rb", 0))
    try:
        while data := await reader.read(64 << 10):
            await handle.send_stdin(data)
        await handle.close_stdin()
    except GuestRefused:
        pass  # it reads no more


def shell(
    sandbox_id: Id,
    command: Annotated[
        list[str] | None, typer.Argument(help="A program instead of the shell, and its arguments.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="user or root.")] = None,
    workdir: Annotated[str | None, typer.Option(help="Directory inside.")] = None,
    edge: Edge = None,
) -> None:
    """Open a terminal inside. Our exit code is the shell's."""
    from rorqual._cli.sandbox_shell import terminal

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CliError("shell needs a terminal; without one: rorqual sandbox exec -i ID sh", code=WRONG_USE)
    raise typer.Exit(
        run_async(terminal(sandbox_id, command=command or None, user=user, workdir=workdir, edge=edge))
    )


def cp(
    source: Annotated[str, typer.Argument(help="PATH here, or ID:PATH inside.")],
    target: Annotated[str, typer.Argument(help="PATH here, or ID:PATH inside.")],
    max_mb: Annotated[int, typer.Option(help="Refuse more than this, in MiB.", min=1)] = 4096,
    edge: Edge = None,
    as_json: As_json = False,
) -> None:
    """Copy a file or a directory into a sandbox or out of it. A target that is a directory gets it inside."""
    from rorqual._cli import sandbox_copy
    from rorqual.sandbox import AsyncSandbox

    ours, theirs = _remote_path(source), _remote_path(target)
    if (ours is None) == (theirs is None):
        raise CliError("cp: one of the two must be ID:PATH, the other a path here", code=WRONG_USE)

    async def work() -> dict[str, Any]:
        sandbox_id, inside = ours or theirs or ("", "")
        async with await AsyncSandbox.connect(sandbox_id, edge=edge) as sandbox:
            if theirs is not None:
                return await sandbox_copy.into(sandbox, Path(source), inside, max_bytes=max_mb << 20)
            return await sandbox_copy.out_of(sandbox, inside, Path(target), max_bytes=max_mb << 20)

    done = run_async(work())
    if as_json:
        write_json(done)
    else:
        sys.stderr.write(f"{done['bytes']} bytes, {done['files']} files -> {done['target']}\n")


def _remote_path(text: str) -> tuple[str, str] | None:
    head, colon, path = text.partition(":")
    return (head, path or ".") if colon and head.startswith("sb-") and "/" not in head else None


def logs(
    sandbox_id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    after: Annotated[int, typer.Option(help="Only what has a higher number.", min=0)] = 0,
    edge: Edge = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout; with -f one a line.")
    ] = False,
) -> None:
    """Show the trajectory of a sandbox, alive or over: each command, each change, its result."""
    from rorqual.sandbox import AsyncSandbox

    if follow:
        run_async(_follow(sandbox_id, after=after, edge=edge, as_json=as_json))
        return
    entries = run_async(AsyncSandbox.logged(sandbox_id, after=after, edge=edge))
    if as_json:
        write_json([_document(entry) for entry in entries])
        return
    console = screen()
    table = plain_table(console, "seq", "time", "kind", "what", "result", "took")
    for entry in entries:
        table.add_row(*_cells(entry))
    console.print(table)


async def _follow(sandbox_id: str, *, after: int, edge: str | None, as_json: bool) -> None:
    from rorqual.sandbox import AsyncSandbox

    console = screen()
    shown: dict[int, bool] = {}
    while True:
        entries = await AsyncSandbox.logged(sandbox_id, after=after, edge=edge)
        for entry in entries:
            done = entry.result is not None
            if shown.get(entry.seq) == done:
                continue
            shown[entry.seq] = done
            if as_json:
                console.file.write(json.dumps(_document(entry), ensure_ascii=False) + "\n")
                console.file.flush()
            else:
                console.print(Text("  ").join(_cells(entry)), soft_wrap=True)
            if entry.kind == "ended":
                return
        while shown.get(after + 1):
            after += 1
            del shown[after]
        await asyncio.sleep(FOLLOW_S)


def _document(entry: TrajectoryEntry) -> dict[str, Any]:
    texts = {name: getattr(entry, name).decode("utf-8", "replace") for name in ("stdout", "stderr", "input")}
    return asdict(entry) | texts


def _cells(entry: TrajectoryEntry) -> list[Text]:
    request, result = entry.request, entry.result
    what = str(request.get("cmd") or request.get("path") or request.get("image") or "")
    if entry.kind == "stdin":
        what = f"{request['size']} bytes to {request['id']}{', the end' if request.get('eof') else ''}"
    if not what and request:
        what = json.dumps({name: value for name, value in request.items() if name not in ("envs", "secrets")})
    if result is None:
        outcome = Text("…", "yellow")
    elif "exit_code" in result:
        code = result["exit_code"]
        outcome = Text(
            f"exit {code}" + (", timed out" if result.get("timed_out") else ""), "red" if code else "green"
        )
    elif "cause" in result:
        outcome = Text(one_line(f"{result['cause']}: {result.get('detail', '')}", 100), "bold")
    elif "errno" in result:
        outcome = Text(os.strerror(result["errno"]), "red")
    else:
        outcome = Text(str(result.get("error") or "ok"), "red" if result.get("error") else "green")
    took = "" if entry.ended is None else f"{1000 * (entry.ended - entry.started):.0f} ms"
    return [
        Text(f"{entry.seq:>3}", "bold"),
        Text(time.strftime("%H:%M:%S", time.localtime(entry.started)), "bright_black"),
        Text(entry.kind),
        Text(one_line(what.replace("\0", " "), 200)),
        outcome,
        Text(took, "bright_black"),
    ]
