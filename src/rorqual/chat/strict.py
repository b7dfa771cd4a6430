"""The official parser's behaviour, from its description in spec/encoding.md 4.1: any deviation is an error.

For conformance checks and for callers that prefer an error to a repair. Whole texts only.
"""

from __future__ import annotations

from collections.abc import Callable

from .errors import ParseError
from .messages import Message, ToolCall
from .profile import BOS, DSML, EOS, THINK, THINK_END
from .schemas import json_string

_BLOCK_START = f"\n\n<{DSML}tool_calls"
_BLOCK_END = f"</{DSML}tool_calls>"
_INVOKE = f"<{DSML}invoke"
_INVOKE_END = f"</{DSML}invoke>"
_PARAMETER = f"<{DSML}parameter"
_PARAMETER_END = f"/{DSML}parameter"
_SPECIALS = (BOS, EOS, THINK, THINK_END, DSML)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, what: str) -> ParseError:
        return ParseError(what, offset=self.at)

    def until(self, *stops: str) -> tuple[str, str]:
        """(text before the nearest stop, that stop), past it; stop is empty if none comes."""
        found = [(p, s) for s in stops if (p := self.text.find(s, self.at)) >= 0]
        end, stop = min(found, default=(len(self.text), ""))
        before = self.text[self.at : end]
        self.at = end + len(stop)
        return before, stop

    def expect(self, word: str) -> None:
        if not self.text.startswith(word, self.at):
            raise self.fail(f"{word!r} expected, found {self.text[self.at : self.at + 20]!r}")
        self.at += len(word)


def parse_strict(text: str, *, thinking: bool, call_ids: Callable[[], str]) -> Message:
    """The message, or ParseError with the offset of the first thing the official grammar does not allow."""
    reader = _Reader(text)
    reasoning = ""
    if thinking:
        reasoning, stop = reader.until(THINK_END, _BLOCK_START)
        if stop != THINK_END:
            raise reader.fail("no </think> after the reasoning")
    content, stop = reader.until(EOS, _BLOCK_START)
    if not stop:
        raise reader.fail("no end of sentence after the content")
    calls: list[ToolCall] = []
    if stop == _BLOCK_START:
        calls = _block(reader, call_ids)
        if reader.at < len(text):
            reader.expect(EOS)
    if reader.at < len(text):
        raise reader.fail("text after the end of sentence")
    for name, value in (("reasoning", reasoning), ("content", content)):
        if any(s in value for s in _SPECIALS):
            raise ParseError(f"a special token inside the {name}", offset=0)
    return Message(
        role="assistant",
        content=content,
        reasoning_content=reasoning,
        tool_calls=calls,
        finish_reason="tool_calls" if calls else "stop",
        raw=text,
    )


def _block(reader: _Reader, call_ids: Callable[[], str]) -> list[ToolCall]:
    calls: list[ToolCall] = []
    reader.expect(">\n")
    while True:
        if reader.text.startswith(_BLOCK_END, reader.at):
            reader.at += len(_BLOCK_END)
            return calls
        reader.expect(_INVOKE)
        calls.append(_call(reader, call_ids))


def _call(reader: _Reader, call_ids: Callable[[], str]) -> ToolCall:
    reader.expect(' name="')
    name, stop = reader.until('">\n')
    if not stop or "\n" in name:
        raise reader.fail("a call without a proper name")
    pairs: dict[str, str] = {}
    if reader.text.startswith("\n" + _INVOKE_END, reader.at):
        reader.at += 1
    while reader.text.startswith(_PARAMETER, reader.at):
        reader.at += len(_PARAMETER)
        reader.expect(' name="')
        key, stop = reader.until('" string="')
        flag, end = reader.until('">')
        if not stop or not end or flag not in ("true", "false"):
            raise reader.fail("a parameter's header is damaged")
        value, end = reader.until(_PARAMETER_END)
        if not end or not value.endswith("<"):
            raise reader.fail("a parameter is not closed")
        if key in pairs:
            raise reader.fail(f"parameter {key!r} was given before")
        pairs[key] = json_string(value[:-1]) if flag == "true" else value[:-1]
        reader.expect(">\n")
    reader.expect(_INVOKE_END)
    reader.expect("\n")
    arguments = "{" + ", ".join(f"{json_string(k)}: {v}" for k, v in pairs.items()) + "}"
    return ToolCall(name=name, arguments=arguments, id=call_ids())
