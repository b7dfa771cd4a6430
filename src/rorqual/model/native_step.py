"""A whole decode step in one native call: one token per row, over the model's own weights and `CacheState`.

`Model.extend` comes here for T = 1 without gradients, in fp32 on a CPU; the torch modules are the reference, and both
may take turns on one state. Weights are used in place, nothing is packed or copied; their addresses are looked up at
every step, so that replaced or moved parameters are seen, and in-place updates need nothing.
A row's result does not depend on what else is in the batch nor on the number of threads, to the bit.
Shapes: B rows, T = 1 token, V vocabulary.                                    (native/cpu; docs/kernels.md)
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rorqual.kernels.cpu import (
    ABI,
    LIBRARY,
    NativeLibrary,
    Pool,
    Step,
    StepLayerPointers,
    StepModelPointers,
    StepStatePointers,
    load_library,
)
from rorqual.model.layers import Rope
from rorqual.model.state import GROW_ENTRIES, CacheState, EntryStore, LayerState, RowHistory

if TYPE_CHECKING:
    from rorqual.model.transformer import Model

__all__ = ["NativeStep"]

log = logging.getLogger(__name__)

MODEL_FIELDS = {
    "embed": "embed.weight",
    "mix_fn": "hc_head.fn",
    "mix_base": "hc_head.base",
    "mix_scale": "hc_head.scale",
    "norm": "norm.weight",
    "head": "head.weight",
}
LAYER_FIELDS = {
    "attn_fn": "hc_attn.fn",
    "attn_base": "hc_attn.base",
    "attn_scale": "hc_attn.scale",
    "attn_norm": "attn_norm.weight",
    "wq_a": "attn.wq_a.weight",
    "q_norm": "attn.q_norm.weight",
    "wq_b": "attn.wq_b.weight",
    "wkv": "attn.wkv.weight",
    "kv_norm": "attn.kv_norm.weight",
    "wo_a": "attn.wo_a.weight",
    "wo_b": "attn.wo_b.weight",
    "sink": "attn.attn_sink",
    "main_wkv": "attn.compressor.wkv.weight",
    "main_wgate": "attn.compressor.wgate.weight",
    "main_ape": "attn.compressor.ape",
    "main_norm": "attn.compressor.norm.weight",
    "index_wq_b": "attn.indexer.wq_b.weight",
    "index_proj": "attn.indexer.weights_proj.weight",
    "index_wkv": "attn.indexer.compressor.wkv.weight",
    "index_wgate": "attn.indexer.compressor.wgate.weight",
    "index_ape": "attn.indexer.compressor.ape",
    "index_norm": "attn.indexer.compressor.norm.weight",
    "ffn_fn": "hc_ffn.fn",
    "ffn_base": "hc_ffn.base",
    "ffn_scale": "hc_ffn.scale",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn.gate.weight",
    "bias": "ffn.gate.bias",
    "tid2eid": "ffn.gate.tid2eid",
    "w1": "ffn.experts.w1",
    "w3": "ffn.experts.w3",
    "w2": "ffn.experts.w2",
    "shared1": "ffn.shared_experts.w1.weight",
    "shared3": "ffn.shared_experts.w3.weight",
    "shared2": "ffn.shared_experts.w2.weight",
}
"""Field of RqLayer to tensor of `Block`; a layer that lacks the tensor gives a null pointer."""

PARTS = ("window", "tail", "entries", "index_tail", "index_keys")


class _Slot:
    """Where a tensor lives (a module's dict: a replaced parameter is found), and the field that points to it."""

    __slots__ = ("field", "name", "table", "target")

    def __init__(self, module: nn.Module, path: str, target: ctypes.Structure, field: str) -> None:
        *parents, self.name = path.split(".")
        for parent in parents:
            module = getattr(module, parent)
        self.table: dict[str, Any] = (
            module._parameters if self.name in module._parameters else module._buffers
        )
        self.target, self.field = target, field
        if self.table.get(self.name) is None:
            raise AttributeError(path)

    def tensor(self) -> Tensor:
        found: Tensor = self.table[self.name]
        return found


class NativeStep:
    """The native decode step of one model. `level` (None: the best here) and `threads` (None: torch's) fix the choice.

    One call at a time: a second thread waits. Copies and pickles without its pointers.
    """

    def __init__(self, *, level: str | None = None, threads: int | None = None) -> None:
        self.level, self.threads = level, threads
        self._plan: _Plan | None = None
        self._refused_at: tuple[int, torch.dtype] | None = None
        self._pool: Pool | None = None
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.level, self.threads)

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeStep:
        return _rebuild(self.level, self.threads)

    @torch.no_grad()
    def extend(
        self, model: Model, token_ids: Tensor, state: CacheState, *, counts: Tensor | None
    ) -> Tensor | None:
        """Feeds token_ids int64 [B, 1] to `state` and advances it; fp32 logits [B, V], zeros where `counts` is 0.

        None, with nothing changed, when this step is not the native path's (the reason is logged once); then torch
        takes it. Raises IndexError for token ids outside the vocabulary or the hash table's experts, ValueError for
        counts other than 0 and 1; nothing has changed then either.
        """
        if self._pid != os.getpid():  # a fork leaves the threads behind, and maybe the lock held
            self._pool, self._lock, self._pid = None, threading.Lock(), os.getpid()
        library = load_library(LIBRARY)
        if library is None:
            return None
        with self._lock:
            return self._extend(library, model, token_ids, state, counts)

    def _extend(
        self,
        library: NativeLibrary,
        model: Model,
        token_ids: Tensor,
        state: CacheState,
        counts: Tensor | None,
    ) -> Tensor | None:
        plan = self._plan
        if plan is None or not plan.current():
            weight = model.embed.weight
            at = (weight.data_ptr(), weight.dtype)
            if at == self._refused_at:  # asked before, of the same weights
                return None
            self._plan = plan = None
            refused = _why_not(model)
            if refused is not None:
                self._refused_at = at
                log.info("decode steps use the torch path: %s", refused)
                return None
            self._refused_at, self._plan = None, _Plan(model)
            plan = self._plan
        batch = len(token_ids)
        tokens = token_ids.reshape(-1).to(torch.int64).contiguous()
        start = state.position.to(torch.int64).contiguous()
        if len(start) != batch or len(tokens) != batch or not batch:
            return None  # torch words the error
        end = start + 1
        if counts is not None:
            counts = counts.to(torch.int64).contiguous()
            if counts.shape != start.shape or bool(((counts < 0) | (counts > 1)).any()):
                raise ValueError(
                    f"counts {counts.tolist()}: a step of one token takes one 0 or 1 for each row"
                )
            end = start + counts
        if not plan.point_at(state, top=int(end.max())):
            return None
        threads = max(1, min(self.threads or torch.get_num_threads(), batch))
        if threads > 1 and (self._pool is None or self._pool.threads < threads):
            self._pool = Pool(library, threads)
        if self.level is not None and self.level not in library.levels:
            raise ValueError(f"level {self.level!r} does not run here: choose one of {list(library.levels)}")
        need = library.scratch_bytes(plan.model, entries=plan.max_entries, batch=batch, threads=threads)
        logits = torch.empty(batch, plan.model.vocab)
        step = plan.step
        step.tokens, step.positions = tokens.data_ptr(), start.data_ptr()
        step.counts = None if counts is None else counts.data_ptr()
        step.batch, step.logits = batch, logits.data_ptr()
        step.scratch, step.max_entries = plan.scratch_at(need), plan.max_entries
        step.threads = threads
        step.level = library.levels[self.level or library.level]
        failed = library.step(step, self._pool)
        if failed:
            raise _input_error(model, tokens, -1 - failed)
        state.position = end
        return logits


