"""The native decode step against the torch modules: logits and state, exactness, fallback, bad input.

Tolerance: 2e-5 as in tests/model/test_parity.py, for logits of spread 1; both paths are fp32 with other summation
orders. The torch model is the oracle; it is held to HF transformers elsewhere. Seeds are fixed: with random weights a
near-tie in a top-k or a router can make two correct fp32 paths part ways (docs/kernels.md).
"""

import copy
import ctypes
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual import kernels
from rorqual.kernels import cpu
from rorqual.model import Config, Model
from rorqual.model.native_step import NativeStep
from rorqual.model.state import RowHistory

TOLERANCE = 2e-5

TINY = Config.preset("tiny").replace(num_nextn_predict_layers=0, vocab_size=211)
# Every kind of layer, YaRN at work, four streams, widths that no vector length divides, more entries than top-k.
MIXED = Config(
    vocab_size=173,
    hidden_size=90,
    num_hidden_layers=6,
    num_attention_heads=6,
    head_dim=44,
    qk_rope_head_dim=12,
    q_lora_rank=37,
    o_groups=3,
    o_lora_rank=29,
    sliding_window=16,
    compress_ratios=(0, 4, 128, 4, 128, 0),
    original_seq_len=64,
    rope_factor=16.0,
    index_n_heads=32,
    index_head_dim=28,
    index_topk=12,
    n_routed_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=35,
    num_hash_layers=2,
    swiglu_limit=1.0,
    hc_mult=4,
    max_position_embeddings=1024,
    num_nextn_predict_layers=0,
)

available = kernels.cpu_status()
pytestmark = pytest.mark.skipif(not available.available, reason=available.reason)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(config, seed=0):
    """Every parameter random; routers and indexers sharp enough that near-ties are rare."""
    model = Model(config, mtp=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith(("sink", "ape", "base", "scale")):
                tensor.copy_(0.7 * noise)
            elif name.endswith("bias"):
                tensor.copy_(0.1 * noise)
            elif name == "embed.weight":
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def tiny():
    return build(TINY)


@pytest.fixture(scope="module")
def mixed():
    return build(MIXED)


def tokens(model, *shape, seed=1):
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_torch(model, ids, state, counts=None):
    native, model.native_step = model.native_step, None
    try:
        return model.extend(ids, state, counts=counts)
    finally:
        model.native_step = native


def filled(model, batch, length, seed=1):
    """A state of `batch` sequences that hold `length` tokens."""
    state = model.new_state(batch)
    if length:
        by_torch(model, tokens(model, batch, length, seed=seed), state)
    return state


def tensors(state):
    parts = [part for layer in state.layers for part in layer.parts()]
    return [part.rows if isinstance(part, RowHistory) else part.entries for part in parts]


def worst(one, other):
    """Largest difference of two states; the same places must hold -inf."""
    assert torch.equal(one.position, other.position)
    found = 0.0
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert a.shape == b.shape
        if a.numel():
            torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)
            found = max(found, float((a - b).nan_to_num().abs().max()))
    return found


@pytest.mark.parametrize(("name", "steps", "prefill"), [("tiny", 110, 60), ("mixed", 150, 0)])
def test_ragged_steps_equal_the_torch_path(name, steps, prefill, request):
    model = request.getfixturevalue(name)
    step, one, other = NativeStep(), filled(model, 3, prefill), filled(model, 3, prefill)
    generator = torch.Generator().manual_seed(5)
    most = 0.0
    for number in range(steps):
        counts = torch.randint(0, 4, (3,), generator=generator).clamp(max=1) if number % 3 == 2 else None
        ids = tokens(model, 3, 1, seed=number)
        expected = by_torch(model, ids, one, counts)
        found = step.extend(model, ids, other, counts=counts)
        busy = torch.ones(3, dtype=torch.bool) if counts is None else counts.bool()
        assert not found[~busy].any()
        if busy.any():
            most = max(most, float((expected - found)[busy].abs().max()))
            assert most <= TOLERANCE, number
    assert worst(one, other) <= TOLERANCE
    assert int(one.position.max()) // 4 > model.config.index_topk  # the top-k has chosen


