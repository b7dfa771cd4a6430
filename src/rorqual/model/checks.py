"""Whether the values of stored tensors are sound: no NaN, no infinity, no scale that overflows, no expert too many.

A packed matrix is judged by its codes and scales, in pieces, without dequantising it.
Owns these judgements for data that stays packed; checkpoint.py judges what it dequantises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.model.config import Config
from rorqual.model.errors import CheckpointError
from rorqual.model.weights import Packed

__all__ = ["TOP_SCALE", "bad_scales", "bad_values", "check_tensor", "check_values"]

PIECE = 4 << 20
"""Elements looked at together."""
EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""Integer view, and the exponent's bits: all set in NaN and infinity alone."""
TOP_SCALE = {"fp8": 246, "fp4": 252}
"""The highest ue8m0 byte whose largest value (448, 6) is finite in fp32 and bf16."""


def bad_values(data: Tensor, *, fp8: bool = False) -> int:
    """How many elements are NaN or infinite; `fp8`: `data` holds e4m3 codes as uint8, of which 0x7f and 0xff are."""
    count = 0
    flat = data.detach().reshape(-1)
    bits, mask = (torch.uint8, 0x7F) if fp8 else EXPONENTS[flat.dtype]
    for start in range(0, len(flat), PIECE):
        # a maximum is ten times faster than a count, and numpy's than torch's: damage is rare, weights are many
        masked = flat[start : start + PIECE].view(bits).numpy() & mask
        if masked.max() == mask:
            count += int((masked == mask).sum())
    return count


def bad_scales(scale: Tensor, kind: str) -> int:
    """How many ue8m0 bytes are NaN (255), or so high that a value of their block could be infinite."""
    # numpy, as above: it also leaves torch's threads asleep, whose barriers cost 100x this on a busy machine
    values = scale.numpy()
    if not values.size or values.max() <= TOP_SCALE[kind]:
        return 0
    return int((values > TOP_SCALE[kind]).sum())


def check_values(name: str, packed: Packed) -> None:
    """Raises CheckpointError when the matrix `name` holds NaN, infinity or a scale out of range."""
    if packed.scale is not None and (count := bad_scales(packed.scale, packed.kind)):
        raise CheckpointError(
            f"{name}: {count} of {packed.scale.numel()} scales are NaN or above 2^{TOP_SCALE[packed.kind] - 127}: "
            "the weights are damaged"
        )
    if packed.kind != "fp4":  # each of the 16 codes of e2m1 is a number
        _refuse(name, bad_values(packed.data, fp8=packed.kind == "fp8"), packed.data.numel())


def check_tensor(name: str, tensor: Tensor, config: Config) -> None:
    """The same for a vector, or a table of experts."""
    if tensor.dtype in (torch.int64, torch.int32):
        low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
        if low < 0 or high >= config.n_routed_experts:
            raise CheckpointError(
                f"{name}: names expert {low} to {high}, config.json has {config.n_routed_experts} (n_routed_experts)"
            )
    else:
        _refuse(name, bad_values(tensor), tensor.numel())


def _refuse(name: str, count: int, total: int) -> None:
    if count:
        raise CheckpointError(
            f"{name}: {count} of {total} values are NaN or infinite: the weights are damaged"
        )
