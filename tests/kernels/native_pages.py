"""Rows in pages as a sequence's cache holds them, for the tests of the native attention and index kernels."""

import torch

from rorqual.kernels import Paged


def in_pages(rows, *, page_rows, generator):
    """uint8 [n, row bytes] in pages out of order, among foreign pages and with bytes between them; and the pages."""
    count, size = rows.shape
    pages = -(-count // page_rows)
    pool = torch.randint(0, 256, (pages + 3, page_rows * size + 24), dtype=torch.uint8, generator=generator)
    table = torch.randperm(pages + 3, generator=generator)[:pages].int()
    for number, row in enumerate(rows):
        at = number % page_rows * size
        pool[table[number // page_rows], at : at + size] = row
    return Paged(pool=pool, table=table, page_rows=page_rows)