def _rebuild(level: str | None, threads: int | None) -> NativeStep:
    return NativeStep(level=level, threads=threads)


def _input_error(model: Model, tokens: Tensor, row: int) -> IndexError:
    token, vocab = int(tokens[row]), model.config.vocab_size
    if not 0 <= token < vocab:
        return IndexError(f"row {row}: token id {token} is outside the vocabulary (0 to {vocab - 1})")
    return IndexError(
        f"row {row}: tid2eid[{token}] names an expert outside 0 to {model.config.n_routed_experts - 1}"
    )


def _why_not(model: Model) -> str | None:
    """Why this model cannot run natively, or None."""
    if model.simulate_quant:
        return "simulate_quant rounds in torch"
    for name, tensor in model.named_parameters():
        if not name.startswith("mtp."):
            if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
                return (
                    f"{name} is {tensor.dtype} on {tensor.device}, the native step reads float32 on the CPU"
                )
            if not tensor.is_contiguous():
                return f"{name} is not contiguous"
    return None


class _Plan:
    """Pointers to one model's tensors, and to the state that the last step used."""

    def __init__(self, model: Model) -> None:
        config = model.config
        self.config = config
        self.model = StepModelPointers(
            abi=ABI,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            rope_dim=config.qk_rope_head_dim,
            q_rank=config.q_lora_rank,
            groups=config.o_groups,
            o_rank=config.o_lora_rank,
            window=config.sliding_window,
            index_heads=config.index_n_heads,
            index_dim=config.index_head_dim,
            index_topk=config.index_topk,
            experts=config.n_routed_experts,
            per_token=config.num_experts_per_tok,
            expert_width=config.moe_intermediate_size,
            shared_width=config.moe_intermediate_size * config.n_shared_experts,
            streams=config.hc_mult,
            iters=config.hc_sinkhorn_iters,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
            route_scale=config.routed_scaling_factor,
            limit=config.swiglu_limit,
            head_scale=config.head_dim**-0.5,
            index_scale=(config.index_head_dim * config.index_n_heads) ** -0.5,
        )
        # Layers of one kind rotate alike: one table of angles each, [qk_rope_head_dim / 2].
        self._tables = [Rope(config, compressed=kind)._frequencies for kind in (False, True)]
        self.model.freqs_window, self.model.freqs_compressed = (table.data_ptr() for table in self._tables)
        self.layers = (StepLayerPointers * config.num_hidden_layers)()
        self._slots = [_Slot(model, path, self.model, field) for field, path in MODEL_FIELDS.items()]
        for layer, ratio, pointers in zip(model.layers, config.compress_ratios, self.layers, strict=True):
            pointers.ratio, pointers.overlap = ratio, int(bool(ratio) and ratio == config.csa_ratio)
            for field, path in LAYER_FIELDS.items():
                try:
                    self._slots.append(_Slot(layer, path, pointers, field))
                except AttributeError:  # a window-only layer has no compressor, a hash layer no bias
                    continue
        self._addresses = [slot.tensor().data_ptr() for slot in self._slots]
        for slot, address in zip(self._slots, self._addresses, strict=True):
            setattr(slot.target, slot.field, address)
        self.states = (StepStatePointers * config.num_hidden_layers)()
        self._held: list[weakref.ref[Tensor]] = []  # tensors that `states` points to
        self.max_entries = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.step = Step(
            model=ctypes.addressof(self.model),
            layers=ctypes.addressof(self.layers),
            state=ctypes.addressof(self.states),
        )

    def current(self) -> bool:
        """Whether every tensor is still where it was."""
        return [slot.table[slot.name].data_ptr() for slot in self._slots] == self._addresses

    def scratch_at(self, need: int) -> int:
        """Address of at least `need` bytes, 64-byte aligned."""
        if len(self._scratch) < need + 64:
            self._scratch = torch.empty(need + 64, dtype=torch.uint8)
        return (int(self._scratch.data_ptr()) + 63) // 64 * 64

    def point_at(self, state: CacheState, *, top: int) -> bool:
        """Points `states` at the tensors of `state`, grown for positions up to `top`. False: not ours."""
        self.max_entries = 0
        tensors: list[Tensor] = []
        for layer, ratio in zip(state.layers, self.config.compress_ratios, strict=True):
            tensors.append(layer.window.rows)
            if ratio:
                self.max_entries = max(self.max_entries, top // ratio)
                for store in (layer.entries, layer.index_keys):
                    if store is not None and top // ratio > store.entries.shape[1]:
                        _grow(store, top // ratio)
                tensors.extend(
                    part.rows if isinstance(part, RowHistory) else part.entries for part in layer.parts()[1:]
                )
        held = self._held
        if len(tensors) == len(held) and all(ref() is t for t, ref in zip(tensors, held, strict=True)):
            return True
        self._held = []
        if any(t.dtype != torch.float32 or t.device.type != "cpu" or t.requires_grad for t in tensors):
            return False
        for layer, pointers in zip(state.layers, self.states, strict=True):
            for name in PARTS:
                self._point(layer, name, pointers)
        return True

    def _point(self, layer: LayerState, name: str, pointers: StepStatePointers) -> None:
        part = getattr(layer, name)
        if part is None:
            return
        tensor: Tensor = part.rows if isinstance(part, RowHistory) else part.entries
        batch, rows, width = tensor.shape
        apart = batch == 1 or tensor.stride(0) >= rows * width
        if rows and not (tensor.stride(2) == 1 and tensor.stride(1) == width and apart):
            tensor = tensor.contiguous()
            if isinstance(part, RowHistory):
                part.rows = tensor
            else:
                part.entries = tensor
        setattr(pointers, name, tensor.data_ptr())
        setattr(pointers, f"{name}_stride", tensor.stride(0))
        self._held.append(weakref.ref(tensor))


def _grow(store: EntryStore, need: int) -> None:
    """Room for `need` entries, by the same steps as `EntryStore.write`."""
    batch, have, width = store.entries.shape
    grow = max(need, have + have // 2, GROW_ENTRIES) - have
    store.entries = torch.cat((store.entries, store.entries.new_zeros(batch, grow, width)), dim=1)
