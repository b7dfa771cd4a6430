"""The native index scores and top-k against kernels/indexer.py in float64, at every level this machine runs.

Random scores differ by more than rounding, so the sets must be equal; ties and NaN have cases of their own. Packed: the
queries go through Hadamard and FP4 as in model/indexer.py, here with the native row functions, which
test_packed_rows.py holds to the reference.
"""

import pytest
import torch

from rorqual.kernels import cpu_status, index_scores, index_topk_cpu, native_core, select_top_k
from tests.kernels.native_pages import in_pages

status = cpu_status()
pytestmark = pytest.mark.skipif(not status.available, reason=status.reason)
levels = pytest.mark.parametrize("level", status.levels)
formats = pytest.mark.parametrize("form", ["exact", "packed"])


class Case:
    """Keys [n, D] in pages and queries that see n, n - 1, ... of them."""

    def __init__(self, level, form, shape, *, keys=None, queries=3, spread=0, seed=0):
        heads, width, count, page_rows = shape
        generator = torch.Generator().manual_seed(seed)
        self.kernels, self.level, self.form = native_core(level), level, form
        self.q = torch.randn(queries, heads, width, generator=generator)
        self.weights = torch.randn(queries, heads, generator=generator) * (heads * width) ** -0.5
        if keys is None:
            keys = torch.randn(count, width, generator=generator)
            shape = (count, -(-width // 32))
            powers = 2.0 ** torch.randint(-spread, spread + 1, shape, generator=generator)
            keys = keys * powers.repeat_interleave(32, 1)[:, :width]
        packed = self.kernels.pack_keys(keys, cache_format=form)
        self.keys = self.kernels.unpack_keys(packed, width=width, cache_format=form)
        self.pages = in_pages(packed, page_rows=page_rows, generator=generator)
        self.seen = torch.tensor([max(0, count - (queries - 1 - t)) for t in range(queries)])

    def run(self, top_k, **more):
        options = {"seen": self.seen, "top_k": top_k, "cache_format": self.form, "level": self.level}
        return index_topk_cpu(self.q, self.weights, self.pages, **(options | more))

    def alone(self, t, top_k):
        one = slice(t, t + 1)
        return index_topk_cpu(
            self.q[one],
            self.weights[one],
            self.pages,
            seen=self.seen[one],
            top_k=top_k,
            cache_format=self.form,
            level=self.level,
        )[0][0]

    def oracle(self, top_k):
        q = self.q
        if self.form == "packed":
            q = self.kernels.round_keys(self.kernels.hadamard(q))
        scores = index_scores(q[None].double(), self.keys[None].double(), self.weights[None].double())
        visible = torch.arange(len(self.keys)) < self.seen[:, None]
        return select_top_k(scores, visible[None], top_k=top_k)[0]


def sets(picks):
    return [set(row.tolist()) - {-1} for row in picks]


# heads, width, keys, rows of a page; top_k; powers of two between the scales of a key's blocks
CASES = {
    "embedded": ((4, 32, 300, 32), 32, 0),
    "Pro": ((64, 128, 2500, 32), 256, 0),
    "Pro, scales apart": ((64, 128, 2500, 32), 256, 3),
    "scales so far apart that int8 does not hold them": ((64, 128, 700, 32), 64, 9),
    "odd counts": ((5, 128, 501, 8), 63, 2),
    "two halves of 128": ((3, 256, 200, 1), 50, 1),
    "64 wide": ((6, 64, 333, 8), 40, 0),
    "64 wide, scales apart": ((4, 64, 333, 32), 40, 3),
    "64 wide, scales far apart": ((4, 64, 333, 32), 40, 9),
    "32 wide, every key another scale": ((4, 32, 500, 32), 40, 9),
    "as many as top_k": ((4, 32, 33, 32), 32, 0),
    "fewer than top_k": ((4, 32, 20, 32), 32, 0),
    "one": ((4, 32, 130, 32), 1, 0),
}


@levels
@formats
@pytest.mark.parametrize("name", CASES)
def test_picks_are_the_best_keys_ascending_whatever_the_cut(level, form, name):
    shape, top_k, spread = CASES[name]
    case = Case(level, form, shape, spread=spread)
    picks, counts = case.run(top_k)
    assert sets(picks) == sets(case.oracle(top_k))
    for row, count, seen in zip(picks, counts.tolist(), case.seen.tolist(), strict=True):
        assert count == min(seen, top_k)
        assert bool((row[:count].diff() > 0).all())
        assert bool((row[count:] == -1).all())
    for part_keys in (64, 192, 4096):
        cut, cut_counts = case.run(top_k, part_keys=part_keys)
        assert torch.equal(cut, picks)
        assert torch.equal(cut_counts, counts)
    for t in range(len(case.q)):
        assert torch.equal(case.alone(t, top_k), picks[t])


@levels
@formats
def test_more_queries_than_share_an_unpacking(level, form):
    case = Case(level, form, (8, 32, 150, 32), queries=40)
    picks, _ = case.run(24)
    assert sets(picks) == sets(case.oracle(24))
    for t in (0, 15, 16, 39):
        assert torch.equal(case.alone(t, 24), picks[t])


@levels
@formats
def test_no_key_is_visible_yet(level, form):
    case = Case(level, form, (4, 32, 40, 32))
    picks, counts = case.run(8, seen=torch.tensor([0, 0, 1]))
    assert counts.tolist() == [0, 0, 1]
    assert picks[2].tolist() == [0] + [-1] * 7
    cut, _ = case.run(8, seen=torch.tensor([0, 0, 1]), part_keys=64)
    assert torch.equal(cut, picks)


@levels
@formats
def test_ties_go_to_the_lower_key(level, form):
    """Three kinds of key by turns: the best third, of equal scores, is cut by top_k."""
    generator = torch.Generator().manual_seed(3)
    three = torch.randn(3, 128, generator=generator)
    case = Case(level, form, (16, 128, 600, 32), keys=three.repeat(200, 1))
    for top_k in (50, 150, 250):
        picks, _ = case.run(top_k)
        assert torch.equal(picks, case.oracle(top_k).sort(1).values.int())
        assert torch.equal(case.run(top_k, part_keys=64)[0], picks)


@levels
@formats
def test_all_scores_zero_picks_the_first_keys(level, form):
    case = Case(level, form, (4, 32, 500, 32), keys=torch.zeros(500, 32))
    assert case.run(64)[0].tolist() == [list(range(64))] * 3


@levels
@formats
def test_nan_comes_first_and_only_where_it_is_visible(level, form):
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(400, 128, generator=generator)
    keys[[17, 300, 399], 5] = torch.nan
    case = Case(level, form, (16, 128, 400, 32), keys=keys)
    picks, _ = case.run(20)
    for row, seen in zip(sets(picks), case.seen.tolist(), strict=True):
        assert {17, 300} <= row
        assert (399 in row) == (seen == 400)
    assert torch.equal(case.run(20, part_keys=64)[0], picks)


@levels
@formats
def test_ascending_scores_pass_the_threshold_every_time(level, form):
    keys = torch.zeros(3000, 32)
    keys[:, 0] = torch.arange(3000) + 1.0
    case = Case(level, form, (1, 32, 3000, 32), keys=keys, queries=1)
    case.q[:] = 0.0
    case.q[..., 0] = 1.0
    case.weights[:] = 1.0
    if form == "packed":  # the query is rotated inside: give it what rotates to this
        case.q = native_core(level).hadamard(case.q)
    picks, _ = case.run(100)
    assert torch.equal(picks[0].long(), case.oracle(100)[0].sort().values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": torch.tensor([3, 2, 1])}, "not descending"),
        ({"seen": torch.tensor([1, 2, 1000])}, "page table has"),
        ({"seen": torch.tensor([-1, 2, 3])}, "none negative"),
        ({"top_k": 0}, "top_k"),
        ({"part_keys": 100}, "multiple of 64"),
        ({"cache_format": "none"}, "cache format"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(status.level, "packed", (4, 32, 40, 32))
    with pytest.raises(ValueError, match=message):
        case.run(**({"top_k": 8} | change))


def test_widths_that_have_no_rotation_are_refused():
    case = Case(status.level, "packed", (4, 32, 40, 32))
    with pytest.raises(ValueError, match="index width 48"):
        index_topk_cpu(
            torch.zeros(3, 4, 48),
            torch.zeros(3, 4),
            case.pages,
            seen=case.seen,
            top_k=8,
            cache_format="packed",
        )
