"""Training of small BPE tokenizers that carry the V4 format.

Byte-level over all 256 bytes, so any text round-trips; no regex split, so a merge may run across spaces
and quotes (a whole scaffold such as `parameter name="command" string="true">` becomes one token); each digit
is its own token. Special tokens come first, BOS 0, EOS 1 and pad 2 as in V4. Deterministic: same
corpus, same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from .errors import TokenizerError
from .profile import SPECIAL_TOKENS
from .segments import Segment
from .tokenizer import Tokenizer, tokenizers_library

SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)


def train_bpe(corpus: Iterable[Sequence[Segment]], *, vocab_size: int) -> Tokenizer:
    """Learns merges from rendered conversations; only text is looked at, specials split it.

    vocab_size: ids wanted, specials and 256 bytes included; a small corpus may yield fewer.
    Raises TokenizerError if vocab_size is below 256 + number of special tokens.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small: {SMALLEST_VOCAB} or more"
            f" (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    library = tokenizers_library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Digits(individual_digits=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[library.AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS],
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer=trainer)
    return Tokenizer(tokenizer.to_str(), name="trained tokenizer")


def _texts(corpus: Iterable[Sequence[Segment]]) -> Iterator[str]:
    for segments in corpus:
        for special, group in groupby(segments, key=lambda s: s.special):
            if not special:
                yield "".join(s.text for s in group)
