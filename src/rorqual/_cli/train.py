"""`rorqual train sft` and `rorqual train rl`: from nothing to a warm start, and from there by acting.

Ctrl-C and SIGTERM end a run after its current step, with a checkpoint; the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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
from rorqual._cli.exits import FAILED, INTERRUPTED, UNFIT, WRONG_USE, CliError
from rorqual._cli.model_dir import check_model_dir
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


RUN_FILES = frozenset(
    {
        *("state.safetensors", "tokenizer.json", "config.json", "model.safetensors", "training.json"),
        *("sft.jsonl", "rl.jsonl", "before.json", "after.json", "control.json", "control", "report.html"),
    }
)
"""What a run leaves in its directory; temporary files begin with a dot."""


def _prepare(out: Path, *, fresh: bool) -> None:
    """Checks the run directory, and empties it for `fresh`: only of what a run leaves, or not at all."""
    if out.exists() and not out.is_dir():
        raise CliError(f"--out {out}: not a directory", code=WRONG_USE)
    if not fresh or not out.exists():
        return
    names = {path.name for path in out.iterdir()}
    foreign = sorted(
        name for name in names - RUN_FILES if not (name.startswith(".") and name.endswith(".tmp"))
    )
    if foreign:
        raise CliError(
            f"--fresh: {out} holds {foreign[0]}, which no run left: nothing is deleted", code=WRONG_USE
        )
    if "model.safetensors" in names and "state.safetensors" not in names:
        raise CliError(f"--fresh: {out} is a model, not a run: nothing is deleted", code=WRONG_USE)
    shutil.rmtree(out)


class _Stop:
    """A signal sets `asked` once steps are being done; before, or the second time, it interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self.stepped = False

    def on_signal(self, *_: object) -> None:
        if self.asked or not self.stepped:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def _stopping(out: Path) -> Iterator[_Stop]:
    """SIGINT and SIGTERM go to a `_Stop` meanwhile; an interrupt leaves as CliError 130."""
    stop = _Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt:
        raise _interrupted(out) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(out: Path) -> CliError:
    kept = (out / "state.safetensors").exists()
    return CliError(
        f"interrupted; the same command goes on from the checkpoint in {out}" if kept else "interrupted",
        code=INTERRUPTED,
    )


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
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: 2200.", min=1)] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Padded tokens per step. Default: 2048.", min=1)
    ] = None,
    style: Annotated[
        str, typer.Option(help="Demonstrations: weak (mostly wrong at decisions) or expert.")
    ] = "weak",
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's choice.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is in --out first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The final figures as JSON on stdout.")] = False,
) -> None:
    """Train the embedded model from scratch on synthetic traces.

    Ctrl-C ends it after the current step with a checkpoint; the same command goes on.
    """
    from rorqual.rl import saves
    from rorqual.rl.sft import SFTConfig, run
    from rorqual.rl.traces import STYLES

    if style not in STYLES:
        raise CliError(f"no style {style!r}: choose one of {', '.join(STYLES)}", code=WRONG_USE)
    _prepare(out, fresh=fresh)
    saves.torch_threads(threads)
    config = SFTConfig(style=style, seed=seed)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    if batch_tokens is not None:
        config = dataclasses.replace(config, batch_tokens=batch_tokens)
    last: dict[str, Any] = {}
    with _stopping(out) as stop, _bar(Console(stderr=True)) as progress:
        bar = progress.add_task("sft", total=config.steps, note="tokenizer and data")

        def on_step(row: dict[str, Any]) -> None:
            stop.stepped = True
            last.update(row)
            note = f"loss {row['loss']:.3f}"
            if "held_out" in last:
                note += f" · held-out accuracy {last['held_out']['accuracy']:.3f}"
            progress.update(bar, completed=row["step"], note=note)

        run(out, config, on_step=on_step, stop=lambda: stop.asked)
    if stop.asked and last["step"] < config.steps:
        raise _interrupted(out)
    if not last:  # the run was complete already
        last = (saves.read_lines(out / "sft.jsonl") or [{}])[-1]
    if as_json:
        write_json({"out": str(out), **last})


def rl(
    recipe: Annotated[str, typer.Option(help="hop-recover or mixed.")] = "hop-recover",
    start: Annotated[Path, typer.Option(help="Model directory to start from.")] = EMBEDDED_DIR,
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run there goes on.")] = Path(
        "runs/rl"
    ),
    steps: Annotated[int | None, typer.Option(help="Policy steps. Default: the recipe's.", min=1)] = None,
    prompts: Annotated[int | None, typer.Option(help="Tasks per step. Default: the recipe's.", min=1)] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Episodes per task, all at once. Default: the recipe's.", min=2)
    ] = None,
    final_per_depth: Annotated[
        int | None,
        typer.Option(help="Held-out tasks per depth before and after. Default: the recipe's.", min=1),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also run the extra-SFT control of equal time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of tasks and sampling.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's choice.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is in --out first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The final figures as JSON on stdout.")] = False,
) -> None:
    """Raise a model by acting in real sandboxes (GRPO); writes report.html.

    Ctrl-C ends it after the current step with a checkpoint; the same command goes on.
    """
    check_model_dir(start)
    if find_spec("matplotlib") is None:
        raise CliError("train rl needs matplotlib: pip install 'rorqual[train]'", code=UNFIT)
    from rorqual.rl import RECIPES, grpo, report, saves

    if recipe not in RECIPES:
        raise CliError(f"no recipe {recipe!r}: choose one of {', '.join(RECIPES)}", code=WRONG_USE)
    if out.resolve() == start.resolve():
        raise CliError("--out and --start are the same directory: the start would be lost", code=WRONG_USE)
    _prepare(out, fresh=fresh)
    saves.torch_threads(threads)
    asked = {
        "steps": steps,
        "prompts": prompts,
        "group_size": group_size,
        "final_per_depth": final_per_depth,
    }
    chosen: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    config = dataclasses.replace(RECIPES[recipe], seed=seed, **chosen)
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

        try:
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
        except CliError as error:
            raise (_interrupted(out) if error.code == INTERRUPTED else error) from None
    try:
        page = report.write(out)
    except OSError as error:
        raise CliError(f"{out / 'report.html'} cannot be written: {error.strerror}", code=FAILED) from error
    console.print(f"report: {page}")
    if as_json:
        write_json({"out": str(out), "report": str(page), "after": result["after"]})
