"""Tools: the exact texts the embedded model is trained on, and what results look like."""

from __future__ import annotations

import json

import pytest

import rorqual.agent
from rorqual.agent import DEFAULT_TOOLS, SYSTEM_PROMPT, TASK_TOOLS, format_result
from rorqual.agent.tools import BASH, RESULT_BYTES, SUBMIT, Tool, ToolContext, check_arguments, shell_command

from .local import LocalEnvironment


def test_the_trained_texts_are_exact() -> None:
    assert [json.dumps(tool.schema()["function"]) for tool in TASK_TOOLS] == [
        '{"name": "bash", "description": "Run a shell command.", "parameters": {"type": "object", '
        '"properties": {"command": {"type": "string"}}, "required": ["command"]}}',
        '{"name": "submit", "description": "Submit the final answer.", "parameters": {"type": "object", '
        '"properties": {"answer": {"type": "string"}}, "required": ["answer"]}}',
    ]
    assert SYSTEM_PROMPT == "Solve the task with the tools."
    assert [tool.name for tool in DEFAULT_TOOLS] == ["bash", "read_file", "write_file", "submit"]


@pytest.mark.parametrize(
    ("output", "options", "text"),
    [
        ("a\nb\n\n", {"exit_code": 0}, "a\nb"),
        ("", {"exit_code": 0}, "(no output)"),
        ("\n", {"exit_code": 0}, "(no output)"),
        ("oops\n", {"exit_code": 2}, "oops\n[exit 2]"),
        ("", {"exit_code": 127}, "[exit 127]"),
        ("so far\n", {"exit_code": 137, "timed_out": True, "timeout": 60.0}, "so far\n[timed out after 60s]"),
        ("", {"exit_code": 137, "timed_out": True, "timeout": 0.5}, "[timed out after 0.5s]"),
        ("  indented \n", {"exit_code": 0}, "  indented "),
        (
            "x",
            {"exit_code": 1, "truncated": True},
            "x\n[the output was longer; the sandbox kept only its beginning]\n[exit 1]",
        ),
    ],
)
def test_results_read_as_specified(output: str, options: dict[str, float], text: str) -> None:
    assert format_result(output, **options) == text


def test_long_output_keeps_head_and_tail_and_counts_the_rest() -> None:
    output = "ä" * 5000 + "middle" + "z" * 5000
    text = format_result(output, exit_code=1)
    head, note, tail, exit_line = text.split("\n")
    assert set(head) == {"ä"} and set(tail) == {"z"} and exit_line == "[exit 1]"
    left_out = len(output.encode()) - len(head.encode()) - len(tail.encode())
    assert note == f"[... {left_out} bytes left out ...]"
    assert len(text.encode()) < RESULT_BYTES + 100
    assert format_result("y" * RESULT_BYTES, exit_code=0) == "y" * RESULT_BYTES


async def test_stderr_and_stdout_come_in_order_whatever_the_command_quotes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    command = "echo 1; echo \"2 it's\" >&2; echo '3'; exit 4"
    ended = await LocalEnvironment(tmp_path).run(shell_command(command))
    assert (ended.output, ended.exit_code) == ("1\n2 it's\n3\n", 4)


async def test_the_shell_is_bash_where_there_is_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    context = ToolContext(environment=LocalEnvironment(tmp_path))
    output = await BASH.call(context, {"command": "[[ a == a ]] && echo ${BASH_VERSION:+bash}"})
    assert output.text == "bash" and not output.failed


def test_arguments_are_checked_against_the_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer"},
            "x": {"type": ["number", "null"]},
            "b": {"type": "boolean"},
            "l": {"type": "array"},
            "any": {},
        },
        "required": ["n"],
    }
    tool = Tool(name="t", description="", parameters=schema, call=SUBMIT.call)
    assert check_arguments(tool, {"n": 1, "x": None, "b": False, "l": [], "any": object()}) is None
    assert check_arguments(tool, {"n": True}) == "t: the parameter 'n' must be of type integer"
    assert check_arguments(tool, {"n": 1, "x": "1"}) == "t: the parameter 'x' must be of type number or null"
    assert check_arguments(tool, {}) == "t: the parameter 'n' is missing"


def test_exports_are_what_all_says() -> None:
    public = {
        name
        for name, value in vars(rorqual.agent).items()
        if getattr(value, "__module__", "").startswith("rorqual.agent.")
    }
    constants = {"DEFAULT_TOOLS", "REMOTE_SYSTEM_PROMPT", "SYSTEM_PROMPT", "TASK_TOOLS"}
    assert sorted(public | constants) == sorted(rorqual.agent.__all__)
