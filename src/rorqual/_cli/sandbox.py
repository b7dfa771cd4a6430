"""`rorqual sandbox ...`: make sandboxes, look at them, end them. Commands and files: sandbox_inside.py.

Every command goes to the edge that --edge or $RORQUAL_EDGE names, else to this host's sandboxes. What `create` and
`fork` make is kept until its timeout or its kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rorqual._cli.exits import FAILED, WRONG_USE, CliError
from rorqual._cli.session import run_async, write_json

if TYPE_CHECKING:
    from rorqual.sandbox import SandboxInfo, Snapshot
    from rorqual.sandbox.images import ImageInfo

__all__ = ["As_json", "Edge", "Id", "one_line", "plain_table", "register", "screen"]

Edge = Annotated[
    str | None,
    typer.Option(help="unix:/path or http://host:port of an edge; 'local': none. Default: $RORQUAL_EDGE."),
]
As_json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a sandbox (`rorqual sandbox ps`).")]

Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of sandboxes.")]

FLEXIBLE = {"image": 2, "metadata": 2, "what": 5, "result": 3}
"""Columns that give way where the terminal is narrow, and how the room is shared among them."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    from rorqual._cli import sandbox_inside

    group = typer.Typer(
        name="sandbox",
        help="Sandboxes of this host or of an edge.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("create")(create)
    sandbox_inside.register(group)
    for command in (ps, pause, resume, fork, snapshot, kill, images, prune):
        group.command(command.__name__)(command)
    app.add_typer(group)


def create(
    image: Annotated[str, typer.Argument(help="An image (`rorqual sandbox images`).")] = "base",
    substrate: Annotated[str, typer.Option(help="container, microvm or fullvm.")] = "container",
    layer: Annotated[list[str] | None, typer.Option(help="An image on top; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds it may live.")] = 3600.0,
    cpu: Annotated[float, typer.Option(help="CPUs.")] = 1.0,
    memory_mb: Annotated[int, typer.Option(help="Memory, in MiB.")] = 512,
    pids: Annotated[int, typer.Option(help="Processes and threads.")] = 256,
    disk_mb: Annotated[int, typer.Option(help="Writable disk in MiB; 0: the host's disk, unlimited.")] = 512,
    network: Annotated[str, typer.Option(help="Name of a network policy.")] = "offline",
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; may be repeated.")] = None,
    workdir: Annotated[str | None, typer.Option(help="Working directory inside.")] = None,
    mount: Annotated[
        list[str] | None, typer.Option(help="HOST:INSIDE, with :rw writable; may be repeated.")
    ] = None,
    user: Annotated[str, typer.Option(help="Default user inside: user or root.")] = "",
    runtime: Annotated[str, typer.Option(help="What must run it, such as crun or runc.")] = "",
    metadata: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; may be repeated.")] = None,
    require: Annotated[
        list[str] | None, typer.Option(help="A capability it must have; may be repeated.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=JSON: any other argument of Sandbox.create; may be repeated."),
    ] = None,
    edge: Edge = None,
    as_json: As_json = False,
) -> None:
    """Start a sandbox and print its id. It lives until its timeout or `rorqual sandbox kill ID`."""
    from rorqual.sandbox import AsyncSandbox

    arguments: dict[str, Any] = {
        "image": image, "substrate": substrate, "layers": tuple(layer or ()), "timeout": timeout, "cpu": cpu,
        "memory_mb": memory_mb, "pids": pids, "disk_mb": disk_mb or None, "network": network,
        "envs": _pairs("--env", env), "workdir": workdir, "mounts": [_mount(text) for text in mount or ()],
        "user": user, "runtime": runtime, "metadata": _pairs("--metadata", metadata),
        "require": tuple(require or ()),
    }  # fmt: skip
    arguments |= _options(option)

    async def work() -> dict[str, Any]:
        sandbox = await AsyncSandbox.create(**arguments, keep=True, edge=edge)
        try:
            return asdict(await sandbox.info())
        finally:
            await sandbox.close()

    info = run_async(work())
    if as_json:
        write_json(info)
    else:
        typer.echo(info["id"])


def ps(edge: Edge = None, as_json: As_json = False) -> None:
    """List the live sandboxes."""
    from rorqual.sandbox import AsyncSandbox

    infos = run_async(AsyncSandbox.list(edge=edge))
    if as_json:
        write_json([asdict(info) for info in infos])
        return
    if not infos:
        screen().print("no sandbox lives")
        return
    labelled = any(info.metadata for info in infos)
    columns = ["id", "substrate", "image", "state", "age", "left", "MiB", "network"]
    console = screen()
    table = plain_table(console, *columns, *(["metadata"] if labelled else []))
    for info in infos:
        cells = _row(info)
        table.add_row(*(cells if labelled else cells[:-1]))
    console.print(table)


def _row(info: SandboxInfo) -> list[Text]:
    state = Text("paused", "yellow") if info.paused else Text("running", "green")
    now = time.time()
    labels = " ".join(f"{name}={value}" for name, value in info.metadata.items())
    image = "a fork's" if info.image.startswith(".fork-") else info.image
    return [
        Text(info.id, "bold"),
        Text(info.substrate),
        Text(one_line(image, 20)),
        state,
        Text(span(now - info.created)),
        Text(span(info.expires - now)),
        Text(str(info.memory_mb)),
        Text(info.network),
        Text(one_line(labels, 60)),
    ]


def pause(
    ids: Annotated[list[str], typer.Argument(metavar="ID...")], edge: Edge = None, as_json: As_json = False
) -> None:
    """Stop everything inside and give memory back. The next call to it resumes it."""
    from rorqual.sandbox import AsyncSandbox, Paused

    async def work() -> list[tuple[str, Paused]]:
        done = []
        for sandbox_id in ids:
            async with await AsyncSandbox.connect(sandbox_id, edge=edge) as sandbox:
                done.append((sandbox_id, await sandbox.pause()))
        return done

    results = run_async(work())
    if as_json:
        write_json([{"id": sandbox_id, **asdict(paused)} for sandbox_id, paused in results])
        return
    for sandbox_id, paused in results:
        typer.echo(
            f"{sandbox_id} paused: {paused.memory_before >> 10} KiB of memory, {paused.memory_after >> 10} KiB after"
        )


def resume(ids: Ids, edge: Edge = None) -> None:
    """Let a paused sandbox go on."""
    from rorqual.sandbox import AsyncSandbox

    async def work() -> None:
        for sandbox_id in ids:
            async with await AsyncSandbox.connect(sandbox_id, edge=edge) as sandbox:
                await sandbox.resume()

    run_async(work())


def fork(
    sandbox_id: Id,
    count: Annotated[int, typer.Option(help="How many.", min=1, max=100)] = 1,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds they may live. Default: as this one.")
    ] = None,
    edge: Edge = None,
    as_json: As_json = False,
) -> None:
    """Make new sandboxes with the files of a running one, and print their ids."""
    from rorqual.sandbox import AsyncSandbox

    async def work() -> list[str]:
        async with await AsyncSandbox.connect(sandbox_id, edge=edge) as sandbox:
            children = await sandbox.fork(count=count, timeout=timeout, keep=True)
            for child in children:
                await child.close()
            return [child.id for child in children]

    ids = run_async(work())
    if as_json:
        write_json(ids)
    else:
        typer.echo("\n".join(ids))


