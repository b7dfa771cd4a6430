"""Whether Triton kernels run here, and if not, the one reason.

Owns the question only. Importing this needs neither triton nor a GPU; `ops` needs triton.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["GpuStatus", "gpu_status", "runs_on_gpu"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuStatus:
    """Whether the Triton kernels run here, and how."""

    available: bool
    device: str | None
    """Name of the GPU, "interpreter" for Triton's own on CPU tensors; None when unavailable."""
    reason: str
    """One line for people: what runs, or what is missing and what to do about it."""


@functools.cache
def gpu_status() -> GpuStatus:
    """What the Triton kernels run on. Looked up once."""
    if find_spec("triton") is None:
        found = "" if torch.cuda.is_available() else "torch sees no GPU, and "
        return _none(f"{found}triton is not installed: pip install 'rorqual[gpu]'")
    from triton import knobs

    if knobs.runtime.interpret:
        return GpuStatus(
            available=True, device="interpreter", reason="Triton kernels, interpreted on CPU tensors (slow)"
        )
    if not torch.cuda.is_available():
        return _none("torch sees no GPU (TRITON_INTERPRET=1 interprets the kernels, for tests)")
    name = torch.cuda.get_device_name()
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return _none(f"{name} has no bf16 tensor cores (compute capability 8.0 is the least)")
    return GpuStatus(available=True, device=name, reason=f"Triton kernels, {name}")


def _none(reason: str) -> GpuStatus:
    return GpuStatus(available=False, device=None, reason=reason)


def runs_on_gpu(*tensors: Tensor) -> bool:
    """The dispatch: True when a call on these tensors belongs to `kernels.gpu.ops`, False when to the torch reference.

    CUDA tensors go to Triton where it runs; without it they stay in torch, and the reason is logged once. CPU tensors
    stay in torch. Raises ValueError when the tensors lie on several devices.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors on {', '.join(sorted(map(str, devices)))}: expected one device")
    if not devices or next(iter(devices)).type != "cuda":
        return False
    if gpu_status().available and gpu_status().device != "interpreter":
        return True
    _tell_once()
    return False


@functools.cache
def _tell_once() -> None:
    log.warning("GPU tensors stay in torch", extra={"reason": gpu_status().reason})
