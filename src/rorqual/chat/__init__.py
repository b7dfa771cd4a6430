"""Chat protocol of DeepSeek-V4: messages to text and ids, completions back to messages.

Text in, text out; needs nothing but the standard library (`Tokenizer` needs: pip install 'rorqual[model]').
"""

from __future__ import annotations

from .bpe import train_bpe
from .errors import ChatError, ParseError, RenderError, TokenizerError
from .messages import Diagnostic, Message, ToolCall
from .renderer import render, render_bridge, render_segments
from .segments import Segment
from .tokenizer import Encoded, StreamDecoder, Tokenizer

__all__ = [
    "ChatError",
    "Diagnostic",
    "Encoded",
    "Message",
    "ParseError",
    "RenderError",
    "Segment",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "render",
    "render_bridge",
    "render_segments",
    "train_bpe",
]
