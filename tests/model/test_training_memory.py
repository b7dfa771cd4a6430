"""Training keeps no tensor of length times length: memory is linear in the length of the sequence."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rorqual.kernels import attend
from rorqual.model import AttentionMode, Config, Model

CONFIG = Config.preset("tiny").replace(
    vocab_size=64,
    hidden_size=32,
    num_attention_heads=2,
    head_dim=32,
    q_lora_rank=16,
    o_lora_rank=16,
    index_n_heads=2,
    index_topk=8,
    n_routed_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
    compress_ratios=(0, 4, 32),
    num_hidden_layers=3,
    max_position_embeddings=1 << 16,
)


class _Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes, and the most bytes that are alive at once."""

    def __init__(self):
        super().__init__()
        self.largest, self.peak, self.bound, self.alive = 0, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage):
        key = storage.data_ptr()
        if key not in self.alive or self.alive[key][0].expired():
            self.alive[key] = (StorageWeakRef(storage), storage.nbytes())
            self.bound += storage.nbytes()
        if self.bound > self.peak:  # only then can there be a new peak: sum what is left
            self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
            self.bound = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.bound)


def _step(length, *, sparse):
    model = Model(CONFIG).initialize(0)
    ids = torch.randint(0, CONFIG.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with _Sizes() as sizes:
        out = model.train_pass(ids, mode=AttentionMode(sparse=sparse, index_loss=True))
        (model.logits(out.hidden).square().mean() + out.index_loss).backward()
    return sizes


def test_the_largest_tensor_and_the_peak_grow_linearly_with_the_length():
    for sparse in (True, False):
        sizes = {length: _step(length, sparse=sparse) for length in (2048, 4096)}
        short, long = sizes[2048], sizes[4096]
        assert long.largest < 4096 * (4096 // 4) / 4, "some tensor holds a score for every query and entry"
        # Twice the length, twice the memory: 4.0 if scores were kept; 2.2 leaves room for what does not grow.
        assert long.largest <= 2.2 * short.largest
        assert long.peak <= 2.2 * short.peak, f"{short.peak} to {long.peak} bytes"


def _positions(pages, length):
    return torch.cat([torch.arange(128) + 128 * page for page in pages])[:length]


def test_pages_that_follow_each_other_are_plain_positions():
    model = Model(CONFIG).initialize(1)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(model(ids, positions=torch.arange(300)), expected)
        rows = torch.arange(300).expand(2, -1)
        filled = AttentionMode(fill_skips=True)  # nothing is skipped, so nothing changes
        torch.testing.assert_close(model(ids, positions=rows, mode=filled), expected, atol=1e-6, rtol=0)
        skipped = model(ids, positions=_positions([0, 5, 7], 300))
        assert torch.equal(skipped[:, :128], expected[:, :128])
        assert (skipped[:, 200:] - expected[:, 200:]).abs().max() > 1e-3


def test_stretched_positions_equal_a_cache_that_starts_there():
    """A page that stands at page 9 is what the decode path computes for a sequence whose position is 9 * 128."""
    model = Model(CONFIG).initialize(2)
    ids = torch.randint(0, CONFIG.vocab_size, (1, 128), generator=torch.Generator().manual_seed(2))
    window_only = AttentionMode(without=frozenset({"csa", "hca"}))
    with torch.no_grad():
        moved = model(ids, positions=_positions([9], 128), mode=window_only)
        torch.testing.assert_close(moved, model(ids, mode=window_only), atol=2e-5, rtol=0)  # RoPE is relative
        layer = model.layers[2].attn  # HCA, on its own: entries turn with the page they stand on
        x = torch.randn(1, 128, CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))
        entries = layer.compressor(x, layer.rope, _positions([9], 128))
        state = model.new_state().layers[2]
        start = torch.tensor([9 * 128])
        numbers, cached, valid = layer.compressor.extend(x, start, None, layer.rope, tail=state.tail)
    assert numbers.tolist() == [[36, 37, 38, 39]] and bool(valid.all())
    torch.testing.assert_close(entries, cached, atol=1e-6, rtol=0)


def test_skipped_pages_weigh_as_copies_of_what_is_there():
    """4 pages on page 3, 7, 11, 15: HCA attends as to a context in which every entry stands 4 times."""
    model = Model(CONFIG).initialize(4)
    layer = model.layers[2].attn
    x = torch.randn(1, 512, CONFIG.hidden_size, generator=torch.Generator().manual_seed(5))
    positions = _positions([3, 7, 11, 15], 512)
    with torch.no_grad():
        cos, sin = layer.rope(positions)
        draw = torch.Generator().manual_seed(7)
        q, kv, q_r = (torch.randn(1, 512, *shape, generator=draw) for shape in ((2, 32), (32,), (16,)))
        got, _ = layer._full(
            x, q, q_r, kv, positions=positions, cos_sin=(cos, sin), mode=AttentionMode(fill_skips=True)
        )
        entries = layer.compressor(x, layer.rope, positions).repeat(1, 4, 1)
        near = torch.arange(512)
        window = (near[None] <= near[:, None]) & (near[None] > near[:, None] - CONFIG.sliding_window)
        last = 511  # the last query sees all 16 entries here, and would see 64 in the whole context
        expected = attend(
            q[:, last:],
            kv,
            window[None, last:],
            sink=layer.attn_sink,
            entries=entries,
            entries_mask=torch.ones(1, 1, 64, dtype=torch.bool),
        )
    torch.testing.assert_close(got[:, last:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "positions, says",
    [
        (torch.arange(200), "expected int64 \\[256\\]"),
        (torch.arange(256).float(), "float32"),
        (torch.arange(256) + 5, "on one page"),
        (torch.cat([torch.arange(128), torch.arange(128)]), "pages rising"),
        (torch.cat([torch.arange(128), torch.arange(128) + 200]), "on one page"),
        (torch.arange(256) - 128, "on one page"),
        (torch.arange(256).flip(0), "on one page"),
    ],
)
def test_bad_positions_are_refused(positions, says):
    model = Model(CONFIG).initialize(0)
    with pytest.raises(ValueError, match=says):
        model(torch.zeros(1, 256, dtype=torch.int64), positions=positions)


def test_a_model_in_bfloat16_trains_prefills_and_decodes():
    exact = Model(CONFIG).initialize(6).eval()
    half = Model(CONFIG).initialize(6).bfloat16().eval()
    ids = torch.randint(0, CONFIG.vocab_size, (1, 150), generator=torch.Generator().manual_seed(6))
    out = half.train_pass(ids, mode=AttentionMode(index_loss=True), mtp=True)
    (half.logits(out.hidden).square().mean() + out.index_loss + out.mtp_hidden.square().mean()).backward()
    for name, parameter in half.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    state = half.new_state()
    with torch.no_grad():
        expected, got = exact(ids)[:, -1], half(ids)[:, -1]
        half.extend(ids[:, :140], state)
        for t in range(140, 150):
            decoded = half.extend(ids[:, t : t + 1], state)
    # 8 bits of mantissa through three layers; two unrelated models differ by 1.
    assert (got - expected).abs().max() < 0.15 and (decoded - got).abs().max() < 0.15
    assert expected.std() > 0.3
