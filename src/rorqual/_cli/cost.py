"""`rorqual cost`: what a configuration costs at a context, beside V3.2 and GQA8-bf16, for capacity planning.

Numbers come from `rorqual.model.cost`; needs no torch and no weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from rorqual._cli.exits import WRONG_USE, CliError
from rorqual._cli.session import write_json

if TYPE_CHECKING:
    from rorqual.model import Config
    from rorqual.model.cost import Row

__all__ = ["register"]

PRESETS = {"pro": "V4-Pro", "flash": "V4-Flash", "tiny": "tiny"}
UNITS = {"k": 1 << 10, "m": 1 << 20}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("cost")(cost)


def cost(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="pro, flash, tiny, a config.json or a model directory. Default: pro flash."),
    ] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="Tokens, as 4096, 128K or 1M; may be repeated. Default: 1M.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """KV-cache bytes, FLOPs per token and parameters of V4 models, DeepSeek-V3.2 and GQA8 beside them."""
    from rorqual.model.cost import table

    configs = {PRESETS.get(name, name): _config(name) for name in models or ["pro", "flash"]}
    rows = table([_tokens(text) for text in context or ["1M"]], configs=configs)
    if as_json:
        write_json([_to_json(row) for row in rows])
    else:
        Console(highlight=False).print(_table(rows))


def _config(name: str) -> Config:
    from rorqual.model import Config, ConfigError

    try:
        if name in PRESETS:
            return Config.preset(name)
        if not Path(name).exists():
            raise CliError(
                f"no model {name!r}: give {', '.join(PRESETS)}, a config.json or its directory",
                code=WRONG_USE,
            )
        return Config.from_file(name)
    except ConfigError as error:
        raise CliError(str(error), code=WRONG_USE) from error


def _tokens(text: str) -> int:
    """`128K` is 131072: powers of two, as context windows are named."""
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in UNITS else (text, "")
    if not (digits.isascii() and digits.isdigit()):
        raise CliError(
            f"--context {text!r}: expected a number of tokens such as 4096, 128K or 1M", code=WRONG_USE
        )
    return int(digits) * UNITS.get(unit, 1)


def _to_json(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row)


def _table(rows: list[Row]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    out.add_column("context", justify="right", no_wrap=True)
    out.add_column("model", no_wrap=True)
    for title in ("KV cache", "/ V3.2", "/ GQA8", "GFLOP", "/ V3.2", "params", "active"):  # GFLOP per token
        out.add_column(title, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        new = before is None or before.context != row.context
        if new and before is not None:
            out.add_section()
        out.add_row(
            f"{row.context:,}" if new else "",
            row.name,
            _bytes(row.kv_bytes),
            _percent(row.kv_of_v32),
            _percent(row.kv_of_gqa8),
            f"{row.flops / 1e9:.{1 if row.flops >= 1e9 else 4}f}" if row.flops is not None else "–",
            _percent(row.flops_of_v32),
            _count(row.parameters),
            _count(row.active_parameters),
        )
    return out


def _percent(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return "<0.1%" if 0 < ratio < 0.001 else f"{100 * ratio:.{1 if ratio < 0.9995 else 0}f}%"


def _bytes(count: int) -> str:
    """Decimal units, as the report's figures."""
    return next(
        (
            f"{count / size:.2f} {unit}"
            for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
            if count >= size
        ),
        f"{count} B",
    )


def _count(number: int | None) -> str:
    if number is None:
        return "–"
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"
