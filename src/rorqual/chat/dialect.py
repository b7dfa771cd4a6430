"""Dialects: the tags of a block of calls as literals, and three-valued matching of them.

The V4 spelling and the damaged or foreign ones that models were seen to write (spec/encoding.md 4.4,
row "damaged start or names"). Matching answers where a literal ends, NO, or MORE: the text ends inside
it. Owns spelling only; which spelling may be accepted where is decided in machine.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from .marks import ANY_MARK, MARK_DSML, MARK_EOS, Beginnings

NO: Final = -1
MORE: Final = -2

MAX_SPACE = 64
"""White space looked through after a tag, in characters."""
MAX_HEADER = 512
"""Longest name or parameter header, in characters."""

BLOCK_NAMES = ("tool_calls", "function_calls", "toolcalls", "calls", "tool")
TAG_WORDS = (*BLOCK_NAMES, "invoke", "parameter")


@dataclass(frozen=True, slots=True)
class Dialect:
    """One spelling: `<` marker space name."""

    marker: str
    space: str
    open_invoke: str = field(init=False)
    close_invoke: str = field(init=False)
    open_parameter: str = field(init=False)
    close_parameter: str = field(init=False)
    close_blocks: tuple[str, ...] = field(init=False)
    value_stops: tuple[str, ...] = field(init=False)
    value_stop: re.Pattern[str] = field(init=False)
    value_stop_begun: Beginnings = field(init=False)
    steps: tuple[str, ...] = field(init=False)
    """What may follow a call: another, its end, the end of the block."""
    after_value: tuple[str, ...] = field(init=False)
    """What may follow the end of a parameter."""
    exact_parameter: re.Pattern[str] = field(init=False)
    """The header as the format has it, for a key without quotes."""

    def __post_init__(self) -> None:
        tag = self.marker + self.space
        put = object.__setattr__
        put(self, "open_invoke", f'<{tag}invoke name="')
        put(self, "close_invoke", f"</{tag}invoke>")
        put(self, "open_parameter", f'<{tag}parameter name="')
        put(self, "close_parameter", f"</{tag}parameter>")
        put(self, "close_blocks", tuple(f"</{tag}{n}>" for n in BLOCK_NAMES))
        stops = (self.close_parameter, "\n" + self.open_parameter, "\n" + self.close_invoke)
        put(self, "value_stops", stops)
        put(self, "value_stop", re.compile("|".join(re.escape(s) for s in (*stops, MARK_EOS))))
        put(self, "value_stop_begun", Beginnings(stops))
        put(self, "steps", (self.open_invoke, self.close_invoke, *self.close_blocks))
        put(self, "after_value", (f"<{tag}parameter", *self.steps))
        key = f'([^"<>\r\n{ANY_MARK}]{{0,{MAX_HEADER - 16}}})'
        put(
            self,
            "exact_parameter",
            re.compile(f'{re.escape(self.open_parameter)}{key}" string="(true|false)">'),
        )

    @property
    def is_marked(self) -> bool:
        """Whether it has the real marker."""
        return MARK_DSML in self.marker


V4 = Dialect(MARK_DSML, "")
MARKED = (V4, Dialect(MARK_DSML, " "), Dialect(f"｜{MARK_DSML}｜", ""))
UNMARKED = (Dialect("", ""), Dialect("|DSML|", ""), Dialect("||DSML||", ""))


def literal(text: str, at: int, word: str) -> int:
    """End of `word` at `at`, NO, or MORE if the text ends inside it."""
    if text.startswith(word, at):
        return at + len(word)
    return MORE if len(text) - at < len(word) and word.startswith(text[at:]) else NO


def first_literal(text: str, at: int, words: tuple[str, ...]) -> tuple[int, int]:
    """(which word, its end); (NO, NO) or (MORE, MORE). No word may be a prefix of another."""
    best = NO
    for which, word in enumerate(words):
        end = literal(text, at, word)
        if end >= 0:
            return which, end
        best = min(best, end)
    return best, best


_VISIBLE = re.compile(r"[^ \t\r\n]")


def visible(text: str, at: int) -> int:
    """Position of the next character that is not white space, len(text) if there is none."""
    match = _VISIBLE.search(text, at)
    return match.start() if match else len(text)


def after_space(text: str, at: int) -> int:
    """As `visible`, but MORE at the end of the text and NO past MAX_SPACE characters of white space."""
    match = _VISIBLE.search(text, at, at + MAX_SPACE + 1)
    if match:
        return match.start()
    return NO if len(text) - at > MAX_SPACE else MORE


_NAME_STOP = re.compile(f'">|[\r\n{ANY_MARK}]')


def invoke_name(text: str, at: int) -> tuple[int, str]:
    """(end of header, name) from behind `name="`; NO: over a line break, empty or too long (spec 4.4)."""
    match = _NAME_STOP.search(text, at, at + MAX_HEADER + 2)
    if match is None:
        return (NO if len(text) - at >= MAX_HEADER + 2 else MORE), ""
    if match[0] != '">' or match.start() == at:
        return NO, ""
    return match.end(), text[at : match.start()]


_HEADER_STOP = re.compile(f"[>{ANY_MARK}]")
_HEADER = re.compile(r'(.*)" string="(true|false)"', re.DOTALL)
_LOOSE_HEADER = re.compile(r'([^"\r\n]*)"(?:\s+string\s*=\s*"?([^"]*)"?)?\s*')


def parameter_header(text: str, at: int) -> tuple[int, str, str]:
    """(end, key, flag) from behind `name="`; flag is true, false, or empty if it is missing or bad."""
    for match in _HEADER_STOP.finditer(text, at, at + MAX_HEADER):
        if match[0] != ">":
            return NO, "", ""
        header = text[at : match.start()]
        if exact := _HEADER.fullmatch(header):
            return match.end(), exact[1], exact[2]
        if loose := _LOOSE_HEADER.fullmatch(header):
            return match.end(), loose[1], ""
    return (NO if len(text) - at >= MAX_HEADER else MORE), "", ""
