"""`rorqual model inspect | convert | verify | synth`: what a checkpoint holds, in another storage, sound, or made up.

Ctrl-C and SIGTERM end `convert` and `synth` at once; the same command goes on after the last finished shard.
Needs `rorqual[model]`.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rorqual._cli.exits import FAILED, INTERRUPTED, WRONG_USE, CliError
from rorqual._cli.session import progress, write_json

if TYPE_CHECKING:
    from rorqual.model import Config
    from rorqual.model.inspection import Inspection
    from rorqual.model.storage import Format, Layout
    from rorqual.model.writer import Written

__all__ = ["register"]

group = typer.Typer(
    help="Model directories: inspect, convert, verify, or make random ones.", no_args_is_help=True
)
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
SHOWN = 20
"""Problems that `verify` lists without --json."""
PRESETS = ("pro", "flash", "tiny")

Directory = Annotated[Path, typer.Argument(help="A directory with config.json and *.safetensors.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ShardBytes = Annotated[
    str, typer.Option(help="Data bytes of a file at most, as 500M or 2G; a kill costs one file.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, convert, verify, synth):
        group.command(command.__name__)(command)
    app.add_typer(group, name="model")


def inspect(directory: Directory, as_json: AsJson = False) -> None:
    """Configuration, layers, parameters, bytes and dialect of a checkpoint, from its headers alone.

    Exits 1 when names, shapes or dtypes contradict config.json.
    """
    from rorqual.model.errors import ModelError
    from rorqual.model.inspection import inspect as run

    _check_directory(directory)
    try:
        found = run(directory)
    except ModelError as error:
        raise CliError(str(error), code=FAILED) from error
    if as_json:
        write_json(found.to_dict())
    else:
        console = Console(highlight=False, soft_wrap=True)
        for name, value in _lines(found):
            console.print(f"{name:<12} {value}", markup=False)
    if found.problems:
        raise CliError(f"{directory}: {found.problems[0]}", code=FAILED)


def convert(
    source: Directory,
    out: Annotated[
        Path, typer.Argument(help="A new or empty directory; an unfinished conversion there goes on.")
    ],
    store: Annotated[
        str,
        typer.Option(
            "--to",
            help="official (FP4 experts, FP8 linears), fp8, bf16, fp32, or keep: every tensor as it is stored.",
        ),
    ] = "keep",
    layout: Annotated[
        str, typer.Option(help="Names: official, or hf (as HF's save_pretrained writes them).")
    ] = "official",
    shard_bytes: ShardBytes = "2G",
    as_json: AsJson = False,
) -> None:
    """Rewrite a checkpoint in another storage, tensor by tensor in bounded memory.

    Ctrl-C or a kill loses the file that was being written; the same command goes on.
    """
    _check_directory(source)
    size = _bytes(shard_bytes, "--shard-bytes")
    from rorqual.model.convert import Conversion
    from rorqual.model.errors import ModelError
    from rorqual.model.storage import FORMATS, LAYOUTS

    _choice("--to", store, (*FORMATS, "keep"))
    _choice("--layout", layout, LAYOUTS)
    try:
        conversion = Conversion(
            source, store=cast("Format | Literal['keep']", store), layout=cast("Layout", layout)
        )
    except ModelError as error:
        raise CliError(str(error), code=FAILED) from error
    total = sum(unit.nbytes for unit in conversion.units)
    with _stopping(out), _bar("convert", total) as advance:
        done = conversion.run(out, shard_bytes=size, on_bytes=advance)
    _report(out, done, as_json=as_json)


def verify(directory: Directory, as_json: AsJson = False) -> None:
    """Read a whole checkpoint: headers, index, every value. Exits 1 when anything is wrong, and says where."""
    from rorqual.model.verify import verify as run

    _check_directory(directory)
    with _stopping(None), _columns() as bar:
        task = bar.add_task("verify", total=None)

        def on_total(total: int) -> None:
            bar.update(task, total=total)

        found = run(directory, on_total=on_total, on_bytes=lambda count: bar.advance(task, count))
    if as_json:
        write_json({"directory": str(directory), **dataclasses.asdict(found)})
    else:
        console = Console(highlight=False, soft_wrap=True)
        for problem in found.problems[:SHOWN]:
            console.print(f"{problem.where}: {' '.join(problem.what.split())}", markup=False)
        if len(found.problems) > SHOWN:
            console.print(f"and {len(found.problems) - SHOWN} more (--json lists all)")
        if not found.problems:
            console.print(f"sound: {found.tensors} tensors, {_size(found.data_bytes)} in {found.files} files")
    if found.problems:
        raise CliError(f"{directory}: {_count(len(found.problems), 'problem')}", code=FAILED)


def synth(
    out: Annotated[
        Path, typer.Argument(help="A new or empty directory; an unfinished one of this command goes on.")
    ],
    preset: Annotated[
        str, typer.Option("--config", help="pro, flash, tiny, a config.json or its directory.")
    ] = "tiny",
    layers: Annotated[int | None, typer.Option(help="Only the first so many layers.", min=1)] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of config.json; may be repeated.")
    ] = None,
    store: Annotated[
        str, typer.Option("--to", help="official (FP4 experts, FP8 linears), fp8, bf16 or fp32.")
    ] = "official",
    mtp: Annotated[bool, typer.Option(help="With the MTP head, if the configuration has one.")] = True,
    seed: Annotated[int, typer.Option(help="Of all values: same seed, same bytes.")] = 0,
    shard_bytes: ShardBytes = "2G",
    as_json: AsJson = False,
) -> None:
    """Write a random checkpoint of any configuration in the official layout, in bounded memory.

    Ctrl-C or a kill loses the file that was being written; the same command goes on.
    """
    size = _bytes(shard_bytes, "--shard-bytes")
    config = _config(preset, layers, changes or [])
    from rorqual.model.errors import ModelError
    from rorqual.model.storage import FORMATS
    from rorqual.model.synth import synth as run
    from rorqual.model.synth import synth_units

    _choice("--to", store, FORMATS)
    kind = cast("Format", store)
    try:
        units = synth_units(config, store=kind, mtp=mtp)
    except ModelError as error:
        raise CliError(str(error), code=WRONG_USE) from error
    with _stopping(out), _bar("synth", sum(unit.nbytes for unit in units)) as advance:
        done = run(out, config, seed=seed, store=kind, mtp=mtp, shard_bytes=size, on_bytes=advance)
    _report(out, done, as_json=as_json)


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise CliError(f"{directory}: no such model directory", code=WRONG_USE)


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CliError(f"{option} {value!r}: choose one of {', '.join(choices)}", code=WRONG_USE)


def _bytes(text: str, option: str) -> int:
    """`2G` is 2 * 10^9."""
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in UNITS else (text, "")
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise CliError(f"{option} {text!r}: expected bytes such as 500M or 2G", code=WRONG_USE)
    return int(digits) * UNITS.get(unit, 1)


def _config(name: str, layers: int | None, changes: list[str]) -> Config:
    from rorqual.model import Config, ConfigError

    try:
        if name in PRESETS:
            config = Config.preset(name)
        elif Path(name).exists():
            config = Config.from_file(name)
        else:
            raise CliError(
                f"no model {name!r}: give {', '.join(PRESETS)}, a config.json or its directory",
                code=WRONG_USE,
            )
        if layers is not None and layers > config.num_hidden_layers:
            raise CliError(f"--layers {layers}: {name} has {config.num_hidden_layers}", code=WRONG_USE)
        values: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
        for change in changes:
            field, value = _change(change)
            values[field] = value
        count = values.get("num_hidden_layers", config.num_hidden_layers)
        values.setdefault("compress_ratios", config.compress_ratios[:count])
        # through the dictionary, so that types and ranges are checked as those of a config.json
        return Config.from_dict(config.replace(**values).to_dict())
    except ConfigError as error:
        raise CliError(str(error), code=WRONG_USE) from error


def _change(text: str) -> tuple[str, Any]:
    from rorqual.model import Config

    field, equals, value = text.partition("=")
    types = {item.name: str(item.type) for item in dataclasses.fields(Config)}
    if not equals or field not in types:
        raise CliError(
            f"--set {text!r}: expected field=value, with a field of config.json such as vocab_size",
            code=WRONG_USE,
        )
    try:
        if types[field] == "int":
            return field, int(value)
        if types[field] == "float":
            return field, float(value)
        if field == "compress_ratios":
            return field, tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise CliError(f"--set {text!r}: {field} is of type {types[field]}", code=WRONG_USE) from error
    return field, value


def _columns() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=progress(),
    )


@contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    """A bar on stderr; gives what moves it."""
    with _columns() as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _stopping(out: Path | None) -> Iterator[None]:
    """SIGTERM is like Ctrl-C, and both leave as CliError 130."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    except KeyboardInterrupt:
        text = "interrupted"
        if out is not None:
            text += f"; the same command goes on with what is finished in {out}"
        raise CliError(text, code=INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(out: Path, done: Written, *, as_json: bool) -> None:
    if as_json:
        write_json({"directory": str(out), **dataclasses.asdict(done)})
        return
    resumed = f", {_size(done.resumed_bytes)} of it by an earlier call" if done.resumed_bytes else ""
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: {_size(done.data_bytes)} in {_count(done.shards, 'file')}{resumed}", markup=False
    )


