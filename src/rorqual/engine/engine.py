"""Engine: cached generation for one model; sequences that grow, fork, rewind and are saved, over one paged cache.

Owns the pieces (pool, runner, prefix tree, store, spills) and the limits. A token whose prefix is known is not fed
again: from the last `generate`, from the prefix tree in memory, from the store on disk. Many sequences at once:
batch.py. The native runner computes where it can; else torch does, and the log says why.       (docs/engine.md)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from rorqual.engine.errors import (
    CacheFull,
    ContextOverflow,
    EngineError,
    PromptError,
    SequenceFileError,
)
from rorqual.engine.layout import PAGE_TOKENS, CacheFormat, CacheLayout
from rorqual.engine.native_runner import NativeRunner, native_runner
from rorqual.engine.pool import PagePool
from rorqual.engine.prefix import Match, Pin, PrefixTree
from rorqual.engine.runner import Runner
from rorqual.engine.sampler import SamplingParams, sample
from rorqual.engine.sequence import PagedSequence, Paging
from rorqual.engine.sequence_file import load_file, save_file
from rorqual.engine.speculative import Speculation, speculate
from rorqual.engine.spill import SpillArea
from rorqual.engine.store import PageStore, StoreConfig, WindowStrategy
from rorqual.engine.torch_runner import TorchRunner
from rorqual.model import Config, Model
from rorqual.model.packed import PackedWeights
from rorqual.model.weights import ModelWeights, Weights

__all__ = ["Engine", "FinishReason", "KVUsage", "SequenceState", "TokenEvent"]

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token; the last of a generation carries why it ended."""

    token_id: int
    logprob: float
    """Natural log, of the tempered distribution before top-p."""
    position: int
    """Index of this token in its sequence."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What a sequence's cache holds, beside what plain attention would hold for the same layers."""

    tokens: int
    held_bytes: int
    """Of the pool: whole pages, shared ones included, and the sequence's rings."""
    gqa8_bytes: int
    """8 KV heads of the model's head width in BF16, K and V, every layer, every token."""
    content_bytes: int = 0
    """Of these, filled by the tokens so far: `cost.kv_bytes` in the packed format."""


