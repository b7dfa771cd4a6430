"""Runs every example of docs/sandbox.md that is not marked no-run."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = (
    "sandbox.md",
    "sandbox-images.md",
    "sandbox-edge.md",
    "sandbox-trajectory.md",
    "sandbox-ports.md",
    "sandbox-pool.md",
    "sandbox-machines.md",
)
EXAMPLES = [
    (page, code)
    for page in PAGES
    for code in re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)
]


@pytest.mark.parametrize(
    ("page", "code"), EXAMPLES, ids=[f"{page} {n}" for n, (page, _) in enumerate(EXAMPLES)]
)
def test_the_example_runs(page: str, code: str, runtime: str) -> None:
    name = f"<an example of docs/{page}>"
    linecache.cache[name] = (
        len(code),
        None,
        code.splitlines(keepends=True),
        name,
    )  # a function is sent as its source
    exec(compile(code, name, "exec"), {})


def test_there_are_examples() -> None:
    assert {page for page, _ in EXAMPLES} == set(PAGES) and len(EXAMPLES) >= 8
