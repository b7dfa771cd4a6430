"""Continuous batching: chunks beside decodes, priorities, preemption by spill, cancellation; each sequence exact."""

import copy
import gc

import pytest
import torch

from rorqual.engine import (
    Batch,
    CacheFull,
    ContextOverflow,
    Engine,
    EngineError,
    SamplingParams,
    SequenceFileError,
    WindowStrategy,
)
from rorqual.engine.sequence import replay_tokens
from rorqual.model.packed import PackedWeights


def _params(key, tokens=12):
    return SamplingParams(seed=3, sequence=key, max_tokens=tokens)


def _drain(batch):
    out = {}
    while batch.busy:
        for event in batch.step():
            out.setdefault(event.key, []).append(event.token_id)
    return out


def _alone(engine, ids, params):
    fresh = Engine(engine.model, cache_format=engine.pool.layout.cache_format, prefix_cache=False)
    return [event.token_id for event in fresh.generate(ids, params)]


def test_a_long_prompt_delays_the_others_by_a_chunk_a_step(engine, prompt):
    batch = Batch(engine)  # chunks of 32
    batch.add({0: prompt(8)}, {0: _params(0, 30)})
    batch.step()
    batch.add({1: prompt(300)}, {1: _params(1, 3)})
    steps = 0
    while [event.key for event in batch.step()] == [0]:
        steps += 1
    assert steps >= 300 // 32


def test_priority_comes_before_arrival(engine, prompt):
    batch = Batch(Engine(engine.model, prefill_chunk=32, max_running=1))
    batch.add({0: prompt(40)}, {0: _params(0, 4)})
    batch.add({1: prompt(40, seed=1)}, {1: _params(1, 4)}, priority=1)
    order = []
    while batch.busy:
        order += [event.key for event in batch.step()]
    assert order == [1, 1, 1, 1, 0, 0, 0, 0]


def test_equal_prompts_are_fed_once(engine, prompt, monkeypatch):
    fed = []
    real = engine.runner.forward
    monkeypatch.setattr(
        engine.runner,
        "forward",
        lambda segments: (fed.append(sum(len(s.tokens) for s in segments)), real(segments))[1],
    )
    batch = Batch(engine, prefixes=False)
    batch.add(dict.fromkeys(range(8), prompt(100)), {key: _params(key, 1) for key in range(8)})
    events = []
    while batch.busy:
        events += batch.step()
    assert sum(fed) == 100 and sorted(event.key for event in events) == list(range(8))


def test_the_first_of_equal_prompts_may_leave_before_it_is_through(engine, prompt):
    batch = Batch(engine)
    batch.add(dict.fromkeys(range(3), prompt(150)), {key: _params(key) for key in range(3)})
    batch.step()
    batch.remove(0)
    got = _drain(batch)
    assert got == {key: _alone(engine, prompt(150), _params(key)) for key in (1, 2)}


@pytest.mark.parametrize("cache_format", ["exact", "packed"])
@pytest.mark.parametrize("disk", [False, True])
def test_preempted_sequences_say_what_they_would_have_said(engine, prompt, tmp_path, disk, cache_format):
    small = _sized(engine, cache_format, 1.9, 300, store=tmp_path if disk else None)
    prompts = {key: prompt(130 + 60 * key, seed=key) for key in range(3)}
    batch = Batch(small)
    batch.add(prompts, {key: _params(key, 30) for key in prompts})
    got = _drain(batch)
    assert batch.preemptions > 0 and small.spills.recomputed == 0
    assert got == {
        key: _alone(_sized(engine, cache_format, 9, 300), ids, _params(key, 30))
        for key, ids in prompts.items()
    }
    for key in prompts:
        batch.remove(key)
    del batch
    gc.collect()
    assert small.spills.held_bytes == 0
    small.pool.check_integrity([small.prefixes.held_pages()], slabs=[])
    small.close()


def _sized(engine, cache_format, sequences, tokens, **options):
    layout = Engine(engine.model, cache_format=cache_format).pool.layout
    return Engine(
        engine.model,
        kv_bytes=int(sequences * layout.held_bytes(tokens)),
        cache_format=cache_format,
        prefill_chunk=64,
        **options,
    )


def test_a_full_disk_while_spilling_loses_nothing(engine, prompt, tmp_path, monkeypatch):
    small = _sized(engine, "exact", 1.9, 260, store=tmp_path)

    def full(*args, **kwargs):
        raise SequenceFileError("cannot be written: No space left on device")

    monkeypatch.setattr(small.store, "put", full)
    prompts = {key: prompt(230 + key, seed=key) for key in range(3)}
    batch = Batch(small)
    batch.add(prompts, {key: _params(key, 30) for key in prompts})
    assert _drain(batch) == {key: _alone(engine, ids, _params(key, 30)) for key, ids in prompts.items()}
    assert batch.preemptions > 0
    small.close()


