"""`rorqual runs`: list the runs of this machine, or show one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rorqual._cli.exits import WRONG_USE, CliError
from rorqual._cli.session import default_runs_dir, write_json

if TYPE_CHECKING:
    from rorqual.agent.events import Event, LoadedLog

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("runs")(runs)


def runs(
    run: Annotated[str | None, typer.Argument(help="Id of a run, or its beginning: show that one.")] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Where the event logs are.")] = None,
    limit: Annotated[int, typer.Option(help="List the newest N.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the newest runs, or show what one did."""
    folder = runs_dir or default_runs_dir()
    paths = sorted(folder.glob("*.jsonl"), reverse=True)
    if run is not None:
        _show(_find(paths, run, folder), as_json=as_json)
        return
    rows = [_summary(path) for path in paths[:limit]]
    if as_json:
        write_json(rows)
        return
    console = Console(highlight=False)
    if not rows:
        console.print(f"no runs in {folder}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in ("run", "outcome", "steps", "tokens", "task", "answer"):
        flexible = name in ("task", "answer")  # the others are never cut
        table.add_column(
            name, no_wrap=True, overflow="ellipsis", ratio=3 if name == "task" else 1 if flexible else None
        )
    for row in rows:
        cells = (
            row["run"],
            row["outcome"],
            row["steps"],
            row["completion_tokens"],
            row["task"],
            row["answer"],
        )
        table.add_row(*(Text("" if cell is None else _one_line(str(cell))) for cell in cells))
    console.print(table)


def _one_line(text: str) -> str:
    from rorqual.agent.view import clean

    return " ".join(clean(text).split())


def _find(paths: Sequence[Path], run: str, folder: Path) -> Path:
    found = [path for path in paths if path.stem == run] or [
        path for path in paths if path.stem.startswith(run)
    ]
    if len(found) == 1:
        return found[0]
    many = f"{len(found)} runs begin with {run!r}: give more of the id" if found else f"no run {run!r}"
    raise CliError(f"{many} in {folder} (`rorqual runs` lists them)", code=WRONG_USE)


def _summary(path: Path) -> dict[str, Any]:
    from rorqual.agent import EventLogError, read_log
    from rorqual.agent.figures import read_figures

    try:
        loaded = read_log(path)
    except EventLogError as error:
        keys = ("steps", "completion_tokens", "task", "answer", "seconds")
        return {"run": path.stem, "outcome": "damaged", **dict.fromkeys(keys), "error": str(error)}
    figures = read_figures(loaded.events)
    end = _data(loaded.events, "run.end")
    return {
        "run": path.stem,
        "outcome": outcome(loaded),
        "steps": figures.steps,
        "completion_tokens": figures.completion_tokens,
        "task": _data(loaded.events, "goal").get("text"),
        "answer": end.get("answer"),
        "seconds": round(figures.seconds, 3),
        "error": end.get("error"),
    }


def outcome(loaded: LoadedLog) -> str:
    """The outcome of the log; a run without an end is `running`, or `died` if nobody holds its log."""
    end = _data(loaded.events, "run.end")
    return str(end["outcome"]) if end else "running" if loaded.live else "died"


def _data(events: Sequence[Event], kind: str) -> dict[str, Any]:
    return next((dict(event.data) for event in reversed(events) if event.kind == kind), {})


def _show(path: Path, *, as_json: bool) -> None:
    from rorqual.agent import read_log
    from rorqual.agent.view import RunView

    loaded = read_log(path)
    if as_json:
        events = [{"seq": e.seq, "kind": e.kind, "time": e.time, "data": dict(e.data)} for e in loaded.events]
        write_json(
            {
                "run": path.stem,
                "path": str(path),
                "outcome": outcome(loaded),
                "torn_bytes": loaded.torn_bytes,
                "events": events,
            }
        )
        return
    console = Console(highlight=False)
    if loaded.events:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(loaded.events[0].time))
        console.print(Text(f"{path.stem}  started {started}  {path}", style="bright_black"))
    with RunView(console, live=False) as view:
        for event in loaded.events:
            view(event)
    if not _data(loaded.events, "run.end"):
        state = "it is still running" if loaded.live else "its process died here"
        console.print(Text(f"  ! no end: {state}", style="yellow"))
