"""An `Environment` over real processes in a temporary directory: what tests of the loop run commands in."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rorqual.agent import CommandEnded, EnvironmentGone


class LocalEnvironment:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []
        self.abandoned = False
        self.gone = False

    async def run(
        self,
        command: str,
        *,
        cwd: str | None = None,
        limit: float | None = None,
        on_output: Callable[[str], None] | None = None,
    ) -> CommandEnded:
        if self.gone:
            raise EnvironmentGone("the sandbox failed: it was killed")
        self.ran.append(command)
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", command, cwd=self.root, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        timed_out = False
        try:
            async with asyncio.timeout(limit):
                out, _ = await process.communicate()
        except TimeoutError:
            timed_out, out = True, b""
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return CommandEnded(output=out.decode(), exit_code=process.returncode or 0, timed_out=timed_out)

    def _path(self, path: str) -> Path:
        return self.root / path.removeprefix("/work/")

    async def read(self, path: str) -> bytes:
        return self._path(path).read_bytes()

    async def write(self, path: str, data: bytes) -> None:
        self._path(path).parent.mkdir(parents=True, exist_ok=True)
        self._path(path).write_bytes(data)

    async def abandon(self) -> None:
        self.abandoned = True

    def info(self) -> dict[str, Any]:
        return {"sandbox": "local"}
