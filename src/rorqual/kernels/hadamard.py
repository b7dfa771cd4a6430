"""Sylvester Walsh-Hadamard rotation of the indexer's queries and keys, orthonormal.     (spec/model.md 2.6)

q.k is unchanged by it; it spreads outliers before FP4 rounding, so it belongs on both sides or on neither.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["hadamard"]


@functools.lru_cache(maxsize=8)
def _matrix(size: int) -> Tensor:
    matrix: Tensor = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    scaled: Tensor = matrix * size**-0.5
    return scaled


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] times H_D / sqrt(D). Raises ValueError when D is not a power of two."""
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"hadamard: the last dim is {size}, expected a power of two")
    return x @ _matrix(size).to(x)
