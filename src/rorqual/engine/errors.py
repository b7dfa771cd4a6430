"""Errors of the engine room.

EngineError
├── CacheFull         the pool has no room for what was asked (fields: need, limit, in bytes)
├── ContextOverflow   the tokens do not fit the model's context or the cache budget (fields: tokens, limit)
├── PromptError       a prompt is empty or holds ids outside the vocabulary
└── SequenceFileError a saved sequence or a cache file is unreadable, damaged, of another model, or cannot be written
    └── DamagedFile   it is one of ours, and its header is damaged
"""

from __future__ import annotations

__all__ = ["CacheFull", "ContextOverflow", "DamagedFile", "EngineError", "PromptError", "SequenceFileError"]


class EngineError(RuntimeError):
    """Base of everything this room raises on bad input."""


class PromptError(EngineError):
    """A prompt is empty or holds ids outside the vocabulary."""


class CacheFull(EngineError):
    """The pool has no room; nothing was changed. Close sequences, or give the engine more kv_bytes."""

    def __init__(self, message: str, *, need: int, limit: int, key: int | None = None) -> None:
        """key: of the batch's row that could go no further; None outside of a batch."""
        super().__init__(message)
        self.need, self.limit, self.key = need, limit, key


class ContextOverflow(EngineError):
    """More tokens than the context or the cache budget holds; nothing was computed or changed."""

    def __init__(self, message: str, *, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens, self.limit = tokens, limit


class SequenceFileError(EngineError):
    """A saved sequence or cache file is unreadable, damaged or of another model, or could not be written."""


class DamagedFile(SequenceFileError):
    """A file of ours whose header does not match its checksum."""
