"""Errors of the chat room.

ChatError
├── RenderError       a conversation cannot be written in the format: names the message and the field
├── ParseError        a completion is malformed and strict parsing was asked for: names the offset
└── TokenizerError    a tokenizer is missing, unreadable, or cannot carry the format
"""

from __future__ import annotations

__all__ = ["ChatError", "ParseError", "RenderError", "TokenizerError"]


class ChatError(Exception):
    """Base of everything this room raises on bad input."""


class RenderError(ChatError):
    """A conversation cannot be rendered. `message_index` counts the caller's messages."""

    def __init__(self, text: str, *, message_index: int | None = None, field: str | None = None) -> None:
        where = (
            ""
            if message_index is None
            else f"messages[{message_index}]" + (f".{field}" if field else "") + ": "
        )
        super().__init__(where + text)
        self.message_index = message_index
        self.field = field


class ParseError(ChatError):
    """Strict parsing found something the official grammar does not allow. `offset` counts characters."""

    def __init__(self, text: str, *, offset: int) -> None:
        super().__init__(f"completion, character {offset}: {text}")
        self.offset = offset


class TokenizerError(ChatError):
    """A tokenizer cannot be loaded or cannot carry the format: names the file or the string at fault."""
