"""Compiles librorqual_cpu.so: `python native/cpu/build.py OUT [--cxx g++] [--flag -fsanitize=address ...]`.

The same SOURCES once per instruction level, in objects of their own; only those objects hold the wider instructions.
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
SOURCES = (
    *("rows.cpp", "attend.cpp", "index.cpp", "core.cpp", "gemm.cpp"),
    *("forward.cpp", "mixing.cpp", "sublayer.cpp", "experts.cpp"),
)
ONCE = ("library.cpp", "check.cpp", "team.cpp")
"""Compiled per level, RQ_LEVEL its name, RQ_NS the namespace of its functions; RQ_FIRST is set for the portable one.
ONCE are compiled for the portable level alone."""
# gcc 12's own avx512fintrin.h trips its warning about uninitialised values (gcc bug 105593, fixed in 13).
AVX512 = [
    *["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    *["-Wno-uninitialized", "-Wno-maybe-uninitialized"],
]
LEVELS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"],
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
        objects = [f"{place}/{source}.o" for source in ONCE]
        commands = [
            [*common, "-c", str(HERE / source), "-o", made]
            for source, made in zip(ONCE, objects, strict=True)
        ]
        for level, extra in levels.items():
            first = ["-DRQ_FIRST"] if level == "portable" else []
            for source in SOURCES:
                objects.append(f"{place}/{level}-{source}.o")
                wanted = [*common, *extra, *first, f"-DRQ_LEVEL={level}", f"-DRQ_NS=rq_{level}"]
                commands.append([*wanted, "-c", str(HERE / source), "-o", objects[-1]])
        _run_all(commands, os.cpu_count() or 1)
        linked = f"{place}/{out.name}"
        subprocess.run(
            [cxx, *flags, "-shared", "-Wl,--as-needed", "-o", linked, *objects, "-lm", "-lpthread"],
            check=True,
        )
        os.replace(linked, out)


def _run_all(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Runs the commands, `jobs` at a time. Raises CalledProcessError once those that had started have ended."""
    waiting, running, failed = list(commands), [], None
    while running or (waiting and failed is None):
        while waiting and failed is None and len(running) < jobs:
            command = waiting.pop(0)
            running.append((subprocess.Popen(command), command))
        process, command = running.pop(0)
        if process.wait() and failed is None:
            failed = subprocess.CalledProcessError(process.returncode, command)
    if failed is not None:
        raise failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cxx", default=compiler())
    parser.add_argument("--flag", action="append", default=[])
    args = parser.parse_args()
    if args.cxx is None:
        raise SystemExit("no C++ compiler found: apt-get install g++")
    build(args.out, args.cxx, flags=args.flag)
