"""`rorqual doctor`: what this host can run, found out by trying it."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rorqual._cli.exits import UNFIT
from rorqual._cli.session import run_async, write_json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was tried."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    """The one command that would change it."""
    needed: bool = False
    """Without it the agent cannot run at all."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Try what this host can do. Exit code 3 if the agent cannot run here."""
    findings = [*_python(), *_cpu(), *_gpu(), *run_async(_sandbox()), *_host()]
    unfit = any(finding.needed and not finding.ok for finding in findings)
    if as_json:
        write_json({"ok": not unfit, "checks": [asdict(finding) for finding in findings]})
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            mark = Text("✔", "green") if finding.ok else Text("✘", "red" if finding.needed else "yellow")
            table.add_row(mark, Text(finding.name, "bold"), Text(finding.detail))
            if finding.fix and not finding.ok:
                table.add_row("", "", Text(f"try: {finding.fix}", "cyan"))
        Console(highlight=False).print(table)
    raise typer.Exit(UNFIT if unfit else 0)


def _python() -> list[Finding]:
    import rorqual
    from rorqual._cli.embedded import FILES, RAISED_DIR

    found = [
        Finding(
            name="python",
            ok=True,
            detail=f"{platform.python_version()} on {platform.system()} {platform.release()}, "
            f"rorqual {rorqual.__version__}",
        )
    ]
    missing = [name for name in ("torch", "safetensors", "tokenizers", "numpy") if find_spec(name) is None]
    versions = "" if "torch" in missing else f"torch {metadata.version('torch')}"
    found.append(
        Finding(
            name="model",
            ok=not missing,
            detail=f"missing: {', '.join(missing)} (remote models work without)" if missing else versions,
            fix="pip install 'rorqual[model]'",
        )
    )
    absent = [name for name in FILES if not (RAISED_DIR / name).is_file()]
    found.append(
        Finding(
            name="embedded model",
            ok=not absent,
            detail=f"{RAISED_DIR}: {', '.join(absent)} missing" if absent else str(RAISED_DIR),
            fix="reinstall the package (the weights ship with it), or train: rorqual train sft",
        )
    )
    return found


def _cpu() -> list[Finding]:
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    flags = set(line.partition(":")[2].split())
                    break
    except OSError:
        pass
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")
    have = [flag for flag in wanted if flag in flags]
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} cores, {platform.machine()}: {' '.join(have) or 'no vector extensions known here'}"
    return [Finding(name="cpu", ok=True, detail=detail)]


def _gpu() -> list[Finding]:
    """Runs one Triton kernel, where Triton and a GPU are."""
    if find_spec("torch") is None:
        return [Finding(name="gpu", ok=False, detail="torch is not installed: pip install 'rorqual[gpu]'")]
    import torch

    from rorqual.kernels import gpu_status

    status = gpu_status()
    if not status.available:
        return [Finding(name="gpu", ok=False, detail=status.reason)]
    from rorqual.kernels.gpu.ops import rms_norm

    x = torch.full((2, 8), 3.0, device="cpu" if status.device == "interpreter" else "cuda")
    try:
        ok, detail = bool((rms_norm(x, eps=0.0) == 1).all()), status.reason
    except Exception as error:  # whatever a driver, a compiler or a broken installation raises
        ok, detail = False, f"{status.reason}: a first kernel failed: {error}"
    return [Finding(name="gpu", ok=ok, detail=detail)]


async def _sandbox() -> list[Finding]:
    """Makes a sandbox and runs a command in it: what `rorqual run` needs."""
    from rorqual.sandbox import AsyncSandbox, SandboxError

    started = time.monotonic()
    try:
        async with await AsyncSandbox.create(timeout=60) as sandbox:
            done = await sandbox.commands.run("echo $((6*7))", timeout=10)
            milliseconds = 1000 * (time.monotonic() - started)
            info = await sandbox.info()
    except SandboxError as error:
        return [
            Finding(name="container", ok=False, detail=str(error), fix=getattr(error, "fix", ""), needed=True)
        ]
    notes = "".join(f"; {note}" for note in info.notes)
    kind = f"{info.runtime}{', rootless' if info.rootless else ''}"
    return [
        Finding(
            name="container",
            ok=done.stdout == "42\n",
            detail=f"{kind}: created and a command run in {milliseconds:.0f} ms{notes}",
            needed=True,
        )
    ]


def _host() -> list[Finding]:
    """The parts a sandbox is made of, each tried by the sandbox room."""
    from rorqual.sandbox.doctor import doctor as try_parts

    return [Finding(name=check.name, ok=check.ok, detail=check.why, fix=check.fix) for check in try_parts()]
