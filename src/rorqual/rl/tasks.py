"""Task families: what the small model is taught and measured on.

A task is a pure function of (family, depth, seed, split): prompt, files, answer. Families (spec/rl.md 5.4):
  hop-recover  files named by three digits point to each other until one holds a key; about a third of them
               lie in a box directory that only the goal names: it must be recalled from far back
  calc-tool    an arithmetic expression that is easy with python and hopeless by heart
Owns drawing tasks, putting their files into a sandbox and grading on the host. Never knows how they are
solved: traces.py does. The answer is in the sandbox only as far as the files themselves show it.
"""

from __future__ import annotations

import hashlib
import posixpath
import random
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from rorqual.rl.errors import TaskError

__all__ = [
    "MISSING_SHARE",
    "SPLITS",
    "Task",
    "depths",
    "families",
    "grade",
    "sample",
    "setup",
    "setup_script",
]

SPLITS: Final = ("train", "rl", "test")

MISSING_SHARE: Final = 0.35
"""Probability that a pointed-to file lies in the box instead of the working directory (spec/rl.md 5.2 A)."""

# Sixteen parts of the content space. A task's content falls into exactly one, so a held-out task was never
# drawn in training: there are few small sums, and other seeds alone would draw the same ones again.
_PARTS: Final[Mapping[str, range]] = {"train": range(0, 10), "rl": range(10, 13), "test": range(13, 16)}

