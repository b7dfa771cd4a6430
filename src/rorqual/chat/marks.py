"""Marks: one character for each real marker, whether it came as text or as a token.

The state machine (machine.py) reads one kind of stream. From text, `TextMarks` turns every marker
string into its mark, wherever a chunk cuts it. From tokens, `token_mark` marks only what is a special
token: text that merely spells a marker stays text, so it is data (spec/encoding.md 4.3). Marks are
lone surrogates, which no UTF-8 stream holds.
"""

from __future__ import annotations

import re

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
_ANY_MARKER = re.compile("|".join(re.escape(s) for s in _MARK_OF))
_LONGEST = max(map(len, _MARK_OF))
ANY_MARK = f"{MARK_DSML}-{chr(_LAST_OTHER)}"
"""The marks as the inside of a regular expression's character class."""
_MARK = re.compile(f"[{ANY_MARK}]")


def clean(text: str) -> str:
    """Text without characters that are marks of ours (lone surrogates; they become U+FFFD)."""
    return text if text.isascii() else _MARK.sub("\ufffd", text)


def partial_suffix(text: str, words: tuple[str, ...], *, longest: int, start: int = 0) -> int:
    """Length of the longest suffix of text[start:] that is a proper prefix of a word; O(longest)."""
    for n in range(min(longest - 1, len(text) - start), 0, -1):
        tail = text[len(text) - n :]
        if any(len(w) > n and w.startswith(tail) for w in words):
            return n
    return 0


class TextMarks:
    """Marks the markers of a text stream; holds back what may be the beginning of one."""

    _words = tuple(_MARK_OF)

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """The marked text that is certain now."""
        text = self._held + clean(text)
        last = 0
        for match in _ANY_MARKER.finditer(text):
            last = match.end()
        held = 0
        if "<" in text[-_LONGEST:] or "｜" in text[-_LONGEST:]:
            held = partial_suffix(text, self._words, longest=_LONGEST, start=last)
        cut = len(text) - held
        self._held = text[cut:]
        return _ANY_MARKER.sub(lambda m: _MARK_OF[m[0]], text[:cut]) if last else text[:cut]

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
        if text.isascii() or not _MARK.search(text):
            return text
        back = {mark: s for s, mark in reversed(self._others.items())} | _TEXT_OF
        return _MARK.sub(lambda m: back.get(m[0], "\ufffd"), text)
