"""Sampling: temperature, top-p, and randomness that is a pure function of (seed, sequence, position).

u = philox4x32-10(key=seed, counter=(position, sequence)); token = inverse CDF at u, over ids in order. So a draw
never depends on what else is in the batch, nor on what was drawn before (DESIGN.md rule 7; spec/rl.md 4).
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Allowed", "SamplingParams", "TokenGuide", "philox_uniform", "sample"]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one generation samples and when it ends."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens with at least this probability; 1 keeps all."""
    seed: int = 0
    sequence: int = 0
    """Names the sequence within the seed: same seed and sequence, same draws."""
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    """Generation ends after one of these (it is part of the output)."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected above 0 and at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Allowed:
    """What the next token of one row may be, and how it is drawn."""

    bits: NDArray[np.uint32] | None = None
    """[ceil(V / 32)] words; bit i % 32 of word i // 32 allows token i. None: every token."""
    greedy: bool = False
    """The likeliest allowed token, whatever the temperature: for syntax."""


TokenGuide = Callable[[int | None], Allowed | None]
"""Of one row: told each token that was sampled (before the first: None), it says what the next one may be (None:
anything). It is asked once for each token, in order, whatever happens to the row in between."""


def philox_uniform(seeds: np.ndarray, sequences: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1), one per element; Philox 4x32 with 10 rounds (Salmon et al. 2011).

    seeds, sequences, positions: integer arrays of one shape, taken modulo 2^64.
    """
    key0, key1 = _words(seeds)
    c0, c1 = _words(positions)
    c2, c3 = _words(sequences)
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> _32) ^ c1 ^ key0,
            second & _MASK,
            (first >> _32) ^ c3 ^ key1,
            first & _MASK,
        )
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    bits = (c0 << np.uint64(21)) ^ (c1 >> np.uint64(11))  # 53 bits
    uniform: np.ndarray = bits.astype(np.float64) * 2.0**-53
    return uniform


def _words(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = np.asarray(values).astype(np.uint64)
    return wide & _MASK, wide >> _32


def sample(
    logits: Tensor,
    params: list[SamplingParams],
    positions: list[int],
    *,
    allowed: Sequence[Allowed | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token per row: ids int64 [B] and their fp32 log-probabilities [B].

    logits fp32 [B, V]; positions: how many tokens row b's sequence holds, the one drawn not counted. allowed: per row
    what may be drawn (None: anything). Log-probabilities are of the tempered distribution of the allowed tokens,
    before top-p (greedy rows: temperature 1). Raises ValueError for a mask of the wrong size or without any token.
    """
    if allowed is not None:
        logits = _masked(logits, allowed)
        params = [
            replace(p, temperature=0.0) if one is not None and one.greedy else p
            for p, one in zip(params, allowed, strict=True)
        ]
    temperatures = torch.tensor([p.temperature or 1.0 for p in params])
    log_probs = torch.log_softmax(logits.float() / temperatures[:, None], dim=-1)
    probs = log_probs.double().exp()
    cut = [row for row, p in enumerate(params) if p.top_p < 1 and p.temperature > 0]
    if cut:
        kept = probs[cut]
        order = torch.sort(kept, dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        limits = torch.tensor([params[row].top_p for row in cut], dtype=torch.float64)
        dropped = torch.zeros_like(kept, dtype=torch.bool).scatter_(
            1, order.indices, before >= limits[:, None]
        )
        probs[cut] = kept.masked_fill(dropped, 0.0)
    uniform = philox_uniform(
        np.array([p.seed for p in params]), np.array([p.sequence for p in params]), np.array(positions)
    )
    cdf = probs.cumsum(-1)
    target = torch.from_numpy(uniform)[:, None] * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    greedy = torch.tensor([p.temperature == 0 for p in params])
    ids = torch.where(greedy, logits.argmax(-1), drawn)
    return ids, log_probs.gather(1, ids[:, None])[:, 0]


def _masked(logits: Tensor, allowed: Sequence[Allowed | None]) -> Tensor:
    """A copy in which tokens that are not allowed have no probability."""
    words = -(-logits.shape[1] // 32)
    rows: list[int] = []
    refused: list[NDArray[np.bool_]] = []
    for row, one in enumerate(allowed):
        if one is None or one.bits is None:
            continue
        if one.bits.shape != (words,) or one.bits.dtype.itemsize != 4:
            raise ValueError(
                f"row {row}: a mask is {words} words of 32 bits, got {one.bits.dtype} {list(one.bits.shape)}"
            )
        bytes_ = np.ascontiguousarray(one.bits).astype("<u4", copy=False).view(np.uint8)
        bits = np.unpackbits(bytes_, count=logits.shape[1], bitorder="little")
        if not bits.any():
            raise ValueError(f"row {row}: the mask allows no token")
        rows.append(row)
        refused.append(bits == 0)
    if not rows:
        return logits
    logits = logits.clone()
    logits[rows] = logits[rows].masked_fill(torch.from_numpy(np.stack(refused)), -torch.inf)
    return logits
