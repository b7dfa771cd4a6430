"""A client of the soak: makes, uses and kills one sandbox for each number it is given, and checks what comes back.

    python scripts/soak_client.py [ADDRESS OF AN EDGE]

Reads a line of numbers ("17 19 21") on its standard input, answers with a line of JSON a number while it works and an
empty line at the end. Which kind of sandbox a number gets, and what is done with it, follows from the number. What the
death of an edge excuses (EdgeLost, an end with cause `infra` or `killed`) is `cut`; anything else is `failed`.
"""

from __future__ import annotations

import json
import sys
import time

from rorqual.sandbox import EdgeError, EdgeUnreachable, Sandbox, SandboxEnded, SandboxNotFound
from rorqual.sandbox.errors import SandboxError
from rorqual.sandbox.images import remove_image

OPTIONS = {"memory_mb": 64, "disk_mb": 16, "timeout": 120.0}


def kind_of(number: int) -> str:
    """Of 20 in a row: 13 plain, 2 with a terminal, 2 paused, 1 forked, 1 snapshot, 1 function."""
    return {
        3: "terminal",
        13: "terminal",
        6: "pause",
        16: "pause",
        8: "fork",
        11: "snapshot",
        18: "function",
    }.get(number % 20, "plain")


def use(number: int, edge: str) -> None:
    """Raises AssertionError when an answer is not what it must be."""
    kind = kind_of(number)
    if kind == "function":
        with Sandbox.function(edge=edge, workers=1, memory_mb=64) as fn:
            for more in range(3):
                assert fn("sum(args)", number, more).value == number + more
        return
    lease = {} if edge == "local" else {"lease": 2.0}
    with Sandbox.create(edge=edge, **OPTIONS, **lease) as sb:
        result = sb.commands.run(f"echo {number}; exit {number % 200}")
        assert result.stdout == f"{number}\n" and result.exit_code == number % 200, result
        data = f"{number} ".encode() * 1000
        sb.files.write("data", data)
        if kind == "terminal":
            terminal = sb.pty.create(cmd=f"echo on $(({number} + 1)); exit")
            assert terminal.wait() == 0
        elif kind == "pause":
            sb.commands.run("sleep 1000", background=True, timeout=None)
            sb.pause()
            assert sb.info().paused
        elif kind == "fork":
            for child in sb.fork(count=2):
                with child:
                    assert child.files.read("data", format="bytes") == data
        elif kind == "snapshot" and edge == "local":  # images are removed by the host that has them
            taken = sb.snapshot()
            try:
                with Sandbox.create(edge=edge, image=taken, **OPTIONS) as again:
                    assert again.files.read("data", format="bytes") == data
            finally:
                remove_image(taken.name)
        assert sb.files.read("data", format="bytes") == data


def patiently(number: int, edge: str) -> None:
    """An edge that is not there yet is asked again: nothing has been made."""
    deadline = time.monotonic() + 30.0
    while True:
        try:
            return use(number, edge)
        except EdgeUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def one(number: int, edge: str) -> dict[str, object]:
    begun = time.perf_counter()
    outcome, why = "ok", ""
    try:
        patiently(number, edge)
    except EdgeError as error:
        outcome, why = "cut", repr(error)
    except (SandboxEnded, SandboxNotFound) as error:
        excused = edge != "local" and error.cause in ("infra", "killed", None)
        outcome, why = ("cut" if excused else "failed"), repr(error)
    except (SandboxError, AssertionError, OSError) as error:
        outcome, why = "failed", repr(error)
    took = round(time.perf_counter() - begun, 4)
    return {"number": number, "kind": kind_of(number), "outcome": outcome, "s": took, "why": why[:300]}


def main() -> None:
    edge = sys.argv[1] if len(sys.argv) > 1 else "local"
    for line in sys.stdin:
        for number in line.split():
            sys.stdout.write(json.dumps(one(int(number), edge)) + "\n")
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
