"""`rorqual demo`: the embedded model works on freshly drawn tasks in real containers, live.

Tasks are drawn from the seed and graded here, on the host; no answer is in the code, nor in the container
beyond what the task's own files show.
"""

from __future__ import annotations

import random
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rorqual._cli.exits import DONE, FAILED, WRONG_USE, CliError
from rorqual._cli.session import default_runs_dir, progress, run_async, write_json

if TYPE_CHECKING:
    from rorqual.agent import AgentResult, EmbeddedModel
    from rorqual.agent.figures import Figures
    from rorqual.rl.tasks import Task

__all__ = ["register"]

PLAN = (
    ("hop-recover", 1),
    ("calc-tool", 2),
    ("hop-recover", 2),
    ("hop-recover", 3),
    ("calc-tool", 1),
    ("hop-recover", 4),
)
"""Family and depth of the first tasks; then from the start again."""
WORKDIR = "/work"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One task of the demo and what came of it."""

    task: Task
    result: AgentResult
    solved: bool
    figures: Figures
    sandbox_ms: float


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    seed: Annotated[
        int | None, typer.Option(help="Seed of tasks and sampling. Default: a random one.")
    ] = None,
    tasks: Annotated[int, typer.Option(help="How many tasks.", min=1, max=1000)] = 4,
    family: Annotated[str | None, typer.Option(help="Only tasks of this family.")] = None,
    depth: Annotated[int | None, typer.Option(help="Only tasks of this depth.")] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.", min=0.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.", min=1)] = 512,
    model_dir: Annotated[Path | None, typer.Option(help="Another model directory.")] = None,
    before_rl: Annotated[
        bool, typer.Option("--before-rl", help="The embedded model as it was before reinforcement learning.")
    ] = False,
    substrate: Annotated[str, typer.Option(help="Kind of sandbox.")] = "container",
    runs_dir: Annotated[Path | None, typer.Option(help="Where the event logs go.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Save a picture of the view here.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The results as one JSON document on stdout.")
    ] = False,
) -> None:
    """Watch the embedded V4 model work on fresh tasks in real containers.

    Exit code 0 once every task was worked on, solved or not; 1 if the machinery failed.
    """
    from rorqual._cli.embedded import EMBEDDED_DIR, RAISED_DIR, open_embedded

    seed = secrets.randbelow(1_000_000) if seed is None else seed
    drawn = draw(seed, tasks, family=family, depth=depth)
    console = progress(record=svg is not None)
    started = time.monotonic()
    model = open_embedded(
        model_dir or (EMBEDDED_DIR if before_rl else RAISED_DIR),
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
    )
    console.print(
        Text.assemble(
            ("rorqual demo", "bold"),
            f"  {model.name}, loaded in {time.monotonic() - started:.1f} s · ",
            (f"--seed {seed}", "cyan"),
            f" · {tasks} task{'' if tasks == 1 else 's'}",
        )
    )
    shown = run_async(
        _show_all(drawn, model, console, substrate=substrate, runs_dir=runs_dir or default_runs_dir())
    )
    console.print()
    console.print(_summary(shown, seconds=time.monotonic() - started))
    if svg is not None:
        console.save_svg(str(svg), title="rorqual demo")
    if as_json:
        write_json({"seed": seed, "tasks": [_to_json(item) for item in shown]})
    broken = any(item.result.outcome in ("model_error", "sandbox_error") for item in shown)
    raise typer.Exit(FAILED if broken else DONE)


def draw(seed: int, count: int, *, family: str | None = None, depth: int | None = None) -> list[Task]:
    """The tasks of a seed: held-out draws, which training never saw. Raises CliError for what does not
    exist."""
    from rorqual.rl import tasks as families
    from rorqual.rl.errors import TaskError

    source = random.Random(seed)
    drawn = []
    try:
        known = families.families()
        if family is not None and family not in known:
            raise CliError(f"no task family {family!r}: choose one of {', '.join(known)}", code=WRONG_USE)
        plan = [
            (kind, depth if depth is not None else level)
            for kind, level in PLAN
            if family in (None, kind) and (depth is None or depth in families.depths(kind))
        ]
        if not plan:
            raise CliError(f"no task family has depth {depth}", code=WRONG_USE)
        for number in range(count):
            kind, level = plan[number % len(plan)]
            drawn.append(families.sample(kind, depth=level, seed=source.randrange(1 << 31), split="test"))
    except TaskError as error:
        raise CliError(str(error), code=WRONG_USE) from error
    return drawn


async def _show_all(
    drawn: list[Task], model: EmbeddedModel, console: Console, *, substrate: str, runs_dir: Path
) -> list[Shown]:
    shown = []
    for number, task in enumerate(drawn):
        title = f"task {number + 1} of {len(drawn)} · {task.family} · depth {task.depth}"
        shown.append(
            await _show(
                task, model.for_sequence(number), console, title=title, substrate=substrate, runs_dir=runs_dir
            )
        )
    return shown


async def _show(
    task: Task, model: EmbeddedModel, console: Console, *, title: str, substrate: str, runs_dir: Path
) -> Shown:
    from rorqual.agent import AsyncAgent, Budget
    from rorqual.agent.figures import read_figures
    from rorqual.agent.view import RunView
    from rorqual.rl import tasks as families
    from rorqual.sandbox import AsyncSandbox

    started = time.monotonic()
    async with await AsyncSandbox.create(
        substrate=substrate, workdir=WORKDIR, timeout=600, memory_mb=256
    ) as sandbox:
        ready_ms = 1000 * (time.monotonic() - started)
        await families.setup(task, sandbox, WORKDIR)
        # A recorded console would keep every frame of the live region.
        live = not console.record
        with RunView(console, title=f"{title} · {substrate} ready in {ready_ms:.0f} ms", live=live) as view:
            agent = AsyncAgent(
                model=model,
                sandbox=sandbox,
                budget=Budget(max_steps=4 * task.min_calls),
                workdir=WORKDIR,
                command_timeout=20.0,
                runs_dir=runs_dir,
                on_event=view,
            )
            result = await agent.run(task.prompt)
            solved = families.grade(task, result.answer) == 1.0
            view.verdict(solved, wanted=task.answer)
    return Shown(
        task=task, result=result, solved=solved, figures=read_figures(result.events), sandbox_ms=ready_ms
    )


def _summary(shown: list[Shown], *, seconds: float) -> Table:
    from rorqual.agent.figures import human_bytes
    from rorqual.agent.view import clean

    solved = sum(item.solved for item in shown)
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        header_style="bright_black",
        title=f"{solved} of {len(shown)} solved in {seconds:.1f} s",
        title_style="bold",
        title_justify="left",
    )
    for name in ("task", "depth", "answer", "", "calls", "tokens", "tokens/s", "KV cache", "GQA8-bf16"):
        left = name in ("task", "answer", "")
        table.add_column(name, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    for item in shown:
        figures, answer = item.figures, item.result.answer
        table.add_row(
            item.task.family,
            str(item.task.depth),
            Text(clean(answer)[:12] if answer is not None else "none"),
            Text("✔", "green") if item.solved else Text("✘", "red"),
            str(figures.calls),
            str(figures.completion_tokens),
            f"{figures.tokens_per_second:.0f}",
            "" if figures.kv_bytes is None else human_bytes(figures.kv_bytes),
            "" if figures.gqa8_bytes is None else human_bytes(figures.gqa8_bytes),
        )
    return table


def _to_json(item: Shown) -> dict[str, Any]:
    figures = item.figures
    return {
        "family": item.task.family,
        "depth": item.task.depth,
        "seed": item.task.seed,
        "prompt": item.task.prompt,
        "answer": item.result.answer,
        "outcome": item.result.outcome,
        "solved": item.solved,
        "sandbox_ms": round(item.sandbox_ms, 1),
        "log": str(item.result.log_path),
        **asdict(figures),
        "tokens_per_second": round(figures.tokens_per_second, 1),
    }
