"""Quantisation: FP8 and FP4 blocks, the packed cache entries, and the packed weights of official checkpoints.

    s = 2^ceil(log2(max(amax, floor) / top)),  q = round(x / s),  x' = q * s    (spec/model.md 2.3, 2.6, 5)

FP8 is e4m3 (top 448, floor 1e-4), FP4 is e2m1 (top 6, floor 6 * 2^-126); s is ue8m0: byte b means 2^(b-127).
Rounding is to nearest, ties to the even code. A block that holds a NaN or an infinity becomes NaN as a whole
(scale byte 255), so bad numbers are seen and never turned into plausible ones.
Owns numbers and byte layouts. Never decides what is quantised: attention.py, indexer.py and checkpoint.py do.
A last dim that is no multiple of the block has a shorter last block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.model.cost import entry_bytes, index_key_bytes
from rorqual.model.errors import CheckpointError

__all__ = [
    "decode_e8m0",
    "fp4_block",
    "fp8_block",
    "pack_entry",
    "pack_fp4_weight",
    "pack_fp8_weight",
    "pack_index_key",
    "quant_dequant_entry",
    "quant_dequant_fp4",
    "quant_dequant_fp8",
    "unpack_entry",
    "unpack_fp4_weight",
    "unpack_fp8_weight",
    "unpack_index_key",
]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0..7; bit 3 is the sign."""
FP8_FLOOR = 1e-4
FP4_FLOOR = 6.0 * 2.0**-126
_MAGIC = 1.5 * 2.0**23  # adding and subtracting s * _MAGIC rounds a float32 to a multiple of s, ties to even


def _scale_byte(amax: Tensor, *, fp4: bool) -> Tensor:
    """ue8m0 byte (int32) of `amax` (fp32, positive), exact by its bits; 255 where it is not finite."""
    # 448 = 1.75 * 2^8 and 6 = 1.5 * 2^2: ceil(log2(amax / top)) is amax's exponent minus 8 (2), one more
    # where its mantissa exceeds 1.75 (1.5): exactly where the added constant carries into the exponent.
    carry, shift = (0x3FFFFF, 2) if fp4 else (0x1FFFFF, 8)
    bits = amax.view(torch.int32)
    return torch.where(bits >= 0x7F800000, 255, ((bits + carry) >> 23) - shift)


def _scale(byte: Tensor) -> Tensor:
    """2^(byte-127) in fp32 for bytes 1..254, NaN for 255 (int32 in)."""
    return torch.where(byte == 255, torch.nan, (byte << 23).view(torch.float32))


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., n] -> [..., ceil(n / block), block] in fp32, zero-padded."""
    short = -x.shape[-1] % block
    x = x.float()
    return (
        (F.pad(x, (0, short)) if short else x)
        .contiguous()
        .reshape(*x.shape[:-1], -(-x.shape[-1] // block), block)
    )


def _scaled(x: Tensor, *, block: int, fp4: bool) -> tuple[Tensor, Tensor]:
    """Values divided by their block's scale [..., blocks, block], and scale bytes [..., blocks, 1] int32."""
    if block < 1 or x.shape[-1] < 1:
        raise ValueError(f"last dim {x.shape[-1]} in blocks of {block}: both must be positive")
    parts = _blocks(x, block)
    amax = parts.abs().amax(-1, keepdim=True).clamp_min(FP4_FLOOR if fp4 else FP8_FLOOR)
    byte = _scale_byte(amax, fp4=fp4)
    return parts * _scale(torch.where(byte == 255, 255, 254 - byte)), byte  # 254 - b is 1 / s


def _round_e4m3(y: Tensor) -> Tensor:
    """Nearest e4m3 value of |y| <= 448, ties to even; four vector ops, faster than the dtype cast on CPU."""
    power = y.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)  # 2^exponent
    magic = power.mul_(_MAGIC / 8).clamp_min_(_MAGIC * 2.0**-9)  # 3 mantissa bits; subnormals step by 2^-9
    return (y + magic).sub_(magic)


def _round_e2m1(y: Tensor) -> Tensor:
    """Nearest e2m1 value of |y| <= 6, ties to even."""
    power = y.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    magic = power.mul_(_MAGIC / 2).clamp_min_(_MAGIC * 0.5)  # 1 mantissa bit; below 1 the step stays 0.5
    return (y + magic).sub_(magic)


