"""`rorqual eval`: held-out success of a model per family and depth, in real sandboxes.

The table or the JSON goes to stdout; what is going on, and how many episodes the host failed, to stderr.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from rorqual._cli.embedded import EMBEDDED_DIR
from rorqual._cli.exits import FAILED, WRONG_USE, CliError
from rorqual._cli.model_dir import open_model_dir
from rorqual._cli.session import progress, run_async, write_json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Model directory.")] = EMBEDDED_DIR,
    family: Annotated[
        list[str] | None, typer.Option(help="hop-recover, calc-tool; may be repeated. Default: all.")
    ] = None,
    per_depth: Annotated[int, typer.Option(help="Tasks per depth.", min=1)] = 50,
    temperature: Annotated[
        list[float] | None, typer.Option(help="May be repeated. Default: 1 and 0 (greedy).", min=0.0)
    ] = None,
    sandboxes: Annotated[int, typer.Option(help="Episodes at once at most.", min=1, max=256)] = 64,
    seed: Annotated[int, typer.Option(help="Of the sampling; the tasks are fixed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Solved tasks of the test split: fresh draws that no training saw.

    Exit code 0 once all was measured, whatever the result; 1 if the host failed every episode of a depth.
    """
    from rorqual.rl import tasks

    families = family or list(tasks.families())
    unknown = sorted(set(families) - set(tasks.families()))
    if unknown:
        raise CliError(f"no family {unknown[0]!r}: choose from {', '.join(tasks.families())}", code=WRONG_USE)
    families = list(dict.fromkeys(families))
    episodes = per_depth * sum(len(tasks.depths(name, split="test")) for name in families)
    heats = list(dict.fromkeys(temperature or [1.0, 0.0]))
    console = progress()
    with console.status(f"{episodes} episodes at each of {len(heats)} temperatures") as status:

        def on_start(heat: float) -> None:
            status.update(f"{episodes} episodes at {'greedy' if heat == 0 else f'T={heat:g}'}")

        results = run_async(
            _measure(model, families, per_depth, heats, min(sandboxes, episodes), seed, on_start)
        )
    failed = sum(result["statuses"].get("infra_error", 0) for result in results)
    if failed:
        console.print(f"{failed} episodes failed for reasons of the host and are not counted", markup=False)
    empty = any(not count for result in results for by in result["counted"].values() for count in by.values())
    if as_json:
        write_json(results)
    else:
        Console(highlight=False).print(_table(model, families, per_depth, results))
    if empty:
        raise CliError(
            "the host failed every episode of a depth: its rate says nothing (`rorqual doctor` tells more)",
            code=FAILED,
        )


def _table(model: Path, families: list[str], per_depth: int, results: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{model}: share solved, {per_depth} tasks a depth")
    table.add_column("family")
    table.add_column("depth", justify="right")
    for result in results:
        greedy = result["temperature"] == 0
        table.add_column("greedy" if greedy else f"T={result['temperature']:g}", justify="right")
    for name in families:
        for depth in results[0]["solved"][name]:
            table.add_row(name, depth, *(f"{100 * result['solved'][name][depth]:.0f}%" for result in results))
    return table


async def _measure(
    model: Path,
    families: list[str],
    per_depth: int,
    temperatures: list[float],
    sandboxes: int,
    seed: int,
    on_start: Callable[[float], None],
) -> list[dict[str, Any]]:
    engine, tokenizer = open_model_dir(model)
    from rorqual.rl import SandboxPool, evaluate

    results = []
    async with SandboxPool.open(sandboxes) as pool:
        for heat in temperatures:
            on_start(heat)
            result = await evaluate(
                engine,
                tokenizer,
                pool,
                families=families,
                per_depth=per_depth,
                temperature=heat,
                seed=seed,
            )
            results.append(result.to_json())
    return results
