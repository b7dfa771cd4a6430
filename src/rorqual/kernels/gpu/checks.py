"""Checks that every GPU op makes before a launch: device, dtype, shape, strides; and the paged rows it may read.

No check reads a tensor's values (that would wait for the GPU): kernels test page numbers and picks where they use
them, and a row that does not exist reads as NaN.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rorqual.kernels.gpu.status import gpu_status

__all__ = ["Pages", "check", "check_pages", "power_of_two", "ready"]


class Pages(Protocol):
    """Rows in pages: row e of a sequence is row e % `page_rows` of page `table[..., e // page_rows]`."""

    @property
    def pool(self) -> Tensor:
        """uint8 [P, page bytes]; a page starts with its rows. Pages may lie any distance apart."""

    @property
    def table(self) -> Tensor:
        """int32 [pages], one sequence; or [T, pages], a row per query (an expanded view costs nothing)."""

    @property
    def page_rows(self) -> int:
        """Rows a page holds."""


def ready(**tensors: Tensor | None) -> torch.device:
    """The device that runs the op. Raises ValueError when it cannot, or when the tensors lie on several."""
    status = gpu_status()
    if not status.available:
        raise ValueError(f"no Triton kernels here: {status.reason}")
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(devices.values()))
    wanted = "cpu" if status.device == "interpreter" else "cuda"
    for name, found in devices.items():
        if found.type != wanted:
            raise ValueError(f"{name} is on {found}, the Triton kernels run on {wanted} ({status.reason})")
        if found != device:
            raise ValueError(f"{name} is on {found}, {next(iter(devices))} on {device}: expected one device")
    return device


def check(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], *, dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """`tensor`, contiguous and detached. Raises ValueError unless it has the shape (None: any size) and a dtype."""
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}, expected {kinds} [{expected}]")
    return tensor.detach().contiguous()


def check_pages(pages: Pages, *, row_bytes: int, queries: int) -> tuple[int, int]:
    """Step of the table from query to query, and pages in a row of it. Raises ValueError when `pages` does not fit."""
    pool, table = pages.pool, pages.table
    if pool.dtype != torch.uint8 or pool.dim() != 2 or pool.stride(1) != 1 or not pool.shape[0]:
        raise ValueError(
            f"pool: {pool.dtype} {list(pool.shape)}, expected uint8 [pages, bytes], bytes adjacent"
        )
    if pages.page_rows < 1 or pages.page_rows * row_bytes > pool.shape[1]:
        raise ValueError(f"{pages.page_rows} rows of {row_bytes} bytes do not fit a page of {pool.shape[1]}")
    if table.dtype != torch.int32 or table.dim() not in (1, 2) or (table.shape[-1] and table.stride(-1) != 1):
        raise ValueError(
            f"page table: {table.dtype} {list(table.shape)}, expected int32 [pages] or [{queries}, pages]"
        )
    if table.dim() == 2 and table.shape[0] != queries:
        raise ValueError(f"page table has {table.shape[0]} rows for {queries} queries")
    return (table.stride(0) if table.dim() == 2 else 0), table.shape[-1]


def power_of_two(size: int, *, least: int = 1) -> int:
    """The smallest power of two that holds `size`, at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())
