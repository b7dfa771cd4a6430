"""Errors of the engine room.

EngineError
├── ContextOverflow   the tokens do not fit the model's context or the cache budget (fields: tokens, limit)
├── PromptError       a prompt is empty or holds ids outside the vocabulary
└── SequenceFileError a saved sequence is unreadable, or of another model
"""

from __future__ import annotations

__all__ = ["ContextOverflow", "EngineError", "PromptError", "SequenceFileError"]


class EngineError(RuntimeError):
    """Base of everything this room raises on bad input."""


class PromptError(EngineError):
    """A prompt is empty or holds ids outside the vocabulary."""


class ContextOverflow(EngineError):
    """More tokens than the context or the cache budget holds; nothing was computed or changed."""

    def __init__(self, message: str, *, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens, self.limit = tokens, limit


class SequenceFileError(EngineError):
    """A saved sequence is unreadable, or belongs to another model."""
