"""Parsing a completion: `StreamParser` for pieces of text or tokens, `parse` for a whole text.

The completion starts after the cue of the prompt: after `<think>` it begins in reasoning, after
`</think>` or a task token in content. Owns the public face and the message that the events add up to;
the states are in machine.py, the official parser's behaviour (`strict=True`) in strict.py.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import ChatError
from .events import Event
from .machine import Machine, ParserOptions
from .marks import TextMarks, TokenMarks, clean
from .messages import Diagnostic, Message, ToolCall
from .schemas import ToolSchemas
from .strict import parse_strict

_BASE62 = string.ascii_letters + string.digits


def new_call_id() -> str:
    """`call_` and 24 characters of base62, 142 random bits: the format has no ids, and ours cannot be
    guessed."""
    number, digits = int.from_bytes(secrets.token_bytes(24)), []
    for _ in range(24):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "call_" + "".join(digits)


class StreamParser:
    """Reads one completion as it comes. However it is cut, the concatenated events are the same.

    Feed it either with `push(text)`, where markers are recognised by their spelling, or with
    `push_piece(text, special=...)`, where only special tokens are markers and text that spells one is data
    (`Tokenizer.pieces` and `StreamDecoder.push_pieces` make such pieces). Then `close()`, then `message`.

    thinking_mode: as rendered: `thinking` if the prompt ends in `<think>`, else `chat`.
    tools: the offered tools; None: not known, then no name is questioned and nothing is repaired by schema.
    options: what to do where spec/encoding.md leaves a choice.
    call_ids: makes the id of each call.
    """

    def __init__(
        self,
        *,
        thinking_mode: str = "thinking",
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: ParserOptions | None = None,
        call_ids: Callable[[], str] = new_call_id,
    ) -> None:
        if thinking_mode not in ("thinking", "chat"):
            raise ChatError(f"thinking_mode {thinking_mode!r}: use 'thinking' or 'chat'")
        self._thinking = thinking_mode == "thinking"
        self._schemas = None if tools is None else ToolSchemas(tools)
        self._options = options or ParserOptions()
        self._call_ids = call_ids
        self._text_marks: TextMarks | None = None
        self._token_marks = TokenMarks()
        self._machine: Machine | None = None
        self._events: list[Event] = []
        self._collected = _Collected()
        self._raw: list[str] = []
        self._finish_reason: str | None = None

    def push(self, text: str) -> list[Event]:
        """The next piece of text, cut anywhere. Returns what became certain."""
        machine = self._start(trusted=False)
        if not text:
            return []
        assert self._text_marks is not None
        self._raw.append(text)
        machine.feed(self._text_marks.push(text))
        return self._take()

    def push_piece(self, text: str, *, special: bool) -> list[Event]:
        """The next piece of a token stream: special: `text` is one special token, by its string."""
        machine = self._start(trusted=True)
        if not text:
            return []
        self._raw.append(text)
        machine.feed(self._token_marks.mark(text) if special else clean(text))
        return self._take()

    def close(self, finish_reason: str | None = None) -> list[Event]:
        """The completion is over. finish_reason: what the engine knows (`length`: it was cut), if it does.

        Without it the reason is `length` exactly when the text ends inside reasoning or a block of
        calls. A second close returns nothing.
        """
        if self._finish_reason is not None:
            return []
        machine = self._start(trusted=False) if self._machine is None else self._machine
        machine.finish(self._text_marks.finish() if self._text_marks is not None else "")
        done = self._collected
        if not (done.reasoning or done.content or done.calls):
            machine.diagnose("empty", "the completion has neither reasoning nor content nor calls")
        if machine.cut or (finish_reason == "length" and not machine.saw_eos):
            reason = "length"
        else:
            reason = "tool_calls" if any(c.done for c in done.calls) else "stop"
        self._finish_reason = reason
        self._emit(Event("end", reason))
        return self._take()

    @property
    def unclosed_reasoning(self) -> bool:
        """Whether the completion ended inside its reasoning."""
        return self._machine is not None and self._machine.unclosed_reasoning

    @property
    def message(self) -> Message:
        """The message so far: completed calls only. Final after `close`."""
        done = self._collected
        return Message(
            role="assistant",
            content="".join(done.content),
            reasoning_content="".join(done.reasoning),
            tool_calls=[
                ToolCall(name=c.name, arguments="".join(c.arguments), id=c.id) for c in done.calls if c.done
            ],
            finish_reason=self._finish_reason,
            diagnostics=list(done.diagnostics),
            raw="".join(self._raw),
        )

    def _start(self, *, trusted: bool) -> Machine:
        if self._finish_reason is not None:
            raise ChatError("this completion is closed: use a new StreamParser for the next one")
        if self._machine is None:
            self._text_marks = None if trusted else TextMarks()
            self._machine = Machine(
                reasoning=self._thinking,
                schemas=self._schemas,
                options=self._options,
                marks=self._token_marks,
                trusted=trusted,
                emit=self._emit,
                new_id=self._call_ids,
            )
        elif trusted == (self._text_marks is not None):
            raise ChatError("push and push_piece cannot be mixed in one completion")
        return self._machine

    def _emit(self, event: Event) -> None:
        self._collected.add(event)
        self._events.append(event)

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class _CollectedCall:
    __slots__ = ("arguments", "done", "id", "name")

    def __init__(self, name: str, call_id: str) -> None:
        self.name, self.id, self.arguments, self.done = name, call_id, list[str](), False


class _Collected:
    """What the events add up to."""

    def __init__(self) -> None:
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[_CollectedCall] = []
        self.diagnostics: list[Diagnostic] = []

    def add(self, event: Event) -> None:
        match event.kind:
            case "reasoning":
                self.reasoning.append(event.text)
            case "content":
                self.content.append(event.text)
            case "args":
                self.calls[-1].arguments.append(event.text)
            case "call_start":
                self.calls.append(_CollectedCall(event.name, event.call_id))
            case "call_end":
                self.calls[-1].done = True
            case "diagnostic":
                self.diagnostics.append(Diagnostic(event.text, event.detail, event.index))


def parse(
    completion_text: str,
    *,
    thinking_mode: str = "thinking",
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: ParserOptions | None = None,
    finish_reason: str | None = None,
    promote_unclosed_reasoning: bool = False,
    strict: bool = False,
    call_ids: Callable[[], str] = new_call_id,
) -> Message:
    """The message of a whole completion: reasoning_content, content, tool_calls, finish_reason, diagnostics.

    Never raises on what a model wrote: it repairs by the table of spec/encoding.md 4.4 and reports
    each repair in `diagnostics`; a call that is cut or malformed is left out, and no markup is in the
    texts.

    finish_reason: what the engine knows, see `StreamParser.close`.
    promote_unclosed_reasoning: a completion that ends (EOS) without `</think>` and calls nothing
        is its content.
    strict: behave as the official parser: raises ParseError at the first deviation.
    The other arguments are those of `StreamParser`.
    """
    if thinking_mode not in ("thinking", "chat"):
        raise ChatError(f"thinking_mode {thinking_mode!r}: use 'thinking' or 'chat'")
    if strict:
        return parse_strict(completion_text, thinking=thinking_mode == "thinking", call_ids=call_ids)
    parser = StreamParser(thinking_mode=thinking_mode, tools=tools, options=options, call_ids=call_ids)
    parser.push(completion_text)
    parser.close(finish_reason)
    return _promoted(parser) if promote_unclosed_reasoning else parser.message


def parse_pieces(
    pieces: Iterable[tuple[str, bool]],
    *,
    thinking_mode: str = "thinking",
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: ParserOptions | None = None,
    finish_reason: str | None = None,
    call_ids: Callable[[], str] = new_call_id,
) -> Message:
    """As `parse`, from (text, is_special) pieces: `parse_pieces(tokenizer.pieces(ids))`. No text
    forges a marker."""
    parser = StreamParser(thinking_mode=thinking_mode, tools=tools, options=options, call_ids=call_ids)
    for text, special in pieces:
        parser.push_piece(text, special=special)
    parser.close(finish_reason)
    return parser.message


def _promoted(parser: StreamParser) -> Message:
    message = parser.message
    if parser.unclosed_reasoning and message.finish_reason == "stop" and not message.tool_calls:
        message.content, message.reasoning_content = message.reasoning_content, ""
    return message
