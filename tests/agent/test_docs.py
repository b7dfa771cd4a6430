"""The Python of docs/agent.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rorqual.sandbox import Sandbox, SandboxError

from .scripted import Say, serving

DOC = Path(__file__).parents[2] / "docs" / "agent.md"


def test_the_snippet_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        Sandbox.create(timeout=60).kill()
    except SandboxError as error:
        pytest.skip(f"no container on this host: {error}")
    [snippet] = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    steps = [Say(calls=[("bash", {"command": "echo $((6*7))"})]), Say(calls=[("submit", {"answer": "42"})])]
    with serving(*steps) as server:
        monkeypatch.setenv("MODEL_URL", server.url)
        exec(compile(snippet, str(DOC), "exec"), {})
    assert capsys.readouterr().out == "submitted 42 20\n"
