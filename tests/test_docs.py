"""README and the pages without a test of their own: their Python runs, their commands and links exist.

docs/agent.md, docs/chat.md and docs/sandbox.md are run by the tests of their rooms.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from rorqual.sandbox import Sandbox, SandboxError

from .snippets import ROOT, commands_of, python_of, run_python

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def test_the_python_of_readme_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        Sandbox.create(timeout=60).kill()
    except SandboxError as error:
        pytest.skip(f"no container on this host: {error}")
    assert len(python_of("README.md")) == 2
    run_python("README.md")
    hello, blank, figure = capsys.readouterr().out.split("\n")[:3]
    assert (hello, blank) == ("hello", " 1")
    assert f"# {figure}:" in (ROOT / "README.md").read_text("utf-8")


def test_the_python_of_the_engine_page_runs() -> None:
    names = run_python("docs/engine.md")
    assert (names["sequence"].length, names["twin"].length) == (2, 5)


def test_the_python_of_the_model_page_runs(tmp_path: Path) -> None:
    import torch

    from rorqual.model import Config, Model

    Model(Config.preset("tiny").replace(vocab_size=97)).initialize(0).save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    names = run_python("docs/model.md", directory=tmp_path, token_ids=ids, chunk=ids)
    assert names["state"] is not None and names["logits"].shape[-1] == 97


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_parses(page: str) -> None:
    from rorqual.cli import app

    root = typer.main.get_command(app)
    for words in commands_of(page):
        command: Any = root
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        options = {name for parameter in command.params for name in parameter.opts}
        assert not hasattr(command, "commands"), f"no such command: {words}"
        for word in words:
            assert not word.startswith("--") or word in options, f"{command.name} has no {word}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_the_page_leads_somewhere(page: str) -> None:
    base = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text("utf-8")):
        assert "://" in target or (base / target).exists(), target
