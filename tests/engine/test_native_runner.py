"""The native forward over pages: the torch model's logits, the same bits however a call is cut, and bad calls.

Tolerance: 2e-5 as in tests/model/test_parity.py, for logits of spread 1; both are fp32 with other summation orders.
The torch model is the oracle; it is held to HF transformers elsewhere. 32 index heads: with few of them scores tie
(spec/model.md 2.6). Where caches or weights round, two correct paths part at a rounding step or a top-k now and then:
there the mean error is held, which a wrong layout or scale raises by a hundred times.
"""

import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rorqual import kernels
from rorqual.engine import native_runner as module
from rorqual.engine.layout import CacheLayout
from rorqual.engine.native_runner import NativeRunner, native_runner
from rorqual.engine.pool import PagePool
from rorqual.engine.runner import Segment
from rorqual.model import Config, Model
from rorqual.model.errors import CheckpointError
from rorqual.model.quant import pack_fp4_weight, pack_fp8_weight
from rorqual.model.weights import Expert, ModelWeights, Packed

TOLERANCE = 2e-5
LENGTH = 300
CHUNKS = (1, 2, 3, 5, 7, 64, 127, 128, 129, 130, 256)

# The embedded model's shape, and one of every layer kind with YaRN at work, four streams and widths that no vector
# length divides; more entries than top-k in both.
TINY = Config.preset("tiny").replace(index_n_heads=32, vocab_size=211)
MIXED = Config(
    vocab_size=173,
    hidden_size=90,
    num_hidden_layers=6,
    num_attention_heads=6,
    head_dim=44,
    qk_rope_head_dim=12,
    q_lora_rank=38,
    o_groups=3,
    o_lora_rank=29,
    sliding_window=16,
    compress_ratios=(0, 4, 128, 4, 128, 0),
    original_seq_len=64,
    rope_factor=16.0,
    index_n_heads=32,
    index_head_dim=32,
    index_topk=12,
    n_routed_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=36,
    num_hash_layers=2,
    swiglu_limit=1.0,
    hc_mult=4,
    max_position_embeddings=1024,
)

available = kernels.cpu_status()
pytestmark = pytest.mark.skipif(not available.available, reason=available.reason)
levels = pytest.mark.parametrize("level", available.levels)
formats = pytest.mark.parametrize("cache_format", ["exact", "packed"])


def make(config, *, seed=0, simulate_quant=False):
    model = Model(config, simulate_quant=simulate_quant).initialize(seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "attn_sink")):
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
                )
    return model


@pytest.fixture(scope="module")
def models():
    return {name: make(config) for name, config in (("tiny", TINY), ("mixed", MIXED))}


def tokens(config, count=LENGTH, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (count,), generator=generator).numpy()


class Paged:
    """A pool, a runner over it, and sequences in it."""

    def __init__(self, weights, *, cache_format="exact", slack=16, mtp_layers=0, kv_bytes=1 << 24, **options):
        weights = ModelWeights(weights) if isinstance(weights, nn.Module) else weights
        layout = CacheLayout(weights.config, cache_format, slack=slack, mtp_layers=mtp_layers)
        self.pool = PagePool(layout, kv_bytes=kv_bytes)
        self.runner = NativeRunner(weights, self.pool, **options)

    def open(self, count=LENGTH):
        pages = self.pool.take_pages(-(-count // 128))
        return np.array(pages[::-1], dtype=np.int32), self.pool.take_slab()

    def feed(self, ids, sequence, *, position=0, chunk=None, logits="all"):
        """Logits of all of `ids`, `chunk` at a time."""
        chunk = chunk or len(ids)
        calls = [
            self.runner.forward([Segment(ids[at : at + chunk], position + at, *sequence, logits)])
            for at in range(0, len(ids), chunk)
        ]
        return torch.cat(calls)


# --- the numbers


@levels
@pytest.mark.parametrize("name", ["tiny", "mixed"])
def test_exact_pages_give_the_models_logits(models, name, level):
    model = models[name]
    ids = tokens(model.config)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None])[0]
    paged = Paged(model, level=level)
    torch.testing.assert_close(paged.feed(ids, paged.open()), expected, atol=TOLERANCE, rtol=0)


