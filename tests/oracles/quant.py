"""Block quantisation by looking up the nearest of all code values. Slow, obvious; imports nothing of ours."""

import math

import numpy as np

E4M3 = np.array(
    [
        (-1) ** (c >> 7)
        * (
            ((c & 7) / 8) * 2.0**-6
            if (c >> 3) & 15 == 0
            else (1 + (c & 7) / 8) * 2.0 ** (((c >> 3) & 15) - 7)
        )
        for c in range(256)
    ]
)  # codes 0x7f and 0xff are NaN, not 480
E4M3[[0x7F, 0xFF]] = np.nan
E2M1 = np.array([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])


def quant_dequant(x, block, *, grid, top, floor):
    """x float32 [n] -> float64 [n]: nearest code of `grid`, ties to even, power-of-two scale."""
    out = np.empty(len(x))
    for start in range(0, len(x), block):
        part = x[start : start + block].astype(np.float64)
        scale = 2.0 ** math.ceil(math.log2(max(np.abs(part).max(), floor) / top))
        for i, value in enumerate(part / scale):
            distance = np.abs(np.abs(grid) - abs(value))
            codes = np.flatnonzero(distance == np.nanmin(distance))
            code = min(codes, key=lambda c: (c & 1, c))
            out[start + i] = math.copysign(abs(grid[code]), value) * scale
    return out


def fp8(x, block=64):
    return quant_dequant(x, block, grid=E4M3, top=448, floor=1e-4)


def fp4(x, block=32):
    return quant_dequant(x, block, grid=E2M1, top=6, floor=6 * 2.0**-126)
