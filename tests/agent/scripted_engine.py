"""A token engine that samples from a script: real token ids of a real tokenizer, no model.

An answer is text; the special strings in it become special tokens, as a model would sample them. It ends with
EOS unless it says `cut`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.agent import DEFAULT_TOOLS, SYSTEM_PROMPT
from rorqual.chat import Segment, Tokenizer, render_segments, train_bpe
from rorqual.chat.profile import SPECIAL_TOKENS

_SPECIAL = re.compile("(" + "|".join(re.escape(text) for text in SPECIAL_TOKENS) + ")")


def call(name: str, parameter: str, value: str) -> str:
    """DSML of one call, with the two newlines in front."""
    return (
        f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n'
        f'<｜DSML｜parameter name="{parameter}" string="true">{value}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )


def bash(thought: str, command: str) -> str:
    return thought + "</think>" + call("bash", "command", command)


def submit(thought: str, answer: str) -> str:
    return thought + "</think>" + call("submit", "answer", answer)


def small_tokenizer() -> Tokenizer:
    tools = [tool.schema() for tool in DEFAULT_TOOLS]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "Start at 123."}]
    return train_bpe([render_segments(messages, tools=tools)], vocab_size=512)


def segments(text: str) -> list[Segment]:
    pieces = [piece for piece in _SPECIAL.split(text) if piece]
    return [Segment(piece, piece in SPECIAL_TOKENS, 0, True) for piece in pieces]


@dataclass(frozen=True)
class Token:
    token_id: int
    finish_reason: str | None = None


@dataclass
class Cut:
    """An answer that runs into the token limit."""

    text: str


Answer = str | Cut | Callable[[str], "str | Cut"]


class ScriptedEngine:
    def __init__(self, tokenizer: Tokenizer, answers: Sequence[Answer], *, pause: float = 0.0) -> None:
        self.tokenizer = tokenizer
        self.answers = list(answers)
        self.prompts: list[list[int]] = []
        self.params: list[Any] = []
        self.open = 0
        self.pause = pause

    def generate(self, prompt_ids: Sequence[int], params: Any, /) -> Iterator[Token]:
        self.prompts.append(list(prompt_ids))
        self.params.append(params)
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer(self.tokenizer.decode(prompt_ids))
        cut = isinstance(answer, Cut)
        ids = self.tokenizer.encode_segments(segments(answer.text if isinstance(answer, Cut) else answer))
        if not cut:
            ids.append(self.tokenizer.eos_id)
        self.open += 1
        try:
            for position, token_id in enumerate(ids[: params.max_tokens]):
                last = position + 1 == min(len(ids), params.max_tokens)
                stop = token_id in params.stop_ids
                yield Token(token_id, "stop" if stop else "length" if last else None)
                if self.pause:
                    time.sleep(self.pause)
        finally:
            self.open -= 1
