"""Runs every example of docs/sandbox.md that is not marked no-run."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs/sandbox.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.S | re.M)


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example {n}" for n in range(len(EXAMPLES))])
def test_the_example_runs(code: str, runtime: str) -> None:
    name = "<an example of docs/sandbox.md>"
    linecache.cache[name] = (
        len(code),
        None,
        code.splitlines(keepends=True),
        name,
    )  # a function is sent as its source
    exec(compile(code, name, "exec"), {})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
