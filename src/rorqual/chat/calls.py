"""Calls being read: their arguments as JSON text that only grows, value by value (spec/encoding.md 4.2, 4.4).

Owns what becomes of a key and a value; where they begin and end is machine.py's business. String
values stream, JSON values come whole, and a call that may turn out to be a wrapper
(`wrapped_arguments`) waits for its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .events import Event
from .marks import TokenMarks
from .schemas import ToolSchemas, json_escape, json_string, json_type

if TYPE_CHECKING:
    from .machine import ParserOptions

_WRAPPERS = frozenset({"arguments", "input"})


class CallWriter:
    """Writes one call after the other. Muted when calls are forbidden: then only a diagnostic goes out."""

    def __init__(
        self,
        schemas: ToolSchemas | None,
        options: ParserOptions,
        marks: TokenMarks,
        emit: Callable[[Event], None],
        new_id: Callable[[], str],
    ) -> None:
        self._schemas = schemas
        self._coerce = options.coerce_by_schema
        self._muted = options.tool_choice == "none"
        self._marks = marks
        self._sink = emit
        self._new_id = new_id
        self.index = -1
        self._name = ""
        self._keys: list[str] = []
        self._parts: list[str] = []
        self._mode = ""  # of the value being read: stream, string, json, guess, skip
        self._lead = ""  # separator and key of a value that goes out whole
        self._wrapper: list[str] | None = None  # argument text held back
        self._wrapped: str | None = None  # the object inside a wrapper
        self._has_body = False

    # --- the call

    def start(self, name: str) -> None:
        """A call begins: its header and the opening brace go out."""
        self._name, self._keys, self._wrapper, self._wrapped = name, [], None, None
        self._has_body, self._parts = False, []
        if self._muted:
            self._sink(Event("diagnostic", "unexpected_call", None, detail=f"call of {name!r} was dropped"))
            return
        self.index += 1
        self._sink(Event("call_start", "", self.index, name, self._new_id()))
        self._sink(Event("args", "{", self.index))
        if self._schemas is not None and name not in self._schemas:
            self._diagnose("unknown_tool", f"{name!r} is not an offered tool")

    def end(self) -> None:
        """The call is complete."""
        if self._wrapper is not None:
            held, self._wrapper = self._wrapper, None
            if len(self._keys) == 1 and self._wrapped is not None:
                self._diagnose("wrapped_arguments", f"the object inside {self._keys[0]!r} was taken")
                self._args(self._wrapped[1:])
                self._has_body = True
            else:
                self._args("".join(held))
        if not self._has_body:
            self._args("}")
        self._emit(Event("call_end", "", self.index))

    def implicit_end(self) -> None:
        """The call was not closed but what follows shows that it is complete."""
        self._diagnose("missing_invoke_close", "a call was not closed")
        self.end()

    def malformed(self, why: str) -> None:
        """The call cannot be read: it must not be executed."""
        self._emit(Event("call_malformed", "", self.index))
        self._diagnose("malformed_call", f"{self._name}: {why}")

    def truncate(self) -> None:
        """The completion ended inside the call: its arguments stay unfinished."""
        self._emit(Event("call_truncated", "", self.index))
        self._diagnose("truncated_call", f"{self._name}: the completion ended inside the call")

    # --- a parameter

    @property
    def is_fresh(self) -> bool:
        """Whether the call has no parameter yet."""
        return not self._keys

    @property
    def has_properties(self) -> bool:
        """Whether the tool's properties are known."""
        return self._properties is not None

    def awaits(self, key: str) -> bool:
        """Whether `key` is a property of the tool that was not given yet."""
        return key in (self._properties or ()) and key not in self._keys

    def value_start(self, key: str, flag: str) -> None:
        """A value begins. flag: true (raw string), false (JSON), empty (missing or bad: decided by
        schema)."""
        self._parts = []
        if key in self._keys:
            self._diagnose("duplicate_parameter", f"{key!r} was given before: the first value stays")
            self._mode = "skip"
            return
        types = self._schemas.types(self._name, key) if self._schemas is not None else frozenset()
        if not flag:
            self._diagnose("bad_string_flag", f"{key!r} has no valid string attribute")
            self._mode = "stream" if types == {"string"} else "guess"
        elif flag == "true":
            self._mode = "coerce" if self._coerce and types and "string" not in types else "stream"
        else:
            self._mode = "json"
        if not self._keys and key in _WRAPPERS and self.has_properties and not self.awaits(key):
            self._wrapper = []
            self._mode = "string" if self._mode == "stream" else self._mode
        self._lead = (", " if self._keys else "") + json_string(key) + ": "
        self._keys.append(key)
        if self._mode == "stream":
            self._args(self._lead + '"')

    def value(self, marked: str) -> None:
        """The next piece of a value: every character is data."""
        if not marked or self._mode == "skip":
            return
        text = self._marks.unmark(marked)
        if self._mode == "stream":
            self._args(json_escape(text))
        else:
            self._parts.append(text)

    def value_end(self) -> None:
        """The value is complete."""
        if self._mode == "skip":
            return
        if self._mode == "stream":
            self._args('"')
            return
        raw = "".join(self._parts)
        self._parts = []
        text = raw.strip()
        kind = None if self._mode == "string" else json_type(text)
        if self._mode in ("guess", "coerce") and not self._fits(kind):
            kind = None
        if self._mode == "json" and kind is None:
            self._diagnose("invalid_json", f"the value of {self._keys[-1]!r} is not JSON: taken as a string")
        if self._wrapper is not None and len(self._keys) == 1 and json_type(text) == "object":
            self._wrapped = text
        self._args(self._lead + (text if kind is not None else json_string(raw)))

    def _fits(self, kind: str | None) -> bool:
        if kind is None:
            return False
        types = self._schemas.types(self._name, self._keys[-1]) if self._schemas is not None else frozenset()
        return not types or kind in types or (kind == "number" and "integer" in types)

    # --- a body that is JSON

    def body(self, marked: str) -> None:
        """The next piece of a JSON body."""
        self._parts.append(self._marks.unmark(marked))

    def body_end(self) -> bool:
        """The body is complete; False if it is not a JSON object."""
        text = "".join(self._parts).strip()
        self._parts = []
        if json_type(text) != "object":
            return False
        self._diagnose("json_body", "the call's body is a JSON object instead of parameters")
        self._args(text[1:])
        self._has_body = True
        return True

    # --- emitting

    def _args(self, text: str) -> None:
        if not text:
            return
        if self._wrapper is not None:
            self._wrapper.append(text)
        else:
            self._emit(Event("args", text, self.index))

    def _emit(self, event: Event) -> None:
        if not self._muted:
            self._sink(event)

    def _diagnose(self, kind: str, detail: str) -> None:
        self._emit(Event("diagnostic", kind, self.index, detail=detail))

    @property
    def _properties(self) -> Mapping[str, Any] | None:
        return self._schemas.properties(self._name) if self._schemas is not None else None
