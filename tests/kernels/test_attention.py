"""Core attention against a plain-loop oracle; the masked, the gathered and the block form against each other."""

import pytest
import torch

from rorqual.kernels import attend, attend_blocks
from tests.oracles.attention import attention as oracle

SHAPE = {"batch": 2, "heads": 3, "width": 6, "window": 4, "ratio": 4}


def _inputs(length, entries, *, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, heads, width = SHAPE["batch"], SHAPE["heads"], SHAPE["width"]
    q, kv, far, sink = draw(batch, length, heads, width), draw(batch, length, width), None, draw(heads)
    if entries:
        far = draw(batch, entries, width)
    steps = torch.arange(length)
    mask = (torch.arange(entries) < (steps[:, None] + 1) // SHAPE["ratio"])[None]
    return q, kv, far, sink, mask


@pytest.mark.parametrize("length", [1, 3, 4, 5, 13, 16])
def test_block_attention_equals_the_loop_oracle(length):
    entries = length // SHAPE["ratio"]
    q, kv, far, sink, _ = _inputs(length, entries)
    out, _ = attend_blocks(q, kv, sink=sink, window=SHAPE["window"], entries=far, ratio=SHAPE["ratio"])
    for b in range(SHAPE["batch"]):
        expected = oracle(
            q[b].tolist(),
            kv[b].tolist(),
            far[b].tolist() if entries else [],
            sink.tolist(),
            window=SHAPE["window"],
            visible=lambda t, s: s < (t + 1) // SHAPE["ratio"],
        )
        torch.testing.assert_close(out[b], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_masked_form_equals_the_block_form():
    q, kv, far, sink, mask = _inputs(13, 3)
    steps = torch.arange(13)
    window = (steps[None] <= steps[:, None]) & (steps[None] > steps[:, None] - SHAPE["window"])
    masked = attend(q, kv, window[None], sink=sink, entries=far, entries_mask=mask)
    blocks, _ = attend_blocks(q, kv, sink=sink, window=SHAPE["window"], entries=far, ratio=SHAPE["ratio"])
    torch.testing.assert_close(masked, blocks, atol=1e-6, rtol=0)  # `attend` takes logits in fp32


def test_gathered_entries_equal_masked_entries():
    q, kv, far, sink, _ = _inputs(1, 8)
    keep = torch.tensor([[5, 2, -1], [0, 7, 3]])
    mask = torch.zeros(2, 1, 8, dtype=torch.bool)
    for b in range(2):
        mask[b, 0, keep[b][keep[b] >= 0]] = True
    window = torch.ones(1, 1, 1, dtype=torch.bool)
    whole = attend(q, kv, window, sink=sink, entries=far, entries_mask=mask)
    index = keep.clamp(min=0)[:, None, :, None].expand(-1, -1, -1, far.shape[2])
    gathered = far[:, None].gather(2, index)
    picked = attend(q, kv, window, sink=sink, entries=gathered, entries_mask=(keep >= 0)[:, None])
    torch.testing.assert_close(whole, picked, atol=1e-6, rtol=0)
