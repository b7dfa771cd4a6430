"""Which calls of the SDK cross to an edge as they are: found by looking at the SDK itself.

A public coroutine method of a sandbox or of one of its nouns (`files`, `commands`, ...) crosses as a plain call
when its arguments and its result are data. Calls that stream, or that give back an object with a life of its own,
have operations of their own (_remote.py, edge/channel.py) and are named in SPECIAL. Both ends read this table.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPECIAL = frozenset(
    {
        "kill", "close", "fork",
        "commands.run", "commands.connect",
        "files.read", "files.write", "files.write_files",
        "pty.create", "pty.connect", "pty.send_stdin",
    }
)  # fmt: skip
"""Calls with operations of their own."""
REPEATABLE = re.compile(
    r"info|resume|set_timeout|metrics|trajectory\.list|commands\.list|files\.(list|exists|get_info)"
)
"""Calls that a client sends again when the connection broke before the answer came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One call."""

    path: str
    """'pause', 'files.list', ..."""
    function: Callable[..., Any]
    signature: inspect.Signature
    """Without self."""
    hints: dict[str, Any]
    crosses: bool
    """Its arguments and its result are data."""


def nouns() -> dict[str, type]:
    """'' for the sandbox itself, and the class of each of its nouns by name."""
    from rorqual.sandbox._async.sandbox import AsyncSandbox

    found: dict[str, type] = {"": AsyncSandbox}
    for name, hint in typing.get_type_hints(AsyncSandbox).items():
        if not name.startswith("_") and isinstance(hint, type) and hint.__name__.startswith("Async"):
            found[name] = hint
    return found


@functools.cache
def methods() -> dict[str, Method]:
    """Every public coroutine method of a sandbox and its nouns, SPECIAL ones included, by path."""
    found = {}
    for noun, kind in nouns().items():
        for name, function in inspect.getmembers(kind, inspect.iscoroutinefunction):
            if name.startswith("_") or inspect.ismethod(function):
                continue
            path = f"{noun}.{name}" if noun else name
            signature = inspect.signature(function)
            parameters = [one for one in signature.parameters.values() if one.name != "self"]
            hints = typing.get_type_hints(function)
            found[path] = Method(
                path=path,
                function=function,
                signature=signature.replace(parameters=parameters),
                hints=hints,
                crosses=path not in SPECIAL and all(_is_data(hint) for hint in hints.values()),
            )
    return found


def _is_data(hint: Any) -> bool:
    if typing.get_origin(hint) is not None:
        if typing.get_origin(hint) is typing.Literal:
            return True
        if typing.get_origin(hint) is typing.get_origin(Callable[..., Any]):
            return False
        return all(_is_data(item) for item in typing.get_args(hint) if item is not Ellipsis)
    return not (isinstance(hint, type) and hint.__name__.startswith("Async"))
