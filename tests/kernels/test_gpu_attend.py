"""Attention over packed rows in Triton: window, picked or all entries, sink; one sequence and several."""

import pytest
import torch

from rorqual import kernels
from rorqual.model.quant import pack_entry, unpack_entry
from tests.kernels.gpu_device import DEVICE, Rows, paged

from rorqual.kernels.gpu import ops  # isort: skip

WIDTH, ROPE = 48, 16


def reference(q, window, sink, *, position, window_size, far=None, seen=None, picks=None):
    """kernels/attention.py over what quant.py gives back; q is scaled already."""
    queries, _, width = q.shape
    first = position + queries - len(window)
    at, steps = torch.arange(first, first + len(window)), torch.arange(position, position + queries)[:, None]
    near = (at <= steps) & (at > steps - window_size)
    extra = {}
    if far is not None:
        mask = torch.arange(len(far)) < seen[:, None]
        if picks is not None:
            chosen = torch.zeros_like(mask)
            for t, row in enumerate(picks):
                chosen[t, row[row >= 0].long()] = True
            mask &= chosen
        extra = {"entries": far[None], "entries_mask": mask[None]}
    return kernels.attend(q[None] * width**0.5, window[None], near[None], sink=sink, **extra)[0]


def rows_of(count, *, seed, width=WIDTH, rope=ROPE):
    packed = pack_entry(
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), rope_dim=rope
    )
    return packed, unpack_entry(packed, head_dim=width, rope_dim=rope)


def run(q, window, sink, **extra):
    extra = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
    rope = extra.pop("rope_dim", ROPE)
    return ops.attend(q.to(DEVICE), window.to(DEVICE), sink=sink.to(DEVICE), rope_dim=rope, **extra).cpu()


@pytest.mark.parametrize("position", [0, 3, 40])
@pytest.mark.parametrize("heads", [3, 40])
def test_window_alone_equals_torch(position, heads):
    torch.manual_seed(9)
    window_size, queries = 7, 4
    window, values = rows_of(position + queries - max(0, position - window_size + 1), seed=1)
    q, sink = torch.randn(queries, heads, WIDTH) / 4, torch.randn(heads)
    got = run(q, window, sink, position=position, window_size=window_size)
    want = reference(q, values, sink, position=position, window_size=window_size)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("width", "rope", "page_rows"), [(48, 16, 5), (512, 64, 32), (16, 16, 1)])
def test_all_entries_equal_torch_in_parts(width, rope, page_rows, monkeypatch):
    from rorqual.kernels.gpu import attend as module

    monkeypatch.setattr(module, "PART", 32)
    torch.manual_seed(10)
    window, near = rows_of(6, seed=2, width=width, rope=rope)
    entries, far = rows_of(75, seed=3, width=width, rope=rope)
    q, sink = torch.randn(3, 3, width) / width**0.5, torch.randn(3)
    seen = torch.tensor([0, 33, 75])
    pages = paged(entries, page_rows=page_rows)
    extra = {"position": 20, "window_size": 4, "entries": pages, "rope_dim": rope}
    got = run(q, window, sink, seen=seen, **extra)
    want = reference(q, near, sink, position=20, window_size=4, far=far, seen=seen)
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)
    alone = run(q[1:2], window[1:5], sink, seen=seen[1:2], **{**extra, "position": 21})
    assert torch.equal(alone[0], got[1])


def test_picked_entries_equal_torch_and_a_negative_count_means_all():
    torch.manual_seed(11)
    window, near = rows_of(8, seed=4)
    entries, far = rows_of(70, seed=5)
    q, sink = torch.randn(4, 5, WIDTH) / 4, torch.randn(5)
    seen = torch.tensor([0, 9, 70, 40])
    picks = torch.full((4, 37), -1, dtype=torch.int32)
    picks[1, :3] = torch.tensor([0, 4, 8])
    picks[2] = torch.randperm(70)[:37].sort().values
    counts = torch.tensor([0, 3, 37, -1], dtype=torch.int32)
    got = run(
        *(q, window, sink),
        position=4,
        window_size=9,
        entries=paged(entries, page_rows=32),
        seen=seen,
        picks=picks,
        pick_counts=counts,
    )
    picks = torch.nn.functional.pad(picks, (0, 33), value=-1)
    picks[3, :40] = torch.arange(40)
    want = reference(q, near, sink, position=4, window_size=9, far=far, seen=seen, picks=picks)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_bfloat16_queries_stay_within_bfloat16_of_torch():
    torch.manual_seed(12)
    window, near = rows_of(6, seed=6)
    entries, far = rows_of(40, seed=7)
    q, sink = (torch.randn(2, 16, WIDTH) / 4).bfloat16(), torch.randn(16)
    seen = torch.tensor([40, 40])
    got = run(q, window, sink, position=9, window_size=5, entries=paged(entries, page_rows=8), seen=seen)
    want = reference(q.float(), near, sink, position=9, window_size=5, far=far, seen=seen)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=2**-7, rtol=2**-7)


