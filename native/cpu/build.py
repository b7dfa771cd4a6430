"""Compiles librorqual_cpu.so: `python native/cpu/build.py OUT [--cxx g++] [--flag -fsanitize=address ...]`.

The same step.cpp once per instruction level, in objects of its own; only those objects hold the wider instructions.
No fast-math and no contraction: a product and a sum fuse only where the source says so. Needs g++ or clang++.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = "-std=c++17 -O3 -fPIC -ffp-contract=off -fno-exceptions -fno-rtti -fvisibility=hidden -Wall -Wextra"
LEVELS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    # gcc 12's own avx512fintrin.h trips its warning about uninitialised values (gcc bug 105593, fixed in 13).
    "avx512": [
        *["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
        *["-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    ],
}


def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ on the path."""
    return os.environ.get("CXX") or next(
        (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
    )


def build(out: Path, cxx: str, *, flags: Sequence[str] = ()) -> None:
    """Writes the library to `out`, renamed into place. Raises CalledProcessError after the compiler's own words."""
    machine = subprocess.run([cxx, "-dumpmachine"], check=True, capture_output=True, text=True).stdout
    levels = LEVELS if machine.startswith("x86_64") else {"portable": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    common = [cxx, *FLAGS.split(), *flags]
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        objects = [f"{place}/library.o"]
        commands = [[*common, "-c", str(HERE / "library.cpp"), "-o", objects[0]]]
        for level, extra in levels.items():
            first = ["-DRQ_FIRST"] if level == "portable" else []
            objects.append(f"{place}/{level}.o")
            commands.append(
                [
                    *common,
                    *extra,
                    *first,
                    f"-DRQ_LEVEL={level}",
                    "-c",
                    str(HERE / "step.cpp"),
                    "-o",
                    objects[-1],
                ]
            )
        running = [subprocess.Popen(command) for command in commands]
        for process, command in zip(running, commands, strict=True):
            if process.wait():
                for other in running:
                    other.wait()
                raise subprocess.CalledProcessError(process.returncode, command)
        linked = f"{place}/{out.name}"
        subprocess.run(
            [cxx, *flags, "-shared", "-Wl,--as-needed", "-o", linked, *objects, "-lm", "-lpthread"],
            check=True,
        )
        os.replace(linked, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cxx", default=compiler())
    parser.add_argument("--flag", action="append", default=[])
    args = parser.parse_args()
    if args.cxx is None:
        raise SystemExit("no C++ compiler found: apt-get install g++")
    build(args.out, args.cxx, flags=args.flag)