def test_calls_follow_the_torch_models_own_cached_decoding(models):
    model = models["mixed"]
    ids = tokens(model.config, 140)
    state, expected, at = model.new_state(), [], 0
    paged = Paged(model)
    sequence, got = paged.open(), []
    for count in (3, 1, 1, 124, 1, 1, 9):
        with torch.no_grad():
            expected.append(model.extend(torch.from_numpy(ids[at : at + count])[None], state))
        got.append(paged.runner.forward([Segment(ids[at : at + count], at, *sequence)]))
        at += count
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=TOLERANCE, rtol=0)


@levels
@formats
def test_however_a_prompt_is_cut_its_logits_have_the_same_bits(models, level, cache_format):
    model = models["tiny"]
    ids = tokens(model.config)
    paged = Paged(model, cache_format=cache_format, level=level)
    whole = paged.feed(ids, paged.open())
    for chunk in CHUNKS:
        sequence = paged.open()
        assert torch.equal(paged.feed(ids, sequence, chunk=chunk), whole), chunk
        paged.pool.drop_pages(sequence[0])
        paged.pool.drop_slab(sequence[1])


@formats
def test_bits_do_not_depend_on_blocks_or_threads(models, cache_format):
    model = models["mixed"]
    ids = tokens(model.config)
    paged = Paged(model, cache_format=cache_format, threads=1)
    whole = paged.feed(ids, paged.open())
    for threads, block_tokens in ((1, 37), (2, 256), (3, 64), (5, 1)):
        other = Paged(model, cache_format=cache_format, threads=threads, block_tokens=block_tokens)
        assert torch.equal(other.feed(ids, other.open()), whole), (threads, block_tokens)
        if threads > 1:
            assert torch.equal(other.feed(ids, other.open(), chunk=2), whole), threads


@formats
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_does_not_feel_its_company(models, threads, cache_format):
    """Prefill chunks, decode tokens and drafts of five sequences in one call, at positions of their own."""
    model = models["tiny"]
    paged = Paged(model, cache_format=cache_format, threads=threads, block_tokens=48)
    starts, counts = (0, 3, 127, 130, 251), (60, 1, 1, 3, 17)
    alone, together, segments = [], [], []
    for seed, (start, count) in enumerate(zip(starts, counts, strict=True)):
        ids = tokens(model.config, start + count, seed=seed)
        for target in (alone, together):
            sequence = paged.open()
            if start:
                paged.feed(ids[:start], sequence, chunk=50, logits="none")
            if target is alone:
                alone.append(paged.feed(ids[start:], sequence, position=start))
            else:
                segments.append(Segment(ids[start:], start, *sequence, "all"))
    assert torch.equal(paged.runner.forward(segments), torch.cat(alone))


def test_logits_come_for_the_tokens_that_were_asked_for(models):
    model = models["tiny"]
    ids = tokens(model.config, 20)
    paged = Paged(model)
    whole = paged.feed(ids, paged.open())
    segments = [Segment(ids, 0, *paged.open(), wanted) for wanted in ("none", "last", "all")]
    got = paged.runner.forward(segments)
    assert torch.equal(got, torch.cat([whole[-1:], whole]))
    assert paged.runner.forward([]).shape == (0, model.config.vocab_size)


@levels
def test_packed_pages_round_as_the_torch_model_does(models, level):
    model = models["tiny"]
    ids = tokens(model.config)
    rounds = Model(model.config, simulate_quant=True).eval()
    rounds.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, exact = rounds(torch.from_numpy(ids)[None])[0], model(torch.from_numpy(ids)[None])[0]
    paged = Paged(model, cache_format="packed", level=level)
    error = (paged.feed(ids, paged.open()) - expected).abs().mean()
    moved = (exact - expected).abs().mean()  # by rounding the cache at all
    # avx512_bf16 computes packed attention in bf16, 2^-9 a number; an e4m3 value is rounded by 2^-4.
    assert error < moved / (3 if level == "avx512_bf16" else 20)


@formats
def test_rings_serve_a_rewind_of_as_many_tokens_as_their_slack(models, cache_format):
    model = models["mixed"]
    ids, other = tokens(model.config, 200), tokens(model.config, 40, seed=9)
    paged = Paged(model, cache_format=cache_format, slack=20)
    for base in (3, 25, 129, 140):
        fresh = torch.from_numpy(np.concatenate((ids[:base], other)))
        expected = paged.feed(fresh.numpy(), paged.open())[base:]
        sequence = paged.open()
        paged.feed(ids[: base + 20], sequence, logits="none")  # 20 tokens too many
        assert torch.equal(paged.feed(other, sequence, position=base, chunk=3), expected), base


