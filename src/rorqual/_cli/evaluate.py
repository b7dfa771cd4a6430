"""`rorqual eval`: held-out success of a model per family and depth, in real sandboxes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from rorqual._cli.embedded import EMBEDDED_DIR
from rorqual._cli.exits import WRONG_USE, CliError
from rorqual._cli.session import run_async, write_json

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
        list[float] | None, typer.Option(help="May be repeated. Default: 1 and 0 (greedy).")
    ] = None,
    sandboxes: Annotated[int, typer.Option(help="Episodes at once.", min=1, max=256)] = 64,
    seed: Annotated[int, typer.Option(help="Of the sampling; the tasks are fixed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Solved tasks of the test split: fresh draws that no training saw."""
    from rorqual.rl import tasks

    families = family or list(tasks.families())
    unknown = sorted(set(families) - set(tasks.families()))
    if unknown:
        raise CliError(f"no family {unknown[0]!r}: choose from {', '.join(tasks.families())}", code=WRONG_USE)
    results = run_async(_measure(model, families, per_depth, temperature or [1.0, 0.0], sandboxes, seed))
    if as_json:
        write_json(results)
        return
    table = Table(box=box.SIMPLE_HEAD, title=f"{model}: share solved, {per_depth} tasks a depth")
    table.add_column("family")
    table.add_column("depth", justify="right")
    for result in results:
        greedy = result["temperature"] == 0
        table.add_column("greedy" if greedy else f"T={result['temperature']:g}", justify="right")
    for name in families:
        for depth in results[0]["solved"][name]:
            table.add_row(name, depth, *(f"{100 * result['solved'][name][depth]:.0f}%" for result in results))
    Console(highlight=False).print(table)


async def _measure(
    model: Path, families: list[str], per_depth: int, temperatures: list[float], sandboxes: int, seed: int
) -> list[dict[str, Any]]:
    from rorqual.chat import Tokenizer
    from rorqual.engine import Engine
    from rorqual.rl import SandboxPool, evaluate

    engine, tokenizer = Engine(model), Tokenizer.from_file(model)
    async with SandboxPool.open(sandboxes) as pool:
        return [
            (
                await evaluate(
                    engine,
                    tokenizer,
                    pool,
                    families=families,
                    per_depth=per_depth,
                    temperature=heat,
                    seed=seed,
                )
            ).to_json()
            for heat in temperatures
        ]