def test_rings_and_tables_of_several_sequences_equal_each_alone():
    torch.manual_seed(13)
    ring_rows, window_size, heads = 11, 8, 3
    positions, which = torch.tensor([25, 2, 26]), torch.tensor([1, 0, 1], dtype=torch.int32)
    rings = torch.randint(0, 256, (2, ring_rows, WIDTH + ROPE + 8), dtype=torch.uint8)
    tokens = {0: rows_of(3, seed=8), 1: rows_of(27, seed=9)}
    for ring, (packed, _) in tokens.items():
        for p in range(max(0, len(packed) - ring_rows), len(packed)):
            rings[ring, p % ring_rows] = packed[p]
    entries, far = rows_of(12, seed=10)
    pages = paged(entries, page_rows=4)
    table = torch.full((3, 3), -1, dtype=torch.int32)
    table[0], table[2] = pages.table.cpu(), pages.table.cpu()
    seen = torch.tensor([6, 0, 12])
    q, sink = torch.randn(3, heads, WIDTH) / 4, torch.randn(heads)
    shared = {"window_size": window_size, "position": positions, "sequences": which}
    many = Rows(pool=pages.pool, table=table.to(DEVICE), page_rows=4)
    got = run(q, rings, sink, entries=many, seen=seen, **shared)
    for t, position in enumerate(positions.tolist()):
        values = tokens[int(which[t])][1][max(0, position - window_size + 1) : position + 1]
        want = reference(
            q[t : t + 1],
            values,
            sink,
            position=position,
            window_size=window_size,
            far=far,
            seen=seen[t : t + 1],
        )
        torch.testing.assert_close(got[t : t + 1], want, atol=2e-6, rtol=1e-5)


def test_what_does_not_exist_is_nan_and_touches_no_other_query():
    window, _ = rows_of(3, seed=11)
    entries, _ = rows_of(8, seed=12)
    pages = paged(entries, page_rows=4)
    picks = torch.tensor([[0, 7], [0, 2], [0, 1 << 30]], dtype=torch.int32)
    extra = {
        "position": 0,
        "window_size": 4,
        "entries": pages,
        "picks": picks,
        "pick_counts": torch.tensor([2, 2, 2], dtype=torch.int32),
    }
    q, sink = torch.ones(3, 2, WIDTH), torch.zeros(2)
    got = run(q, window, sink, seen=torch.tensor([7, 8, 8]), **extra)  # query 0 may not see entry 7
    assert got[0].isnan().all() and got[2].isnan().all() and not got[1].isnan().any()
    pages.table[0] = -5
    assert run(q, window, sink, seen=torch.tensor([7, 8, 8]), **extra).isnan().all()


def test_attend_refuses_what_does_not_fit():
    window, _ = rows_of(3, seed=13)
    q, sink = torch.ones(3, 2, WIDTH), torch.zeros(2)
    with pytest.raises(ValueError, match=r"window: torch.uint8 \[3, 72\], expected uint8 \[4, 72\]"):
        run(q, window, sink, position=1, window_size=4)
    with pytest.raises(ValueError, match=r"sink: .*expected float32 \[2\]"):
        run(q, window, torch.zeros(3), position=0, window_size=4)
    with pytest.raises(ValueError, match="entries need `seen`"):
        run(q, window, sink, position=0, window_size=4, entries=paged(window, page_rows=2))
    with pytest.raises(ValueError, match="need entries"):
        run(q, window, sink, position=0, window_size=4, seen=torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match=r"expected \[B, 4 or more, 72\]"):
        run(q, window[None], sink, position=torch.tensor([0, 1, 2]), window_size=4)
