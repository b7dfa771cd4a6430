"""Tools: what a model may call, and the exact text it gets back.

Owns the `Tool` type, the built-ins `bash`, `read_file`, `write_file`, `submit`, argument checks and
`format_result`. The embedded model is trained on the names, descriptions, schemas and result texts below:
changing one is a retrain. Never starts or kills a sandbox: it acts through an `Environment` (environment.py).
"""

from __future__ import annotations

import json
import posixpath
import shlex
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rorqual.agent.environment import Environment

__all__ = [
    "BASH",
    "DEFAULT_TOOLS",
    "READ_FILE",
    "RESULT_BYTES",
    "SUBMIT",
    "TASK_TOOLS",
    "WRITE_FILE",
    "Tool",
    "ToolContext",
    "ToolOutput",
    "canonical_call",
    "check_arguments",
    "format_result",
    "shell_command",
]

RESULT_BYTES = 8192
"""Bytes of output a result may hold before its middle is cut out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolContext:
    """What a tool call may touch."""

    environment: Environment
    workdir: str | None = None
    """Working directory of commands, and where relative paths start; None: the sandbox's own."""
    command_timeout: float = 60.0
    """Seconds a command may run before its whole process group is killed."""
    on_output: Callable[[str], None] | None = None
    """Called with output as it comes, where the environment streams; display only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolOutput:
    """The result of one call."""

    text: str
    """What the model reads."""
    answer: str | None = None
    """Set by a tool that ends the run: the run's answer."""
    failed: bool = False
    """The tool could not do it (bad path, bad argument, command ended non-zero). Not an agent error."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts for the log: `exit_code`, `timed_out`, `truncated`, `bytes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A named function with a JSON schema for its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of an object."""
    call: Callable[[ToolContext, Mapping[str, Any]], Awaitable[ToolOutput]]
    ends_run: bool = False
    """A successful call is the end of the run, and its `answer` the result."""

    def schema(self) -> dict[str, Any]:
        """The OpenAI-shaped tool entry, keys in the order the embedded model was trained on."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def format_result(
    output: str,
    *,
    exit_code: int,
    timed_out: bool = False,
    timeout: float = 0.0,
    truncated: bool = False,
) -> str:
    """What the model reads after a command.

    The output without trailing newlines, `(no output)` if there was none, then one line each for a time limit
    (`[timed out after 60s]`, which replaces the exit code of the killed shell) or an exit code that is not 0
    (`[exit 2]`). More than `RESULT_BYTES` is cut to head and tail; `truncated` says that the sandbox itself
    kept only the beginning.
    """
    text = _cut(output.rstrip("\n"))
    notes = []
    if truncated:
        notes.append("[the output was longer; the sandbox kept only its beginning]")
    if timed_out:
        notes.append(f"[timed out after {timeout:g}s]")
    elif exit_code != 0:
        notes.append(f"[exit {exit_code}]")
    if not text and not notes:
        return "(no output)"
    return "\n".join([text, *notes] if text else notes)


def _cut(text: str) -> str:
    raw = text.encode("utf-8", "replace")
    if len(raw) <= RESULT_BYTES:
        return text
    half = RESULT_BYTES // 2
    head, tail = raw[:half].decode("utf-8", "ignore"), raw[-half:].decode("utf-8", "ignore")
    left_out = len(raw) - len(head.encode()) - len(tail.encode())
    return f"{head}\n[... {left_out} bytes left out ...]\n{tail}"


def shell_command(command: str) -> str:
    """`command` for a POSIX shell: run by bash if the image has it, else sh, stderr merged into stdout in
    order."""
    quoted = shlex.quote(command)
    return (
        f"if command -v bash >/dev/null 2>&1; then exec bash -c {quoted} 2>&1; "
        f"else exec sh -c {quoted} 2>&1; fi"
    )


def check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> str | None:
    """None if `arguments` fit the tool's schema (required, known and typed properties), else what is
    wrong."""
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    for name in tool.parameters.get("required", ()):
        if name not in arguments:
            return f"{tool.name}: the parameter {name!r} is missing"
    for name, value in arguments.items():
        if name not in properties:
            if tool.parameters.get("additionalProperties", False):
                continue
            return f"{tool.name}: no parameter {name!r}; it has {', '.join(sorted(properties)) or 'none'}"
        wanted = properties[name].get("type") if isinstance(properties[name], Mapping) else None
        kinds = [wanted] if isinstance(wanted, str) else list(wanted or ())
        if kinds and not any(_is(value, kind) for kind in kinds):
            return f"{tool.name}: the parameter {name!r} must be of type {' or '.join(kinds)}"
    return None


def _is(value: object, kind: str) -> bool:
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        number = isinstance(value, int) if kind == "integer" else isinstance(value, int | float)
        return number and not isinstance(value, bool)
    types: dict[str, type] = {"string": str, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, types[kind]) if kind in types else True


def canonical_call(name: str, arguments: Mapping[str, Any]) -> str:
    """One spelling per call: the name and the key-sorted arguments. Equal texts are the same call."""
    return f"{name} {json.dumps(arguments, sort_keys=True, ensure_ascii=False, separators=(',', ':'))}"


async def _bash(context: ToolContext, arguments: Mapping[str, Any]) -> ToolOutput:
    timeout = context.command_timeout
    ended = await context.environment.run(
        shell_command(arguments["command"]), cwd=context.workdir, limit=timeout, on_output=context.on_output
    )
    text = format_result(
        ended.output,
        exit_code=ended.exit_code,
        timed_out=ended.timed_out,
        timeout=timeout,
        truncated=ended.truncated,
    )
    if ended.oom:
        text += "\n[killed: out of memory]"
    details = {"exit_code": ended.exit_code, "timed_out": ended.timed_out, "truncated": ended.truncated}
    return ToolOutput(text=text, failed=ended.timed_out or ended.exit_code != 0, details=details)


def _absolute(context: ToolContext, path: str) -> str:
    return posixpath.normpath(posixpath.join(context.workdir or "", path))


async def _read_file(context: ToolContext, arguments: Mapping[str, Any]) -> ToolOutput:
    path = _absolute(context, arguments["path"])
    try:
        raw = await context.environment.read(path)
    except OSError as error:
        return ToolOutput(text=f"Error: {path}: {error.strerror or error}", failed=True)
    text = format_result(raw.decode("utf-8", "replace"), exit_code=0) if raw else "(empty file)"
    return ToolOutput(text=text, details={"bytes": len(raw)})


async def _write_file(context: ToolContext, arguments: Mapping[str, Any]) -> ToolOutput:
    path = _absolute(context, arguments["path"])
    raw = arguments["content"].encode("utf-8", "replace")
    try:
        await context.environment.write(path, raw)
    except OSError as error:
        return ToolOutput(text=f"Error: {path}: {error.strerror or error}", failed=True)
    return ToolOutput(text=f"Wrote {len(raw)} bytes to {path}", details={"bytes": len(raw)})


async def _submit(context: ToolContext, arguments: Mapping[str, Any]) -> ToolOutput:
    return ToolOutput(text="Submitted.", answer=arguments["answer"])


def _strings(*names: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": list(names),
    }


BASH = Tool(name="bash", description="Run a shell command.", parameters=_strings("command"), call=_bash)
READ_FILE = Tool(name="read_file", description="Read a file.", parameters=_strings("path"), call=_read_file)
WRITE_FILE = Tool(
    name="write_file", description="Write a file.", parameters=_strings("path", "content"), call=_write_file
)
SUBMIT = Tool(
    name="submit",
    description="Submit the final answer.",
    parameters=_strings("answer"),
    call=_submit,
    ends_run=True,
)

TASK_TOOLS = (BASH, SUBMIT)
"""The tools of the embedded model, in the order it was trained on."""
DEFAULT_TOOLS = (BASH, READ_FILE, WRITE_FILE, SUBMIT)
"""The tools of remote models."""
