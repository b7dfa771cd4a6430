"""Screen: how a conversation looks in a terminal. What a model wrote is data: no control character of it goes out."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

__all__ = ["Screen", "printable"]

INVISIBLE = "\n\t\xa0\u200d\u202f\u3000"
"""What Python calls not printable and is harmless: white space, and what joins the parts of an emoji."""


def printable(text: str) -> str:
    """The text without control characters, which could move the cursor or rewrite what stands there."""
    return "".join(c if c.isprintable() or c in INVISIBLE else "\ufffd" for c in text)


class Screen:
    """Writes answers as they come. Reasoning is one line that counts, unless it is to be shown."""

    def __init__(self, *, show_reasoning: bool = False) -> None:
        self.show_reasoning = show_reasoning
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._live = self._console.is_terminal
        self._thought = 0
        self._fresh = True
        """Whether the cursor stands at the start of a line."""

    def read(self, prompt: str) -> str:
        """A line from the user. Raises EOFError, KeyboardInterrupt."""
        return input(prompt if sys.stdin.isatty() else "")

    def note(self, text: str, *, style: str = "dim") -> None:
        """A line of ours."""
        self.end_line()
        self._console.print(Text(printable(text)), style=style)

    def reasoning(self, text: str) -> None:
        """A piece of reasoning."""
        self._thought += len(text)
        if self.show_reasoning:
            self._write(text, style="dim italic")
        elif self._live:
            self._raw(f"\r\x1b[2Kthinking ... {self._thought} characters")
            self._fresh = False

    def end_reasoning(self) -> None:
        """What follows is no reasoning."""
        if not self._thought:
            return
        if self.show_reasoning:
            self.end_line()
        else:
            if self._live:
                self._raw("\r\x1b[2K")
                self._fresh = True
            self.note(f"[thought: {self._thought} characters, /reasoning shows them]")
        self._thought = 0

    def content(self, text: str) -> None:
        """A piece of the answer."""
        self._write(text)

    def call(self, name: str, arguments: str) -> None:
        """A finished call."""
        self.note(f"[call] {name} {arguments}", style="cyan")

    def end_line(self) -> None:
        """The cursor at the start of a line."""
        if not self._fresh:
            self._raw("\n")
            self._fresh = True

    def _write(self, text: str, *, style: str | None = None) -> None:
        if text:
            self._console.out(printable(text), style=style, end="", highlight=False)
            self._console.file.flush()
            self._fresh = text.endswith("\n")

    def _raw(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
