"""`rorqual train sft` and `rorqual train rl`: from nothing to a warm start, and from there by acting."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rorqual._cli.embedded import EMBEDDED_DIR
from rorqual._cli.exits import WRONG_USE, CliError
from rorqual._cli.session import run_async, write_json

__all__ = ["register"]

group = typer.Typer(
    help="Train a small V4 model: `sft` from scratch, `rl` by acting in sandboxes.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group.command("sft")(sft)
    group.command("rl")(rl)
    app.add_typer(group, name="train")


def _prepare(out: Path, *, fresh: bool) -> None:
    if fresh and out.exists():
        if not (out / "tokenizer.json").exists() and any(out.iterdir()):
            raise CliError(f"{out} does not look like a training run: it is not deleted", code=WRONG_USE)
        shutil.rmtree(out)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=False,
    )


def sft(
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run there goes on.")] = Path(
        "runs/sft"
    ),
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Padded tokens per step.")] = None,
    style: Annotated[
        str, typer.Option(help="Demonstrations: weak (mostly wrong at decisions) or expert.")
    ] = "weak",
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's choice.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is in --out first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The final figures as JSON on stdout.")] = False,
) -> None:
    """Trains the embedded model from scratch on synthetic traces; Ctrl-C keeps the last checkpoint."""
    from rorqual.rl import saves
    from rorqual.rl.sft import SFTConfig, run

    _prepare(out, fresh=fresh)
    saves.torch_threads(threads)
    config = SFTConfig(style=style, seed=seed)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    if batch_tokens is not None:
        config = dataclasses.replace(config, batch_tokens=batch_tokens)
    last: dict[str, Any] = {}
    with _bar(Console(stderr=True)) as progress:
        bar = progress.add_task("sft", total=config.steps, note="")

        def on_step(row: dict[str, Any]) -> None:
            last.update(row)
            note = f"loss {row['loss']:.3f}"
            if "held_out" in last:
                note += f" · held-out accuracy {last['held_out']['accuracy']:.3f}"
            progress.update(bar, completed=row["step"], note=note)

        run(out, config, on_step=on_step)
    if as_json:
        write_json({"out": str(out), **last})


def rl(
    recipe: Annotated[str, typer.Option(help="hop-recover or mixed.")] = "hop-recover",
    start: Annotated[Path, typer.Option(help="Model directory to start from.")] = EMBEDDED_DIR,
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run there goes on.")] = Path(
        "runs/rl"
    ),
    steps: Annotated[int | None, typer.Option(help="Policy steps.")] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also run the extra-SFT control of equal time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of tasks and sampling.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's choice.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is in --out first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The final figures as JSON on stdout.")] = False,
) -> None:
    """Raises a model by acting in real sandboxes (GRPO); writes report.html. Ctrl-C keeps the last checkpoint."""
    from rorqual.rl import RECIPES, grpo, report, saves

    if recipe not in RECIPES:
        raise CliError(f"no recipe {recipe!r}: choose one of {', '.join(RECIPES)}", code=WRONG_USE)
    _prepare(out, fresh=fresh)
    saves.torch_threads(threads)
    config = dataclasses.replace(RECIPES[recipe], seed=seed)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    console = Console(stderr=True)
    with _bar(console) as progress:
        bar = progress.add_task("rl", total=config.steps, note="")
        held_out: list[str] = [""]

        def on_step(row: dict[str, Any]) -> None:
            if "held_out" in row:
                solved = [rate for by in row["held_out"]["solved"].values() for rate in by.values()]
                held_out[0] = f" · held-out {sum(solved) / len(solved):.2f}"
            progress.update(bar, completed=row["step"], note=f"reward {row['reward']:.2f}{held_out[0]}")

        def on_note(text: str) -> None:
            progress.console.print(text, style="dim")

        result = run_async(grpo.run(out, start, config, on_step=on_step, on_note=on_note))
        if control:
            seconds = result["history"][-1]["seconds"]
            bar = progress.add_task("control: more SFT", total=int(seconds), note="")
            run_async(
                grpo.control(
                    out,
                    start,
                    config,
                    seconds=seconds,
                    on_step=lambda row: progress.update(
                        bar, completed=int(row["seconds"]), note=f"loss {row['loss']:.3f}"
                    ),
                )
            )
    page = report.write(out)
    console.print(f"report: {page}")
    if as_json:
        write_json({"out": str(out), "report": str(page), "after": result["after"]})
