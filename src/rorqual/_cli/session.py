"""What the commands share: consoles, the runs directory, an event loop that ends cleanly on Ctrl-C and
SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from rorqual._cli.exits import INTERRUPTED, CliError

__all__ = ["default_runs_dir", "progress", "run_async", "write_json"]

T = TypeVar("T")


def progress(*, record: bool = False) -> Console:
    """Where people look: stderr. `record`: keep what is shown, for a picture."""
    return Console(stderr=True, highlight=False, record=record)


def write_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")


def default_runs_dir() -> Path:
    """`$RORQUAL_RUNS`, else `rorqual/runs` in the user's state directory (XDG)."""
    if named := os.environ.get("RORQUAL_RUNS"):
        return Path(named)
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "rorqual" / "runs"


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`. Ctrl-C and SIGTERM cancel it, so that sandboxes are killed and logs closed; then CliError
    130."""

    async def until_signalled() -> T:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            return await task
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    try:
        return asyncio.run(until_signalled())
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise CliError("interrupted", code=INTERRUPTED) from None