def test_without_room_to_spill_the_tokens_are_fed_again(engine, prompt):
    small = _sized(engine, "exact", 1.9, 260)
    small.spills.memory_bytes = 0
    prompts = {key: prompt(230 + key, seed=key) for key in range(3)}
    batch = Batch(small)
    batch.add(prompts, {key: _params(key, 30) for key in prompts})
    assert _drain(batch) == {key: _alone(engine, ids, _params(key, 30)) for key, ids in prompts.items()}
    assert small.spills.recomputed == small.spills.spilled > 0


def test_a_prefix_is_hit_beside_preempted_sequences(engine, prompt):
    small = _sized(engine, "exact", 3.2, 300)
    batch = Batch(small, prefixes=True)
    batch.add({0: prompt(270)}, {0: _params(0, 10)})
    first = _drain(batch)[0]
    again = prompt(270) + first + prompt(20, seed=4)
    batch.remove(0)
    others = {key: prompt(200, seed=key) for key in (1, 2, 3)}
    batch.add(others, {key: _params(key, 40) for key in others})
    batch.step()
    batch.add({4: again}, {4: _params(4)}, priority=5)
    got = _drain(batch)
    assert got[4] == _alone(engine, again, _params(4))
    assert got[2] == _alone(engine, others[2], _params(2, 40))
    assert small.prefixes.statistics().hit_tokens == 256 and batch.preemptions > 0


def test_a_reply_cancelled_in_the_middle_and_sent_again_is_not_computed_again(engine, prompt):
    fresh = Engine(engine.model, prefill_chunk=64)
    batch = Batch(fresh, prefixes=True)
    batch.add({0: prompt(250)}, {0: _params(0, 40)})
    said = []
    while len(said) < 20:
        said += [event.token_id for event in batch.step()]
    batch.remove(0)
    fresh.pool.check_integrity([fresh.prefixes.held_pages()], slabs=[])
    resent = prompt(250) + said
    batch.add({1: resent}, {1: _params(0, 20)})
    assert _drain(batch)[1] == _alone(engine, prompt(250), _params(0, 40))[20:]
    assert fresh.prefixes.statistics().hit_tokens == 256


def test_more_tokens_than_memory_is_a_clear_error_before_damage(engine, prompt):
    small = _sized(engine, "exact", 1, 256)
    batch = Batch(small)
    with pytest.raises(ContextOverflow, match="raise kv_bytes"):
        batch.add({0: prompt(10), 1: prompt(400)}, {0: _params(0), 1: _params(1)})
    assert len(batch) == 0
    batch.add({0: prompt(200)}, {0: _params(0, 200)})
    with pytest.raises(CacheFull, match="sequence 0"):
        _drain(batch)
    assert not batch.busy and len(batch) == 1
    batch.remove(0)
    batch.add({1: prompt(30)}, {1: _params(1)})
    assert _drain(batch)[1] == _alone(engine, prompt(30), _params(1))


def test_a_runner_that_fails_costs_no_token(engine, prompt, monkeypatch):
    batch = Batch(engine)
    batch.add({0: prompt(70), 1: prompt(90)}, {0: _params(0), 1: _params(1)})
    real = engine.runner.forward
    got, calls = {0: [], 1: []}, []

    def shaky(segments):
        calls.append(len(segments))
        logits = real(segments)
        if len(calls) in (2, 3, 8, 9, 15):  # prompts, the repair of the rings, decodes
            raise OSError("an expert cannot be read")
        return logits

    monkeypatch.setattr(engine.runner, "forward", shaky)
    failures = 0
    while batch.busy:
        try:
            for event in batch.step():
                got[event.key].append(event.token_id)
        except OSError:
            failures += 1
    monkeypatch.undo()
    assert failures == 5
    assert got == {0: _alone(engine, prompt(70), _params(0)), 1: _alone(engine, prompt(90), _params(1))}


def test_sequences_move_between_hands(engine, prompt):
    batch = Batch(engine)
    sequence = engine.open(prompt(60))
    batch.adopt(7, sequence, next_id=5, params=_params(7, 6))
    said = [event.token_id for _ in range(4) for event in batch.step()]
    back = batch.release(7)
    assert back.token_ids == [*prompt(60), 5, *said[:3]] and len(batch) == 0
    assert said == _alone(engine, [*prompt(60), 5], _params(7, 4))
    with pytest.raises(EngineError, match="its own engine"):
        Batch(Engine(engine.model)).adopt(0, back, next_id=1, params=_params(0))


