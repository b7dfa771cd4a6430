"""The native attention core against a softmax in float64, and its bits against its own cuts, at every level.

Tolerance fp32: 2e-5 on outputs of spread 1 (other summation orders). bf16 (packed rows, level avx512_bf16): queries and
weights have 8 bits, so 2e-2. Bits: whatever block, head range or part a query goes through.
"""

import pytest
import torch

from rorqual.kernels import Paged, attend_cpu, cpu_status, native_core
from tests.kernels.native_pages import in_pages

status = cpu_status()
pytestmark = pytest.mark.skipif(not status.available, reason=status.reason)
FP32, BF16 = 2e-5, 2e-2
levels = pytest.mark.parametrize("level", status.levels)
formats = pytest.mark.parametrize("form", ["exact", "packed"])


class Case:
    """Queries of one sequence: `window` and `rows` as the cache holds them, `seen_rows(t)` what query t attends to."""

    def __init__(self, level, form, shape, *, position, entries, picks=0, queries=3, seed=0, scale=2.0):
        heads, width, rope, window, page_rows = shape
        generator = torch.Generator().manual_seed(seed)
        kernels = native_core(level)
        self.q = torch.randn(queries, heads, width, generator=generator) * scale * width**-0.5
        self.sink = torch.randn(heads, generator=generator)
        have = min(position, window - 1) + queries
        values = torch.randn(have, width, generator=generator)
        entry_values = torch.randn(max(entries, 1), width, generator=generator)
        self.window = kernels.pack_entries(values, rope_dim=rope, cache_format=form)
        packed = kernels.pack_entries(entry_values, rope_dim=rope, cache_format=form)
        self.window_values = kernels.unpack_entries(
            self.window, width=width, rope_dim=rope, cache_format=form
        )
        self.entry_values = kernels.unpack_entries(packed, width=width, rope_dim=rope, cache_format=form)
        self.seen = torch.tensor([max(0, entries - (queries - 1 - t)) for t in range(queries)])
        self.options = {
            "sink": self.sink,
            "position": position,
            "window_size": window,
            "rope_dim": rope,
            "cache_format": form,
            "level": level,
        }
        if entries:
            self.options |= {
                "entries": in_pages(packed, page_rows=page_rows, generator=generator),
                "seen": self.seen,
            }
        if picks:
            chosen = [torch.randperm(int(n), generator=generator)[:picks].sort().values for n in self.seen]
            self.options |= {
                "picks": torch.stack(chosen).int(),
                "pick_counts": torch.full((queries,), picks, dtype=torch.int32),
            }

    def run(self, **more):
        return attend_cpu(self.q, self.window, **(self.options | more))

    def alone(self, t):
        """Query t in a call of its own."""
        size, position = self.options["window_size"], self.options["position"]
        options = dict(self.options, position=position + t)
        end = len(self.window) - len(self.q) + t + 1
        for name in ("seen", "picks", "pick_counts"):
            if name in options:
                options[name] = options[name][t : t + 1]
        return attend_cpu(self.q[t : t + 1], self.window[max(0, end - size) : end], **options)[0]

    def oracle(self):
        out = []
        for t, q in enumerate(self.q.double()):
            end = len(self.window) - len(self.q) + t + 1
            near = self.window_values[max(0, end - self.options["window_size"]) : end]
            far = self.entry_values[: self.seen[t]] if "entries" in self.options else self.entry_values[:0]
            if "picks" in self.options:
                far = self.entry_values[self.options["picks"][t].long()]
            keys = torch.cat([near, far]).double()
            logits = torch.cat([q @ keys.T, self.sink.double()[:, None]], 1)
            out.append(logits.softmax(1)[:, :-1] @ keys)
        return torch.stack(out).float()


# heads, width, rope, window, rows of a page
PRO, EMBEDDED, ODD = (128, 512, 64, 128, 32), (4, 64, 16, 16, 32), (6, 44, 12, 16, 8)
CASES = {
    "window alone, at the start": (EMBEDDED, {"position": 0, "entries": 0}),
    "window alone": (EMBEDDED, {"position": 70, "entries": 0}),
    "all entries": (EMBEDDED, {"position": 70, "entries": 18}),
    "first entry": (EMBEDDED, {"position": 3, "entries": 1}),
    "picks": (EMBEDDED, {"position": 500, "entries": 120, "picks": 32}),
    "odd widths, picks": (ODD, {"position": 100, "entries": 25, "picks": 7}),
    "eight heads": ((8, 256, 64, 128, 32), {"position": 900, "entries": 220, "picks": 128}),
    "twenty heads, wide window": ((20, 96, 32, 300, 1), {"position": 700, "entries": 201}),
    "Flash": ((64, 512, 64, 128, 32), {"position": 5000, "entries": 700, "picks": 512, "queries": 2}),
    "Pro, all entries": (PRO, {"position": 1500, "entries": 300, "queries": 2}),
}


