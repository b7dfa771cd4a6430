"""Optimizers: Muon for matrices, AdamW for the rest, as the V4 report splits them.

Muon: momentum 0.95 with Nesterov, Newton-Schulz orthogonalisation, update scaled to RMS 0.18.  (spec/model.md 6.3)
AdamW: embedding, head, norms, sinks, biases and everything else of mHC that is no matrix.
torch.optim.Muon takes 2D parameters only; the routed experts are stacked in 3D, hence our own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "OptimConfig", "Optimizers", "orthogonalize"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Learning rates and decay; both optimizers follow one schedule factor."""

    use_muon: bool = True
    """False: AdamW for everything, as RL does."""
    muon_lr: float = 1e-2
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""


def orthogonalize(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Approximately U V^T of each matrix [..., n, m] = U S V^T, by Newton-Schulz iterations in fp32."""
    a, b, c = COEFFICIENTS
    x = matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Parameters are [n, m] or stacks [E, n, m]."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is never evaluated
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault((parameter.shape[-2], parameter.shape[-1]), []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    buffer = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                    update = parameter.grad.add(buffer, alpha=group["momentum"])
                    updates.append(update.reshape(-1, rows, columns))
                scale = 0.18 * max(rows, columns) ** 0.5
                joined = orthogonalize(torch.cat(updates))  # same shapes together: few large products
                for parameter, update in zip(
                    parameters, torch.split(joined, [len(u) for u in updates]), strict=True
                ):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.reshape(parameter.shape).to(parameter), alpha=-group["lr"] * scale)


class Optimizers:
    """Muon and AdamW over one model, stepped together."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                plain = name in ("embed.weight", "head.weight") or name.endswith((".ape", ".fn"))
                vector = parameter.dim() < 2 or plain or not config.use_muon
                (rest if vector else matrices).append(parameter)
        self.config = config
        self.params = [*matrices, *rest]
        self.muon: Muon | None = None
        if matrices:
            self.muon = Muon(
                matrices, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
        self.adam = torch.optim.AdamW(rest, lr=config.adam_lr, betas=config.betas, weight_decay=0.0)

    def step(self, factor: float) -> float:
        """One step at `factor` times the base learning rates, then clears gradients; returns the gradient norm."""
        limit = self.config.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, limit))
        for optimizer, base in self._pairs():
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def _pairs(self) -> list[tuple[torch.optim.Optimizer, float]]:
        pairs: list[tuple[torch.optim.Optimizer, float]] = [(self.adam, self.config.adam_lr)]
        return pairs if self.muon is None else [(self.muon, self.config.muon_lr), *pairs]

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: `muon.N.momentum`, `adam.N.exp_avg` and so on."""
        out = {}
        for optimizer, _ in self._pairs():
            kind = "muon" if optimizer is self.muon else "adam"
            for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
                for name, value in optimizer.state.get(parameter, {}).items():
                    out[f"{kind}.{number}.{name}"] = (
                        value if isinstance(value, Tensor) else torch.tensor(value)
                    )
        return out

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`. Raises KeyError or ValueError for names that fit no parameter."""
        for key, value in tensors.items():
            kind, number, name = key.split(".")
            optimizer = self.adam if kind == "adam" else self.muon
            if optimizer is None:
                raise ValueError(f"{key}: this run has no Muon")
            parameter = optimizer.param_groups[0]["params"][int(number)]
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{key} has shape {list(value.shape)}, expected {list(parameter.shape)}")
            optimizer.state[parameter][name] = value.clone()
