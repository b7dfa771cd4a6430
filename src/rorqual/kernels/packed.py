"""Cache rows in the native library, at any instruction level: 584-byte entries, 68-byte index keys, fp32 rows.

Owns the mirror of native/cpu/core.h (the table of a level's kernels and their two jobs) and the faces of the row
functions; kernels/paged.py has those of attention and index. Formats: spec/model.md 2.3, 2.6, 3.1. The reference is
model/quant.py, to the byte. The forward call uses the same functions inside the library.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import CFUNCTYPE, POINTER, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rorqual.kernels.cpu import LIBRARY, load_library

__all__ = [
    "FORMATS",
    "AttendJob",
    "CacheFormat",
    "Core",
    "IndexJob",
    "cache_format_number",
    "check_width",
    "checked_bytes",
    "native_core",
]

CacheFormat = Literal["exact", "packed"]
FORMATS = {"exact": 0, "packed": 1}
"""RQ_EXACT, RQ_PACKED."""
_MAX_WIDTH = 1024


class AttendJob(ctypes.Structure):
    """RqAttend."""

    _fields_ = (
        *((name, c_int32) for name in ("heads", "width", "rope", "window", "format", "page_rows")),
        ("queries", c_int64),
        *(("q", c_void_p), ("q_step", c_int64), ("out", c_void_p), ("out_step", c_int64), ("sink", c_void_p)),
        *(("window_rows", c_void_p), ("window_own", c_int64)),
        *(("entries", c_void_p), ("page_bytes", c_int64), ("pages", c_void_p), ("seen", c_void_p)),
        *(("picks", c_void_p), ("picks_step", c_int64), ("pick_counts", c_void_p)),
    )


class IndexJob(ctypes.Structure):
    """RqIndex."""

    _fields_ = (
        *((name, c_int32) for name in ("heads", "width", "format", "top_k", "page_rows")),
        ("queries", c_int64),
        *(("q", c_void_p), ("q_step", c_int64), ("weights", c_void_p), ("weights_step", c_int64)),
        *(("keys", c_void_p), ("page_bytes", c_int64), ("pages", c_void_p), ("seen", c_void_p)),
        *(("picks", c_void_p), ("picks_step", c_int64), ("pick_counts", c_void_p)),
    )


_A, _I = POINTER(AttendJob), POINTER(IndexJob)
_NAMES: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("entry_bytes", c_int64, (c_int32, c_int32, c_int32)),
    ("key_bytes", c_int64, (c_int32, c_int32)),
    ("pack_entries", None, (c_int32, c_void_p, c_int64, c_int32, c_int32, c_void_p)),
    ("unpack_entries", None, (c_int32, c_void_p, c_int64, c_int32, c_int32, c_void_p)),
    ("pack_keys", None, (c_int32, c_void_p, c_int64, c_int32, c_void_p)),
    ("unpack_keys", None, (c_int32, c_void_p, c_int64, c_int32, c_void_p)),
    ("round_entries", None, (c_int32, c_void_p, c_int64, c_int32, c_int32)),
    ("round_keys", None, (c_int32, c_void_p, c_int64, c_int32)),
    ("hadamard", None, (c_void_p, c_int64, c_int32)),
    ("entries_to_bf16", None, (c_void_p, c_int64, c_int32, c_int32, c_void_p)),
    ("attend_scratch", c_int64, (_A,)),
    ("attend", None, (_A, c_int64, c_int64, c_void_p)),
    ("attend_heads", None, (_A, c_int64, c_int32, c_int32, c_void_p)),
    ("attend_parts", c_int64, (_A, c_int64)),
    ("attend_partial_bytes", c_int64, (_A,)),
    ("attend_part", None, (_A, c_int64, c_int64, c_void_p, c_void_p)),
    ("attend_merge", None, (_A, c_int64, c_void_p, c_int64, c_void_p)),
    ("index_scratch", c_int64, (_I,)),
    ("index_topk", None, (_I, c_int64, c_int64, c_void_p)),
    ("index_partial_bytes", c_int64, (_I,)),
    ("index_part", None, (_I, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    ("index_merge", None, (_I, c_int64, c_void_p, c_int64, c_void_p)),
)


class _Table(ctypes.Structure):
    """RqCore."""

    _fields_ = tuple((name, CFUNCTYPE(result, *arguments)) for name, result, arguments in _NAMES)


class Core:
    """The kernels of one level: `call.NAME` is RqCore's function, the methods are its checked faces."""

    def __init__(self, table: Any, level: str) -> None:
        self.call, self.level = table, level

    def pack_entries(self, x: Tensor, *, rope_dim: int, cache_format: CacheFormat = "packed") -> Tensor:
        """fp32 [..., D] -> uint8 [..., entry bytes]. Raises ValueError on another dtype or width."""
        x, form = _rows(x, "entries"), cache_format_number(cache_format)
        width = check_width(x.shape[-1], rope_dim)
        out = torch.empty(*x.shape[:-1], self.call.entry_bytes(form, width, rope_dim), dtype=torch.uint8)
        count = x.numel() // width
        self.call.pack_entries(form, x.data_ptr(), count, width, rope_dim, out.data_ptr())
        return out

    def unpack_entries(
        self, rows: Tensor, *, width: int, rope_dim: int, cache_format: CacheFormat = "packed"
    ) -> Tensor:
        """uint8 [..., entry bytes] -> fp32 [..., D]. Raises ValueError when the rows have another size."""
        form = cache_format_number(cache_format)
        size = self.call.entry_bytes(form, check_width(width, rope_dim), rope_dim)
        rows = checked_bytes(rows, size, "entries")
        out = torch.empty(*rows.shape[:-1], width)
        count = rows.numel() // size
        self.call.unpack_entries(form, rows.data_ptr(), count, width, rope_dim, out.data_ptr())
        return out

    def entries_to_bf16(self, rows: Tensor, *, width: int, rope_dim: int) -> Tensor:
        """Packed uint8 [..., entry bytes] -> bf16 [..., D], as the attention core reads them."""
        size = self.call.entry_bytes(1, check_width(width, rope_dim), rope_dim)
        rows = checked_bytes(rows, size, "entries")
        out = torch.empty(*rows.shape[:-1], width, dtype=torch.bfloat16)
        self.call.entries_to_bf16(rows.data_ptr(), rows.numel() // size, width, rope_dim, out.data_ptr())
        return out

    def round_entries(self, x: Tensor, *, rope_dim: int) -> Tensor:
        """fp32 [..., D] as the packed format gives it back."""
        x = _rows(x, "entries").clone()
        self.call.round_entries(
            1, x.data_ptr(), x.numel() // check_width(x.shape[-1], rope_dim), x.shape[-1], rope_dim
        )
        return x

    def pack_keys(self, x: Tensor, *, cache_format: CacheFormat = "packed") -> Tensor:
        """fp32 [..., D] -> uint8 [..., key bytes]; nothing is rotated here. Raises ValueError on another dtype."""
        x, form = _rows(x, "keys"), cache_format_number(cache_format)
        out = torch.empty(*x.shape[:-1], self.call.key_bytes(form, x.shape[-1]), dtype=torch.uint8)
        self.call.pack_keys(form, x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], out.data_ptr())
        return out

    def unpack_keys(self, rows: Tensor, *, width: int, cache_format: CacheFormat = "packed") -> Tensor:
        """uint8 [..., key bytes] -> fp32 [..., D]. Raises ValueError when the rows have another size."""
        form = cache_format_number(cache_format)
        size = self.call.key_bytes(form, check_width(width, 0))
        rows = checked_bytes(rows, size, "keys")
        out = torch.empty(*rows.shape[:-1], width)
        self.call.unpack_keys(form, rows.data_ptr(), rows.numel() // size, width, out.data_ptr())
        return out

    def round_keys(self, x: Tensor) -> Tensor:
        """fp32 [..., D] as the packed format gives it back."""
        x = _rows(x, "keys").clone()
        self.call.round_keys(1, x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1])
        return x

    def hadamard(self, x: Tensor) -> Tensor:
        """fp32 [..., D] times H/sqrt(D). Raises ValueError when D is not a power of two."""
        x = _rows(x, "keys").clone()
        if x.shape[-1] & (x.shape[-1] - 1):
            raise ValueError(f"hadamard: the last dim is {x.shape[-1]}, expected a power of two")
        self.call.hadamard(x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1])
        return x


