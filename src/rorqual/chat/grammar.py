"""Grammars: what a model may write once a call has opened, as text for a grammar engine (llguidance's Lark).

From the offered tools to one grammar: names among them, parameters among each tool's properties, none twice, the
required ones all there, string values as text and all others as JSON valid against their schema. Texts end at the
DSML token, which no text contains, so a value may spell anything. Owns the language; constraint.py runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import ChatError

MAX_FREE_ORDER = 6
"""Tools with at most so many parameters may be given them in any order; others in the order of their schema."""
MAX_COUNTED_TEXT = 4096
"""Bounds on a string's length above this are left to the tool: counting states cost memory."""
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As the format writes JSON (spec/encoding.md 3.5)."""
_ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
_MAX_REFS = 16


def calls_grammar(
    tools: Sequence[Mapping[str, Any]],
    *,
    dsml: int,
    only: str | None = None,
    parallel: bool = True,
    lead: bool = False,
    accepts: Callable[[str], bool] = lambda grammar: True,
) -> str:
    """The rest of a block of calls, behind its first `<` and DSML token, to its end.

    tools: `{"type": "function", "function": {...}}` or the function alone. dsml: id of the DSML token. only: the
    one name that may be called. parallel: more than one call. lead: with the two newlines, `<` and the token before
    it. accepts: whether the engine can take a grammar; a property whose schema it cannot is replaced by any JSON,
    unless its tool is `strict`.

    Raises:
        ChatError: no tool, or none of that name; a strict tool with a schema that cannot be followed.
    """
    writer = _Writer(dsml, accepts)
    names = []
    for tool in tools:
        function = tool.get("function", tool)
        if only is None or function.get("name") == only:
            names.append(writer.call(function))
    if not names:
        raise ChatError(f"no tool is called {only!r}" if only is not None else "no tools are offered")
    open_block = ("\n\n<", None, "tool_calls>\n") if lead else ("tool_calls>\n",)
    calls = f"({' | '.join(names)})"
    body = f"{writer.text(*open_block)} {calls}{'+' if parallel else ''} {writer.text('</', None, 'tool_calls>')}"
    return "\n".join([f"start: {body}", *writer.rules, ""])


def json_grammar(schema: Mapping[str, Any]) -> str:
    """JSON text that is valid against a schema, formatted as the format writes JSON."""
    return f"start: %json {_json_rule(schema)}\n"


def either_grammar(calls: str, answer: str) -> str:
    """A block of calls with its lead, or an answer."""
    first = re.sub(r"\Astart:", "calls_start:", calls)
    second = re.sub(r"\Astart:", "answer_start:", answer)
    return f"start: calls_start | answer_start\n{first}{second}"


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, dsml: int, accepts: Callable[[str], bool]) -> None:
        self.rules: list[str] = []
        self._mark = f"<[{dsml}]>"
        self._accepts = accepts
        self._count = 0

    def text(self, *parts: str | None) -> str:
        """Literals in a row; None is the DSML token."""
        return " ".join(self._mark if part is None else _quoted(part) for part in parts)

    def rule(self, body: str, *, kind: str = "r") -> str:
        """Adds a rule and returns its name. kind: a capital makes it one lexeme."""
        self._count += 1
        name = f"{kind}{self._count}" if kind.islower() else f"{kind}_{self._count}"
        self.rules.append(f"{name}: {body}")
        return name

    def call(self, function: Mapping[str, Any]) -> str:
        """One call of a tool."""
        name, parameters = function["name"], function.get("parameters")
        strict = function.get("strict") is True
        root = parameters if isinstance(parameters, Mapping) else {}
        properties = root.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        required = root.get("required")
        needed = {key for key in required if key in properties} if isinstance(required, list) else set()
        values = []
        for key, schema in properties.items():
            schema = schema if isinstance(schema, Mapping) else {}
            if strict and not self._accepts(f"start: {_json_form(schema, root)}\n"):
                raise ChatError(f"tool {name!r} is strict, and the schema of {key!r} cannot be followed")
            values.append((self._parameter(key, schema, root), key in needed))
        if not properties and root.get("additionalProperties", True) is not False:
            body = f"{self._any_parameter()}*"
        elif len(values) <= MAX_FREE_ORDER:
            body = self._any_order(values)
        else:
            body = " ".join(value if must else f"{value}?" for value, must in values)
        opened = self.text("<", None, f'invoke name="{name}">\n')
        return self.rule(f"{opened} {body} {self.text('</', None, 'invoke>' + chr(10))}")

    def _any_order(self, values: Sequence[tuple[str, bool]]) -> str:
        """Each at most once, the needed ones all, in any order: one rule for each set of those already given."""
        needed = sum(1 << n for n, (_, must) in enumerate(values) if must)
        if not values:
            return '""'
        first = self._count + 1
        self._count += 1 << len(values)
        for given in range(1 << len(values)):
            ways = [
                f"{value} r{first + (given | 1 << n)}"
                for n, (value, _) in enumerate(values)
                if not given >> n & 1
            ]
            if given & needed == needed:
                ways.append('""')
            self.rules.append(f"r{first + given}: {' | '.join(ways)}")
        return f"r{first}"

    def _parameter(self, key: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        types = schema_types(schema, root)
        ways = []
        if "string" in types:
            head = self.text("<", None, f'parameter name="{key}" string="true">')
            ways.append(f"{head} {self._string(schema, root)}")
        if types - {"string"}:
            head = self.text("<", None, f'parameter name="{key}" string="false">')
            ways.append(f"{head} {self._json(schema, root)} {_quoted('</')}")
        end = self.text(None, "parameter>\n")
        return self.rule(f"({' | '.join(ways)}) {end}")

    def _string(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """The text of a string and the `</` behind it, as one lexeme."""
        schema = _resolved(schema, root)
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(choices, list) and (texts := [text for text in choices if isinstance(text, str)]):
            return self.rule(f"/({'|'.join(map(_escaped, texts))})<\\//", kind="T")
        low, high = schema.get("minLength"), schema.get("maxLength")
        low = low if isinstance(low, int) and 0 <= low <= MAX_COUNTED_TEXT else 0
        bounded = isinstance(high, int) and low <= high <= MAX_COUNTED_TEXT
        count = f"{{{low},{high}}}" if bounded else f"{{{low},}}" if low else "*"
        return self.rule(f"/(?s:.{count})<\\//", kind="T")

    def _json(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        rule = _json_form(schema, root)
        if not self._accepts(f"start: {rule}\n"):
            rule = f"%json {_json_rule({})}"
        return self.rule(rule)

    def _any_parameter(self) -> str:
        head = self.text("<", None, 'parameter name="')
        name = self.rule(r'/[^"<>\r\n]{1,64}/', kind="N")
        text = self.rule(r"/(?s:.*)<\//", kind="T")
        value = self.rule(f"%json {_json_rule({})}")
        ways = f"""{_quoted('" string="true">')} {text} | {_quoted('" string="false">')} {value} {_quoted("</")}"""
        return self.rule(f"{head} {name} ({ways}) {self.text(None, 'parameter>' + chr(10))}")


def schema_types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a property's schema lets pass, as far as it says so; all where it does not."""
    schema = _resolved(schema, root)
    if "const" in schema or isinstance(schema.get("enum"), list):
        return frozenset(map(_type_of, schema.get("enum") or [schema.get("const")]))
    named = schema.get("type")
    if isinstance(named, str | list):
        types = frozenset([named] if isinstance(named, str) else named) & _ALL_TYPES
        return types or _ALL_TYPES
    for key in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(key), list) and branches:
            return frozenset().union(*(schema_types(b, root) for b in branches if isinstance(b, Mapping)))
    return _ALL_TYPES


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follows `$ref`s inside the document."""
    for _ in range(_MAX_REFS):
        target = schema.get("$ref")
        if not isinstance(target, str) or not target.startswith("#/"):
            break
        found: Any = root
        for part in target[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            break
        schema = found
    return schema


def _type_of(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case None:
            return "null"
        case str():
            return "string"
        case int() | float():
            return "number"
        case list():
            return "array"
        case _:
            return "object"


def _json_form(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """The rule of JSON that fits a property's schema, with the definitions it may refer to."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return f"%json {_json_rule({**shared, **schema})}"


def _json_rule(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _JSON_FORM}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """Text inside a pattern between slashes."""
    return re.escape(text).replace("\\\n", "\\n").replace("/", "\\/")
