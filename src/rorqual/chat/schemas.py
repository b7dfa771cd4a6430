"""What the offered tools' schemas say about names, properties and types; all the parser needs of JSON
Schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ChatError
from .messages import refuse_constant

_JSON_TYPES = {"string", "number", "integer", "boolean", "array", "object", "null"}


class ToolSchemas:
    """The offered tools. Names are known even for a tool without a schema."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tools: dict[str, Mapping[str, Any]] = {}
        for n, tool in enumerate(tools):
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise ChatError(f'tools[{n}]: a tool is {{"type": "function", "function": {{"name": ...}}}}')
            self._tools[function["name"]] = function

    def __contains__(self, name: str) -> bool:
        return name in self._tools

    def __len__(self) -> int:
        return len(self._tools)

    def properties(self, name: str) -> Mapping[str, Any] | None:
        """Properties of a tool, None if its schema is unknown."""
        parameters = self._tools.get(name, {}).get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        return properties if isinstance(properties, Mapping) else None

    def types(self, name: str, key: str) -> frozenset[str]:
        """JSON types that the schema of a property names; empty if it says nothing."""
        schema = (self.properties(name) or {}).get(key)
        if not isinstance(schema, Mapping):
            return frozenset()
        named = schema.get("type")
        types = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        return frozenset(t for t in types if t in _JSON_TYPES)


def json_type(text: str) -> str | None:
    """JSON type of a text, None if it is not JSON. Linear, whatever the size of its numbers."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "array"
    if isinstance(value, bool):
        return "boolean"
    if value is None:
        return "null"
    return "number" if value is _NUMBER else "string"


_NUMBER = object()


def _number(text: str) -> object:
    return _NUMBER


_DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_int=_number, parse_float=_number)

_ENCODER = json.JSONEncoder(ensure_ascii=False)
_SURROGATE = re.compile("[\ud800-\udfff]")


def json_escape(text: str) -> str:
    """Text as the inside of a JSON string, character by character, so that pieces concatenate (spec 4.2)."""
    escaped = _ENCODER.encode(text)[1:-1]
    return escaped if text.isascii() else _SURROGATE.sub(lambda m: f"\\u{ord(m[0]):04x}", escaped)


def json_string(text: str) -> str:
    """Text as a JSON string."""
    return f'"{json_escape(text)}"'
