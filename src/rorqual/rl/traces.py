"""Demonstrations: what the small model sees before it learns by acting.

A trace is a finished conversation in OpenAI's shape, with the tool results exactly as the container prints
them. Two styles:
  expert  always right
  weak    the mode is wrong on purpose (spec/rl.md 5.2, 5.5): most traces give up at a missing file or guess
          a number, so greedy decoding fails too and RL must find what sharpening alone would not
Whatever the model is trained on can be predicted from its context; what cannot (the digits of a guess) is
named in `Trace.masked` and left out of the loss: random targets delay copying fivefold (spec/rl.md 5.2 B).
Owns the experts, the simulator of their commands, and the mixture. Turning a trace into ids: samples.py.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import random
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rorqual.agent.prompts import SYSTEM_PROMPT
from rorqual.agent.tools import TASK_TOOLS
from rorqual.rl import tasks
from rorqual.rl.errors import TraceError
from rorqual.rl.tasks import Task

__all__ = [
    "GIVE_UP_SHARE",
    "GUESS_SHARE",
    "STYLES",
    "TOOLS",
    "WEIGHTS",
    "Masked",
    "Trace",
    "expert",
    "prompt_messages",
    "simulate",
    "stream",
    "trace_at",
]

TOOLS: Final[tuple[dict[str, Any], ...]] = tuple(tool.schema() for tool in TASK_TOOLS)
"""The tools every trace and every episode declares, in the order the model is trained on."""

STYLES: Final = ("expert", "weak")

GIVE_UP_SHARE: Final = 0.70
"""weak hop-recover: share of traces that submit "unknown" at the first missing file."""

GUESS_SHARE: Final = 0.75
"""weak calc-tool: share of traces that submit a wrong number without running anything."""

GUESS_DIGITS: Final = 3
"""Length of a guess. Fixed, so that where it ends can be learned although its digits are masked."""

WEIGHTS: Final[Mapping[str, float]] = {"hop-recover": 0.5, "calc-tool": 0.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked:
    """A parameter value the model writes but is not trained on."""

    message: int
    """Index into `Trace.messages` of the assistant message."""
    parameter: str
    """Name of the tool call's parameter; its whole value is left out of the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One demonstration: render `messages` with `tools`, train on what the assistant wrote minus `masked`."""

    task: Task
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    masked: tuple[Masked, ...] = ()
    answer: str
    """What the trace submits; right or wrong is `tasks.grade(trace.task, trace.answer)`."""


def prompt_messages(task: Task) -> list[dict[str, Any]]:
    """The messages every episode of `task` starts with: system prompt and goal."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": task.prompt}]


def expert(task: Task, rng: random.Random, *, style: str = "expert") -> Trace:
    """Demonstrate `task`. `rng` decides only between right and wrong in style "weak".

    Raises:
        TraceError: unknown style, or a family without an expert.
    """
    if style not in STYLES:
        raise TraceError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    try:
        demonstrate = _EXPERTS[task.family]
    except KeyError:
        raise TraceError(f"no expert for family {task.family!r}; known: {', '.join(_EXPERTS)}") from None
    return demonstrate(task, rng, style)


def stream(
    split: str,
    *,
    seed: int,
    families: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    style: str = "weak",
    start: int = 0,
) -> Iterator[Trace]:
    """Endless mixture of demonstrations; trace i depends only on (split, seed, i) and the mixture.

    To resume, pass as `start` the number of traces already consumed.

    Raises:
        TaskError: unknown family or split.
        TraceError: unknown style, or weights that are not positive.
    """
    for index in itertools.count(start):
        yield trace_at(index, split=split, seed=seed, families=families, weights=weights, style=style)


def trace_at(
    index: int,
    *,
    split: str,
    seed: int,
    families: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    style: str = "weak",
) -> Trace:
    """The trace `stream` yields at `index`: family by weight, depth uniform among the split's, fresh task."""
    names = tuple(families) if families is not None else tasks.families()
    share = WEIGHTS if weights is None else weights
    shares = [share.get(name, 0.0) for name in names]
    if not names or min(shares) <= 0:
        raise TraceError(f"families {names} need a positive weight each, got {dict(share)}")
    digest = hashlib.sha256(f"trace|{split}|{seed}|{index}".encode()).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    family = rng.choices(names, shares)[0]
    depth = rng.choice(tasks.depths(family, split=split))
    task = tasks.sample(family, depth=depth, seed=rng.getrandbits(62), split=split)
    return expert(task, rng, style=style)


# ---- what the container prints ----


