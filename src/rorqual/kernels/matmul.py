"""Matrix products with weights as checkpoints hold them: fp32, bf16, FP8 and FP4 with their scales.

    y[r, o] = sum_k round(x[r, k]) * w[o, k],    w = code * 2^(scale - 127)      (formats: spec/model.md 3.1, 5)

round() is to bf16 for every kind but f32; sums are fp32. `matmul` is the reference in torch, `matmul_cpu` a level of
native/cpu/gemm.cpp over the same tensors in place. Owns the checks before pointers cross and the mirror of RqGemm.
Kinds: f32 float32 [O, K]; bf16 bfloat16 [O, K]; fp8 e4m3 (float8_e4m3fn or its bytes) [O, K] with a scale per square of
`block`, [ceil(O / block), ceil(K / block)]; fp4 e2m1 pairs, low nibble first, (u)int8 [O, K / 2] with a scale per 32
along K, [O, ceil(K / 32)]. Scales are ue8m0 (uint8 or float8_e8m0fnu), 255 is NaN. Letters: O outputs, R rows.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import CFUNCTYPE, POINTER, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rorqual.kernels.cpu import LIBRARY, MatrixPointers, load_library

__all__ = ["matmul", "matmul_cpu"]

Kind = Literal["f32", "bf16", "fp8", "fp4"]
_TYPES = {"f32": 0, "bf16": 1, "fp8": 2, "fp4": 3}
_DTYPES = {
    "f32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "fp8": (torch.float8_e4m3fn, torch.uint8),
    "fp4": (torch.uint8, torch.int8),
}
_BLOCKS = {"f32": (0,), "bf16": (0,), "fp8": (128, 32), "fp4": (32,)}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class _Table(ctypes.Structure):
    """RqGemm."""

    _fields_ = (
        ("scratch", CFUNCTYPE(c_int64, c_int64)),
        (
            "matmul",
            CFUNCTYPE(
                None,
                *(POINTER(MatrixPointers), c_int64, c_int64, c_int64),
                *(c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p),
            ),
        ),
    )


def matmul(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, kind: Kind, block: int | None = None
) -> Tensor:
    """fp32 [..., K] times a weight [O, K] -> fp32 [..., O], in torch (module docstring for kinds).

    `block`: None means 128 for fp8. Raises ValueError when dtypes, shapes or the block do not fit the kind.
    """
    width, _ = _check(x, weight, scale, kind=kind, block=block)
    block = block or _BLOCKS[kind][0]
    if kind == "f32":
        return x @ weight.T
    values = weight.float() if kind == "bf16" else _values(weight, kind)[:, :width]
    if scale is not None:
        byte = scale.view(torch.uint8).to(torch.int32)
        factor = torch.where(byte == 0, 2.0**-127, (byte << 23).view(torch.float32))
        factor = torch.where(byte == 255, torch.nan, factor).repeat_interleave(block, 1)[:, :width]
        if kind == "fp8":
            factor = factor.repeat_interleave(block, 0)[: weight.shape[0]]
        values = values * factor
    return x.bfloat16().float() @ values.T


def matmul_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    kind: Kind,
    block: int | None = None,
    outputs: range | None = None,
    level: str | None = None,
    path: Path = LIBRARY,
) -> Tensor:
    """`matmul` by the native kernels on one thread: fp32 [..., K] -> fp32 [..., O], or [..., len(outputs)].

    `outputs` (step 1) picks rows of the weight; no bit of a result depends on it, nor on the other rows of x. `level`:
    None takes the best this CPU runs. A weight below 2^-126 in magnitude may count as 0. Raises ValueError as `matmul`
    does and for outputs or a level that are not there, OSError when the native library is not available.
    """
    width, rows = _check(x, weight, scale, kind=kind, block=block)
    table = _table(level, path=path)
    total = weight.shape[0]
    outputs = range(total) if outputs is None else outputs
    if outputs.step != 1 or not 0 <= outputs.start <= outputs.stop <= total:
        raise ValueError(f"outputs {outputs}: expected a range of step 1 within 0..{total}")
    x, weight = x.detach().contiguous(), weight.detach()
    y = torch.empty(*x.shape[:-1], len(outputs))
    scratch = torch.empty(table.scratch(width), dtype=torch.uint8)  # torch aligns to 64
    matrix = MatrixPointers()
    matrix.data, matrix.type, matrix.block = weight.data_ptr(), _TYPES[kind], block or _BLOCKS[kind][0]
    matrix.scale = None if scale is None else scale.data_ptr()
    sizes = (width, outputs.start, len(outputs))
    at = (x.data_ptr(), width, rows, y.data_ptr(), len(outputs), scratch.data_ptr())
    table.matmul(matrix, *sizes, *at)
    return y


@functools.lru_cache(maxsize=16)
def _table(level: str | None, *, path: Path) -> Any:
    library = load_library(path)
    if library is None:
        raise OSError(f"{path}: the native CPU library is not available; `rorqual doctor` says why")
    level = level or list(library.levels)[-1]
    if level not in library.levels:
        raise ValueError(f"level {level!r} does not run here; these do: {', '.join(library.levels)}")
    find = library._library.rq_gemm
    find.restype, find.argtypes = POINTER(_Table), [c_int32]
    return find(library.levels[level]).contents


def _check(
    x: Tensor, weight: Tensor, scale: Tensor | None, *, kind: Kind, block: int | None
) -> tuple[int, int]:
    """K and the number of rows of x. Raises ValueError."""
    if kind not in _TYPES:
        raise ValueError(f"kind {kind!r}, expected one of {', '.join(_TYPES)}")
    if weight.dtype not in _DTYPES[kind] or weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(
            f"{kind} weight: {weight.dtype} {list(weight.shape)}, strides {list(weight.stride())}; "
            f"expected contiguous {_DTYPES[kind][0]} [outputs, {'K / 2' if kind == 'fp4' else 'K'}]"
        )
    width = weight.shape[1] * (2 if kind == "fp4" else 1)
    if x.dtype != torch.float32 or x.dim() < 1 or x.shape[-1] != width or width < 1:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, this {kind} weight expects float32 [..., {width}]")
    if any(t is not None and t.device.type != "cpu" for t in (x, weight, scale)):
        raise ValueError("x, weight and scale must be on the CPU")
    blocks = _BLOCKS[kind]
    if block is not None and block not in blocks:
        raise ValueError(f"{kind} with blocks of {block}, expected {' or '.join(map(str, blocks))}")
    block = block or blocks[0]
    if not block:
        if scale is not None:
            raise ValueError(f"a {kind} weight has no scale")
        return width, x.numel() // width
    if scale is None:
        raise ValueError(f"a {kind} weight needs its scale")
    need = [-(-weight.shape[0] // block) if kind == "fp8" else weight.shape[0], -(-width // block)]
    if (
        scale.dtype not in (torch.uint8, torch.float8_e8m0fnu)
        or list(scale.shape) != need
        or not scale.is_contiguous()
    ):
        raise ValueError(
            f"scale of this {kind} weight: {scale.dtype} {list(scale.shape)}, expected contiguous uint8 {need}"
        )
    return width, x.numel() // width


def _values(weight: Tensor, kind: Kind) -> Tensor:
    """fp32 values of the codes, [O, K]."""
    if kind == "fp8":
        return weight.view(torch.float8_e4m3fn).float()
    codes = weight.view(torch.uint8)
    codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    return torch.tensor(_E2M1 + tuple(-v for v in _E2M1))[codes.long()]