@dataclass(frozen=True, slots=True)
class Found:
    """A sequence that begins with what was cached."""

    sequence: PagedSequence
    match: Match
    from_disk: int
    """Tokens of it that only the disk had."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """What `Engine.pin` keeps."""

    tree: Pin | None
    store: Sequence[object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """Tokens of a prefix by where they lie."""

    live: int
    """In pages that a running sequence holds too."""
    memory: int
    """In memory, the live ones included."""
    disk: int
    """On disk, whether in memory too or not."""
    page_bytes: int
    """Of its pages in memory."""


class Engine:
    """Generates with a model: a `Model`, the directory of one, or packed `Weights` (native path only).

    kv_bytes: the cache of all sequences together, prefixes included; memory is used as it fills.
    prefill_chunk: most prompt tokens of a step. cache_format: `exact` (fp32 rows: parity, RL) or `packed` (584-byte
    entries: long contexts); decision 0010. max_running: most sequences in one step of a batch. prefix_cache: keep
    prefixes in unused pages. store: a directory that keeps prefixes across restarts, `window` is how it keeps what a
    restart needs beside the pages; or a `StoreConfig`, with bounds. runner: `auto`, or `torch` for the reference path.
    drafts: how many tokens the MTP head may draft at a time in `generate` (0: none); the output is the same to the bit
    (speculative.py). expert_bytes: keep a directory's weights packed and mapped, and at most so many bytes of routed
    experts in memory, read when needed: for models larger than memory (native path only). unit_tokens: a batch keeps
    what it is fed as a prefix, on disk too, whenever it has passed a multiple of this (of 128 itself), not only at the
    end.

    Raises ConfigError or CheckpointError when a directory cannot be loaded, SequenceFileError when `store` cannot be
    used, EngineError when packed weights have no native library to run them.
    """

    def __init__(
        self,
        model: Model | Weights | str | Path,
        *,
        kv_bytes: int = 2 << 30,
        prefill_chunk: int = 256,
        cache_format: CacheFormat = "exact",
        max_running: int = 256,
        prefix_cache: bool = True,
        store: str | Path | StoreConfig | None = None,
        window: WindowStrategy = WindowStrategy.PERIODIC,
        runner: Literal["auto", "torch"] = "auto",
        drafts: int = 0,
        expert_bytes: int | None = None,
        unit_tokens: int = 8192,
    ) -> None:
        self._opened: PackedWeights | None = None
        if isinstance(model, str | Path):
            if expert_bytes is None:
                model = Model.from_pretrained(model)
            else:
                model = self._opened = PackedWeights(model, expert_bytes=expert_bytes)
        elif expert_bytes is not None:
            raise ValueError(
                "expert_bytes is for a directory: what is open already is in memory, or brings its own"
            )
        self._model = model.eval() if isinstance(model, Model) else None
        self.weights: Weights = ModelWeights(model) if isinstance(model, Model) else model
        self.kv_bytes, self.prefill_chunk, self.max_running = kv_bytes, prefill_chunk, max_running
        if unit_tokens < 1 or unit_tokens % PAGE_TOKENS:
            raise ValueError(f"unit_tokens is {unit_tokens}, expected a multiple of {PAGE_TOKENS}")
        self.unit_tokens = unit_tokens
        self._last: SequenceState | None = None
        self._fingerprint: bytes | None = None
        self._epoch: int | None = None
        drafts = self._drafts(drafts, runner)
        layout = CacheLayout(self.config, cache_format, mtp_layers=int(drafts > 0))
        if drafts > layout.slack:
            raise ValueError(f"drafts is {drafts}: a sequence is rewound by at most {layout.slack} tokens")
        self.pool = PagePool(layout, kv_bytes=kv_bytes)
        self.runner = self._choose(runner)
        self.paging = Paging(pool=self.pool, runner=self.runner, prefill_chunk=prefill_chunk)
        self.prefixes = PrefixTree(self.pool, snapshot_bytes=kv_bytes // 4) if prefix_cache else None
        if self.prefixes is not None:
            self.pool.reclaim = self.prefixes.evict
        self.store: PageStore | None = None
        if store is not None:
            if not isinstance(store, StoreConfig):
                store = StoreConfig(directory=store, window=window)
            self.store = PageStore(store, layout, fingerprint=self.fingerprint())
        self.spills = SpillArea(memory_bytes=kv_bytes, store=self.store)
        self.drafts = drafts if isinstance(self.runner, NativeRunner) else 0
        self.speculation = Speculation()
        """Figures of drafting over all generations."""
        self.refresh()

    def _drafts(self, wanted: int, runner: str) -> int:
        """How many drafts are possible; why fewer than wanted is told in the log."""
        if wanted < 0:
            raise ValueError(f"drafts is {wanted}, expected 0 or more")
        if not wanted:
            return 0
        drafter = self.weights.drafter
        if drafter == "mtp" and runner == "auto":
            return wanted
        why = (
            "the torch runner has no drafts"
            if drafter == "mtp"
            else f"the weights hold {drafter or 'no head'}"
        )
        log.warning("generation goes on without drafts, which need an MTP head: %s", why)
        return 0

    def _choose(self, wanted: Literal["auto", "torch"]) -> Runner:
        if wanted == "auto":
            rounds = self._model is not None and self._model.simulate_quant
            native = native_runner(self.weights, self.pool, simulate_quant=rounds)
            if native is not None:
                return native
        return TorchRunner(self.model, self.pool)

    @property
    def model(self) -> Model:
        """The torch model. Raises EngineError for an engine over packed weights."""
        if self._model is None:
            raise EngineError("this engine runs packed weights natively: there is no torch model behind it")
        return self._model

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.weights.config

    def close(self) -> None:
        """Writes to the store what it lacks, and closes it and what `expert_bytes` opened. Idempotent."""
        self._close_store()
        if self._opened is not None:
            self._opened.close()

    def _close_store(self) -> None:
        if self.store is None or self.store.closed:
            return
        if self._last is not None:
            self.keep(self._last.paged)
        try:
            for space, ids, pages, snapshots in self.prefixes.branches() if self.prefixes is not None else ():
                self.store.put(ids, pages, pool=self.pool, snapshots=snapshots, space=space, last=True)
        except SequenceFileError as error:
            log.warning("prefixes in memory are not kept: %s", error)
        finally:
            self.store.close()

    # --- sequences

    def open(self, prompt_ids: Sequence[int], *, space: str = "") -> SequenceState:
        """A new sequence that holds `prompt_ids`; what is cached of them is not fed again.

        space: prefixes of one space are invisible in another. Raises PromptError, ContextOverflow, CacheFull.
        """
        ids = list(prompt_ids)
        self.check(ids)
        self.refresh()
        sequence = SequenceState(self, self.begin(ids, space=space))
        try:
            sequence.append(ids[sequence.length :])
        except BaseException:
            sequence.close()
            raise
        return sequence

    def begin(self, ids: Sequence[int], *, space: str = "") -> PagedSequence:
        """A sequence that holds the longest cached prefix of `ids`, at most all but the last token. CacheFull."""
        return self.find(ids, space=space).sequence

    def find(self, ids: Sequence[int], *, space: str = "", defer: bool = False) -> Found:
        """As `begin`, with what was found and where; defer: nothing is replayed yet. Raises CacheFull."""
        if self.prefixes is None:
            return Found(PagedSequence(self.paging), Match(tokens=0, replay=0, known=0, reason="off"), 0)
        loaded = self._load_prefix(ids, space) if self.store is not None else 0
        sequence, match = self.prefixes.open(self.paging, ids, space=space, defer=defer)
        return Found(sequence, match, min(loaded, match.tokens))

    def _load_prefix(self, ids: Sequence[int], space: str) -> int:
        """Brings what only the disk knows of `ids` into the prefix tree; returns how many tokens that was."""
        assert self.prefixes is not None and self.store is not None
        deep = self.store.depth(ids, space=space)
        if deep <= self.prefixes.match(ids, space=space).known:
            return 0
        pin = self.prefixes.pin(ids, space=space)  # making room must not take what the new pages hang on
        known = pin.tokens // PAGE_TOKENS * PAGE_TOKENS
        try:
            pages, snapshots = self.store.load(ids[:deep], pool=self.pool, skip=known, space=space)
            try:
                for snapshot in snapshots:
                    self.pool.charge(snapshot, len(snapshot.data))
                whole = known + len(pages) * PAGE_TOKENS
                behind = [-1] * (known // PAGE_TOKENS)  # there already
                self.prefixes.insert_pages(ids[:whole], [*behind, *pages], snapshots=snapshots, space=space)
                return whole - known
            finally:
                self.pool.drop_pages(pages)
        except CacheFull as error:
            log.info("a prefix on disk is not used: %s", error)
            return 0
        finally:
            self.prefixes.unpin(pin)

    def pin(self, ids: Sequence[int], *, space: str = "") -> Pinned:
        """Keeps what is cached of `ids`, in memory and on disk, until `unpin`."""
        tree = None if self.prefixes is None else self.prefixes.pin(ids, space=space)
        return Pinned(tree, () if self.store is None else self.store.pin(ids, space=space))

    def unpin(self, pinned: Pinned) -> None:
        """Takes back one `pin`."""
        if self.prefixes is not None and pinned.tree is not None:
            self.prefixes.unpin(pinned.tree)
        if self.store is not None:
            self.store.unpin(pinned.store)

    def locate(self, ids: Sequence[int], *, space: str = "") -> Located:
        """Where what is cached of `ids` lies."""
        pages: list[int] = []
        tokens = 0
        if self.prefixes is not None:
            pages = self.prefixes.branch(ids, space=space)[0]
            tokens = self.prefixes.match([*ids, 0], space=space).tokens
        live = next((n for n, page in enumerate(pages) if self.pool.references(page) < 2), len(pages))
        return Located(
            live=live * PAGE_TOKENS,
            memory=max(tokens, len(pages) * PAGE_TOKENS),
            disk=0 if self.store is None else self.store.depth(ids, space=space),
            page_bytes=len(pages) * self.pool.layout.page_bytes,
        )

    def checkpoint(self, ids: Sequence[int], *, space: str = "") -> int:
        """Writes what memory holds of `ids` to disk now, whatever the budget; returns the tokens that lie there.

        Raises EngineError without a store, SequenceFileError when the disk refuses.
        """
        if self.store is None or self.prefixes is None:
            raise EngineError("this engine keeps nothing on disk: open it with a store")
        pages, snapshots = self.prefixes.branch(ids, space=space)
        whole = ids[: len(pages) * PAGE_TOKENS]
        self.store.put(whole, pages, pool=self.pool, snapshots=snapshots, space=space, last=True)
        return self.store.depth(ids, space=space)

    def discard(self, ids: Sequence[int], *, space: str = "") -> None:
        """Forgets what only `ids` goes through, in memory and on disk; what is pinned stays."""
        if self.prefixes is not None:
            self.prefixes.forget(ids, space=space)
        if self.store is not None:
            self.store.discard(ids, space=space)

    def keep(
        self,
        sequence: PagedSequence,
        *,
        space: str = "",
        frontiers: Sequence[int] = (),
        warm: bool = False,
    ) -> None:
        """Makes what `sequence` holds a prefix for others, in memory and on disk. A disk that refuses is told once.

        frontiers: positions at or just behind its head to be kept to the token, in memory. warm: a conversation came
        back for it (prefix.py).
        """
        if self.prefixes is not None:
            self.prefixes.insert(sequence, space=space, warm=warm)
            for at in frontiers:
                self.prefixes.insert_frontier(sequence, at=at, space=space, warm=warm)
        if self.store is not None:
            try:
                self.store.put(
                    sequence.token_ids,
                    sequence.pages,
                    pool=self.pool,
                    snapshots=tuple(sequence.snapshots.values()),
                    space=space,
                )
            except SequenceFileError as error:
                log.warning("a prefix stays in memory only: %s", error)

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[TokenEvent]:
        """Streams the tokens that follow `prompt_ids`.

        Continues the last generation's sequence when `prompt_ids` extends it. Raises PromptError, ContextOverflow,
        CacheFull before anything is sampled.
        """
        ids = list(prompt_ids)
        self.check(ids)
        self.refresh()
        last, self._last = (
            self._last,
            None,
        )  # a generation dropped half-way leaves no half-fed sequence behind
        if last is not None and 0 < last.length <= len(ids) and last.token_ids == ids[: last.length]:
            sequence = last
            sequence.append(ids[last.length :])
        else:
            if last is not None:
                self.keep(last.paged)
            del last
            sequence = self.open(ids)
        self._last = sequence
        return self._turn(sequence, params or SamplingParams())

    def _turn(self, sequence: SequenceState, params: SamplingParams) -> Iterator[TokenEvent]:
        for event in sequence.generate(params):
            if event.finish_reason is not None:  # before the last event: its receiver may not come back
                self.keep(sequence.paged)
            yield event

    def usage(self) -> KVUsage | None:
        """The cache of the last `generate`, or None before the first."""
        return None if self._last is None else self._last.usage()

    def load(self, path: str | Path) -> SequenceState:
        """A sequence written by `SequenceState.save`. Raises SequenceFileError, CacheFull."""
        self.refresh()
        paged, logits = load_file(Path(path), self.paging, fingerprint=self.fingerprint())
        sequence = SequenceState(self, paged)
        if logits is not None and len(logits) == self.config.vocab_size:
            sequence.logits = torch.from_numpy(logits)[None]
        return sequence

    # --- limits and identity

    def predicted_bytes(self, tokens: int) -> int:
        """Bytes of the pool that a sequence of `tokens` tokens takes."""
        return self.pool.layout.held_bytes(tokens)

    def check(self, ids: Sequence[int], *, held: int = 0) -> None:
        """Raises unless `ids` are valid and fit beside `held` tokens, in the context and in an empty cache."""
        limit = self.config.max_position_embeddings
        if not ids and not held:
            raise PromptError("the prompt is empty: give at least one token")
        vocab = self.config.vocab_size
        bad = next((token for token in ids if not 0 <= token < vocab), None)
        if bad is not None:
            raise PromptError(f"token id {bad} is outside the vocabulary (0 to {vocab - 1})")
        total = held + len(ids)
        if total > limit:
            raise ContextOverflow(
                f"{total} tokens do not fit the context of {limit}", tokens=total, limit=limit
            )
        need = self.predicted_bytes(total)
        if need > self.kv_bytes:
            raise ContextOverflow(
                f"{total} tokens need {need} bytes of KV cache, the budget is {self.kv_bytes}: raise kv_bytes",
                tokens=total,
                limit=limit,
            )

    def refresh(self) -> None:
        """Forgets every cached prefix if the model's parameters have changed: they mean nothing to the new ones."""
        if self._model is None:
            return
        epoch = hash(tuple((p.data_ptr(), p._version) for p in self._model.parameters()))
        if epoch == self._epoch:
            return
        if self._epoch is not None:
            if self.store is not None:
                raise SequenceFileError(
                    "the model's parameters have changed, its store holds another model's cache: "
                    "open a new engine, with another directory"
                )
            self._last = self._fingerprint = None
            if self.prefixes is not None:
                self.prefixes.clear()
        self._epoch = epoch

    def fingerprint(self) -> bytes:
        """SHA-256 over configuration, parameters and cache format: equal iff the cached bytes mean the same."""
        if self._fingerprint is None:
            layout = {"format": self.pool.layout.cache_format}
            digest = hashlib.sha256(json.dumps([self.config.to_dict(), layout], sort_keys=True).encode())
            if self._model is None:
                for name, tensor in _sample(self.weights):
                    digest.update(name.encode())
                    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
            else:
                for name, tensor in sorted(self._model.state_dict().items()):
                    digest.update(name.encode())
                    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
            self._fingerprint = digest.digest()
        return self._fingerprint


