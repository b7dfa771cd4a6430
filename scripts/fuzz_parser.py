"""Fuzzes the streaming parser for as long as it is told to: `python scripts/fuzz_parser.py --minutes 60`.

Completions grow from pieces of markup, damaged markup, text and noise, are mutated and cut at random. For each: no
exception, the same events however it is cut, no marker in a text when tools are offered, finished calls are JSON
objects. And now and then a long hostile repetition: time and memory stay linear. Prints one line every few seconds; the
failing input, its seed and its cuts when something is wrong, and exits with 1. tests/chat runs a few seconds of it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chat.conversations import BOS, EOS, TOOLS, D, merged

from rorqual.chat import Event, StreamParser

PIECES = [
    BOS,
    EOS,
    "<think>",
    "</think>",
    D,
    "<｜User｜>",
    "｜",
    "|DSML|",
    "<",
    "</",
    ">",
    "\n",
    "\n\n",
    " ",
    "a",
    "é😀",
    '"',
    "{",
    "}",
    "[1, 2",
    "null",
    "\\",
    "\x00",
    "\u2028",
    "\ud83d",
    "\udb80",
    "invoke",
    "parameter",
    "tool_calls",
    "function_calls",
    f"<{D}tool_calls>\n",
    f"</{D}tool_calls>",
    f"<{D}function_calls>",
    f"</{D}function_calls>",
    "<tool_calls>",
    "<|DSML|tool_calls>",
    f'<{D}invoke name="bash">\n',
    f'<{D}invoke name="now">\n',
    f'<{D}invoke name="no\n',
    '<invoke name="bash">',
    f"</{D}invoke>\n",
    f'<{D}parameter name="command" string="true">',
    f'<{D}parameter name="timeout" string="false">',
    f'<{D}parameter name="x">',
    f"</{D}parameter>\n",
    f"</{D}parameter>",
    f"< {D}invoke",
    f"<{D} invoke name=",
    'string="maybe">',
    "12",
    '{"command": "ls"}',
    "x" * 600,
]
MARKERS = (D, EOS, BOS, "<think>", "</think>")
REPEATED = [
    "<",
    "｜",
    "\n",
    f"<{D}",
    f"</{D}parameter>",
    f'\n<{D}parameter name="',
    "{",
    D,
    f"<{D}tool_calls>\n",
    "\n\n<",
    "<<｜",
]
LEADS = ("", "</think>", f'\n\n<{D}tool_calls>\n<{D}invoke name="bash">\n')
LONG = 200_000
MAX_GROWTH = 9.0
"""Linear work grows fourfold with four times the text, quadratic work sixteenfold."""


def make(chance: random.Random) -> str:
    text = "".join(chance.choice(PIECES) for _ in range(chance.randint(1, 40)))
    for _ in range(chance.randint(0, 3)):
        at, size = chance.randint(0, len(text)), chance.randint(0, 8)
        kind = chance.randrange(3)
        if kind == 0:
            text = text[:at] + text[at + size :]
        elif kind == 1:
            text = text[:at] + text[at : at + size] + text[at:]
        else:
            text = text[:at] + chance.choice('<>/|｜\n"{}a ') + text[at:]
    return text


def cut(chance: random.Random, text: str) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        size = chance.choice((1, 1, 2, 3, 7, 40, 400))
        pieces.append(text[at : at + size])
        at += size
    return pieces


def read(pieces: Sequence[str], **options: Any) -> tuple[list[Event], Any]:
    parser = StreamParser(call_ids=lambda: "id", **options)
    events = [event for piece in pieces for event in parser.push(piece)]
    return [*events, *parser.close()], parser.message


def check(text: str, pieces: Sequence[str], **options: Any) -> None:
    whole, message = read([text], **options)
    events, again = read(pieces, **options)
    assert merged(whole) == merged(events), "other events when cut"
    assert message == again, "another message when cut"
    for call in message.tool_calls:
        assert isinstance(json.loads(call.arguments), dict), "arguments that are no object"
    if options["tools"]:
        for marker in MARKERS:
            assert marker not in message.content + message.reasoning_content, f"{marker} leaked"


def seconds_of(pieces: Sequence[str]) -> float:
    """CPU time of reading them."""
    begun = time.process_time()
    read(pieces, tools=TOOLS)
    return time.process_time() - begun


def check_long(chance: random.Random, unit: str, lead: str, *, size: int = LONG) -> None:
    """Four times the text takes about four times as long, whatever else the machine does."""
    short, long = (lead + unit * (n // len(unit)) for n in (size // 4, size))
    pieces = (cut(chance, short), cut(chance, long)) if chance.random() < 0.5 else ([short], [long])
    for _ in range(3):  # a busy machine's clock may lie once
        few, many = map(seconds_of, pieces)
        if many < 0.05 or many < MAX_GROWTH * few:
            return
    raise AssertionError(f"{few:.3f} s, four times the text {many:.3f} s: {unit!r} repeated behind {lead!r}")


def run(seconds: float, *, seed: int) -> int:
    """Number of inputs read. Raises AssertionError, or whatever the parser raised, with the input in its notes."""
    begun = told = time.monotonic()
    count, memory = 0, 0
    while time.monotonic() - begun < seconds:
        chance = random.Random(f"{seed}/{count}")
        text = make(chance)
        pieces = cut(chance, text)
        options = {
            "thinking_mode": chance.choice(("thinking", "chat")),
            "tools": chance.choice((None, [], TOOLS)),
        }
        try:
            check(text, pieces, **options)
            if count % 20_000 == 19_999:
                check_long(chance, chance.choice(REPEATED), chance.choice(LEADS))
        except Exception as error:
            error.add_note(f"input {seed}/{count}: {text!r}\ncut: {pieces!r}\noptions: {options}")
            raise
        count += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{count} inputs, {told - begun:.0f} s, {memory} MiB at most", flush=True)
    return count


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--minutes", type=float, default=1.0)
    arguments.add_argument("--seed", type=int, default=int(time.time()))
    options = arguments.parse_args()
    print(f"seed {options.seed}: {run(options.minutes * 60, seed=options.seed)} inputs, no finding")
