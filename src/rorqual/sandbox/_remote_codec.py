"""What crosses between a client and an edge, as JSON: arguments, records and errors.

Both ends read the SDK's own annotations, so that a record or an error with a new field crosses without a change
here. Owns the forms: dataclasses as objects, bytes in base64, tuples as arrays, an error as type, message and
fields. Whatever an edge sends is data: it becomes a record, or an error of errors.py, and nothing else.
"""

from __future__ import annotations

import base64
import builtins
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rorqual.sandbox import errors
from rorqual.sandbox.errors import EdgeError, InvalidRequest, SandboxError

_PLAIN = (str, int, float, bool, type(None))
_BUILTIN_ERRORS = ("ValueError", "TypeError", "TimeoutError", "NotImplementedError")


def encode(value: Any, *, name: str = "value") -> Any:
    """A JSON document of a value. Raises InvalidRequest, naming `name`, for what no document can hold."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(getattr(value, field.name), name=f"{name}.{field.name}")
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidRequest(f"{name}: its keys must be strings")
        return {key: encode(item, name=f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [encode(item, name=name) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    raise InvalidRequest(f"{name}: {type(value).__name__} cannot be sent to an edge")


def decode(hint: Any, document: Any) -> Any:
    """The value of type `hint` that `document` encodes. Raises EdgeError when it is not one."""
    try:
        return _decode(hint, document)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise EdgeError(
            f"the edge sent something that is no {hint}: {error}. Is it of another version of rorqual?"
        ) from error


def _decode(hint: Any, document: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or origin is typing.Literal:
        return document
    if origin in (typing.Union, types.UnionType):
        if document is None and type(None) in arguments:
            return None
        return _decode(next(item for item in arguments if item is not type(None)), document)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        known = {field.name for field in dataclasses.fields(hint) if field.init}
        return hint(**{key: _decode(hints[key], item) for key, item in document.items() if key in known})
    if hint is bytes:
        return base64.b64decode(document, validate=True)
    if origin is tuple or hint is tuple:
        inner = arguments[0] if arguments else Any
        return tuple(_decode(inner, item) for item in document)
    if origin is list or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return [_decode(arguments[0], item) for item in document]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _decode(arguments[1], item) for key, item in document.items()}
    if hint is float and isinstance(document, int) and not isinstance(document, bool):
        return float(document)
    if hint in (str, int, float, bool, type(None)) and not isinstance(document, hint):
        raise TypeError(f"{document!r:.80}")
    return document


def encode_error(error: BaseException) -> dict[str, Any]:
    """An error of ours with its fields; any other only by its type and text."""
    fields = {}
    if isinstance(error, SandboxError):
        for key, value in vars(error).items():
            if not key.startswith("_"):
                fields[key] = encode(value, name=key)
    return {"type": type(error).__name__, "message": str(error), "fields": fields}


def decode_error(document: Mapping[str, Any]) -> Exception:
    """The error that was raised at the edge: the same type, text and fields."""
    name, text = str(document.get("type")), str(document.get("message"))
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, SandboxError):
        error: Exception = kind.__new__(kind)  # its constructor would make the text anew
        error.args = (text,)
        for key, value in dict(document.get("fields") or {}).items():
            if key.isidentifier() and not key.startswith("_"):
                setattr(error, key, tuple(value) if isinstance(value, list) else value)
        return error
    if name in _BUILTIN_ERRORS:
        builtin: type[Exception] = getattr(builtins, name)
        return builtin(text)
    return EdgeError(f"the edge failed: {name}: {text}")
