"""Programs of the host that make images: found, run with a deadline, their failure in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from rorqual.sandbox.errors import HostUnfit, ImageError
from rorqual.sandbox.host import find_program


def run_program(
    name: str,
    arguments: Sequence[str],
    *,
    package: str,
    about: str,
    timeout: float,
    lines: int = 1,
    holding: str = "",
) -> None:
    """Runs it, silently. about: what the error text begins with. lines: how many of its last ones it tells; holding:
    only those with this in them.

    Raises HostUnfit when it is not installed, ImageError when it failed or was not done after `timeout` seconds.
    """
    program = find_program(name)
    if program is None:
        raise HostUnfit(f"{name} is not installed.", fix=f"apt-get install {package}")
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{about}: {name} was not done after {timeout:g} s") from error
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip() and holding in line]
        said = " | ".join(words[-lines:])[-500:]
        raise ImageError(f"{about}: {name} failed: {said or done.returncode}")