def _sample(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """What tells checkpoints apart without reading all of one: every layer's norms, rows of embedding and head."""
    for name in ("embed", "head"):
        yield name, weights.matrix(name).data[::64]
    for layer in range(weights.config.num_hidden_layers):
        for name in ("attn_norm", "attn.q_norm", "attn.kv_norm", "ffn_norm"):
            yield name, weights.vector(f"layers.{layer}.{name}")


class SequenceState:
    """One conversation's tokens and cache. Made by `Engine.open`, `fork`, `Engine.load` or `Batch.release`.

    Its memory goes back with `close`, or when nobody holds it any more.
    """

    def __init__(self, engine: Engine, paged: PagedSequence | None = None) -> None:
        self.engine = engine
        self.paged = PagedSequence(engine.paging) if paged is None else paged
        self._logits: torch.Tensor | None = None

    @property
    def token_ids(self) -> list[int]:
        """Tokens in the cache, in order."""
        return self.paged.token_ids

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.paged.length

    @property
    def logits(self) -> torch.Tensor | None:
        """fp32 [1, V] after the last token; None for an empty sequence. After a rewind it is computed when asked."""
        if self._logits is None and self.length:
            token = self.token_ids[-1]
            self.paged.rewind(self.length - 1)
            self._logits = self.paged.append([token])
        return self._logits

    @logits.setter
    def logits(self, value: torch.Tensor | None) -> None:
        self._logits = value

    def append(self, ids: Sequence[int]) -> None:
        """Feeds `ids` in chunks. Raises PromptError, ContextOverflow, CacheFull; then nothing has changed."""
        ids = list(ids)
        self.engine.check(ids, held=self.length)
        if ids:
            self._logits, before = None, self._logits
            try:
                self._logits = self.paged.append(ids)
            except CacheFull:
                self._logits = before
                raise

    def generate(self, params: SamplingParams) -> Iterator[TokenEvent]:
        """Samples until a stop id, `max_tokens` or the end of the context. Every sampled token but the last is fed."""
        if self.engine.drafts and self.length:
            yield from speculate(self, params, drafts=self.engine.drafts, figures=self.engine.speculation)
            return
        limit = self.engine.config.max_position_embeddings
        for count in range(1, params.max_tokens + 1):
            logits = self.logits
            assert logits is not None
            ids, logprobs = sample(logits, [params], [self.length])
            token = int(ids[0])
            reason: FinishReason | None = None
            if token in params.stop_ids:
                reason = "stop"
            elif count == params.max_tokens or self.length + 1 >= limit:
                reason = "length"
            yield TokenEvent(token, float(logprobs[0]), self.length, reason)
            if reason is not None:
                return
            self.append([token])

    def fork(self) -> SequenceState:
        """An independent twin; pages are shared until one of both writes them. Raises CacheFull."""
        twin = SequenceState(self.engine, self.paged.fork())
        twin._logits = self._logits
        return twin

    def rewind(self, position: int) -> int:
        """Goes back to the first `position` tokens; returns how many tokens had to be fed again for it.

        None within the layout's slack (16), else those since the last snapshot before it, at most
        `sequence.replay_tokens`. Raises ValueError outside 1..length.
        """
        if not 1 <= position <= self.length:
            raise ValueError(f"cannot rewind to {position}: the sequence holds {self.length} tokens")
        if position < self.length:
            self._logits = None
        return self.paged.rewind(position)

    def save(self, path: str | Path) -> None:
        """Writes tokens, cache and logits to one file, atomically. Raises SequenceFileError when it cannot."""
        logits = None if self._logits is None else self._logits.numpy().astype(np.float32).ravel()
        save_file(Path(path), self.paged, fingerprint=self.engine.fingerprint(), logits=logits)

    def usage(self) -> KVUsage:
        """Bytes this sequence's cache holds."""
        config, layout = self.engine.config, self.engine.pool.layout
        per_token = 2 * 8 * config.head_dim * 2 * config.num_hidden_layers
        held = len(self.paged.pages) * layout.page_bytes + layout.slab_bytes
        return KVUsage(self.length, held, per_token * self.length, layout.content_bytes(self.length))

    def close(self) -> None:
        """Gives its memory back. Idempotent."""
        self.paged.close()
