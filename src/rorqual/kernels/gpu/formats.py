"""Number formats inside Triton kernels: e4m3, e2m1, ue8m0 and packed cache rows, by their bits; bf16 products; sigmoid.

By bits and not by Triton's float8 types: compute capability 8.0 has none, and its interpreter reads NaN codes as
numbers. spec/model.md 2.3, 2.6, 3.1, 5. Every decoded value (code times scale) is exact in bf16.
"""

import triton
import triton.language as tl
from triton import knobs

__all__ = [
    "dot_bf16",
    "e2m1",
    "e2m1_code",
    "e4m3",
    "e8m0",
    "round_bf16",
    "row_address",
    "sigmoid",
    "unpack_rows",
]

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def round_bf16(x):
    """fp32 rounded to bf16 (ties to even), still fp32. The interpreter's own cast cuts off."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def dot_bf16(a, b, total):
    """total + a b, with a and b fp32 [.., ..] that hold bf16 values: exact products, fp32 sums.

    Tensor cores on a GPU; the interpreter (Triton 3.7) multiplies the bits of bf16 as integers, so there it is fp32.
    """
    if INTERPRETED:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)


@triton.jit
def e8m0(byte):
    """int32 bytes to fp32: 2^(byte - 127), 255 is NaN."""
    bits = tl.where(byte == 0, 0x400000, byte << 23)  # 2^-127 is subnormal
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(byte):
    """int32 codes to fp32. Goes through fp16, whose exponent is wider and whose subnormals are fast."""
    half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def e2m1(code):
    """int32 codes 0..15 to fp32."""
    half = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def e2m1_code(size):
    """fp32 magnitudes 0..6 to codes 0..7, to nearest, ties to the even code."""
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    return code + (size > 5.0).to(tl.int32)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) with no overflow on the way."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def row_address(pool, table, row, used, pages, table_pages, page_rows, page_step, ROW: tl.constexpr):
    """Addresses of rows int32 [N] of a paged sequence, and which of those `used` exist; others point to the pool."""
    at = row // page_rows
    named = used & (row >= 0) & (at < table_pages)
    page = tl.load(table + tl.where(named, at, 0), mask=named, other=-1)
    exists = named & (page >= 0) & (page < pages)
    offset = page.to(tl.int64) * page_step + (row % page_rows) * ROW
    return pool + tl.where(exists, offset, 0), exists


@triton.jit
def unpack_rows(base, used, exists, WIDTH: tl.constexpr, ROPE: tl.constexpr, PADDED: tl.constexpr):
    """Packed rows at addresses `base` [N] to fp32 [N, PADDED]: e4m3 by 64, then bf16; NaN where used and not there."""
    NOPE: tl.constexpr = WIDTH - ROPE
    col = tl.arange(0, PADDED)[None, :]
    here = (used & exists)[:, None]
    plain = here & (col < NOPE)
    code = tl.load(base[:, None] + col, mask=plain, other=0).to(tl.int32)
    scale = tl.load(base[:, None] + (NOPE + 2 * ROPE + col // 64), mask=plain, other=127).to(tl.int32)
    turning = here & (col >= NOPE) & (col < WIDTH)
    pair = base[:, None] + (2 * col - NOPE)  # NOPE + 2 * (col - NOPE)
    low = tl.load(pair, mask=turning, other=0).to(tl.int32)
    high = tl.load(pair + 1, mask=turning, other=0).to(tl.int32)
    bits = ((high << 24) | (low << 16)).to(tl.float32, bitcast=True)
    value = tl.where(col < NOPE, e4m3(code) * e8m0(scale), bits)
    return tl.where((used & ~exists)[:, None] & (col < WIDTH), float("nan"), value)