@pytest.mark.parametrize("level", available.levels)
def test_each_level_equals_the_torch_path_where_blocks_end(mixed, level):
    step, one, other = NativeStep(level=level), filled(mixed, 2, 123), filled(mixed, 2, 123)
    for number in range(10):  # over position 127, where an HCA and a CSA block end
        ids = tokens(mixed, 2, 1, seed=number)
        found = step.extend(mixed, ids, other, counts=None)
        torch.testing.assert_close(found, by_torch(mixed, ids, one), atol=TOLERANCE, rtol=0)
    worst(one, other)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(st.tuples(st.integers(0, 9), st.lists(st.booleans(), min_size=2, max_size=2)), max_size=14)
)
def test_chunks_in_torch_and_native_steps_mix(mixed, plan):
    """0 is a native step, n a torch chunk of n; the reference takes all of it in torch."""
    step, one, other = NativeStep(), filled(mixed, 2, 50), filled(mixed, 2, 50)
    for number, (length, busy) in enumerate(plan):
        ids = tokens(mixed, 2, max(length, 1), seed=number)
        counts = torch.tensor([int(go) * max(length, 1) for go in busy])
        expected = by_torch(mixed, ids, one, counts)
        found = (
            by_torch(mixed, ids, other, counts) if length else step.extend(mixed, ids, other, counts=counts)
        )
        rows = torch.tensor(busy)
        torch.testing.assert_close(found[rows], expected[rows], atol=TOLERANCE, rtol=0)
    worst(one, other)


@pytest.mark.parametrize("level", available.levels)
def test_a_row_is_the_same_to_the_bit_in_any_company(mixed, level):
    """Alone, beside others, in another order, idle neighbours, one to three threads: 37 rows make several blocks."""
    batch = 37
    together = filled(mixed, batch, 70)
    ids = tokens(mixed, batch, 1)
    others = [
        (NativeStep(level=level, threads=threads), together.select(torch.arange(batch))) for threads in (2, 3)
    ]
    singles = {row: together.select(torch.tensor([row])) for row in (0, 17, 36)}
    order = torch.arange(batch).flip(0)
    turned = together.select(order)
    sparse, some = together.select(torch.arange(batch)), torch.arange(batch) % 3 == 0
    alone = NativeStep(level=level, threads=1)
    expected = alone.extend(mixed, ids, together, counts=None)
    for step, state in others:
        assert torch.equal(step.extend(mixed, ids, state, counts=None), expected)
        assert all(map(torch.equal, tensors(state), tensors(together)))
    for row, state in singles.items():
        assert torch.equal(alone.extend(mixed, ids[row : row + 1], state, counts=None)[0], expected[row])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(tensors(state), tensors(together), strict=True))
    assert torch.equal(alone.extend(mixed, ids[order], turned, counts=None), expected[order])
    before = [tensor.clone() for tensor in tensors(sparse)]
    found = others[0][0].extend(mixed, ids, sparse, counts=some.long())
    assert torch.equal(found[some], expected[some])
    assert all(torch.equal(a[~some], b[~some]) for a, b in zip(tensors(sparse), before, strict=True))


def test_index_ties_go_to_the_earlier_entry():
    """All index scores are zero: the first top-k entries, as in the torch path."""
    model = build(MIXED)
    with torch.no_grad():
        for layer in model.layers:
            if layer.attn.indexer is not None:
                layer.attn.indexer.weights_proj.weight.zero_()
    one, other = filled(model, 1, 90), filled(model, 1, 90)
    ids = tokens(model, 1, 1)
    found = NativeStep().extend(model, ids, other, counts=None)
    torch.testing.assert_close(found, by_torch(model, ids, one), atol=TOLERANCE, rtol=0)


