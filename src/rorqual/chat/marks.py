"""Marks: one character for each real marker, whether it came as text or as a token.

The state machine (machine.py) reads one kind of stream. From text, `TextMarks` turns every marker
string into its mark, wherever a chunk cuts it. From tokens, `token_mark` marks only what is a special
token: text that merely spells a marker stays text, so it is data (spec/encoding.md 4.3). Marks are
lone surrogates, which no UTF-8 stream holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .profile import BOS, DSML, EOS, THINK, THINK_END

MARK_DSML, MARK_THINK, MARK_THINK_END, MARK_EOS = "\udb80", "\udb81", "\udb82", "\udb83"
_FIRST_OTHER, _LAST_OTHER = 0xDB84, 0xDBFF

_MARK_OF = {
    DSML: MARK_DSML,
    THINK: MARK_THINK,
    THINK_END: MARK_THINK_END,
    EOS: MARK_EOS,
    BOS: chr(_FIRST_OTHER),
}
_TEXT_OF = {mark: text for text, mark in _MARK_OF.items()}
ANY_MARK = f"{MARK_DSML}-{chr(_LAST_OTHER)}"
"""The marks as the inside of a regular expression's character class."""
_MARK = re.compile(f"[{ANY_MARK}]")


def clean(text: str) -> str:
    """Text without characters that are marks of ours (lone surrogates; they become U+FFFD)."""
    return _MARK.sub("\ufffd", text) if _has_surrogates(text) else text


def _has_surrogates(text: str) -> bool:
    """Encoding fails on a lone surrogate, and is ten times as fast as a pattern that looks for one."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return True
    return False


class Beginnings:
    """Finds the end of a text that may be the beginning of one of some words."""

    def __init__(self, words: Iterable[str]) -> None:
        self._begun = frozenset(word[:n] for word in words for n in range(1, len(word)))
        self._longest = max(map(len, self._begun))
        self._first = re.compile("[" + re.escape("".join({begun[0] for begun in self._begun})) + "]")

    def at_end(self, text: str, start: int = 0) -> int:
        """Length of the longest suffix of text[start:] that is a proper prefix of a word; O(longest word)."""
        for match in self._first.finditer(text, max(start, len(text) - self._longest)):
            if text[match.start() :] in self._begun:
                return len(text) - match.start()
        return 0


class TextMarks:
    """Marks the markers of a text stream; holds back what may be the beginning of one."""

    _beginnings = Beginnings(_MARK_OF)

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """The marked text that is certain now."""
        text = self._held + clean(text) if self._held else clean(text)
        if "｜" in text or "think>" in text:
            for word, mark in _MARK_OF.items():  # no marker overlaps another: the order makes no difference
                text = text.replace(word, mark)
        held = self._beginnings.at_end(text)
        self._held = text[len(text) - held :] if held else ""
        return text[: len(text) - held] if held else text

    def finish(self) -> str:
        """What was held back: a marker that never became whole is text."""
        held, self._held = self._held, ""
        return held


class TokenMarks:
    """Marks of a token stream: special tokens by their string; remembers the ones that are not the
    format's."""

    def __init__(self) -> None:
        self._others: dict[str, str] = {}

    def mark(self, special: str) -> str:
        """The mark of a special token."""
        known = _MARK_OF.get(special) or self._others.get(special)
        if known is None:
            code = _FIRST_OTHER + 1 + len(self._others)
            known = chr(min(code, _LAST_OTHER))
            self._others[special] = known
        return known

    def unmark(self, text: str) -> str:
        """The text with each mark as the string it stands for (for values of arguments, where all is
        data)."""
        if not _has_surrogates(text):
            return text
        back = {mark: s for s, mark in reversed(self._others.items())} | _TEXT_OF
        return _MARK.sub(lambda m: back.get(m[0], "\ufffd"), text)