@functools.lru_cache(maxsize=16)
def native_core(level: str | None = None, *, path: Path = LIBRARY) -> Core:
    """The kernels of `level` (None: the best this CPU runs).

    Raises OSError when the library cannot be used, ValueError for a level that this CPU does not run.
    """
    library = load_library(path)
    if library is None:
        raise OSError(f"{path}: the native CPU library is not available; `rorqual doctor` says why")
    level = level or library.level
    if level not in library.levels:
        raise ValueError(f"level {level!r} does not run here; these do: {', '.join(library.levels)}")
    find = library._library.rq_core
    find.restype, find.argtypes = POINTER(_Table), [c_int32]
    return Core(find(library.levels[level]).contents, level)


def cache_format_number(name: str) -> int:
    if name not in FORMATS:
        raise ValueError(f"cache format {name!r}, expected 'exact' or 'packed'")
    return FORMATS[name]


def check_width(width: int, rope_dim: int) -> int:
    if not (0 < width <= _MAX_WIDTH and 0 <= rope_dim <= width):
        raise ValueError(f"width {width} with {rope_dim} rotating dims, expected 1..{_MAX_WIDTH} and no more")
    return width


def _rows(x: Tensor, what: str) -> Tensor:
    if x.dtype != torch.float32 or x.dim() < 1 or not 0 < x.shape[-1] <= _MAX_WIDTH:
        raise ValueError(f"{what}: {x.dtype} {list(x.shape)}, expected fp32 [..., 1..{_MAX_WIDTH}]")
    return x.detach().contiguous()


def checked_bytes(rows: Tensor, size: int, what: str) -> Tensor:
    if rows.dtype != torch.uint8 or rows.dim() < 1 or rows.shape[-1] != size:
        raise ValueError(f"{what}: {rows.dtype} {list(rows.shape)}, expected uint8 [..., {size}]")
    return rows.contiguous()