def test_an_engine_over_packed_weights_saves_and_comes_back(models, prompt, tmp_path):
    models["exact"].save_pretrained(tmp_path / "model")
    options = {"cache_format": "packed", "store": tmp_path / "kv"}
    first = Engine(PackedWeights(tmp_path / "model"), **options)
    said = [event.token_id for event in first.generate(prompt(300), _params(0, 5))]
    sequence = first.open(prompt(300))
    sequence.save(tmp_path / "a.seq")
    assert torch.equal(first.load(tmp_path / "a.seq").logits, sequence.logits)
    with pytest.raises(EngineError, match="no torch model"):
        _ = first.model
    first.close()
    second = Engine(PackedWeights(tmp_path / "model"), **options)
    assert [event.token_id for event in second.generate(prompt(300), _params(0, 5))] == said
    assert second.prefixes.statistics().hit_tokens == 256
    second.close()


def test_changed_parameters_make_cached_prefixes_worthless(models, prompt):
    model = copy.deepcopy(models["exact"])
    engine = Engine(model)
    before = engine.open(prompt(300)).logits
    engine.keep(engine.open(prompt(300)).paged)
    assert engine.prefixes.match(prompt(300)).tokens == 256
    with torch.no_grad():
        model.head.weight.mul_(1.5)
        model.layers[0].attn.wkv.weight.mul_(0.5)
    after = engine.open(prompt(300)).logits
    assert engine.prefixes.statistics().hit_tokens == 0
    with torch.no_grad():
        expected = model(torch.tensor([prompt(300)]))[:, -1]
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=0)
    assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize("window", list(WindowStrategy))
def test_an_engine_that_is_restarted_goes_on_from_its_store(engine, prompt, tmp_path, window):
    long = prompt(300) + prompt(80, seed=2)
    with_store = {"store": tmp_path, "window": window, "prefill_chunk": 64}
    first = Engine(engine.model, **with_store)
    said = [event.token_id for event in first.generate(prompt(300), _params(0))]
    assert first.store.statistics().pages == 2  # at the end of the turn already
    first.close()
    first.close()
    second = Engine(engine.model, **with_store)
    again = [event.token_id for event in second.generate(long, _params(1))]
    assert second.prefixes.statistics().hit_tokens == 256
    assert again == _alone(engine, long, _params(1)) and said
    second.close()


def test_prompts_take_turns_and_a_short_one_does_not_wait_for_a_long_one(engine, prompt):
    fresh = Engine(engine.model, prefill_chunk=32)
    batch = Batch(fresh)
    batch.add({0: prompt(400)}, {0: _params(0, 2)})
    batch.step()
    batch.add({1: prompt(30, seed=1)}, {1: _params(1, 1)})
    steps = 0
    while not any(event.key == 1 for event in batch.step()):
        steps += 1
    assert steps <= 1
    assert _drain(batch)[0] == _alone(engine, prompt(400), _params(0, 2))


def test_a_conversation_feeds_what_is_new_alone(engine, prompt, monkeypatch):
    fresh = Engine(engine.model, prefill_chunk=64)
    batch = Batch(fresh, prefixes=True, frontiers=True)
    ids, cached = prompt(77), []
    for turn in range(4):
        key = 10 + turn
        batch.add({key: ids}, {key: _params(key, 7)}, keep_at={key: (40, len(ids) - 1)})
        out = _drain(batch)[key]
        assert out == _alone(engine, ids, _params(key, 7))
        cached.append((batch.found(key).match.tokens, len(ids)))
        batch.remove(key)
        ids = [*ids, *out, *prompt(30, seed=turn)]
    # All but the last sampled token, which was never fed.
    assert [tokens for tokens, _ in cached[1:]] == [length + 6 for _, length in cached[:-1]]
    match = fresh.prefixes.match
    assert match([*prompt(77)[:40], 96, 95]).tokens == 40  # the head that others share
    assert match([*prompt(77), 96]).tokens == 76  # a retry, or another answer
    fresh.prefixes.check_integrity()
    fresh.pool.check_integrity([fresh.prefixes.held_pages()], slabs=[])


