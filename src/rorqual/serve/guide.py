"""Guides: how a request's tools, its forced call or its JSON schema hold the engine to what can be read.

Owns the step from a `Conversation` to a `TokenGuide`; what may come when is `rorqual.chat`'s constraint.
"""

from __future__ import annotations

import numpy as np

from rorqual.chat import ChatError, Constrainer, Constraint
from rorqual.engine import Allowed, TokenGuide
from rorqual.serve.conversation import Conversation
from rorqual.serve.errors import BadRequest

__all__ = ["answer_guide", "check_constraint"]

MAX_RESERVE = 1024
"""A reasoning is ended when so many tokens are left for what must follow it, or a quarter of all."""


def check_constraint(
    conversation: Conversation, constrainer: Constrainer, *, thinking: bool
) -> Constraint | None:
    """The constraint of an answer; None: it is free. Raises BadRequest for a schema that cannot be followed."""
    tools = [] if conversation.tool_choice == "none" else conversation.tools
    if not tools and conversation.schema is None:
        return None
    try:
        return constrainer.constraint(
            thinking=thinking,
            tools=tools,
            required=conversation.tool_choice == "required",
            only=conversation.forced_tool,
            parallel=conversation.parallel,
            schema=conversation.schema,
        )
    except ChatError as error:
        param = conversation.schema_place if conversation.schema is not None else "tools"
        raise BadRequest(str(error), param=param, code="invalid_schema") from None


def answer_guide(constraint: Constraint, *, words: int, max_tokens: int) -> TokenGuide:
    """What the engine asks. words: 32-bit words of a mask over the model's vocabulary, which may be larger."""
    reserve = min(max(max_tokens // 4, 1), MAX_RESERVE)
    drawn = 0

    def guide(token: int | None) -> Allowed | None:
        nonlocal drawn
        if token is not None:
            constraint.push(token)
            drawn += 1
        if not constraint.active:
            return None
        mask = np.zeros(words, np.int32)
        if (
            not constraint.fill(mask[: constraint.words], ending=max_tokens - drawn <= reserve)
            or not mask.any()
        ):
            return None  # a grammar at its wits' end lets go
        return Allowed(bits=mask.view(np.uint32), greedy=constraint.greedy)

    return guide