_HOP_PROMPTS: Final = (
    "Start at file {start} and follow the pointers to the key. Missing files are in box {box}.",
    "Follow the pointers from file {start} to the key. If a file is missing, look in box {box}.",
    "Find the key. Start at file {start}. Missing files are in box {box}.",
    "Which key do the pointers lead to? Missing files are in box {box}. Start at file {start}.",
)
_CALC_PROMPTS: Final = (
    "Compute {expression}.",
    "What is {expression}?",
    "Work out {expression}.",
    "Submit the value of {expression}.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task: pure data, made by `sample`."""

    family: str
    depth: int
    """hop-recover: pointers to follow. calc-tool: operators."""
    seed: int
    split: str
    prompt: str
    answer: str
    """Ground truth; stays on the host."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path relative to the working directory -> content."""
    min_calls: int
    """Tool calls the expert needs, `submit` included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    draw: Callable[[random.Random, int], tuple[str, Task]]
    """(random source, depth) -> (content that must not cross splits, task without seed and split)."""
    depths: Mapping[str, tuple[int, ...]]
    """Split -> depths used there; hop-recover 5 and 6 are only ever tested."""


def families() -> tuple[str, ...]:
    """Names of the task families."""
    return tuple(_FAMILIES)


def depths(family: str, *, split: str = "test") -> tuple[int, ...]:
    """Depths of `family` used in `split`; "test" has all of them.

    Raises:
        TaskError: unknown family or split.
    """
    return _family(family).depths[_split(split)]


def sample(family: str, *, depth: int, seed: int, split: str = "train") -> Task:
    """Draw one task; the same arguments always give the same task (spec/rl.md 5.4).

    Splits are disjoint by content: an expression, or a pair of start file and box, belongs to one split only.

    Raises:
        TaskError: unknown family or split, or a depth the family does not have.
    """
    entry = _family(family)
    _split(split)
    if depth not in entry.depths["test"]:
        known = ", ".join(map(str, entry.depths["test"]))
        raise TaskError(f"{family}: no depth {depth!r}; this family has {known}")
    digest = hashlib.sha256(f"{family}|{depth}|{seed}|{split}".encode()).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    while True:  # a draw lands in the split's part with probability 10/16 or 3/16
        content, task = entry.draw(rng, depth)
        if _part(family, content) in _PARTS[split]:
            break
    return replace(task, seed=seed, split=split)


def grade(task: Task, answer: str | None) -> float:
    """1.0 if `answer`, stripped, is the task's answer, else 0.0. Runs on the host; None means no answer."""
    return 1.0 if answer is not None and answer.strip() == task.answer else 0.0


class SandboxLike(Protocol):
    """The part of `rorqual.sandbox.AsyncSandbox` that `setup` uses."""

    @property
    def commands(self) -> Any: ...


async def setup(task: Task, sandbox: SandboxLike, workdir: str) -> None:
    """Write the task's files into `workdir` (absolute, empty or absent) with one command.

    Raises:
        TaskError: `workdir` is not absolute, not empty, or could not be written.
    """
    result = await sandbox.commands.run(setup_script(task, workdir))
    if result.exit_code != 0:
        detail = (result.stderr or result.stdout or "").strip()
        raise TaskError(
            f"{task.family} seed {task.seed}: could not fill {workdir} (exit {result.exit_code}): {detail}. "
            "Give every episode an empty directory that the sandbox's user may write to."
        )


def setup_script(task: Task, workdir: str) -> str:
    """The shell command `setup` runs: POSIX sh, refuses a directory that is not empty.

    Raises:
        TaskError: `workdir` is not absolute, or a file path leaves it.
    """
    if not workdir.startswith("/"):
        raise TaskError(f"workdir {workdir!r}: must be an absolute path inside the sandbox")
    root = shlex.quote(workdir)
    lines = [
        "set -e",
        f"mkdir -p -- {root}",
        f"cd -- {root}",
        'if [ -n "$(ls -A)" ]; then echo "directory is not empty" >&2; exit 73; fi',
    ]
    folders = {posixpath.dirname(path) for path in task.files} - {""}
    if folders:
        lines.append("mkdir -p -- " + " ".join(shlex.quote(folder) for folder in sorted(folders)))
    for path, content in task.files.items():
        if posixpath.normpath(path) != path or path.startswith(("/", "..")):
            raise TaskError(
                f"{task.family}: file path {path!r} is not a plain path below the working directory"
            )
        lines.append(f"printf '{_escape(content)}' > {shlex.quote(path)}")
    return "\n".join(lines)


def _escape(content: bytes) -> str:
    """`content` as a printf format inside single quotes: everything but plain characters as \\ooo."""
    return "".join(
        chr(b) if chr(b).isascii() and (chr(b).isalnum() or b == 0x20) else f"\\{b:03o}" for b in content
    )


def _part(family: str, content: str) -> int:
    return hashlib.sha256(f"{family}|{content}".encode()).digest()[0] % 16


def _family(name: str) -> _Family:
    try:
        return _FAMILIES[name]
    except KeyError:
        raise TaskError(f"unknown task family {name!r}; known: {', '.join(_FAMILIES)}") from None


def _split(name: str) -> str:
    if name not in SPLITS:
        raise TaskError(f"unknown split {name!r}; known: {', '.join(SPLITS)}")
    return name


# ---- hop-recover ----


def _draw_hop(rng: random.Random, depth: int) -> tuple[str, Task]:
    # Every name is used once, so no file outside the chain can be mistaken for one in it.
    names = [f"{n:03d}" for n in rng.sample(range(1000), depth + 1 + 12)]
    chain, spare = names[: depth + 1], names[depth + 1 :]
    boxes = [f"{n:02d}" for n in rng.sample(range(100), 3)]
    keys = [f"{n:04d}" for n in rng.sample(range(10000), 9)]
    box, key = boxes[0], keys[0]
    contents = [f"next {name}" for name in chain[1:]] + [f"key {key}"]
    missing = [False] + [rng.random() < MISSING_SHARE for _ in range(depth)]

    entries: dict[str, str] = {}
    for name, content, gone in zip(chain, contents, missing, strict=True):
        if not gone:
            entries[name] = content
            continue
        entries[f"box{box}/{name}"] = content
        for other in boxes[1:]:  # the same name with another content: a guessed box leads astray
            entries[f"box{other}/{name}"] = f"key {keys[rng.randrange(1, 9)]}"
    for place, share in (
        ("", 4),
        *((f"box{b}/", 2) for b in boxes),
    ):  # bystanders, half of them end in a wrong key
        for name in spare[:share]:
            wrong = f"next {rng.choice(spare)}" if rng.random() < 0.5 else f"key {keys[rng.randrange(1, 9)]}"
            entries[place + name] = wrong
        spare = spare[share:]
    order = sorted(entries)
    prompt = rng.choice(_HOP_PROMPTS).format(start=chain[0], box=box)
    task = Task(
        family="hop-recover",
        depth=depth,
        seed=0,
        split="",
        prompt=prompt,
        answer=key,
        files={path: (entries[path] + "\n").encode() for path in order},
        min_calls=depth + 1 + sum(missing) + 1,
    )
    return f"{chain[0]} {box}", task


# ---- calc-tool ----


def _draw_calc(rng: random.Random, depth: int) -> tuple[str, Task]:
    operators: list[str] = []
    for _ in range(depth):  # at most two products: results stay below a million
        operators.append(rng.choice("+-" if operators.count("*") == 2 else "+-*"))
    operands = [
        rng.randrange(2, 10) if rng.random() < 0.3 else rng.randrange(10, 100) for _ in range(depth + 1)
    ]
    expression = str(operands[0])
    for operator, operand in zip(operators, operands[1:], strict=True):
        expression += f"{operator}{operand}"
    task = Task(
        family="calc-tool",
        depth=depth,
        seed=0,
        split="",
        prompt=rng.choice(_CALC_PROMPTS).format(expression=expression),
        answer=str(_value(operators, operands)),
        min_calls=2,
    )
    return expression, task


def _value(operators: list[str], operands: list[int]) -> int:
    """Products first, then left to right."""
    terms = [operands[0]]
    for operator, operand in zip(operators, operands[1:], strict=True):
        if operator == "*":
            terms[-1] *= operand
        else:
            terms.append(operand if operator == "+" else -operand)
    return sum(terms)


_FAMILIES: Final[Mapping[str, _Family]] = {
    "hop-recover": _Family(
        draw=_draw_hop, depths={"train": (1, 2, 3), "rl": (1, 2, 3, 4), "test": (1, 2, 3, 4, 5, 6)}
    ),
    "calc-tool": _Family(draw=_draw_calc, depths={"train": (1, 2, 3), "rl": (1, 2, 3), "test": (1, 2, 3)}),
}