class _QuantDequant(torch.autograd.Function):
    """Rounds forward, passes the gradient straight through (the report's QAT, spec/model.md 6.4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, fp4: bool) -> Tensor:
        y, byte = _scaled(x, block=block, fp4=fp4)
        out = (_round_e2m1(y) if fp4 else _round_e4m3(y)).mul_(_scale(byte))
        return out.flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def quant_dequant_fp8(x: Tensor, *, block: int = 64) -> Tensor:
    """`x` [..., n] as FP8 blocks of `block` would give it back, same dtype; straight-through gradient."""
    return _QuantDequant.apply(x, block, False)  # type: ignore[no-any-return, no-untyped-call]


def quant_dequant_fp4(x: Tensor, *, block: int = 32) -> Tensor:
    """`x` [..., n] as MXFP4 blocks of `block` would give it back, same dtype; straight-through gradient."""
    return _QuantDequant.apply(x, block, True)  # type: ignore[no-any-return, no-untyped-call]


def quant_dequant_entry(kv: Tensor, *, rope_dim: int, block: int = 64) -> Tensor:
    """`kv` [..., head_dim] as a packed cache entry would give it back: FP8 nope dims, then bf16 rope dims.

    Equal to `unpack_entry(pack_entry(kv))`, with straight-through gradients. spec/model.md 2.3.
    """
    nope = kv.shape[-1] - rope_dim
    rope = kv[..., nope:]
    rope = rope.to(torch.bfloat16).to(kv.dtype)  # autograd's cast passes gradients through (rounded to bf16)
    return torch.cat([quant_dequant_fp8(kv[..., :nope], block=block), rope], -1) if nope else rope


def fp8_block(x: Tensor, *, block: int = 64) -> tuple[Tensor, Tensor]:
    """FP8 codes (float8_e4m3fn, shape of `x` [..., n]) and ue8m0 scales (uint8 [..., ceil(n / block)])."""
    y, byte = _scaled(x.detach(), block=block, fp4=False)
    codes = y.to(torch.float8_e4m3fn).flatten(-2)[..., : x.shape[-1]]
    return codes, byte.squeeze(-1).to(torch.uint8)


def fp4_block(x: Tensor, *, block: int = 32) -> tuple[Tensor, Tensor]:
    """e2m1 codes (uint8 0..15, shape of `x` [..., n]) and ue8m0 scales (uint8 [..., ceil(n / block)])."""
    y, byte = _scaled(x.detach(), block=block, fp4=True)
    value = _round_e2m1(y).abs_()
    # codes 0..4 are 0, .5 .. 2, then 3, 4, 6
    code = torch.where(value <= 2, value * 2, torch.where(value <= 4, value + 2, 7)).nan_to_num_(0)
    code = code.to(torch.uint8) | (y.signbit().to(torch.uint8) << 3)
    return code.flatten(-2)[..., : x.shape[-1]], byte.squeeze(-1).to(torch.uint8)


def decode_e8m0(scale: Tensor) -> Tensor:
    """fp32 value of ue8m0 bytes (uint8 or float8_e8m0fnu): 2^(byte-127), 0 meaning 2^-127 and 255 NaN."""
    byte = scale.view(torch.uint8).to(torch.int32)
    value = torch.where(byte == 0, 2.0**-127, (byte << 23).view(torch.float32))
    return torch.where(byte == 255, torch.nan, value)


def _dequant(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """values fp32 [..., n] times their block's scale (uint8 [..., ceil(n / block)])."""
    return values * decode_e8m0(scales).repeat_interleave(block, -1)[..., : values.shape[-1]]


def _fp4_values(codes: Tensor) -> Tensor:
    """fp32 values of e2m1 codes 0..15."""
    table = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=codes.device)
    return table[codes.long()]


def _pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [..., n] -> uint8 [..., ceil(n / 2)], the even element in the low nibble."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 or int8 [..., n] -> uint8 codes [..., 2n], low nibble first."""
    raw = packed.view(torch.uint8)
    return torch.stack([raw & 15, raw >> 4], -1).flatten(-2)


def pack_entry(kv: Tensor, *, rope_dim: int, block: int = 64) -> Tensor:
    """Packs main cache entries: `kv` [..., head_dim] -> uint8 [..., entry_bytes] (584 at 448 + 64).

    Layout: nope e4m3 | rope bf16 little-endian | one ue8m0 a block of nope | zeros to a multiple of 8 scales.
    spec/model.md 3.1; the last `rope_dim` dims rotate.
    """
    nope = kv.shape[-1] - rope_dim
    kv = kv.detach()
    parts = [kv[..., nope:].to(torch.bfloat16).contiguous().view(torch.uint8)]
    if nope:
        codes, scales = fp8_block(kv[..., :nope], block=block)
        parts = [codes.contiguous().view(torch.uint8), *parts, scales]
    out = torch.cat(parts, -1)
    return F.pad(out, (0, entry_bytes(kv.shape[-1], rope_dim, block=block) - out.shape[-1]))


