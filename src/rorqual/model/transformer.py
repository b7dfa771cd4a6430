"""The V4 model: embedding, blocks over mHC streams, head; one code for training and for cached decoding.

Owns the assembly, initialisation and the parameter names; formulas live in the modules it imports.
Shapes: B batch, T tokens, N streams, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from rorqual.model import checkpoint
from rorqual.model.attention import AttentionMode
from rorqual.model.block import Block
from rorqual.model.config import PAGE_TOKENS, Config
from rorqual.model.hyper_connections import HyperHead, Streams
from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.mtp import MTPBlock
from rorqual.model.state import CacheState

__all__ = ["Model", "TrainOutput"]


@dataclass(frozen=True, slots=True)
class TrainOutput:
    """What a training pass returns."""

    hidden: Tensor
    """[B, T, D] after the final norm: `Model.logits` turns (a part of) it into logits."""
    mtp_hidden: Tensor | None
    """[B, T-1, D] of the MTP head: row t predicts token t+2. None unless asked for."""
    index_loss: Tensor
    """Mean of the indexers' losses, a scalar (0 without `mode.index_loss`)."""


class Model(nn.Module):
    """DeepSeek-V4. `model(token_ids)` gives logits; `extend` decodes with a `CacheState`.

    `simulate_quant` rounds cache entries to their formats (FP8 with BF16 rotated dims, FP4 index keys) with
    straight-through gradients; off, everything is exact in the parameters' dtype.
    """

    def __init__(self, config: Config, *, mtp: bool = True, simulate_quant: bool = False) -> None:
        super().__init__()
        self.config, self.simulate_quant = config, simulate_quant
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, ratio=ratio, hashed=layer < config.num_hash_layers, simulate_quant=simulate_quant)
            for layer, ratio in enumerate(config.compress_ratios)
        )
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        count = config.num_nextn_predict_layers if mtp else 0
        self.mtp = nn.ModuleList(MTPBlock(config, simulate_quant=simulate_quant) for _ in range(count))

    def forward(
        self, token_ids: Tensor, *, mode: AttentionMode | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """token_ids int64 [B, T] to fp32 logits [B, T, V] of whole sequences. See `train_pass`."""
        return self.logits(
            self.train_pass(token_ids, mode=mode or AttentionMode(), positions=positions).hidden
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden [..., D] to fp32 logits [..., V]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.head.weight.float())

    def train_pass(
        self,
        token_ids: Tensor,
        *,
        mode: AttentionMode,
        mtp: bool = False,
        positions: Tensor | None = None,
    ) -> TrainOutput:
        """Whole sequences (right padding is harmless), with what the losses need.

        `positions` int64 [T] or [B, T] stretches short sequences over long contexts: pages of 128 tokens that stand at
        any later page (`positions[128 i + j] = 128 page(i) + j`, pages rising). None: 0, 1, 2 ... Raises ValueError.
        """
        if positions is not None:
            _check_positions(positions, token_ids)
        streams, losses = self._streams(token_ids), []
        for layer in self.layers:
            streams, loss = layer(streams, token_ids, mode=mode, positions=positions)
            if loss is not None:
                losses.append(loss)
        hidden = self.norm(self.hc_head(streams))
        mtp_hidden = None
        if mtp and len(self.mtp):
            following = token_ids[:, 1:]
            earlier = tuple(stream[:, :-1] for stream in streams)
            places = None if positions is None else positions[..., :-1]
            mtp_hidden = self.mtp[0].hidden(  # type: ignore[operator]
                earlier, self.embed(following), following, positions=places
            )
        index_loss = torch.stack(losses).mean() if losses else hidden.new_zeros(())
        return TrainOutput(hidden, mtp_hidden, index_loss)

    def extend(
        self, token_ids: Tensor, state: CacheState, *, counts: Tensor | None = None, last_only: bool = True
    ) -> Tensor:
        """Feeds a chunk to every sequence of `state` and advances it.

        token_ids int64 [B, T], right-padded; row b brings `counts[b]` tokens (None: all T). Returns fp32 logits of
        each row's last token [B, V], or of all [B, T, V] (`last_only=False`; padded places hold no meaning).
        """
        start, streams = state.position, self._streams(token_ids)
        mode = AttentionMode()
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            streams, _ = layer(streams, token_ids, mode=mode, state=layer_state, start=start, counts=counts)
        state.position = start + (token_ids.shape[1] if counts is None else counts)
        if last_only:
            last = torch.full_like(start, token_ids.shape[1]) if counts is None else counts
            rows = torch.arange(len(start), device=start.device)
            streams = tuple(stream[rows, last.clamp(min=1) - 1][:, None] for stream in streams)
            return self.logits(self.norm(self.hc_head(streams)))[:, 0]
        return self.logits(self.norm(self.hc_head(streams)))

    def new_state(self, batch: int = 1) -> CacheState:
        """Empty decode state for `batch` sequences, in the parameters' dtype."""
        weight = self.embed.weight
        return CacheState.create(self.config, batch, dtype=weight.dtype, device=weight.device)

    def _streams(self, token_ids: Tensor) -> Streams:
        return (self.embed(token_ids),) * self.config.hc_mult

    @torch.no_grad()
    def initialize(self, seed: int) -> Self:
        """Random start for training: fan-in scaled matrices, streams that begin nearly separate. Returns self."""
        generator = torch.Generator().manual_seed(seed)

        def normal(tensor: Tensor, std: float) -> None:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

        count = self.config.hc_mult
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if name.endswith(("_norm.weight", "norm.weight")):
                parameter.fill_(1.0)
            elif leaf == "fn":
                normal(parameter, 0.3 * parameter.shape[1] ** -0.5)
            elif leaf == "scale":
                parameter.fill_(0.3)
            elif leaf == "base":
                parameter.zero_()
                if len(parameter) > count:  # a HyperConnection: mix mostly along the diagonal
                    normal(parameter[: 2 * count], 0.5)
                    parameter[2 * count :].copy_((torch.eye(count) * 2.0).flatten())
            elif leaf in ("attn_sink", "bias"):
                parameter.zero_()
            elif leaf == "ape":
                normal(parameter, 0.5)
            elif name == "embed.weight":
                normal(parameter, 1.0)
            elif leaf in ("w1", "w2", "w3"):  # stacked experts
                normal(parameter, parameter.shape[2] ** -0.5)
            else:
                normal(parameter, parameter.shape[-1] ** -0.5)
                if name.endswith(("wo_b.weight", "w2.weight")):
                    parameter.mul_(1 / math.sqrt(2 * len(self.layers)))
        return self

    def official_state(self) -> dict[str, Tensor]:
        """Tensors under the names of the official checkpoint (routed experts stacked): what `save` writes."""
        return {_official(name): tensor for name, tensor in self.state_dict().items()}

    def load_official_state(self, state: dict[str, Tensor]) -> None:
        """The reverse of `official_state`; every tensor must be there (`checkpoint.load_state` has checked it)."""
        ours = {_official(name): name for name in self.state_dict()}
        self.load_state_dict({ours[name]: tensor for name, tensor in state.items()})

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, simulate_quant: bool = False) -> Self:
        """Loads config.json and *.safetensors: our own, the official, HF's or `save_pretrained`'s names.

        Raises ConfigError and CheckpointError.
        """
        config = Config.from_file(directory)
        state = checkpoint.load_state(directory, config)
        mtp = any(name.startswith("mtp.") for name in state)
        model = cls(config, mtp=mtp, simulate_quant=simulate_quant)
        model.load_official_state(state)
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, metadata: dict[str, str] | None = None) -> None:
        """Writes config.json and model.safetensors, atomically."""
        checkpoint.save(directory, self.config, self.official_state(), metadata=metadata)


