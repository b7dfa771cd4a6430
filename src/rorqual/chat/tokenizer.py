"""Tokenizer: ids of rendered segments, and text from ids, one by one if need be.

Wraps a HF `tokenizers` file (the official one or one of ours, bpe.py). Special segments become their id;
texts are encoded by a twin without added tokens, so no text forges a special token (spec/encoding.md 1).
Decoding is by bytes and keeps every special string. Owns ids; never renders and never parses.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .errors import TokenizerError
from .profile import BOS, EOS, PAD, SPECIAL_TOKENS
from .segments import Segment

_SURROGATE = re.compile("[\ud800-\udfff]")


def tokenizers_library() -> Any:
    """The `tokenizers` package. Raises TokenizerError naming the command if it is not installed."""
    try:
        import tokenizers  # here, not on top: heavy and optional
    except ImportError:
        raise TokenizerError(
            "tokenizing needs the `tokenizers` package: pip install 'rorqual[model]'"
        ) from None
    return tokenizers


def _byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in kept}
    rest = [b for b in range(256) if b not in set(kept)]
    return table | {chr(0x100 + i): b for i, b in enumerate(rest)}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of a conversation with their origin; the three lists have the same length."""

    ids: list[int]
    generated: list[bool]
    """Loss mask: True where the model itself writes the token. False if it reaches into prompt text."""
    turns: list[int]
    """`Segment.turn` of the segment in which the token starts."""


class Tokenizer:
    """A byte-level BPE that carries the V4 format. Make one with `from_file` or `train_bpe`."""

    def __init__(self, serialized: str, *, name: str = "tokenizer") -> None:
        """serialized: a tokenizer.json as text. Raises TokenizerError if a string the format uses is not one
        token, or if the vocabulary is not byte-level."""
        library = tokenizers_library()
        try:
            spec = json.loads(serialized)
            full = library.Tokenizer.from_str(serialized)
            added = {t["content"]: t["id"] for t in spec.get("added_tokens") or ()}
            plain = library.Tokenizer.from_str(
                json.dumps({**spec, "added_tokens": [], "truncation": None, "padding": None})
            )
        except Exception as error:  # the library raises bare Exception on malformed files
            raise TokenizerError(f"{name}: not a tokenizer.json: {error}") from None
        self.serialized: str = serialized
        """The tokenizer.json it was made from."""
        self._plain = plain
        self._ids: dict[str, int] = added
        self._special_texts = {i: s for s, i in added.items()}
        for text in SPECIAL_TOKENS:
            found = full.encode(text, add_special_tokens=False).ids
            if text != PAD and (text not in added or found != [added[text]]):
                raise TokenizerError(
                    f"{name}: {text!r} is not one token (it encodes to {found}): this tokenizer cannot"
                    " carry the V4 format; use the model's own tokenizer.json, or train one with train_bpe"
                )
        self.vocab_size: int = max(full.get_vocab(with_added_tokens=True).values()) + 1
        """Ids are below this."""
        self.bos_id: int = added[BOS]
        self.eos_id: int = added[EOS]
        self._bytes = self._byte_table(full, name)

    def _byte_table(self, full: Any, name: str) -> list[bytes | None]:
        alphabet = _byte_alphabet()
        table: list[bytes | None] = [None] * self.vocab_size
        for token, token_id in full.get_vocab(with_added_tokens=True).items():
            if token_id in self._special_texts:
                table[token_id] = self._special_texts[token_id].encode()
                continue
            try:
                table[token_id] = bytes(alphabet[c] for c in token)
            except KeyError:
                raise TokenizerError(f"{name}: token {token_id} {token!r} is not byte-level") from None
        return table

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a tokenizer.json (or the folder that holds one). Raises TokenizerError naming the file."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            serialized = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file}: cannot be read: {error}") from None
        return cls(serialized, name=str(file))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json that HF reads too (a folder gets one inside); atomic."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", encoding="utf-8") as handle:
                handle.write(self.serialized)
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise TokenizerError(f"{file}: cannot be written: {error}") from error

    def token_id(self, special: str) -> int:
        """Id of a special token by its string. Raises TokenizerError if there is none."""
        try:
            return self._ids[special]
        except KeyError:
            raise TokenizerError(f"this tokenizer has no special token {special!r}") from None

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special (added) token, never the result of text."""
        return token_id in self._special_texts

    def encode_text(self, text: str) -> list[int]:
        """Ids of text. Never a special id, whatever the text spells."""
        return list(self._plain.encode(_encodable(text), add_special_tokens=False).ids)

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of rendered segments: specials by id, neighbouring texts joined and encoded (spec 1)."""
        ids: list[int] = []
        for special, group in groupby(segments, key=lambda s: s.special):
            if special:
                ids.extend(self.token_id(s.text) for s in group)
            else:
                ids.extend(self.encode_text("".join(s.text for s in group)))
        return ids

    def encode_conversation(self, segments: Iterable[Segment]) -> Encoded:
        """The ids of `encode_segments` with loss mask and turn of each."""
        out = Encoded([], [], [])
        for special, group in groupby(segments, key=lambda s: s.special):
            if special:
                for s in group:
                    out.ids.append(self.token_id(s.text))
                    out.generated.append(s.generated)
                    out.turns.append(s.turn)
            else:
                self._encode_run(list(group), out)
        return out

    def _encode_run(self, run: Sequence[Segment], out: Encoded) -> None:
        encoded = self._plain.encode(_encodable("".join(s.text for s in run)), add_special_tokens=False)
        out.ids.extend(encoded.ids)
        ends: list[int] = []
        for s in run:
            ends.append((ends[-1] if ends else 0) + len(s.text))
        at = 0
        for start, end in encoded.offsets:
            while start >= ends[at]:
                at += 1
            last = at
            while end > ends[last]:
                last += 1
            out.generated.append(all(s.generated for s in run[at : last + 1]))
            out.turns.append(run[at].turn)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids, special strings included. Raises TokenizerError for an unknown id."""
        return b"".join(self._piece(i) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special strings included; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int]) -> Iterator[tuple[str, bool]]:
        """(text, is_special) in order, for `StreamParser.push_piece`: marked special = a real token."""
        decoder = StreamDecoder(self)
        for token_id in ids:
            yield from decoder.push_pieces(token_id)
        if rest := decoder.finish():
            yield rest, False

    def _piece(self, token_id: int) -> bytes:
        piece = self._bytes[token_id] if 0 <= token_id < self.vocab_size else None
        if piece is None:
            raise TokenizerError(f"id {token_id} is not in the vocabulary (0 to {self.vocab_size - 1})")
        return piece


class StreamDecoder:
    """Text of one stream of ids as it comes; a character cut across tokens waits until it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became complete with this id; special strings included."""
        return self._utf8.decode(self._tokenizer._piece(token_id))

    def push_pieces(self, token_id: int) -> list[tuple[str, bool]]:
        """As `push`, but as (text, is_special) pairs; no empty texts."""
        if self._tokenizer.is_special(token_id):
            head = self.finish()
            special = (self._tokenizer._special_texts[token_id], True)
            return [(head, False), special] if head else [special]
        text = self.push(token_id)
        return [(text, False)] if text else []

    def finish(self) -> str:
        """What is left: U+FFFD if the stream ended inside a character, else nothing. Starts anew."""
        return self._utf8.decode(b"", final=True)


def _encodable(text: str) -> str:
    """Lone surrogates (from JSON escapes) have no bytes: U+FFFD, one for one, so offsets stay."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
