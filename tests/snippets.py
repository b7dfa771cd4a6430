"""Runs what the documents show: the Python of a page in one namespace, in order; the shell lines against the CLI."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def python_of(page: str) -> list[str]:
    """The Python snippets of a page; those marked `no-run` are left out."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.S | re.M)


def run_python(page: str, **namespace: Any) -> dict[str, Any]:
    """Executes the page's snippets one after the other in `namespace`, and returns it."""
    for snippet in python_of(page):
        exec(compile(snippet, page, "exec"), namespace)
    return namespace


def commands_of(page: str) -> list[list[str]]:
    """The `rorqual ...` lines of a page's shell blocks, as arguments; continued lines are joined."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["rorqual"]:
                found.append(words[1:])
    return found
