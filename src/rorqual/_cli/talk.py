"""Talk: a conversation with a server, turn by turn: history, streamed answers, calls whose results the user types.

An answer that Ctrl-C stops stays in the history as far as it came; one that failed leaves no trace there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import httpx_sse

from rorqual._cli.talk_screen import Screen

__all__ = ["Talk", "TalkConfig"]

HELP = """\
/reasoning   the reasoning of the last answer
/new         forget the conversation
/again       ask for another answer
/help        this
Ctrl-C       stop the answer
Ctrl-D       leave (/quit too)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TalkConfig:
    """What every request says."""

    model: str
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: bool = True
    max_tokens: int | None = None
    temperature: float | None = None


@dataclass
class _Said:
    """An answer as it comes."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    def message(self, *, finished: bool) -> dict[str, Any]:
        """The turn for the history. Calls count only if the answer was finished."""
        message = {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning}
        if finished and self.calls:
            calls = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for _, call in sorted(self.calls.items())
            ]
            return {**message, "tool_calls": calls}
        return message


class _Failed(Exception):
    """The server refused or broke off. The text is for the user."""


class Talk:
    """One conversation. `run` returns when the user leaves."""

    def __init__(self, client: httpx.Client, config: TalkConfig, screen: Screen) -> None:
        self.messages: list[dict[str, Any]] = []
        self._client, self._config, self._screen = client, config, screen
        self._reasoning = ""
        self._forget()

    def run(self) -> None:
        """Reads and answers until the end of input."""
        self._screen.note(f"{self._config.model} (Ctrl-C stops an answer, Ctrl-D leaves, /help)")
        while True:
            try:
                line = self._screen.read("> ").strip()
            except EOFError:
                self._screen.end_line()
                return
            except KeyboardInterrupt:
                self._screen.note("\n(Ctrl-D leaves)")
                continue
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn({"role": "user", "content": line})

    def _command(self, line: str) -> None:
        if line == "/reasoning":
            self._screen.note(self._reasoning or "(there was none)")
        elif line == "/new":
            self._forget()
            self._screen.note("(a new conversation)")
        elif line == "/again":
            while self.messages and self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            if self.messages and self.messages[-1]["role"] != "system":
                self._turn()
            else:
                self._screen.note("(nothing was asked yet)")
        elif line == "/help":
            self._screen.note(HELP)
        else:
            self._screen.note(f"no command {line.split()[0]}: /help tells which there are")

    def _forget(self) -> None:
        system = self._config.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def _turn(self, *asked: dict[str, Any]) -> None:
        """Asks, and goes on as long as the answer calls tools."""
        start = len(self.messages)
        self.messages += asked
        while True:
            said, finished = _Said(), False
            try:
                self._answer(said)
                finished = True
            except KeyboardInterrupt:
                self._screen.end_reasoning()
                self._screen.note("(stopped)")
            except _Failed as error:
                self._screen.end_reasoning()
                self._screen.note(f"error: {error}", style="red")
                del self.messages[start:]
                return
            self._reasoning = said.reasoning
            self.messages.append(said.message(finished=finished))
            if not (finished and said.calls):
                return
            self.messages += self._results(self.messages[-1]["tool_calls"])

    def _results(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        out = []
        for call in calls:
            try:
                text = self._screen.read(f"result of {call['function']['name']}> ")
            except (EOFError, KeyboardInterrupt):
                self._screen.note("\n(no result)")
                text = ""
            out.append({"role": "tool", "tool_call_id": call["id"], "content": text})
        return out

    def _answer(self, said: _Said) -> None:
        """Streams one answer into `said` and onto the screen."""
        for chunk in self._chunks():
            said.usage = chunk.get("usage") or said.usage
            for choice in chunk.get("choices") or ():
                said.finish_reason = choice.get("finish_reason") or said.finish_reason
                self._delta(said, choice.get("delta") or {})
        self._screen.end_reasoning()
        self._screen.end_line()
        for _, call in sorted(said.calls.items()):
            self._screen.call(call["name"], call["arguments"])
        if said.finish_reason == "length":
            said.calls.clear()  # the last of them was cut: none is run
            self._screen.note("(cut: the answer reached its longest)")
        if said.usage:
            details = said.usage.get("prompt_tokens_details") or {}
            self._screen.note(
                f"({said.usage.get('prompt_tokens')} tokens in, {details.get('cached_tokens', 0)} of them cached; "
                f"{said.usage.get('completion_tokens')} out)"
            )

    def _delta(self, said: _Said, delta: dict[str, Any]) -> None:
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            said.reasoning += thought
            self._screen.reasoning(thought)
        if text := delta.get("content"):
            self._screen.end_reasoning()
            said.content += text
            self._screen.content(text)
        for piece in delta.get("tool_calls") or ():
            call = said.calls.setdefault(piece["index"], {"id": "", "name": "", "arguments": ""})
            function = piece.get("function") or {}
            call["id"] = piece.get("id") or call["id"]
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""

    def _chunks(self) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed answer. Raises _Failed."""
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        optional = {"tools": config.tools, "max_tokens": config.max_tokens, "temperature": config.temperature}
        body |= {name: value for name, value in optional.items() if value is not None}
        if not config.thinking:
            body["thinking"] = {"type": "disabled"}
        try:
            with httpx_sse.connect_sse(self._client, "POST", "/v1/chat/completions", json=body) as events:
                if events.response.status_code != 200:
                    events.response.read()
                    raise _Failed(_message(events.response))
                for event in events.iter_sse():
                    if event.data == "[DONE]":
                        return
                    chunk = json.loads(event.data)
                    if error := chunk.get("error"):
                        raise _Failed(str(error.get("message", error)))
                    yield chunk
        except (httpx.HTTPError, httpx_sse.SSEError) as error:
            raise _Failed(f"the connection failed: {error or type(error).__name__}") from error
        except (ValueError, AttributeError) as error:
            raise _Failed(f"the server's answer cannot be read: {error}") from error


def _message(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
