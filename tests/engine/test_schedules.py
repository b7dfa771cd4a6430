"""Random schedules of append, fork, rewind, evict, spill, save and restart against plain recomputation.

Every sequence must say after each operation what one says that was fed the same tokens at once in another pool: to
the bit where the runner promises it, else to the rounding of fp32 sums (2e-5); and the pool must add up.
"""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rorqual.engine import CacheFull, Engine, SequenceState
from rorqual.engine.sequence import PagedSequence
from rorqual.model import Model

from .conftest import SMALL

MODEL = Model(SMALL).initialize(0).eval()
TEXTS = [[(7 * n + n * n * (t + 1)) % 97 for n in range(420)] for t in range(2)]
"""Two texts; prompts are prefixes of one, or leave it: so prefixes meet."""


class Schedules(RuleBasedStateMachine):
    cache_format = "exact"

    @initialize(runner=st.sampled_from(["auto", "torch"]))
    def start(self, runner):
        self.directory = tempfile.TemporaryDirectory()
        self.options = {"cache_format": self.cache_format, "prefill_chunk": 64, "runner": runner}
        layout = Engine(MODEL, **self.options).pool.layout
        self.options["kv_bytes"] = 5 * layout.held_bytes(300)
        self.wide = Engine(MODEL, **{**self.options, "kv_bytes": 64 << 20}, prefix_cache=False)
        self.expected = {}
        self.sequences = []
        self.engine = None
        self.restart()

    def teardown(self):
        if getattr(self, "engine", None) is not None:
            self.engine.close()
            self.directory.cleanup()

    def restart(self):
        if self.engine is not None:
            self.engine.close()
        self.sequences = []
        self.engine = Engine(MODEL, store=self.directory.name, **self.options)

    def check(self, sequence, logits):
        """`logits` after the last token of `sequence`, against a sequence that was never anything else."""
        ids = tuple(sequence.token_ids)
        if ids not in self.expected:
            with PagedSequence(self.wide.paging) as plain:
                self.expected[ids] = plain.append(ids)
        if self.engine.runner.batch_invariant:
            assert torch.equal(logits, self.expected[ids])
        elif self.cache_format == "exact":
            torch.testing.assert_close(logits, self.expected[ids], atol=2e-5, rtol=0)
        else:  # a value on a rounding edge may round the other way
            torch.testing.assert_close(logits, self.expected[ids], atol=5e-3, rtol=0)

    def append(self, sequence, ids):
        before = list(sequence.token_ids)
        try:
            self.check(sequence, sequence.append(ids))
        except CacheFull:
            assert sequence.token_ids == before

    def pick(self, number):
        return self.sequences[number % len(self.sequences)]

    @rule(text=st.integers(0, 1), length=st.integers(1, 400), other=st.booleans())
    def open(self, text, length, other):
        ids = TEXTS[text][:length]
        if other:
            ids = [*ids, 96, 95, 94]
        try:
            sequence = self.engine.begin(ids)
        except CacheFull:
            return
        assert sequence.token_ids == ids[: sequence.length] and sequence.length % 128 == 0
        self.sequences.append(sequence)
        self.append(sequence, ids[sequence.length :])

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 9), count=st.sampled_from([1, 1, 3, 4, 17, 33, 129]))
    def grow(self, number, count):
        sequence = self.pick(number)
        if sequence.length + count <= 500:
            self.append(sequence, [(sequence.length * 5 + n) % 97 for n in range(count)])

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 9))
    def fork(self, number):
        trunk = self.pick(number)
        try:
            twin = trunk.fork()
        except CacheFull:
            return
        self.sequences.append(twin)
        for step in range(3):  # each fills entries of the page that both began with
            for sequence, token in ((trunk, 21), (twin, 11)):
                if sequence.length < 500:
                    self.append(sequence, [token + step] * 3)

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 9), back=st.sampled_from([1, 2, 5, 16, 17, 40, 130, 300]))
    def rewind(self, number, back):
        sequence = self.pick(number)
        position = max(sequence.length - back, 0)
        replayed = sequence.rewind(position)
        assert sequence.length == position and replayed <= position
        self.append(sequence, [(position + back) % 97])

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 9), keep=st.booleans())
    def close(self, number, keep):
        sequence = self.sequences.pop(number % len(self.sequences))
        if keep:
            self.engine.keep(sequence)
        sequence.close()

    @rule(need=st.integers(1, 200_000))
    def evict(self, need):
        self.engine.prefixes.evict(need)

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 9), disk=st.booleans())
    def spill_and_restore(self, number, disk):
        at = number % len(self.sequences)
        sequence = self.sequences.pop(at)
        area = self.engine.spills
        area.store = self.engine.store if disk else None
        ids = list(sequence.token_ids)
        spilled = area.spill(sequence)
        try:
            back = area.restore(spilled, self.engine.paging)
        except CacheFull:
            area.drop(spilled)
            return
        assert back.token_ids == ids
        self.sequences.append(back)
        self.append(back, [13, 14])

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 9))
    def save_and_load(self, number):
        path = Path(self.directory.name) / "one.seq"
        SequenceState(self.engine, self.pick(number)).save(path)
        try:
            loaded = self.engine.load(path).paged
        except CacheFull:
            return
        assert loaded.token_ids == self.pick(number).token_ids
        self.sequences.append(loaded)
        self.append(loaded, [15])

    @rule()
    def come_back_after_a_restart(self):
        self.restart()

    @invariant()
    def everything_adds_up(self):
        if getattr(self, "engine", None) is None:
            return
        tree, pool = self.engine.prefixes, self.engine.pool
        tree.check_integrity()
        pool.check_integrity(
            [tree.held_pages(), *(sequence.pages for sequence in self.sequences)],
            slabs=[sequence.slab for sequence in self.sequences],
        )
        assert pool.used_bytes <= pool.kv_bytes


class PackedSchedules(Schedules):
    cache_format = "packed"


CHOICE = settings(
    max_examples=6,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestExact = Schedules.TestCase
TestPacked = PackedSchedules.TestCase
TestExact.settings = TestPacked.settings = CHOICE
