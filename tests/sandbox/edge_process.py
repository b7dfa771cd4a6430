"""A real edge for tests: `rorqual edge` as a process of its own, killed and started anew at will."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 60.0


class EdgeProcess:
    """One edge by name. `start` it; `stop` or `kill9` it; `start` it again."""

    def __init__(self, name: str, directory: Path, *, options: Sequence[str] = (), token: str = "") -> None:
        self.name = name
        self.log = directory / f"edge-{name}.log"
        self.socket = f"unix:{directory}/edge-{name}.sock"
        self.http = ""
        """Its TCP address, when it has one."""
        self.token = token
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it answers."""
        path = self.socket.removeprefix("unix:")
        command = [sys.executable, "-m", "rorqual.cli", "edge", "--name", self.name, "--socket", path]
        env = {**os.environ, "RORQUAL_EDGE_TOKEN": self.token}
        env.pop("RORQUAL_EDGE", None)
        with self.log.open("ab") as log:
            offset = log.tell()
            self._process = subprocess.Popen([*command, *self._options], stderr=log, env=env)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            text = self.log.read_text("utf-8")[offset:]
            ready = re.search(rf"edge {self.name} at unix:\S+( and (http://\S+))?", text)
            if ready:
                self.http = ready[2] or ""
                return
            if self._process.poll() is not None:
                raise AssertionError(f"the edge ended: {text}")
            time.sleep(0.02)
        raise AssertionError(f"the edge did not start: {self.log.read_text('utf-8')}")

    def kill9(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Asks it to stop; returns its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(timeout=PATIENCE_S)
        self._process = None
        return code
