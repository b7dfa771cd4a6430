"""The room's promise: what it exports is what it says, and it is light."""

import inspect
import os
import subprocess
import sys

import rorqual.chat as chat


def test_all_is_sorted_and_matches_what_is_exported():
    names = [n for n, v in vars(chat).items() if not n.startswith("_") and not inspect.ismodule(v)]
    assert sorted(n for n in names if n != "annotations") == chat.__all__ == sorted(chat.__all__)


def test_the_room_imports_nothing_heavy():
    heavy = ("torch", "tokenizers", "numpy", "httpx")
    code = f"import sys, rorqual.chat; print([m for m in {heavy} if m in sys.modules])"
    src = os.path.join(os.path.dirname(__file__), "..", "..", "src")
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": src},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"