def test_updated_replaced_and_moved_weights_are_seen():
    model, step = build(TINY), NativeStep()
    state = filled(model, 1, 20)
    ids = tokens(model, 1, 1)

    def check():
        one, other = state.select(torch.tensor([0])), state.select(torch.tensor([0]))
        found = step.extend(model, ids, one, counts=None)
        torch.testing.assert_close(found, by_torch(model, ids, other), atol=TOLERANCE, rtol=0)
        return found

    first = check()
    with torch.no_grad():
        model.layers[1].attn.wq_b.weight.mul_(-1.0)  # as an optimiser does
    second = check()
    model.layers[2].attn.wkv.weight = torch.nn.Parameter(model.layers[2].attn.wkv.weight.detach().flip(0))
    third = check()
    model.head.weight.data = model.head.weight.data.flip(0).contiguous()
    fourth = check()
    assert float((first - second).abs().max()) > 1e-3 < float((second - third).abs().max())
    assert float((third - fourth).abs().max()) > 1e-3


def test_extend_takes_the_native_path_for_single_tokens_only(tiny, monkeypatch):
    calls = []
    original = NativeStep.extend

    def counted(self, model, ids, state, *, counts):
        calls.append(ids.shape)
        return original(self, model, ids, state, counts=counts)

    monkeypatch.setattr(NativeStep, "extend", counted)
    state = tiny.new_state(2)
    with torch.no_grad():
        tiny.extend(tokens(tiny, 2, 5), state)
        assert calls == []
        assert tiny.extend(tokens(tiny, 2, 1), state).shape == (2, tiny.config.vocab_size)
        assert tiny.extend(tokens(tiny, 2, 1), state, last_only=False).shape == (2, 1, tiny.config.vocab_size)
    assert len(calls) == 2
    tiny.extend(tokens(tiny, 2, 1), state.select(torch.arange(2)))  # with gradients
    assert len(calls) == 2
    assert Model(TINY, mtp=False, native=False).native_step is None


@pytest.mark.parametrize("how", ["bfloat16", "simulate_quant"])
def test_what_is_not_fp32_stays_in_torch(how, caplog):
    config = TINY.replace(compress_ratios=(0,) * 5)  # compressors hold fp32 even in a bfloat16 model
    model = Model(config, mtp=False, simulate_quant=how == "simulate_quant").initialize(0)
    if how == "bfloat16":
        model = model.bfloat16()
    state = model.new_state(1)
    with caplog.at_level(logging.INFO, "rorqual.model.native_step"), torch.no_grad():
        for _ in range(2):
            assert model.extend(torch.tensor([[3]]), state).isfinite().all()
    assert int(state.position) == 2
    assert len([record for record in caplog.records if "torch path" in record.getMessage()]) == 1
    assert how in caplog.text


def test_a_missing_library_is_told_once_and_torch_decodes(tiny, tmp_path, monkeypatch, caplog):
    missing = tmp_path / "librorqual_cpu.so"
    monkeypatch.setattr("rorqual.model.native_step.LIBRARY", missing)
    one, other = filled(tiny, 1, 9), filled(tiny, 1, 9)
    ids = tokens(tiny, 1, 1)
    with caplog.at_level(logging.WARNING, "rorqual.kernels.cpu"), torch.no_grad():
        assert torch.equal(tiny.extend(ids, one), by_torch(tiny, ids, other))
        tiny.extend(ids, one)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "torch path" in warnings[0] and "g++" in warnings[0]
    status = kernels.cpu_status(missing)
    assert not status.available and status.level is None and str(missing) in status.reason


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_broken_library_is_refused(tmp_path, content):
    path = tmp_path / "librorqual_cpu.so"
    path.write_bytes(content)
    assert cpu.load_library(path) is None
    assert str(path) in kernels.cpu_status(path).reason


def test_a_library_of_something_else_is_refused():
    name = next(
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libm.so" in line
    )
    with pytest.raises(OSError, match="not the native library"):
        cpu.NativeLibrary(Path(name))


@pytest.mark.parametrize("token", [-1, TINY.vocab_size, 2**40])
def test_a_token_outside_the_vocabulary_changes_nothing(tiny, token):
    state = filled(tiny, 2, 30)
    before = [tensor.clone() for tensor in tensors(state)]
    with pytest.raises(IndexError, match=f"row 1: token id {token} "):
        NativeStep().extend(tiny, torch.tensor([[3], [token]]), state, counts=None)
    assert all(map(torch.equal, tensors(state), before)) and state.position.tolist() == [30, 30]


