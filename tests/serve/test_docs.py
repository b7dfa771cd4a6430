"""docs/serve.md: its snippet runs, its options, paths and refusals are those of the code."""

import re
from pathlib import Path

import typer

from rorqual._cli import serve as command
from rorqual.serve import schemas

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text("utf-8")


def test_the_snippet_runs(server, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    snippet = snippet.replace("http://127.0.0.1:8000", server.url).replace("rorqual-embedded", "tiny")
    namespace = {}
    exec(compile(snippet, "docs/serve.md", "exec"), namespace)
    namespace["client"].close()
    assert capsys.readouterr().out.strip()


def test_the_options_are_those_of_the_command():
    app = typer.Typer()
    command.register(app)
    options = {
        name for param in typer.main.get_command(app).params for name in param.opts if name.startswith("--")
    }
    table = re.findall(r"^\| `(--.*?)` \|", TEXT, re.MULTILINE)
    named = {one for row in table for one in re.findall(r"--[a-z-]+", row)}
    assert named == options - {"--install-completion", "--show-completion", "--help"}


def test_the_paths_are_those_of_the_server(server):
    section = TEXT.split("## Paths")[1].split("## Chat")[0]
    named = {path.replace("{id}", "{model_id}") for path in re.findall(r"`(?:POST |GET )?(/[^`]*)`", section)}
    assert named == {*server.server.config.app.openapi()["paths"], "/docs", "/openapi.json"}


def test_every_refused_parameter_is_named():
    section = TEXT.split("Not done yet")[1].split("## Anthropic")[0]
    for name in (
        "n",
        "logprobs",
        "logit_bias",
        "top_k",
        "min_p",
        "echo",
        "suffix",
    ):
        assert name in schemas._ACCEPTED and name in section