def unpack_entry(
    packed: Tensor, *, head_dim: int, rope_dim: int, block: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of `pack_entry`: uint8 [..., entry_bytes] -> `dtype` [..., head_dim].

    Raises ValueError on another width or dtype.
    """
    size = entry_bytes(head_dim, rope_dim, block=block)
    if packed.shape[-1] != size or packed.dtype != torch.uint8:
        raise ValueError(f"packed entries are {packed.dtype} x {packed.shape[-1]}, expected uint8 x {size}")
    nope = head_dim - rope_dim
    rope = packed[..., nope : nope + 2 * rope_dim].contiguous().view(torch.bfloat16).to(dtype)
    if not nope:
        return rope
    codes = packed[..., :nope].contiguous().view(torch.float8_e4m3fn).float()
    scales = packed[..., nope + 2 * rope_dim :][..., : -(-nope // block)]
    return torch.cat([_dequant(codes, scales, block).to(dtype), rope], -1)


def pack_index_key(key: Tensor, *, block: int = 32) -> Tensor:
    """Packs indexer keys: `key` [..., D] -> uint8 [..., D / 2 + D / 32] (68 at 128), pairs then scales."""
    codes, scales = fp4_block(key, block=block)
    return torch.cat([_pack_nibbles(codes), scales], -1)


def unpack_index_key(
    packed: Tensor, *, head_dim: int, block: int = 32, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of `pack_index_key`: uint8 [..., bytes] -> `dtype` [..., head_dim].

    Raises ValueError on another width or dtype.
    """
    size = index_key_bytes(head_dim, block=block)
    if packed.shape[-1] != size or packed.dtype != torch.uint8:
        raise ValueError(
            f"packed index keys are {packed.dtype} x {packed.shape[-1]}, expected uint8 x {size}"
        )
    pairs = -(-head_dim // 2)
    values = _fp4_values(_unpack_nibbles(packed[..., :pairs].contiguous()))[..., :head_dim]
    return _dequant(values, packed[..., pairs:], block).to(dtype)


def pack_fp8_weight(weight: Tensor, *, block: int = 128) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] -> float8_e4m3fn [out, in] and ue8m0 uint8 [ceil(out / block), ceil(in / block)]."""
    out, into = weight.shape
    square = F.pad(weight.detach().float(), (0, -into % block, 0, -out % block))
    tiles = square.reshape(square.shape[0] // block, block, -1, block).transpose(1, 2)  # [O, I, block, block]
    codes, scales = fp8_block(tiles.flatten(2), block=block * block)
    codes = (
        codes.view(torch.uint8).reshape(*codes.shape[:2], block, block).transpose(1, 2).reshape(square.shape)
    )
    return codes[:out, :into].contiguous().view(torch.float8_e4m3fn), scales.squeeze(-1)


def unpack_fp8_weight(
    weight: Tensor, scale: Tensor, *, block: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """FP8 `weight` [out, in] and `scale` [ceil(out / block), ceil(in / block)] -> `dtype` [out, in].

    `scale` is ue8m0 (float8_e8m0fnu or uint8) or fp32. Raises CheckpointError when the shapes do not fit.
    """
    expected = tuple(-(-n // block) for n in weight.shape)
    if weight.dim() != 2 or tuple(scale.shape) != expected:
        raise CheckpointError(
            f"scale has shape {list(scale.shape)}, FP8 weight {list(weight.shape)} expects {list(expected)}"
        )
    factor = scale if scale.dtype == torch.float32 else decode_e8m0(scale)
    factor = factor.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (weight.float() * factor[: weight.shape[0], : weight.shape[1]]).to(dtype)


def pack_fp4_weight(weight: Tensor, *, block: int = 32) -> tuple[Tensor, Tensor]:
    """`weight` [..., out, in] -> int8 [..., out, in / 2] (low nibble: even element), uint8 scales."""
    if weight.shape[-1] % 2:
        raise ValueError(
            f"FP4 weights pack in pairs along K, which is {weight.shape[-1]}: expected an even number"
        )
    codes, scales = fp4_block(weight, block=block)
    return _pack_nibbles(codes).view(torch.int8), scales


def unpack_fp4_weight(
    packed: Tensor, scale: Tensor, *, block: int = 32, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """FP4 `packed` [..., out, in / 2] and `scale` [..., out, ceil(in / block)] -> `dtype` [..., out, in].

    `packed` is int8 or uint8. Raises CheckpointError when the shapes do not fit. spec/model.md 5.
    """
    into = packed.shape[-1] * 2
    expected = (*packed.shape[:-1], -(-into // block))
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            f"scale has shape {list(scale.shape)}, FP4 weight {list(packed.shape)} expects {list(expected)}"
        )
    return _dequant(_fp4_values(_unpack_nibbles(packed)), scale, block).to(dtype)