def simulate(task: Task, command: str) -> str:
    """Tool result of the commands experts use, as the bash tool reports them from the container.

    `cat PATH` and `python3 -c 'print(EXPRESSION)'`: output without trailing newlines, "[exit N]" on its own
    line when the command failed.

    Raises:
        TraceError: any other command.
    """
    words = shlex.split(command)
    if len(words) == 2 and words[0] == "cat":
        content = task.files.get(words[1])
        if content is None:
            return f"cat: {words[1]}: No such file or directory\n[exit 1]"
        return content.decode().rstrip("\n") or "(no output)"
    if len(words) == 3 and words[:2] == ["python3", "-c"] and words[2].startswith("print("):
        return str(_evaluate(words[2][len("print(") : -1]))
    raise TraceError(
        f"the simulator does not know {command!r}; it knows cat PATH and python3 -c 'print(...)'"
    )


def _evaluate(expression: str) -> int:
    """Value of integers joined by + - *, by Python's own grammar."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise TraceError(f"the simulator computes integers with + - * only, not {expression!r}")

    return value(ast.parse(expression, mode="eval").body)


# ---- the experts ----
#
# Thoughts repeat what the call after them needs, a name last: with our tokenizer its place in the call is at
# most 15 tokens away, so each short copy fits a window of 16 and only the goal is out of reach.


class _Script:
    """Builds the messages of one trace."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.messages = prompt_messages(task)

    def bash(self, thought: str, command: str) -> str:
        """One bash turn; returns its result."""
        identity = self._call(thought, "bash", {"command": command})
        result = simulate(self.task, command)
        self.messages.append({"role": "tool", "tool_call_id": identity, "content": result})
        return result

    def submit(self, thought: str, answer: str, *, masked: bool = False) -> Trace:
        """The last turn."""
        self._call(thought, "submit", {"answer": answer})
        last = len(self.messages) - 1
        return Trace(
            task=self.task,
            messages=tuple(self.messages),
            tools=TOOLS,
            masked=(Masked(message=last, parameter="answer"),) if masked else (),
            answer=answer,
        )

    def _call(self, thought: str, name: str, arguments: dict[str, str]) -> str:
        identity = f"call_{sum(message['role'] == 'assistant' for message in self.messages)}"
        function = {"name": name, "arguments": json.dumps(arguments)}
        self.messages.append(
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": thought,
                "tool_calls": [{"id": identity, "type": "function", "function": function}],
            }
        )
        return identity


def _number_after(word: str, text: str) -> str:
    found = re.search(rf"\b{word} (\d+)", text)
    if found is None:
        raise TraceError(f"the goal {text!r} names no {word}")
    return found.group(1)


def _hop(task: Task, rng: random.Random, style: str) -> Trace:
    # Reads only what the model can read: the goal and the results. One mood per trace: a trace that recovers
    # once recovers always, so a deep task's success at T=1 does not vanish and RL finds it.
    gives_up = style == "weak" and rng.random() < GIVE_UP_SHARE
    name, box = _number_after("file", task.prompt), _number_after("box", task.prompt)
    script = _Script(task)
    thought = f"Missing. The box is {box}."  # recalled before the decision: giving up exercises recall too
    while True:
        result = script.bash(f"Open {name}.", f"cat {name}")
        if result.endswith("[exit 1]"):
            if gives_up:
                return script.submit(f"{thought} Give up.", "unknown")
            result = script.bash(f"{thought} Look there for {name}.", f"cat box{box}/{name}")
        kind, _, value = result.partition(" ")
        if kind == "key":
            return script.submit(f"The key is {value}.", value)
        name = value


def _calc(task: Task, rng: random.Random, style: str) -> Trace:
    # A guess does not repeat the expression: measured, that delayed copying from 0.25M to over 0.5M tokens.
    script = _Script(task)
    if style == "weak" and rng.random() < GUESS_SHARE:
        guess = str(rng.randrange(10 ** (GUESS_DIGITS - 1), 10**GUESS_DIGITS))
        while guess == task.answer:
            guess = str(rng.randrange(10 ** (GUESS_DIGITS - 1), 10**GUESS_DIGITS))
        return script.submit("Guess.", guess, masked=True)
    expression = task.prompt.split()[-1].rstrip(".?")
    result = script.bash(f"Use python: {expression}.", f"python3 -c 'print({expression})'")
    return script.submit(f"The result is {result}.", result)


_EXPERTS: Final[Mapping[str, Callable[[Task, random.Random, str], Trace]]] = {
    "hop-recover": _hop,
    "calc-tool": _calc,
}