class Embedding(nn.Module):
    """Token table `weight` [V, D]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, token_ids: Tensor) -> Tensor:
        return nn.functional.embedding(token_ids, self.weight)


def _check_positions(positions: Tensor, token_ids: Tensor) -> None:
    length = token_ids.shape[1]
    if positions.shape not in ((length,), token_ids.shape) or positions.dtype != torch.int64:
        raise ValueError(
            f"positions are {positions.dtype} {list(positions.shape)}, expected int64 [{length}] or "
            f"{list(token_ids.shape)}"
        )
    steps = torch.arange(length, device=positions.device)
    base = positions - steps % PAGE_TOKENS
    pages = base[..., ::PAGE_TOKENS] // PAGE_TOKENS
    whole = torch.equal(base, (pages * PAGE_TOKENS).repeat_interleave(PAGE_TOKENS, -1)[..., :length])
    if not whole or bool((pages < 0).any()) or bool((pages.diff(dim=-1) < 1).any()):
        raise ValueError(
            f"positions: every {PAGE_TOKENS} tokens must stand on one page, pages rising: entries never straddle pages"
        )


def _official(name: str) -> str:
    for site in ("hc_attn", "hc_ffn", "hc_head"):
        name = name.replace(f"{site}.", f"{site}_")
    return name
