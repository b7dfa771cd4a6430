"""What the tests of the Triton kernels share: the device they run on, paged rows out of order, and nothing of the ops.

On a machine with a GPU they run there; else Triton interprets the kernels on CPU tensors. Without triton: skipped, with
the reason that `rorqual doctor` gives. `make test-gpu` installs triton (0.7 GB) into the virtual environment.
"""

import os
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from rorqual.kernels.gpu import gpu_status

if not gpu_status().available:
    pytest.skip(gpu_status().reason, allow_module_level=True)
DEVICE = "cpu" if gpu_status().device == "interpreter" else "cuda"


@dataclass(frozen=True, kw_only=True)
class Rows:
    pool: torch.Tensor
    table: torch.Tensor
    page_rows: int


def paged(rows: torch.Tensor, *, page_rows: int, spare: int = 3, seed: int = 0) -> Rows:
    """uint8 [n, bytes] spread over shuffled pages, with garbage between and in the pages that are not named."""
    generator = torch.Generator().manual_seed(seed)
    count, size = rows.shape
    pages = -(-count // page_rows)
    step = page_rows * size + 12
    pool = torch.randint(0, 256, (pages + spare, step), dtype=torch.uint8, generator=generator)
    table = torch.randperm(pages + spare, generator=generator)[:pages].int()
    for row in range(count):
        at = row % page_rows * size
        pool[table[row // page_rows], at : at + size] = rows[row]
    return Rows(pool=pool.to(DEVICE), table=table.to(DEVICE), page_rows=page_rows)
