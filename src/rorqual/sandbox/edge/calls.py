"""What clients may ask of an edge, as types: request models made from the SDK's own signatures, and the plain calls.

A new argument of `AsyncSandbox.create` or a new call that is data both ways is here at once, in the channel, in the
HTTP API and in the OpenAPI schema. Owns the check of what a client may name on this host: paths only below the
roots that the edge's owner allows.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from rorqual.sandbox._async.sandbox import _OF_THE_EDGE, AsyncSandbox
from rorqual.sandbox._remote_codec import encode
from rorqual.sandbox._remote_methods import Method, methods
from rorqual.sandbox.edge.edge import Edge
from rorqual.sandbox.errors import InvalidRequest, Unsupported

INSIDE = frozenset(
    {"python", "imports", "envs", "metadata", "workdir", "require", "network", "cloud_init", "console"}
)
"""Arguments of `create` whose strings are not paths of this host."""
SECRET = frozenset({"envs", "secrets", "stdin", "cloud_init", "console"})
"""Arguments whose values no error text repeats."""


def request_model(
    title: str, function: Any, *, leave_out: Sequence[str] = (), optional: Mapping[str, Any] | None = None
) -> type[BaseModel]:
    """A model with the keyword arguments of a method: their types, their defaults. optional: more fields."""
    hints = typing.get_type_hints(function)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", "cls") or name in leave_out or name.startswith("_"):
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (hints[name], default)
    for name, (hint, default) in (optional or {}).items():
        fields[name] = (hint, default)
    config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, ser_json_bytes="base64", val_json_bytes="base64"
    )
    model: type[BaseModel] = create_model(title, __config__=config, **fields)
    return model


@functools.cache
def create_model_of_sandbox() -> type[BaseModel]:
    """The arguments of `create` that cross to an edge."""
    return request_model("Create", AsyncSandbox.create, leave_out=(*_OF_THE_EDGE, "trajectory"))


@functools.cache
def create_model_of_function() -> type[BaseModel]:
    """The arguments of `function` that cross to an edge."""
    return request_model("Function", AsyncSandbox.function, leave_out=(*_OF_THE_EDGE, "trajectory"))


@functools.cache
def model_of(path: str, *leave_out: str) -> type[BaseModel]:
    """The arguments of one call."""
    title = "".join(word.capitalize() for word in path.replace(".", "_").split("_"))
    return request_model(title, methods()[path].function, leave_out=leave_out)


def arguments(model: type[BaseModel], document: Any) -> dict[str, Any]:
    """The checked arguments of a JSON object, without any conversion of types. Raises InvalidRequest."""
    try:
        checked = model.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        raise InvalidRequest(in_words(error)) from error
    return {name: getattr(checked, name) for name in model.model_fields}


def in_words(error: ValidationError) -> str:
    """The first finding as one line."""
    found = error.errors()[0]
    where = str(found["loc"][0]) if found["loc"] else "the arguments"
    if found["type"] == "extra_forbidden":
        return f"{where}: this edge knows no such argument"
    if where in SECRET:
        return f"{where}: {found['msg']}"
    return f"{where}: {found['msg']} (got {found['input']!r:.80})"


def create_arguments(given: Mapping[str, Any], *, roots: Sequence[str]) -> dict[str, Any]:
    """All arguments of `create`, when none names a host path outside of `roots`. Raises InvalidRequest."""
    for name, value in given.items():
        if name not in INSIDE:
            for path in _host_paths(name, value):
                _check_path(name, path, roots)
    return {**given, "trajectory": None}


def _host_paths(name: str, value: Any) -> list[str]:
    if name == "mounts":
        if isinstance(value, Mapping):
            return [str(source) for source in value]
        sources = [item.get("source") if isinstance(item, Mapping) else item.source for item in value or ()]
        return [str(source) for source in sources if source]  # one without is refused by its own words
    if name == "secrets":
        return [
            str(one["ca"]) for one in (value or {}).values() if isinstance(one, Mapping) and one.get("ca")
        ]
    if isinstance(value, os.PathLike):
        return [os.fspath(value)]
    if isinstance(value, str):
        return [value] if value.startswith(("/", ".", "~")) else []
    if isinstance(value, Mapping):
        return [path for item in value.values() for path in _host_paths(name, item)]
    if isinstance(value, list | tuple):
        return [path for item in value for path in _host_paths(name, item)]
    return []


def _check_path(name: str, path: str, roots: Sequence[str]) -> None:
    real = os.path.realpath(path)
    for root in roots:
        if os.path.commonpath([real, os.path.realpath(root)]) == os.path.realpath(root):
            return
    allowed = (
        f"only below {', '.join(roots)}" if roots else "none (rorqual edge --mount-root DIR allows some)"
    )
    what = f"{name}: source" if name == "mounts" else f"{name}:"
    raise InvalidRequest(f"{what} {path!r} is a path of the edge's host, and clients may name {allowed}")


async def call(
    edge: Edge, sandbox_id: str, path: str, given: Any, *, hold: AsyncSandbox | None = None
) -> Any:
    """One plain call, as its JSON document. hold: the caller's own hold on the sandbox, if it has one.

    Raises Unsupported for a call that is not plain or not known, InvalidRequest, and what the call raises.
    """
    method = methods().get(path)
    if method is None or not method.crosses:
        raise Unsupported(
            f"the call {path!r} through this edge",
            reason="it is not one of its plain calls",
            available=[name for name, one in methods().items() if one.crosses],
        )
    checked = arguments(model_of(path), given)
    try:
        return encode(await _do(edge, sandbox_id, method, checked, hold=hold))
    except OverflowError as error:  # a number that JSON can hold and no file offset or row can
        raise InvalidRequest(f"{path}: {error}") from error


async def _do(
    edge: Edge, sandbox_id: str, method: Method, checked: Mapping[str, Any], *, hold: AsyncSandbox | None
) -> Any:
    if method.path == "trajectory.list":  # readable after the end
        return await edge.trajectory(sandbox_id).list(**checked)
    target: Any = hold or await edge.held(sandbox_id)
    noun, _, name = method.path.rpartition(".")
    return await getattr(getattr(target, noun) if noun else target, name)(**checked)
