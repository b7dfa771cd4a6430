"""Constraint: which tokens may come next in one completion, so that calls always parse.

Free until a call opens (`<` and the DSML token); from there to the end of the block only what the grammar of the
offered tools lets pass (grammar.py), syntax greedy and payload sampled as asked, as ds4 does. The same way for a
forced call and for an answer with a JSON schema, which begin where the reasoning ends. A `Constrainer` holds a
tokenizer's tables and compiled grammars, a `Constraint` one completion's state. The engine is llguidance
(pip install 'rorqual[serve]'); nothing else of ours imports it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ChatError
from .grammar import calls_grammar, either_grammar, json_grammar
from .profile import DSML, THINK_END
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_PLANS = 256
"""Compiled grammars kept, least recently used first out."""
MAX_GRAMMAR = 4 << 20
"""Longest grammar, in characters: larger offers are refused, not compiled."""
_VALUE_MARKS = (b' string="true">', b' string="false">')


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What one kind of request needs, compiled: matchers to copy from."""

    call: Any = None
    """From behind `<` and the DSML token; None: no tools."""
    answer: Any = None
    """From the end of the reasoning; None: free."""


class Constrainer:
    """Makes constraints for completions of one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ChatError if llguidance is not installed."""
        try:
            import llguidance  # here, not on top: optional
        except ImportError:
            raise ChatError("constrained answers need llguidance: pip install 'rorqual[serve]'") from None
        self._engine = llguidance
        self.tokenizer = tokenizer
        self.words = (tokenizer.vocab_size + 31) // 32
        """Length of a mask, in 32-bit words."""
        self._table = llguidance.LLTokenizer(tokenizer.serialized, eos_token=tokenizer.eos_id)
        self._plans: OrderedDict[str, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(
        self,
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        required: bool = False,
        only: str | None = None,
        parallel: bool = True,
        schema: Mapping[str, Any] | None = None,
    ) -> Constraint:
        """The constraint of one completion.

        thinking: it begins in reasoning. tools: what may be called. required: it must call something; only: just
        that tool. parallel: several calls in one turn. schema: what an answer without calls must be, as JSON schema.

        Raises:
            ChatError: a schema that the grammar engine cannot follow, saying which part, or a grammar too large.
        """
        if only is not None:
            required = True
        key = json.dumps([tools, required, only, parallel, schema], sort_keys=True, default=str)
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
        if plan is None:
            plan = self._compile(tools, required=required, only=only, parallel=parallel, schema=schema)
            with self._lock:
                self._plans[key] = plan
                while len(self._plans) > MAX_PLANS:
                    self._plans.popitem(last=False)
        return Constraint(self, plan, thinking=thinking)

    def _compile(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        required: bool,
        only: str | None,
        parallel: bool,
        schema: Mapping[str, Any] | None,
    ) -> _Plan:
        dsml = self.tokenizer.token_id(DSML)

        def calls(*, lead: bool) -> str:
            return calls_grammar(
                tools, dsml=dsml, only=only, parallel=parallel, lead=lead, accepts=self._accepts
            )

        call = self._matcher(calls(lead=False)) if tools else None
        if required:
            return _Plan(call=call, answer=self._matcher(calls(lead=True)))
        if schema is None:
            return _Plan(call=call)
        answer = json_grammar(schema)
        return _Plan(
            call=call, answer=self._matcher(either_grammar(calls(lead=True), answer) if tools else answer)
        )

    def _accepts(self, grammar: str) -> bool:
        wrapped = self._engine.LLMatcher.grammar_from_lark(grammar)
        return not self._engine.LLMatcher.validate_grammar(wrapped, self._table)

    def _matcher(self, grammar: str) -> Any:
        if len(grammar) > MAX_GRAMMAR:
            raise ChatError(
                f"the offered tools or the schema make a grammar of {len(grammar)} characters: too large"
            )
        wrapped = self._engine.LLMatcher.grammar_from_lark(grammar)
        if error := self._engine.LLMatcher.validate_grammar(wrapped, self._table):
            raise ChatError(f"the schema cannot be followed: {error.splitlines()[0]}")
        return self._engine.LLMatcher(self._table, wrapped, log_level=0)


class Constraint:
    """The state of one completion. For each token: `fill` a mask, sample, `push` the token."""

    def __init__(self, constrainer: Constrainer, plan: _Plan, *, thinking: bool) -> None:
        tokenizer = constrainer.tokenizer
        self._tokenizer = tokenizer
        self._plan = plan
        self.words = constrainer.words
        """Length of a mask."""
        self._dsml = tokenizer.token_id(DSML)
        self._think_end = tokenizer.token_id(THINK_END)
        self._reasoning = thinking
        self._matcher: Any = None
        self._less = False
        """The text so far ends in `<`."""
        self._in_value = False
        self._tag = b""
        self._in_calls = False
        self.opened = False
        """Whether a grammar has taken over at some time."""
        if not thinking:
            self._begin_answer()

    @property
    def active(self) -> bool:
        """Whether `fill` has something to say about the next token."""
        return self._matcher is not None or (self._reasoning and self._plan.answer is not None)

    @property
    def greedy(self) -> bool:
        """Whether the next token is syntax of a call: the most likely one is taken."""
        return self._matcher is not None and self._in_calls and not self._in_value

    def fill(self, mask: npt.NDArray[np.int32], *, ending: bool = False) -> bool:
        """Writes the mask of the next token, bit n of word n // 32 for id n; False: anything may come.

        mask: int32 [words], contiguous. ending: few tokens are left, a reasoning must end here.
        """
        if self._matcher is not None:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            return True
        if not self.active:
            return False
        if ending:
            mask[:] = 0
            mask[self._think_end // 32] = _bit(self._think_end)
        else:  # what is owed comes after the reasoning, so the turn may not end in it
            mask[:] = -1
            mask[self._tokenizer.eos_id // 32] &= ~_bit(self._tokenizer.eos_id)
        return True

    def push(self, token_id: int) -> None:
        """The token that was sampled."""
        if self._matcher is not None:
            if not self._matcher.consume_token(token_id):
                self._matcher = None  # not of our mask: whoever sampled it has other plans
                return
            self._follow(token_id)
            return
        if self._reasoning and token_id == self._think_end:
            self._reasoning = False
            self._less = False
            self._begin_answer()
            return
        if token_id == self._dsml:
            if self._less and self._plan.call is not None:
                self._open(self._plan.call, in_calls=True)
            self._less = False
        elif (
            piece := self._tokenizer.decode_bytes([token_id])
            if token_id < self._tokenizer.vocab_size
            else b""
        ):
            self._less = piece.endswith(b"<") and not self._tokenizer.is_special(token_id)

    def _begin_answer(self) -> None:
        if self._plan.answer is not None:
            self._open(self._plan.answer, in_calls=False)

    def _open(self, matcher: Any, *, in_calls: bool) -> None:
        self._matcher, self._in_calls, self.opened = matcher.deep_copy(), in_calls, True

    def _follow(self, token_id: int) -> None:
        """Keeps track of what is syntax: everything but a value, which ends at the next DSML token."""
        if token_id == self._dsml:
            self._in_calls, self._in_value, self._tag = True, False, b""
        elif self._in_calls and not self._in_value:
            self._tag += self._tokenizer.decode_bytes([token_id])
            self._in_value = self._tag.startswith(b"parameter") and any(
                mark in self._tag for mark in _VALUE_MARKS
            )


def _bit(token_id: int) -> int:
    """The bit of an id in its word, as int32."""
    bit = 1 << token_id % 32
    return bit - (1 << 32) if bit >= 1 << 31 else bit