def test_frozen_segments_rebuild_rings_and_write_no_page(models):
    """Zero caching: over the right entries, a replay of `window - 1` tokens a layer makes the rings exact."""
    config = TINY.replace(compress_ratios=(4, 32), num_hidden_layers=2)
    model = make(config)
    ids = tokens(config, 280)
    paged = Paged(model)
    pages, slab = paged.open()
    paged.feed(ids[:256], (pages, slab), logits="none")
    expected_pages = [paged.pool.read_page(page) for page in pages[:2]]
    again = paged.pool.take_slab()
    paged.pool.slab(again)[:] = 0x7F  # stale rows of another sequence
    paged.runner.forward([Segment(ids[64:256], 64, pages, again, "none", frozen=True)])
    for page, held in zip(pages[:2], expected_pages, strict=True):
        assert np.array_equal(paged.pool.read_page(page), held)
    own = paged.open()
    expected = paged.feed(ids, own)[256:]
    assert torch.equal(paged.feed(ids[256:], (pages, again), position=256), expected)


# --- weights


class Quantised:
    """A model's matrices in another type; `model` then holds what they are worth."""

    drafter = None
    experts_resident = True

    def __init__(self, model, kind, *, block=128):
        self.model, self.kind, self.block = model, kind, block
        self._plain, self._made = ModelWeights(model), {}
        self.config = model.config

    def matrix(self, name):
        if name not in self._made:
            packed = self._plain.matrix(name)
            dense = ("embed", "head", "gate", "compressor", "weights_proj")
            fp4 = self.kind == "fp4" and ".experts." in name
            kind = "fp4" if fp4 else "bf16" if any(part in name for part in dense) else self.kind
            if kind == "fp8" or (kind == "fp4" and not fp4):
                data, scale = pack_fp8_weight(packed.data, block=self.block)
                made = Packed(
                    data=data.view(torch.uint8), scale=scale, kind="fp8", shape=packed.shape, block=self.block
                )
            elif kind == "fp4":
                data, scale = pack_fp4_weight(packed.data)
                made = Packed(
                    data=data.view(torch.uint8), scale=scale, kind="fp4", shape=packed.shape, block=32
                )
            else:
                made = replace(packed, data=packed.data.bfloat16(), kind="bf16")
            with torch.no_grad():
                packed.data.copy_(made.unpack())
            self._made[name] = made
        return self._made[name]

    def vector(self, name):
        return self._plain.vector(name)

    def table(self, name):
        return self._plain.table(name)

    def prefetch(self, token_ids):
        self.prefetched = list(token_ids)


class Streamed(Quantised):
    """Routed experts come on demand, and go."""

    experts_resident = False
    fails = False

    def load_experts(self, layer, ids):
        if self.fails:
            raise CheckpointError("expert 3 could not be read")
        assert list(ids) == sorted(set(ids)) and len(ids)
        return [
            Expert(*(self.matrix(f"layers.{layer}.ffn.experts.{expert}.{w}") for w in ("w1", "w3", "w2")))
            for expert in ids
        ]


@levels
@pytest.mark.parametrize(("kind", "block"), [("bf16", 128), ("fp8", 128), ("fp8", 32), ("fp4", 128)])
def test_packed_weights_are_worth_what_they_unpack_to(level, kind, block):
    """Activations are rounded to bf16 for them: 2^-9 a number, some 0.01 on logits of spread 1."""
    model = make(MIXED if kind != "fp4" else TINY)
    weights = Quantised(model, kind, block=block)
    paged = Paged(weights, level=level)
    ids = tokens(model.config, 140)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None])[0]
    got = paged.feed(ids, paged.open())
    assert (got - expected).abs().mean() < 0.05
    assert torch.equal(paged.feed(ids, paged.open(), chunk=9), got)


def test_a_bf16_model_is_read_in_place():
    model = make(TINY).bfloat16()
    wide = make(TINY)
    wide.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
    )
    ids = tokens(TINY, 150)
    with torch.no_grad():
        expected = wide(torch.from_numpy(ids)[None])[0]
    paged = Paged(model)
    assert (paged.feed(ids, paged.open()) - expected).abs().mean() < 0.05
    with torch.no_grad():  # a norm is converted: an update in place must be seen all the same
        model.norm.weight.mul_(2)
    assert (paged.feed(ids, paged.open()) - 2 * expected).abs().mean() < 0.1