def test_what_a_row_will_begin_at_is_not_evicted_while_it_waits(engine, prompt):
    fresh = Engine(engine.model, prefill_chunk=32, max_running=1)
    for seed in (1, 2):
        with fresh.begin(prompt(260, seed=seed)) as sequence:
            sequence.append(prompt(260, seed=seed))
            fresh.keep(sequence)
    batch = Batch(fresh)
    batch.add({0: prompt(200)}, {0: _params(0, 1)})
    batch.add({1: prompt(260, seed=1)}, {1: _params(1, 1)})
    batch.step()
    fresh.prefixes.evict(1 << 40)
    assert fresh.prefixes.match(prompt(260, seed=2)).known == 0
    assert fresh.prefixes.match(prompt(260, seed=1)).known == 256
    _drain(batch)
    assert batch.found(1).match.tokens == 256
    for key in (0, 1):
        batch.remove(key)
    fresh.prefixes.evict(1 << 40)
    assert fresh.prefixes.pages == 0  # nothing stays pinned
    batch.add({2: prompt(260)}, {2: _params(2, 1)})
    batch.abandon()
    assert len(batch) == 0 and fresh.pool.used_bytes == 0


def test_a_long_prompt_is_kept_on_the_way(engine, prompt, tmp_path):
    fresh = Engine(engine.model, prefill_chunk=64, store=tmp_path, unit_tokens=128)
    batch = Batch(fresh)
    batch.add({0: prompt(500)}, {0: _params(0, 1)})
    while fresh.store.depth(prompt(500)) < 256:
        assert not batch.step()
    batch.abandon()  # as if killed
    fresh.store.close()
    with pytest.raises(ValueError, match="unit_tokens is 100, expected a multiple of 128"):
        Engine(engine.model, unit_tokens=100)
    again = Engine(engine.model, prefill_chunk=64, store=tmp_path)
    batch = Batch(again)
    batch.add({0: prompt(500)}, {0: _params(0, 3)})
    got = _drain(batch)
    assert batch.found(0).match.tokens == batch.found(0).from_disk == 256
    assert got == {0: _alone(engine, prompt(500), _params(0, 3))}
    batch.remove(0)
    again.close()


@pytest.mark.parametrize("cache_format", ["exact", "packed"])
def test_a_prefix_without_its_windows_is_replayed_in_turns(engine, prompt, tmp_path, cache_format):
    options = {
        "store": tmp_path,
        "window": WindowStrategy.ZERO,
        "prefill_chunk": 16,
        "cache_format": cache_format,
    }
    with_one = Engine(engine.model, **options)
    with_one.keep(with_one.open(prompt(400)).paged)
    with_one.close()
    again = Engine(engine.model, **options)
    batch = Batch(again)
    batch.add({0: prompt(20, seed=1)}, {0: _params(0, 60)})
    while not batch.step():
        pass
    batch.add({1: prompt(400)}, {1: _params(1, 5)})
    steps, got = 0, {0: [], 1: []}
    while not got[1]:
        for event in batch.step():
            got[event.key].append(event.token_id)
        steps += 1
    match = batch.found(1).match
    assert (match.tokens, match.replay) == (384, replay_tokens(again.pool.layout))
    assert steps >= match.replay // 16 and len(got[0]) == steps  # the other went on all the while
    for key, tokens in _drain(batch).items():
        got[key] += tokens
    assert got[1] == _alone(again, prompt(400), _params(1, 5))
    batch.add({2: [*prompt(384), 5, 6]}, {2: _params(2, 5)})  # and one that leaves in the middle of it
    batch.step()
    batch.remove(2)
    for key in (0, 1):
        batch.remove(key)
    again.pool.check_integrity([again.prefixes.held_pages()], slabs=[])
    again.close()


def test_a_replay_that_is_put_off_is_made_up_for_by_whatever_comes_first(engine, prompt, tmp_path):
    options = {"store": tmp_path, "window": WindowStrategy.ZERO, "prefill_chunk": 16}
    first = Engine(engine.model, **options)
    first.keep(first.open(prompt(400)).paged)
    first.close()
    plain = Engine(engine.model, prefix_cache=False)
    for act in ("append", "fork", "rewind", "half", "freeze"):
        again = Engine(engine.model, **options)
        sequence = again.find(prompt(400), defer=True).sequence
        assert sequence.length == 384 and sequence.replay_left > 0
        if act == "half":
            segment = sequence.replay_segment(10)
            again.runner.forward([segment])
            sequence.replay_done(len(segment.tokens))
        elif act == "fork":
            sequence = sequence.fork()
        elif act == "rewind":
            sequence.rewind(300)
        elif act == "freeze":
            sequence.freeze()
        logits = sequence.append(prompt(400)[sequence.length :])
        with plain.begin(prompt(400)) as whole:
            expected = whole.append(prompt(400))
        assert torch.equal(logits, expected) and sequence.replay_left == 0
        sequence.close()
        again.close()