def snapshot(
    sandbox_id: Id,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the image; an older one of the name gives way. Default: a new one."),
    ] = None,
    edge: Edge = None,
    as_json: As_json = False,
) -> None:
    """Keep its files as an image, and print the image's name."""
    from rorqual.sandbox import AsyncSandbox

    async def work() -> Snapshot:
        async with await AsyncSandbox.connect(sandbox_id, edge=edge) as sandbox:
            return await (sandbox.commit(name) if name else sandbox.snapshot())

    taken = run_async(work())
    if as_json:
        write_json(asdict(taken))
    else:
        typer.echo(taken.name)


def kill(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every live one.")] = False,
    edge: Edge = None,
    as_json: As_json = False,
) -> None:
    """End sandboxes and remove everything of them. Exit code 1 if one was not there."""
    from rorqual.sandbox import AsyncSandbox, SandboxNotFound

    if bool(ids) == every:
        raise CliError("name sandboxes, or pass --all", code=WRONG_USE)

    async def work() -> dict[str, str]:
        names = ids or [info.id for info in await AsyncSandbox.list(edge=edge)]
        outcomes = {}
        for sandbox_id in names:
            try:
                sandbox = await AsyncSandbox.connect(sandbox_id, edge=edge)
                outcomes[sandbox_id] = "killed" if await sandbox.kill() else f"it was over: {sandbox.cause}"
            except SandboxNotFound as error:
                outcomes[sandbox_id] = str(error)
        return outcomes

    outcomes = run_async(work())
    if as_json:
        write_json(outcomes)
    else:
        for sandbox_id, outcome in outcomes.items():
            typer.echo(f"{sandbox_id} {outcome}", err=outcome != "killed")
    if not every and any(outcome != "killed" for outcome in outcomes.values()):
        raise typer.Exit(FAILED)


