"""The live view of a run in a terminal: a pure consumer of events (`on_event=view`).

Finished blocks scroll by: task, thoughts, each call, its real output, the outcome. What is still coming
(thoughts as they stream, a command's output) stands in a live region below, on terminals only; in a pipe only
finished blocks appear. Owns looks, decides nothing. Text of models and commands is untrusted: control
characters never reach the terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rorqual.agent.events import Event
from rorqual.agent.figures import read_figures

__all__ = ["RunView", "clean"]

OUTPUT_LINES = 14
"""Lines of a result that are shown; the log has all of them."""
LIVE_LINES = 8
"""Lines of the live region."""
_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|[ -/]*[0-~])"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

_OUTCOMES = {
    "submitted": ("submitted", "green"),
    "answered": ("answered", "green"),
    "step_limit": ("stopped: step limit", "yellow"),
    "token_limit": ("stopped: token limit", "yellow"),
    "loop": ("stopped: it was going in circles", "yellow"),
    "model_error": ("the model failed", "red"),
    "sandbox_error": ("the sandbox failed", "red"),
    "interrupted": ("interrupted", "red"),
}


def clean(text: str) -> str:
    """`text` without what moves cursors, rings bells, retitles windows or turns the writing direction."""
    return _CONTROL.sub("", _ESCAPE.sub("", text.replace("\r\n", "\n")))


class RunView:
    """Shows runs, one after another. Use it as a context manager: leaving it gives the terminal back."""

    def __init__(self, console: Console, *, title: str | None = None, live: bool = True) -> None:
        """`live`: show what is still coming, where `console` is a terminal."""
        self._console = console
        self._may_live = live and console.is_terminal
        self._title = title
        self._events: list[Event] = []
        self._live: Live | None = None
        self._channel = ""
        self._text = ""
        self._waiting = ""

    def __enter__(self) -> RunView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hide()

    def title(self, text: str) -> None:
        """What stands above the next task."""
        self._title = text

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if event.kind == "run.start":
            self._events = []
        if event.seq >= 0:
            self._events.append(event)
        handler = getattr(self, "_on_" + event.kind.replace(".", "_"), None)
        if handler is not None:
            handler(event.data)

    def _on_goal(self, data: Mapping[str, Any]) -> None:
        start = next((event.data for event in self._events if event.kind == "run.start"), {})
        title = self._title or " · ".join(
            clean(str(part))
            for part in (start.get("model"), (start.get("sandbox") or {}).get("substrate"))
            if part
        )
        self._print("")
        self._print(
            Panel(
                Text(clean(data["text"].strip())),
                title=Text(title, style="bold cyan"),
                title_align="left",
                border_style="cyan",
                padding=(0, 1),
            )
        )

    def _on_model_request(self, data: Mapping[str, Any]) -> None:
        self._begin("thinking")

    def _on_model_delta(self, data: Mapping[str, Any]) -> None:
        channel = data["channel"]
        if channel == "note":
            self._note(data["text"], "yellow")
            return
        if channel == "restart":
            self._begin("asking again")
            return
        if channel == "call":
            self._channel, self._text = "call", f"{data['text']} "
        elif channel == "arguments":
            self._text += data["text"]
        else:
            if channel != self._channel:
                self._channel, self._text = channel, ""
            self._text += data["text"]
        self._refresh()

    def _on_model_response(self, data: Mapping[str, Any]) -> None:
        self._hide()
        if data["reasoning"].strip():
            self._block(
                "┆", Text(clean(data["reasoning"].strip()), style="italic bright_black"), "bright_black"
            )
        if data["content"].strip():
            self._block("»", Text(clean(data["content"].strip())), "blue")

    def _on_tool_intent(self, data: Mapping[str, Any]) -> None:
        arguments = data["arguments"]
        if data["name"] == "bash":
            self._block("$", Text(clean(str(arguments["command"])), style="bold"), "bold green")
        else:
            line = Text(data["name"], style="bold magenta")
            for value in arguments.values():
                shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                first, _, rest = clean(shown).partition("\n")
                line.append("  " + first[:200] + (" …" if rest or len(first) > 200 else ""), style="default")
            self._block("▸", line, "bold magenta")
        self._begin(f"running {data['name']}")

    def _on_tool_output(self, data: Mapping[str, Any]) -> None:
        self._channel = "output"
        self._text = (self._text + data["text"])[-20_000:]
        self._refresh()

    def _on_tool_result(self, data: Mapping[str, Any]) -> None:
        self._hide()
        if data.get("answer") is not None:
            return
        lines = clean(data["text"]).split("\n")
        if len(lines) > OUTPUT_LINES:
            keep = OUTPUT_LINES // 2
            hidden = len(lines) - 2 * keep
            lines = [*lines[:keep], f"… {hidden} more lines …", *lines[-keep:]]
        text = Text()
        for number, line in enumerate(lines):
            notice = re.fullmatch(
                r"\[(exit \d+|timed out.*|blocked:.*|warning:.*|killed:.*)\]|Error: .*", line
            )
            text.append(("\n" if number else "") + line, style="red" if notice else "")
        self._block("", text, "")

    def _on_guard_verdict(self, data: Mapping[str, Any]) -> None:
        if data["action"] == "nudge":
            self._note("no call: asked once more for an answer", "yellow")
        elif data["action"] != "warn":
            self._note(f"{data['action']}: the same call for the {data['count']}th time", "yellow")

    def _on_error(self, data: Mapping[str, Any]) -> None:
        if data["where"] == "model" and data["recovered"] and not data.get("text"):
            return  # a note was shown when it happened
        self._note(data["error"], "yellow" if data["recovered"] else "red")

    def _on_run_end(self, data: Mapping[str, Any]) -> None:
        self._hide()
        said, style = _OUTCOMES.get(data["outcome"], (data["outcome"], "red"))
        line = Text(said, style=f"bold {style}")
        if data.get("answer"):
            line.append("  " + clean(data["answer"]), style="bold")
        elif data.get("error") and data["outcome"] not in ("model_error", "sandbox_error"):
            line.append("  " + clean(data["error"]), style="default")
        self._block("●", line, style)
        for figures in read_figures(self._events).lines():
            self._print(Padding(Text(figures, style="bright_black"), (0, 0, 0, 4)))

    def verdict(self, solved: bool, *, wanted: str) -> None:
        """What the grader says, after the end of a run."""
        if solved:
            self._block("✔", Text("solved", style="bold green"), "bold green")
        else:
            line = Text("not solved", style="bold red")
            line.append(f"  the answer is {clean(wanted)}", style="default")
            self._block("✘", line, "bold red")

    def _block(self, mark: str, text: RenderableType, style: str) -> None:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=3, justify="right")
        grid.add_column()
        grid.add_row(Text(mark, style=style), text)
        self._print(grid)

    def _note(self, text: str, style: str) -> None:
        self._block("!", Text(clean(text), style=style), style)

    def _print(self, block: RenderableType) -> None:
        # With a live region on, rich prints above it.
        self._console.print(block)

    def _begin(self, waiting: str) -> None:
        self._waiting, self._channel, self._text = waiting, "", ""
        if self._may_live and self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=12)
            self._live.start()
        self._refresh()

    def _refresh(self) -> None:
        if self._live is None:
            return
        parts: list[RenderableType] = []
        if self._text:
            width = max(20, self._console.width - 6)
            style = {"reasoning": "italic bright_black", "call": "bold green"}.get(self._channel, "")
            wrapped = Text(clean(self._text[-width * LIVE_LINES :]), style=style).wrap(self._console, width)
            parts.append(Padding(Text("\n").join(list(wrapped)[-LIVE_LINES:]), (0, 0, 0, 4)))
        parts.append(Padding(Spinner("dots", text=Text(self._waiting, style="bright_black")), (0, 0, 0, 2)))
        self._live.update(Group(*parts))

    def _hide(self) -> None:
        live, self._live = self._live, None
        self._channel, self._text = "", ""
        if live is not None:
            live.stop()