def test_counts_beyond_one_and_bad_hash_tables_are_refused():
    model, step = build(TINY), NativeStep()
    state = filled(model, 1, 3)
    with pytest.raises(ValueError, match=r"counts \[2\]"):
        step.extend(model, torch.tensor([[1]]), state, counts=torch.tensor([2]))
    model.layers[0].ffn.gate.tid2eid[7, 1] = TINY.n_routed_experts
    with pytest.raises(IndexError, match=r"tid2eid\[7\]"):
        step.extend(model, torch.tensor([[7]]), state, counts=None)
    assert state.position.tolist() == [3]


@pytest.mark.parametrize(
    "name", ["layers.1.ffn.gate.weight", "layers.1.attn.indexer.wq_b.weight", "norm.weight"]
)
def test_nan_in_a_weight_reaches_the_logits(name):
    model = build(MIXED)
    state = filled(model, 1, 80)
    with torch.no_grad():
        model.get_parameter(name)[0] = float("nan")
    ids = tokens(model, 1, 1)
    expected = by_torch(model, ids, state.select(torch.tensor([0])))
    found = NativeStep().extend(model, ids, state, counts=None)
    assert torch.equal(found.isnan(), expected.isnan())


def test_a_level_that_does_not_run_here_is_named(tiny):
    with pytest.raises(ValueError, match=r"'sse9'.*portable"):
        NativeStep(level="sse9").extend(tiny, torch.tensor([[1]]), tiny.new_state(1), counts=None)


def test_copies_and_pickles_of_a_model_step_on_their_own(tiny):
    state = filled(tiny, 1, 12)
    ids = tokens(tiny, 1, 1)
    with torch.no_grad():
        expected = tiny.extend(ids, state.select(torch.tensor([0])))
        for twin in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
            twin.embed.weight.mul_(1.0)
            assert torch.equal(twin.extend(ids, state.select(torch.tensor([0]))), expected)


def test_a_forked_child_makes_threads_of_its_own():
    script = (
        "import os, torch\n"
        "from rorqual.model import Config, Model\n"
        "from rorqual.model.native_step import NativeStep\n"
        "model = Model(Config.preset('tiny'), mtp=False).initialize(0)\n"
        "model.native_step = NativeStep(threads=2)\n"
        "ids = torch.arange(8)[:, None]\n"
        "with torch.no_grad():\n"
        "    first = model.extend(ids, model.new_state(8))\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os._exit(0 if torch.equal(model.extend(ids, model.new_state(8)), first) else 1)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_the_structures_have_the_size_of_the_header():
    """The same sizes are asserted in native/cpu/library.cpp when it compiles."""
    mirrors = (cpu.StepModelPointers, cpu.StepLayerPointers, cpu.StepStatePointers, cpu.Step)
    assert [ctypes.sizeof(mirror) for mirror in mirrors] == [168, 288, 80, 88]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_idle_rows_never_need_more_scratch_than_was_given(monkeypatch, threads):
    """33 rows go in blocks of 9 over two threads, 32 of them in blocks of 16: the buffer must hold either."""
    from rorqual.model import native_step

    model = Model(TINY).initialize(0).eval()
    step, guard, buffers = NativeStep(threads=threads), 1 << 16, []

    def guarded(self, need):
        buffer = torch.full((need + guard + 64,), 0xA5, dtype=torch.uint8)
        start = -buffer.data_ptr() % 64
        buffers.append((buffer, start + need))
        return buffer.data_ptr() + start

    monkeypatch.setattr(native_step._Plan, "scratch_at", guarded)
    for batch in (2, 33, 65, 96, 97):
        for busy in {1, batch // 2, batch - 1, batch}:
            counts = torch.zeros(batch, dtype=torch.int64)
            counts[:busy] = 1
            ids = torch.zeros(batch, 1, dtype=torch.int64)
            assert step.extend(model, ids, model.new_state(batch), counts=counts) is not None
            buffer, end = buffers.pop()
            assert bool((buffer[end:] == 0xA5).all()), f"{batch} rows, {busy} busy: wrote past the buffer"
