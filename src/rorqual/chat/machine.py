"""The state machine of spec/encoding.md 4.3 over marked text (marks.py): prose, calls, values.

States: R reasoning, C content, M and N a mention of markup being removed, B in the block, I in a
    call, V value of a parameter, K a body that is JSON, A after the block, Z done. (H of the spec is
    one bounded header here.) A handler looks at the buffer from `pos`, emits, moves on and says
    whether to go on; what it cannot decide stays in the buffer, which is bounded: 64 characters of
    white space, 512 of a header, a tag. JSON values are kept in pieces, so work per character is
    constant however the stream is cut. Owns the decisions of the table in 4.4; spelling is in
    dialect.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .calls import CallWriter
from .dialect import (
    BLOCK_NAMES,
    MARKED,
    MAX_HEADER,
    MORE,
    NO,
    TAG_WORDS,
    UNMARKED,
    V4,
    Dialect,
    after_space,
    first_literal,
    invoke_name,
    literal,
    parameter_header,
    visible,
)
from .events import Event, EventKind
from .marks import ANY_MARK, MARK_DSML, MARK_EOS, MARK_THINK, MARK_THINK_END, TokenMarks
from .schemas import ToolSchemas

_PROSE_STOP = re.compile(f"[{ANY_MARK}]")
_TAG_STOP = re.compile(f"[<{MARK_EOS}]")
_LEADS = ("<｜", "</", "<")
_ATTRIBUTE_STOP = re.compile(f"[>\r\n<{ANY_MARK}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParserOptions:
    """Choices of spec/encoding.md 4.2 to 4.4 that a caller may make."""

    tool_choice: Literal["auto", "none"] = "auto"
    """none: calls that appear all the same are dropped and reported."""
    coerce_by_schema: bool = False
    """Read a string argument as JSON where the schema excludes strings and the text is JSON of that type."""
    markup_in_text: Literal["auto", "escape", "drop"] = "auto"
    """Markup that is no call: written with ASCII bars, or removed. auto: removed if tools were offered."""


class Machine:
    """Feeds on marked text, emits events. `finish` once at the end."""

    def __init__(
        self,
        *,
        reasoning: bool,
        schemas: ToolSchemas | None,
        options: ParserOptions,
        marks: TokenMarks,
        trusted: bool,
        emit: Callable[[Event], None],
        new_id: Callable[[], str],
    ) -> None:
        self._emit = emit
        self._schemas = schemas
        self._marks = marks
        self._trusted = trusted
        self._offered = bool(schemas)
        self._escape = options.markup_in_text == "escape" or (
            options.markup_in_text == "auto" and not self._offered
        )
        # Unmarked aliases are for transports that lost the marker: with trusted tokens, spelled
        # markup is data.
        self._aliases = self._offered and not trusted
        self._calls = CallWriter(schemas, options, marks, emit, new_id)
        self._dialect, self._exact = V4, True
        self._buf, self._pos = "", 0
        self._next_mark = -1
        """Where the next mark is in the buffer; its length: nowhere. Before `_pos`: not known."""
        self._state = "R" if reasoning else "C"
        self._channel: EventKind = "reasoning" if reasoning else "content"
        self._last = ""  # last character emitted in this channel
        self._mention_left = 0
        self._reported = False  # prose of this gap was reported
        self._blocks = 0
        self.saw_eos = False
        self.cut = False
        self.unclosed_reasoning = False
        self._handlers: dict[str, Callable[[], bool]] = {
            "R": self._prose,
            "C": self._prose,
            "M": self._mention_word,
            "N": self._mention_rest,
            "B": self._block,
            "I": self._call,
            "V": self._value,
            "K": self._json_body,
            "A": self._after,
            "Z": self._done,
        }

    def feed(self, marked: str) -> None:
        """Takes the next piece."""
        self._buf = self._buf[self._pos :] + marked if self._pos < len(self._buf) else marked
        self._pos, self._next_mark = 0, -1
        while self._pos < len(self._buf) and self._handlers[self._state]():
            pass

    def finish(self, tail: str = "") -> None:
        """The stream is over: decides what was held back (spec 4.3, "At the end of the stream").

        tail: text that began to spell a marker: text in prose, dropped elsewhere.
        """
        rest = self._buf[self._pos :]
        self._buf, self._pos = "", 0
        if self._state in "RC":
            self.unclosed_reasoning = self._state == "R"
            if MARK_DSML in rest:
                self.diagnose("cut_start_tag", "the completion ends inside a start tag")
                self.cut = True
            else:
                self._text(rest + tail)
            self.cut = self.cut or self._state == "R"
        elif self._state == "V" and rest.startswith(self._dialect.close_parameter):
            self._calls.value_end()
        if self._state in "VIK":
            self.saw_eos = self.saw_eos or rest.endswith(MARK_EOS)
            self._truncate()
        elif self._state == "B":
            self.cut = True

    # --- emitting

    def diagnose(self, kind: str, detail: str, *, index: int | None = None) -> None:
        """Reports a repair."""
        self._emit(Event("diagnostic", kind, index, detail=detail))

    def _text(self, text: str) -> None:
        if text:
            self._emit(Event(self._channel, text))
            self._last = text[-1]

    def _gap(self) -> None:
        """Stands for a removed marker, so that what surrounds it cannot join to one (no-leak rule)."""
        if self._last:
            self._text(" ")

    def _end_reasoning(self) -> None:
        self._emit(Event("reasoning_end"))
        self._state, self._channel, self._last = "C", "content", ""

    def _eos(self, at: int, kind: str = "", detail: str = "") -> bool:
        if kind:
            self.diagnose(kind, detail)
        self.saw_eos = True
        self._state, self._pos = "Z", at + 1
        return True

    def _truncate(self) -> None:
        self._calls.truncate()
        self.cut = True
        self._state = "Z"

    # --- R, C

    def _prose(self) -> bool:
        buf, i = self._buf, self._pos
        if self._aliases and buf[i] == "<" and self._last in ("", "\n"):
            at = i
        else:
            if self._next_mark < i:  # looked for once, however many lines begin with `<` before it
                match = _PROSE_STOP.search(buf, i)
                self._next_mark = match.start() if match else len(buf)
            at = self._next_mark
            if self._aliases and (line := buf.find("\n<", max(i - 1, 0), at)) >= 0:
                at = line + 1
            elif at == len(buf):
                return self._prose_to(len(buf) - self._separator(buf, i, len(buf)))
        mark = buf[at]
        if mark == "<":  # at a line start: a tag without marker, or the lead of one with it
            lead = buf[at : at + 2] if buf.startswith(("<｜", "</"), at) else "<"
            if len(buf) == at + len(lead):
                return self._prose_to(len(buf) - self._separator(buf, i, len(buf)))
            marked = buf[at + len(lead)] == MARK_DSML
            return self._tag(at, at + len(lead) if marked else at)
        if mark == MARK_DSML:
            lead = next((s for s in _LEADS if buf.startswith(s, at - len(s)) and at - len(s) >= i), "")
            return self._tag(at - len(lead), at)
        self._text(buf[i:at])
        self._pos = at + 1
        if mark == MARK_EOS:
            if self._state == "R":
                self.unclosed_reasoning = True
                self.diagnose("unclosed_reasoning", "the completion ended before </think>")
            return self._eos(at)
        if mark == MARK_THINK_END and self._state == "R":
            self._end_reasoning()
        elif mark == MARK_THINK and not self._last:
            self.diagnose("echoed_think", "<think> at the start of the completion was swallowed")
        else:
            self.diagnose("stray_special", f"{self._marks.unmark(mark)} was removed from {self._channel}")
            self._gap()
        return True

    def _prose_to(self, cut: int) -> bool:
        self._text(self._buf[self._pos : cut])
        self._pos = cut
        return False

    def _separator(self, buf: str, i: int, end: int) -> int:
        """Length of what may belong to a following block: up to two newlines and the lead of a tag."""
        at = end
        for lead in _LEADS:
            if buf.startswith(lead, at - len(lead), end) and at - len(lead) >= i:
                at -= len(lead)
                break
        n = 0
        while n < 2 and at - 1 >= i and buf[at - 1] == "\n":
            at, n = at - 1, n + 1
        return end - at

    def _tag(self, start: int, at: int) -> bool:
        """A tag may start at `start` (its marker, if it has one, is at `at`): call, mention or wait."""
        buf, i = self._buf, self._pos
        newlines = 0
        while newlines < 2 and start - newlines - 1 >= i and buf[start - newlines - 1] == "\n":
            newlines += 1
        verdict, orphan = self._opening(start) if buf[start] == "<" else (NO, False)
        if verdict == MORE:
            return self._prose_to(start - newlines)
        if verdict >= 0:
            self._text(buf[i : start - newlines])
            self._open_block(newlines, orphan)
            self._pos = verdict
            return True
        if buf[at] == "<":  # an unmarked alias that is none
            self._text(buf[i : at + 1])
            self._pos = at + 1
            return True
        self._text(buf[i:start])
        self.diagnose("markup_in_text", f"markup that is no call was found in {self._channel}")
        self._pos = at + 1
        if self._escape:
            self._text(buf[start:at] + "|DSML|")
            return True
        self._gap()
        if start < at:
            self._mention_left, self._state = MAX_HEADER, "M"
        return True

    def _open_block(self, newlines: int, orphan: bool) -> None:
        if self._state == "R":
            self.diagnose("call_in_reasoning", "a call stands before </think>")
            self._end_reasoning()
        if orphan:
            self.diagnose("orphan_invoke", "a call stands outside a block")
        elif newlines != 2:
            self.diagnose("separator", f"{newlines} newlines before the block instead of 2")
        if not self._exact:
            self.diagnose("alias_markup", "the block's tags are misspelled")
        self._state, self._reported = "B", False
        self._blocks += 1

    def _opening(self, p: int) -> tuple[int, bool]:
        """(position from which state B reads, whether the block start is missing), or NO or MORE."""
        buf, best = self._buf, NO
        in_reasoning = self._state == "R"
        before = buf[p - 1] if p > self._pos else self._last
        alias_here = self._offered and before in ("", "\n")
        for dialect in (*MARKED, *UNMARKED) if self._aliases else MARKED:
            if dialect is not V4 and not alias_here:
                continue
            q = literal(buf, p, "<" + dialect.marker + dialect.space)
            if q < 0:
                best = min(best, q)
                continue
            for name in BLOCK_NAMES:
                exact = dialect is V4 and name == "tool_calls"
                if not exact and not alias_here:
                    continue
                r = literal(buf, q, name + ">")
                verdict = r if r < 0 else self._confirms(r, dialect, in_reasoning or not exact)
                if verdict >= 0:
                    self._dialect, self._exact = dialect, exact
                    return r, False
                best = min(best, verdict)
            if self._offered and dialect.is_marked:
                r = literal(buf, q, 'invoke name="')
                end, name = invoke_name(buf, r) if r >= 0 else (r, "")
                if end >= 0 and self._known(name):
                    self._dialect, self._exact = dialect, dialect is V4
                    return p, True
                best = min(best, MORE if end == MORE else NO)
        return best, False

    def _confirms(self, r: int, dialect: Dialect, named: bool) -> int:
        """Whether what follows a block start makes it a block; named: only a complete call of a known
        tool does."""
        buf = self._buf
        q = after_space(buf, r)
        if q < 0:
            return q
        invoke = literal(buf, q, dialect.open_invoke)
        if named:
            end, name = invoke_name(buf, invoke) if invoke >= 0 else (invoke, "")
            return end if end < 0 or self._known(name) else NO
        _, close = first_literal(buf, q, dialect.close_blocks)
        return max(invoke, close) if max(invoke, close) >= 0 else min(invoke, close)

    def _known(self, name: str) -> bool:
        return self._schemas is None or name in self._schemas

    # --- M, N: removing a mention

    def _mention_word(self) -> bool:
        start = self._pos + 1 if self._buf[self._pos] == " " else self._pos
        self._state = "C" if self._channel == "content" else "R"
        for word in TAG_WORDS:
            end = literal(self._buf, start, word)
            if end == MORE:
                self._state = "M"
                return False
            if end >= 0:
                self._pos, self._state = end, "N"
                break
        return True

    def _mention_rest(self) -> bool:
        match = _ATTRIBUTE_STOP.search(self._buf, self._pos, self._pos + self._mention_left)
        if match is None and len(self._buf) - self._pos < self._mention_left:
            self._mention_left -= len(self._buf) - self._pos
            self._pos = len(self._buf)
            return False
        self._state = "C" if self._channel == "content" else "R"
        if match is None:
            self._pos += self._mention_left
        else:
            self._pos = match.end() if match[0] == ">" else match.start()
        return True

    # --- B, A: between and after calls

    def _skip_to_tag(self, kind: str, detail: str) -> int:
        """Position of the next tag or EOS, -1 if there is none; text before it is dropped and reported
        once."""
        match = _TAG_STOP.search(self._buf, self._pos)
        at = match.start() if match else len(self._buf)
        if not self._reported and visible(self._buf, self._pos) < at:
            self.diagnose(kind, detail)
            self._reported = True
        self._pos = at
        return at if match else -1

    def _block(self) -> bool:
        at = self._skip_to_tag("prose_in_block", "text between calls was dropped")
        if at < 0:
            return False
        if self._buf[at] == MARK_EOS:
            return self._eos(at, "missing_block_close", "the block of calls was not closed")
        return self._step_tag(at, in_call=False)

    def _step_tag(self, at: int, *, in_call: bool) -> bool:
        """A tag that ends or begins a call. in_call: an open call is closed by it."""
        buf, d = self._buf, self._dialect
        which, end = first_literal(buf, at, d.steps)
        if end == MORE:
            return False
        if end == NO:
            if in_call:
                return self._malformed("text instead of a parameter or a closing tag")
            if not self._reported:
                self.diagnose("prose_in_block", "text between calls was dropped")
                self._reported = True
            self._pos = at + 1
            return True
        if which == 0:
            header, name = invoke_name(buf, end)
            if header == MORE:
                return False
            if in_call:
                self._calls.implicit_end()
            self._state, self._reported = "B", False
            if header == NO:
                self.diagnose("bad_invoke_header", "a tool name runs over a line break, is empty or too long")
                self._reported = True
                self._pos = end
            else:
                self._calls.start(name)
                self._state, self._pos = "I", header
            return True
        self._pos = end
        if which == 1:
            if in_call:
                self._calls.end()
            self._state, self._reported = "B", False
            return True
        if in_call:
            self._calls.implicit_end()
        self._emit(Event("block_end"))
        self._state, self._reported = "A", False
        return True

    def _after(self) -> bool:
        at = self._skip_to_tag("text_after_calls", "text after the block was dropped")
        if at < 0:
            return False
        if self._buf[at] == MARK_EOS:
            return self._eos(at)
        end = literal(self._buf, at, f"<{self._dialect.marker}{self._dialect.space}tool_calls>")
        if end == MORE:
            return False
        if end >= 0:
            self.diagnose("second_block", "a second block of calls")
            self._state, self._pos, self._reported = "B", end, False
            return True
        if not self._reported:
            self.diagnose("text_after_calls", "text after the block was dropped")
            self._reported = True
        self._pos = at + 1
        return True

    def _done(self) -> bool:
        self._pos = len(self._buf)
        return False

    # --- I, V, K: in a call

    def _malformed(self, why: str) -> bool:
        self._calls.malformed(why)
        self._state, self._reported = "B", True
        return True

    def _call(self) -> bool:
        buf, d = self._buf, self._dialect
        at = self._pos = visible(buf, self._pos)
        if at == len(buf):
            return False
        if buf[at] == MARK_EOS:
            self._truncate()
            return self._eos(at)
        if buf[at] == "{" and self._calls.is_fresh:
            self._state = "K"
            return True
        if buf[at] != "<":
            return self._malformed("text instead of a parameter or a closing tag")
        if exact := d.exact_parameter.match(buf, at):
            self._calls.value_start(exact[1], exact[2])
            self._state, self._pos = "V", exact.end()
            return True
        start = literal(buf, at, d.open_parameter)
        if start == NO:
            return self._step_tag(at, in_call=True)
        if start == MORE:
            return False
        end, key, flag = parameter_header(buf, start)
        if end == MORE:
            return False
        if end == NO:
            self._pos = start
            return self._malformed("a parameter's header is damaged or too long")
        self._calls.value_start(key, flag)
        self._state, self._pos = "V", end
        return True

    def _value(self) -> bool:
        buf, d, i = self._buf, self._dialect, self._pos
        match = d.value_stop.search(buf, i)
        if match is None:
            held = d.value_stop_begun.at_end(buf, i)
            self._calls.value(buf[i : len(buf) - held])
            self._pos = len(buf) - held
            return False
        at, end = match.span()
        self._calls.value(buf[i:at])
        self._pos = at
        verdict, diagnostic = self._closes(match[0], at, end)
        if verdict == MORE:
            return False
        if verdict == NO:  # data: a newline that only looks like the gap before a tag is data alone
            self._calls.value(buf[at] if buf[at] == "\n" else buf[at:end])
            self._pos = at + 1 if buf[at] == "\n" else end
        elif match[0] == MARK_EOS:
            self._truncate()
            return self._eos(at)
        else:
            if diagnostic:
                self.diagnose(diagnostic, "a parameter was not closed", index=self._calls.index)
            self._calls.value_end()
            self._state, self._pos = "I", verdict
        return True

    def _closes(self, stop: str, at: int, end: int) -> tuple[int, str]:
        """(position where state I reads on, diagnostic) if the value ends here; else NO or MORE (spec
        4.2, 4.4)."""
        buf, d = self._buf, self._dialect
        if stop == MARK_EOS:  # from text, EOS inside a value is an end only if nothing follows
            return (end, "") if self._trusted else (MORE if end == len(buf) else NO, "")
        if stop == d.close_parameter:
            q = after_space(buf, end)
            if q < 0:
                return q, ""
            if buf[q] == MARK_EOS:
                return end, ""
            which, verdict = first_literal(buf, q, d.after_value)
            return (end if which >= 0 else verdict), ""
        if stop == d.value_stops[1]:
            if not self._calls.has_properties:
                return NO, ""
            verdict, key, _ = parameter_header(buf, end)
            if verdict < 0:
                return verdict, ""
            return (at + 1 if self._calls.awaits(key) else NO), "missing_parameter_close"
        q = after_space(buf, end)
        if q < 0:
            return q, ""
        which, verdict = first_literal(buf, q, (d.open_invoke, *d.close_blocks))
        return (at + 1 if which >= 0 else verdict), "missing_parameter_close"

    def _json_body(self) -> bool:
        buf, d = self._buf, self._dialect
        match = _TAG_STOP.search(buf, self._pos)
        at = match.start() if match else len(buf)
        self._calls.body(buf[self._pos : at])
        self._pos = at
        if match is None:
            return False
        if buf[at] == MARK_EOS:
            self._truncate()
            return self._eos(at)
        which, _ = first_literal(buf, at, d.steps)
        if which == MORE:
            return False
        if which == NO:
            self._calls.body("<")
            self._pos = at + 1
        elif self._calls.body_end():
            self._state = "I"  # which reads the same tag
        else:
            return self._malformed("the body is neither parameters nor a JSON object")
        return True