def test_streamed_experts_give_the_bits_of_resident_ones_and_their_failure_is_raised():
    ids = tokens(TINY, 70)
    resident = Paged(Quantised(make(TINY), "fp4"))
    weights = Streamed(make(TINY), "fp4")
    for expert in range(TINY.n_routed_experts):  # as the resident ones were: before the model is read
        for layer in range(TINY.num_hidden_layers):
            weights.load_experts(layer, [expert])
    paged = Paged(weights, block_tokens=16)
    assert torch.equal(paged.feed(ids, paged.open()), resident.feed(ids, resident.open()))
    weights.fails = True
    with pytest.raises(CheckpointError, match="expert 3"):
        paged.feed(ids, paged.open())
    weights.fails = False
    assert torch.equal(paged.feed(ids, paged.open()), resident.feed(ids, resident.open()))


def test_parameters_may_be_updated_and_replaced():
    model = make(TINY)
    ids = tokens(TINY, 40)
    paged = Paged(model)
    before = paged.feed(ids, paged.open())
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(paged.feed(ids, paged.open()), 2 * before)
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    assert torch.equal(paged.feed(ids, paged.open()), 4 * before)


# --- the MTP head


def test_hidden_streams_feed_the_mtp_head():
    model = make(TINY)
    ids = tokens(TINY, 150)
    from rorqual.model.attention import AttentionMode

    with torch.no_grad():
        passed = model.train_pass(torch.from_numpy(ids)[None], mode=AttentionMode(), mtp=True)
        expected = model.logits(passed.mtp_hidden)[0]
    paged = Paged(model, mtp_layers=1)
    pages, slab = paged.open()
    logits, streams = paged.runner.forward_hidden([Segment(ids, 0, pages, slab, "all")], hidden=[150])
    torch.testing.assert_close(logits, model.logits(passed.hidden)[0].detach(), atol=TOLERANCE, rtol=0)
    drafts, deeper = paged.runner.mtp([Segment(ids[1:], 0, pages, slab, "all")], streams[:-1], hidden=[2])
    torch.testing.assert_close(drafts, expected, atol=TOLERANCE, rtol=0)
    assert deeper.shape == (2, TINY.hc_mult, TINY.hidden_size) and deeper.isfinite().all()
    own = [paged.runner.mtp([Segment(ids[1:60], 0, pages, slab, "all")], streams[:59])[0]]
    for at in range(59, 149):
        segment = Segment(ids[at + 1 : at + 2], at, pages, slab)
        own.append(paged.runner.mtp([segment], streams[at : at + 1])[0])
    assert torch.equal(torch.cat(own), drafts)
    _, last = paged.runner.forward_hidden(
        [Segment(ids[:30], 0, *paged.open()), Segment(ids[:9], 0, *paged.open())], hidden=[2, 1]
    )
    assert torch.equal(last, torch.stack([streams[28], streams[29], streams[8]]))


def test_an_mtp_call_wants_a_head_and_fitting_streams():
    ids = tokens(TINY, 4)
    paged = Paged(make(TINY), mtp_layers=1)
    segment = Segment(ids, 0, *paged.open())
    with pytest.raises(ValueError, match="streams are"):
        paged.runner.mtp([segment], torch.zeros(3, TINY.hc_mult, TINY.hidden_size))
    bare = Paged(make(TINY))
    with pytest.raises(ValueError, match="no MTP head"):
        bare.runner.mtp([Segment(ids, 0, *bare.open())], torch.zeros(4, TINY.hc_mult, TINY.hidden_size))


# --- bad calls


def broken(good, paged):
    """Segments that break the contract, and what the error says."""
    pages = good.pages
    wide = np.array([0, 1 << 20], dtype=np.int32)
    below = np.array([-1, 0], dtype=np.int32)
    return [
        (replace(good, tokens=np.array([1, TINY.vocab_size])), "vocabulary"),
        (replace(good, tokens=np.array([-1])), "vocabulary"),
        (replace(good, tokens=np.array([], dtype=np.int64)), r"\(0,\) tokens"),
        (replace(good, tokens=np.zeros((2, 2), dtype=np.int64)), r"\(2, 2\) tokens"),
        (replace(good, position=-1), "position -1"),
        (replace(good, position=1 << 40), "pages do not hold"),
        (replace(good, pages=pages[:1], position=127), "1 pages do not hold 130 tokens"),
        (replace(good, pages=wide, position=127), "page id is outside"),
        (replace(good, pages=below), "page id is outside"),
        (replace(good, slab=paged.pool.slab_capacity), "slab"),
        (replace(good, slab=-1), "slab"),
    ]