def images(
    remove: Annotated[list[str] | None, typer.Option(help="Remove this image; may be repeated.")] = None,
    edge: Edge = None,
    as_json: As_json = False,
) -> None:
    """List what sandboxes can be made from. --remove acts on this host alone."""
    from rorqual.sandbox import images as store
    from rorqual.sandbox._address import edge_place

    place = edge_place(edge, None)
    if remove and place is not None:
        raise CliError("--remove: images are removed on their own host (--edge local)", code=WRONG_USE)
    for name in remove or ():
        store.remove_image(name)
    found: list[ImageInfo]
    if place is None:
        found = store.images()
    else:
        from rorqual.sandbox import _remote

        found = run_async(_remote.images(place))
    if as_json:
        write_json([asdict(image) for image in found])
        return
    console = screen()
    table = plain_table(console, "name", "origin", "size", "digest")
    for image in found:
        size = "" if image.size_bytes is None else f"{image.size_bytes / 2**20:.1f} MiB"
        table.add_row(Text(image.name, "bold"), image.origin, Text(size, justify="right"), image.digest[:19])
    console.print(table)


def prune(
    keep_days: Annotated[
        float | None, typer.Option(help="Forget trajectories that are older. Default: none.", min=0)
    ] = None,
    as_json: As_json = False,
) -> None:
    """Remove what nobody uses on this host: orphans of dead clients, unfinished images, layers."""
    from rorqual.sandbox import prune as remove_unused

    removed = remove_unused(keep_days=keep_days)
    if as_json:
        write_json(asdict(removed))
        return
    counts = {
        name: len(value) if isinstance(value, tuple) else value for name, value in asdict(removed).items()
    }
    typer.echo("removed: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


# -- words and numbers


def screen() -> Console:
    """Our terminal, as wide as it is; a file or a pipe gets lines that are not cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def plain_table(console: Console, *columns: str) -> Table:
    """Columns without lines. On a narrow terminal those of FLEXIBLE are cut, the others never."""
    narrow = console.is_terminal and any(name in FLEXIBLE for name in columns)
    table = Table(box=None, pad_edge=False, header_style="bold", expand=narrow)
    for name in columns:
        ratio = FLEXIBLE.get(name) if narrow else None
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=ratio)
    return table


def one_line(text: str, width: int) -> str:
    """Text of a guest or a client on one line, without what a terminal would obey."""
    from rorqual.agent.view import clean

    line = " ".join(clean(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def span(seconds: float) -> str:
    """A time in its two largest units: '3m 05s'."""
    rest = max(0, round(seconds))
    if rest < 60:
        return f"{rest}s"
    if rest < 3600:
        return f"{rest // 60}m {rest % 60:02}s"
    if rest < 86400:
        return f"{rest // 3600}h {rest // 60 % 60:02}m"
    return f"{rest // 86400}d {rest // 3600 % 24:02}h"


def _pairs(flag: str, texts: Sequence[str] | None) -> dict[str, str]:
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CliError(f"{flag} {text}: expected NAME=VALUE", code=WRONG_USE)
        found[name] = value
    return found


def _mount(text: str) -> dict[str, Any]:
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target or mode not in ("", "ro", "rw"):
        raise CliError(f"--mount {text}: expected HOST:INSIDE or HOST:INSIDE:rw", code=WRONG_USE)
    return {"source": source, "target": target, "readonly": mode != "rw"}


def _options(texts: Sequence[str] | None) -> dict[str, Any]:
    import inspect

    from rorqual.sandbox import AsyncSandbox

    known = set(inspect.signature(AsyncSandbox.create).parameters) - {"edge", "token", "lease", "keep"}
    found = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if name not in known:
            raise CliError(f"--option {text}: it is none of {', '.join(sorted(known))}", code=WRONG_USE)
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise CliError(f"--option {text}: the value is not JSON: {error}", code=WRONG_USE) from error
    return found
