"""Answer: one completion while it is sampled: token ids in, events of `rorqual.chat` out.

Owns stop strings and the counts of usage. A chat answer is parsed in token mode, so only special tokens are markup;
stop strings look at its visible content, never at reasoning or arguments. A raw answer is plain text. Never knows
HTTP nor threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from rorqual import chat

__all__ = ["Answer", "ChatAnswer", "RawAnswer", "StopStrings"]

EngineReason = Literal["stop", "length"]


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.met: str | None = None
        """The stop string that was met."""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may go out, whether a stop string was met: then nothing follows)."""
        if not self._stops:
            return text, False
        text, self._held = self._held + text, ""
        # The one that is complete first counts, as if the text came character by character.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at = min(found)
            self.met = text[at:end]
            return text[:at], True
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size], False
        return text, False

    def flush(self) -> str:
        """What was held back after all."""
        text, self._held = self._held, ""
        return text


class Answer(Protocol):
    """What the scheduler feeds."""

    ids: list[int]
    """As sampled so far."""
    finished: bool
    """Nothing more is wanted; the last event was `end`."""

    def push(self, token_id: int, reason: EngineReason | None) -> list[chat.Event]:
        """The next token, and why it is the last one if it is."""
        ...


class RawAnswer:
    """Text as it comes, special tokens as their strings; EOS and stop strings are not part of it."""

    def __init__(self, tokenizer: chat.Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.finished = False
        self.text = ""
        self.finish_reason = "stop"
        self._tokenizer = tokenizer
        self._decoder = chat.StreamDecoder(tokenizer)
        self._stops = StopStrings(stop)

    def push(self, token_id: int, reason: EngineReason | None) -> list[chat.Event]:
        """See `Answer`."""
        self.ids.append(token_id)
        text = ""
        if token_id != self._tokenizer.eos_id:
            text = self._decoder.push(token_id) if token_id < self._tokenizer.vocab_size else "\ufffd"
        if reason is not None:
            text += self._decoder.finish()
        out, hit = self._stops.push(text)
        if reason is not None and not hit:
            out += self._stops.flush()
        self.text += out
        events = [chat.Event("content", out)] if out else []
        if hit or reason is not None:
            self.finished = True
            self.finish_reason = "stop" if hit or reason is None else reason
            events.append(chat.Event("end", self.finish_reason))
        return events


class ChatAnswer:
    """An assistant turn. `message` and `finish_reason` are final once `finished`."""

    def __init__(
        self,
        tokenizer: chat.Tokenizer,
        *,
        thinking: bool,
        tools: Sequence[dict[str, Any]],
        stop: Sequence[str] = (),
    ) -> None:
        self.ids: list[int] = []
        self.finished = False
        self.stopped = False
        """Whether a stop string cut it."""
        self.ended = False
        """Whether it ended as the format has it: by EOS or behind a block of calls."""
        self.thinking = thinking
        self.reasoning_tokens = 0
        self._reasoning = thinking
        self._content: list[str] = []
        self._called = False
        self._tokenizer = tokenizer
        self._decoder = chat.StreamDecoder(tokenizer)
        self._stops = StopStrings(stop)
        # Without tools nothing may be called; the parser then drops calls and reports them.
        options = chat.ParserOptions(tool_choice="auto" if tools else "none")
        mode = "thinking" if thinking else "chat"
        self._parser = chat.StreamParser(thinking_mode=mode, tools=tools, options=options)

    def push(self, token_id: int, reason: EngineReason | None) -> list[chat.Event]:
        """See `Answer`."""
        self.ids.append(token_id)
        known = token_id < self._tokenizer.vocab_size
        pieces = self._decoder.push_pieces(token_id) if known else [("\ufffd", False)]
        events: list[chat.Event] = []
        for text, special in pieces:
            events += self._parser.push_piece(text, special=special)
        self._called = self._called or any(event.kind == "call_end" for event in events)
        done = self._called and any(event.kind == "block_end" for event in events)
        if done or reason is not None:
            if rest := self._decoder.finish():
                events += self._parser.push_piece(rest, special=False)
            events += self._parser.close("stop" if done else reason)
            self.ended = done or reason == "stop"
        if self._reasoning:
            self._reasoning = not any(event.kind in ("reasoning_end", "call_start") for event in events)
            self.reasoning_tokens += self._reasoning and token_id != self._tokenizer.eos_id
        return self._filter(events)

    def _filter(self, events: Sequence[chat.Event]) -> list[chat.Event]:
        """Applies the stop strings to content."""
        out: list[chat.Event] = []
        for event in events:
            if event.kind == "content":
                text, hit = self._stops.push(event.text)
                self._say(text, out)
                if hit:
                    self.stopped = self.finished = True
                    self.ended = False
                    out.append(chat.Event("end", "stop"))
                    return out
                continue
            if event.kind != "diagnostic":
                self._say(self._stops.flush(), out)
            self.finished = self.finished or event.kind == "end"
            out.append(event)
        return out

    def _say(self, text: str, out: list[chat.Event]) -> None:
        if text:
            self._content.append(text)
            out.append(chat.Event("content", text))

    @property
    def stop_string(self) -> str | None:
        """The stop string that cut it."""
        return self._stops.met

    @property
    def finish_reason(self) -> str:
        """stop, tool_calls or length."""
        return self.message.finish_reason or "stop"

    @property
    def message(self) -> chat.Message:
        """What was said so far, stop strings applied."""
        message = self._parser.message
        message.content = "".join(self._content)
        if self.stopped:
            message.finish_reason = "stop"
        return message
