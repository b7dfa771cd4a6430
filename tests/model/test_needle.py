"""benchmarks/needle.py: its data are what they say, its training resumes, and the shipped model finds needles."""

import dataclasses
import random

import pytest
import torch
from benchmarks import needle

from rorqual.model import Model


def test_sequences_hold_records_and_questions_that_can_be_answered():
    draw = random.Random(1)
    for _ in range(20):
        ids, mask = needle.sequence(draw, length=256, records=20)
        assert len(ids) == len(mask) == 256
        held, asked = {}, 0
        for at, token in enumerate(ids):
            if token == needle.KEY:
                held[tuple(ids[at + 1 : at + 3])] = ids[at + 4 : at + 8]
                assert not any(mask[at : at + 8])
            elif token == needle.ASK:
                asked += 1
                assert held[tuple(ids[at + 1 : at + 3])] == ids[at + 4 : at + 8]
                assert mask[at : at + 8] == [0, 0, 0, 0, 1, 1, 1, 1]
        assert len(held) + asked == 20 and sum(mask) == 4 * asked


def test_stretched_positions_reach_the_whole_context_in_whole_pages():
    draw, ends = random.Random(2), []
    for length in (256, 1000, 4096) * 30:
        positions = torch.tensor(needle.stretch(draw, length))
        assert len(positions) == length
        assert bool((positions % 128 == torch.arange(length) % 128).all())
        assert bool((positions.diff() >= 1).all()) and int(positions[-1]) < needle.LONGEST
        ends.append(int(positions[-1]))
    assert min(ends) < 4096 and max(ends) > needle.LONGEST // 2


def test_a_haystack_has_its_needles_where_it_says_and_no_key_twice():
    hay = needle.haystack(65536, seed=3)
    assert len(hay.ids) == 65536 - 16 and hay.distractors >= 14
    for place, depth, (key, value) in zip(hay.places, needle.DEPTHS, hay.records, strict=True):
        assert hay.ids[place : place + 8] == [needle.KEY, *key, needle.VALUE, *value]
        assert abs(place / 65536 - depth) < 0.01
    keys = [tuple(hay.ids[at + 1 : at + 3]) for at, token in enumerate(hay.ids) if token == needle.KEY]
    assert len(keys) == len(set(keys)) == hay.distractors + 3


def test_a_killed_training_goes_on_where_its_checkpoint_stood(tmp_path, monkeypatch):
    stage = needle.Stage(steps=2, length=128, batch=1, records=4, sparse=True, quant=True)
    last = dataclasses.replace(stage, steps=1)
    rounds = (
        needle.Round(stages=(stage,), decay_share=0.3),
        needle.Round(stages=(last,), decay_share=0.3, sharpen=1.5, first_weight=2.0),
    )
    monkeypatch.setattr(needle, "ROUNDS", rounds)
    needle.train(tmp_path / "whole", minutes=None)
    for _ in range(4):  # ends with a checkpoint after every step
        needle.train(tmp_path / "cut", minutes=1e-9)
    whole, cut = (Model.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("runner", ["whole", "native"])
def test_the_shipped_model_finds_needles_over_the_packed_cache(runner):
    facts = needle.run(needle.MODEL, 8192, runner=runner, threads=1, seed=0, chunk=512)
    assert [answer["right"] for answer in facts["answers"]] == [True] * 3
    if runner == "native":
        assert facts["cache_bytes_by_format"] == facts["cache_bytes_by_cost"]


def test_a_context_that_the_model_does_not_take_is_refused():
    with pytest.raises(SystemExit, match="--context is 4194304"):
        needle.run(needle.MODEL, 1 << 22, runner="native", threads=1, seed=0, chunk=512)