def _lines(found: Inspection) -> Iterator[tuple[str, str]]:
    """What `inspect` prints."""
    config, counts = found.config, found.parameters
    yield "model", f"{found.directory} ({found.dialect} names)"
    yield "layers", f"{config.num_hidden_layers}: {found.schedule}; {config.num_hash_layers} hash-routed"
    yield (
        "shape",
        f"hidden {config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.n_routed_experts} experts, {config.num_experts_per_tok} a token, vocabulary {config.vocab_size}",
    )
    extra = f" + {_number(counts.mtp)} in the MTP head" if found.drafter == "mtp" else ""
    yield "parameters", f"{_number(counts.total)}{extra}, {_number(counts.active)} active"
    yield (
        "drafter",
        {"mtp": "MTP head", "dspark": "DSpark (recognised, not supported)"}.get(found.drafter or "", "none"),
    )
    yield "files", f"{_count(found.files, 'file')}, {_size(found.file_bytes)}"
    yield "by kind", ", ".join(f"{kind} {_size(one.nbytes)}" for kind, one in found.by_kind.items())
    yield "by part", ", ".join(f"{part} {_size(one.nbytes)}" for part, one in found.by_part.items())
    yield (
        "on demand",
        f"{_size(found.resident_bytes)} mapped, and {_size(found.expert_bytes)} for each routed expert held",
    )
    yield "KV cache", f"{_size(found.kv_bytes)} at {found.kv_context:,} tokens"
    yield "headers", "sound" if not found.problems else _count(len(found.problems), "problem")


def _size(count: int) -> str:
    """Decimal units."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _number(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
