"""One generation: engine events in, parsed message out, deltas on the way. Runs in a worker thread.

Owns the wiring of engine, tokenizer and `StreamParser` in token mode: only sampled special ids count as
markers, text that spells one is data (spec/encoding.md 4.3). embedded.py owns the conversation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rorqual.chat as chat
from rorqual.agent.models.base import Delta, OnDelta

__all__ = ["Sampler"]


class Sampler:
    """Holds one generation while it runs; read the fields after `run` returned."""

    def __init__(
        self,
        tokenizer: chat.Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]],
        thinking_mode: str,
        on_delta: OnDelta | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._parser = chat.StreamParser(thinking_mode=thinking_mode, tools=tools)
        self._on_delta = on_delta
        self._think_end = tokenizer.token_id("</think>")
        self._thinking = thinking_mode == "thinking"
        self.stop = threading.Event()
        """Set it to end the generation at its next token."""
        self.ids: list[int] = []
        self.finish_reason = "length"
        self.reasoning_tokens = 0
        self.seconds = 0.0
        self.metrics: dict[str, float] = {}

    def run(self, engine: Any, prompt: Sequence[int], params: Any) -> None:
        """Sample to the end, a stop id, or `stop`. Raises what the engine raises."""
        started = time.monotonic()
        decoder = chat.StreamDecoder(self._tokenizer)
        events = engine.generate(prompt, params)
        try:
            for event in events:
                if not self.ids:
                    self.metrics["first_token_seconds"] = time.monotonic() - started
                self._take(event.token_id)
                for text, special in decoder.push_pieces(event.token_id):
                    self._show(self._parser.push_piece(text, special=special))
                if event.finish_reason is not None:
                    self.finish_reason = event.finish_reason
                if self.stop.is_set():
                    break
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()  # a generator left open would keep the engine's sequence
        if rest := decoder.finish():
            self._show(self._parser.push_piece(rest, special=False))
        self._show(self._parser.close(self.finish_reason))
        self.seconds = time.monotonic() - started

    @property
    def message(self) -> chat.Message:
        """The parsed answer; only closed calls are in it."""
        return self._parser.message

    def _take(self, token_id: int) -> None:
        self.ids.append(token_id)
        if self._thinking and token_id == self._think_end:
            self._thinking = False
        elif self._thinking:
            self.reasoning_tokens += 1

    def _show(self, events: Sequence[Any]) -> None:
        for event in events:
            delta = _delta(event)
            if delta is not None and self._on_delta is not None:
                self._on_delta(delta)


def _delta(event: Any) -> Delta | None:
    if event.kind == "reasoning" or event.kind == "content":
        return Delta(channel=event.kind, text=event.text)
    if event.kind == "call_start":
        return Delta(channel="call", text=event.name, index=event.index or 0)
    if event.kind == "args":
        return Delta(channel="arguments", text=event.text, index=event.index or 0)
    return None
