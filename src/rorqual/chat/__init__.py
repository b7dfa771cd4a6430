"""Chat protocol of DeepSeek-V4: messages to text and ids, completions back to messages.

Text in, text out; needs nothing but the standard library (`Tokenizer` needs: pip install 'rorqual[model]').
"""

from __future__ import annotations

from .bpe import train_bpe
from .constraint import Constrainer, Constraint
from .errors import ChatError, ParseError, RenderError, TokenizerError
from .events import Event
from .machine import ParserOptions
from .messages import Diagnostic, Message, ToolCall
from .parser import StreamParser, new_call_id, parse, parse_pieces
from .renderer import render, render_bridge, render_segments
from .segments import Segment
from .tokenizer import Encoded, StreamDecoder, Tokenizer

__all__ = [
    "ChatError",
    "Constrainer",
    "Constraint",
    "Diagnostic",
    "Encoded",
    "Event",
    "Message",
    "ParseError",
    "ParserOptions",
    "RenderError",
    "Segment",
    "StreamDecoder",
    "StreamParser",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "new_call_id",
    "parse",
    "parse_pieces",
    "render",
    "render_bridge",
    "render_segments",
    "train_bpe",
]