@levels
@formats
@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_softmax_over_window_entries_and_sink(level, form, name):
    shape, how = CASES[name]
    case = Case(level, form, shape, **how)
    out = case.run()
    tolerance = BF16 if form == "packed" and level == "avx512_bf16" else FP32
    torch.testing.assert_close(out, case.oracle(), rtol=0, atol=tolerance)
    for split in ("heads", "parts"):
        assert torch.equal(case.run(split=split), out), split
    for t in range(len(case.q)):
        assert torch.equal(case.alone(t), out[t]), t


@levels
@formats
def test_all_seen_and_every_entry_picked_give_the_same_bits(level, form):
    case = Case(level, form, EMBEDDED, position=400, entries=100)
    picks = torch.arange(100, dtype=torch.int32).expand(3, -1).contiguous()
    counts = case.seen.int()
    assert torch.equal(case.run(picks=picks, pick_counts=counts), case.run())
    assert torch.equal(case.run(picks=picks, pick_counts=torch.full_like(counts, -1)), case.run())


@levels
def test_window_rows_may_be_fp32_where_they_hold_rounded_values(level):
    case = Case(level, "packed", EMBEDDED, position=40, entries=10)
    assert torch.equal(attend_cpu(case.q, case.window_values, **case.options), case.run())


@levels
@formats
def test_many_queries_that_share_rows_have_the_bits_of_each_alone(level, form):
    """Rows kept from query to query: more of them than there are places, picked at random."""
    case = Case(level, form, (8, 64, 16, 16, 32), position=6000, entries=1500, picks=300, queries=12)
    out = case.run()
    for t in range(len(case.q)):
        assert torch.equal(case.alone(t), out[t]), t


@levels
@formats
def test_rows_that_a_query_may_not_see_do_not_reach_it(level, form):
    """NaN in the next token's window row and in the entry it completes: only queries that see them turn NaN."""
    case = Case(level, form, EMBEDDED, position=70, entries=18)
    out = case.run()
    nan = native_core(level).pack_entries(torch.full((1, 64), torch.nan), rope_dim=16, cache_format=form)[0]
    case.window[-1] = nan
    pages = case.options["entries"]
    pages.pool[pages.table[0], 17 * len(nan) : 18 * len(nan)] = nan
    again = case.run()
    assert torch.equal(again[:2], out[:2])
    assert bool(again[2].isnan().all())


@levels
@formats
def test_large_logits_stay_finite_and_a_large_sink_takes_all(level, form):
    case = Case(level, form, EMBEDDED, position=70, entries=18, scale=3000.0)
    assert bool(case.run().isfinite().all())
    nothing = case.run(sink=torch.full((4,), 3e38))
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": torch.tensor([1, 2, 1000])}, "page table has"),
        ({"seen": torch.tensor([1, -2, 3])}, "none negative"),
        ({"seen": None}, "seen"),
        ({"picks": torch.zeros(3, 4, dtype=torch.int32)}, "pick_counts"),
        ({"sink": torch.zeros(5)}, "sink"),
        ({"position": -1}, "position"),
        ({"position": 3}, "rows"),
        ({"rope_dim": 65}, "rotating"),
        ({"cache_format": "bf16"}, "cache format"),
        ({"cache_format": "exact"}, "expected uint8"),
        ({"level": "none"}, "does not run"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(status.level, "packed", EMBEDDED, position=70, entries=18)
    with pytest.raises(ValueError, match=message):
        case.run(**change)


def test_hostile_pages_and_picks_are_refused():
    case = Case(status.level, "packed", EMBEDDED, position=70, entries=18)
    pages = case.options["entries"]
    for table in ([99], [-1]):
        broken = Paged(pool=pages.pool, table=torch.tensor(table, dtype=torch.int32), page_rows=32)
        with pytest.raises(ValueError, match="outside"):
            case.run(entries=broken)
    with pytest.raises(ValueError, match="do not fit a page"):
        case.run(entries=Paged(pool=pages.pool, table=pages.table, page_rows=33000))
    picks = torch.tensor([[0, 40]] * 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="may not see"):
        case.run(picks=picks, pick_counts=torch.full((3,), 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="counts"):
        case.run(picks=picks, pick_counts=torch.full((3,), 3, dtype=torch.int32))