@formats
def test_a_bad_segment_is_refused_before_anything_changes(models, cache_format):
    paged = Paged(models["tiny"], cache_format=cache_format, kv_bytes=1 << 22)
    ids = tokens(TINY, 130)
    pages, slab = paged.open(256)
    other = paged.open(256)
    paged.feed(ids, (pages, slab), logits="none")
    held = [paged.pool.read_page(page) for page in pages], paged.pool.slab(slab).copy()
    good = Segment(ids[:3], 5, pages, slab)
    for bad, words in broken(good, paged):
        company = [Segment(ids[:2], 0, *other)] if bad.slab != other[1] else []
        with pytest.raises(ValueError, match=words):
            paged.runner.forward([*company, bad])
        assert all(np.array_equal(paged.pool.read_page(p), h) for p, h in zip(pages, held[0], strict=True))
        assert np.array_equal(paged.pool.slab(slab), held[1])
    with pytest.raises(ValueError, match="one slab"):
        paged.runner.forward([good, good])
    with pytest.raises(ValueError, match="hidden has 2"):
        paged.runner.forward_hidden([good], hidden=[1, 1])
    for count in (-1, 4):
        with pytest.raises(ValueError, match="hidden rows"):
            paged.runner.forward_hidden([good], hidden=[count])


def test_a_hash_table_that_names_no_expert_is_refused():
    model = make(TINY)
    paged = Paged(model)
    model.layers[0].ffn.gate.tid2eid[5, 1] = TINY.n_routed_experts
    with pytest.raises(ValueError, match="hash table"):
        paged.runner.forward([Segment(np.array([4, 5]), 0, *paged.open())])
    assert paged.runner.forward([Segment(np.array([4]), 0, *paged.open())]).isfinite().all()


def test_weights_of_another_shape_are_refused():
    model = make(TINY)
    model.layers[1].attn.wq_a.weight = nn.Parameter(torch.zeros(3, TINY.hidden_size))
    with pytest.raises(CheckpointError, match=r"layers.1.attn.wq_a: shape \[3, 128\]"):
        Paged(model)
    with pytest.raises(ValueError, match="level 'sse9'"):
        Paged(make(TINY), level="sse9")
    with pytest.raises(ValueError, match="block_tokens"):
        Paged(make(TINY), block_tokens=0)


def test_why_torch_runs_is_told(monkeypatch, caplog, tmp_path):
    weights = ModelWeights(make(TINY).double())
    layout = CacheLayout(TINY, "exact")
    pool = PagePool(layout, kv_bytes=1 << 24)
    with caplog.at_level(logging.WARNING):
        assert native_runner(weights, pool) is None
        assert native_runner(ModelWeights(make(TINY)), pool, simulate_quant=True) is None
        monkeypatch.setattr(module, "LIBRARY", tmp_path / "none.so")
        assert native_runner(ModelWeights(make(TINY)), pool) is None
    text = caplog.text
    assert "torch.float64" in text and "simulate_quant" in text and "native library" in text


# --- company


def test_two_threads_may_share_a_runner(models):
    model = models["tiny"]
    paged = Paged(model, threads=2)
    prompts = [tokens(TINY, 90, seed=seed) for seed in range(4)]
    expected = [paged.feed(ids, paged.open()) for ids in prompts]
    got: list[torch.Tensor | None] = [None] * 4

    def work(number):
        got[number] = paged.feed(prompts[number], paged.open(), chunk=7)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_forked_child_makes_threads_of_its_own():
    script = (
        "import os, numpy as np, torch\n"
        "from tests.engine.test_native_runner import TINY, Paged, make, tokens\n"
        "paged, ids = Paged(make(TINY), threads=3), tokens(TINY, 64)\n"
        "first = paged.feed(ids, paged.open())\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if torch.equal(paged.feed(ids, paged.open()), first) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=os.getcwd(),
    )
    assert done.returncode == 0, done.stderr
