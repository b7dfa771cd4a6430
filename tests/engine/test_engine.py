"""Cached generation against the full forward pass; sequences that fork, rewind and are saved; bad input."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rorqual.engine
from rorqual.engine import ContextOverflow, Engine, PromptError, SamplingParams, SequenceFileError
from rorqual.model import Config, Model
from rorqual.model.packed import PackedWeights

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def _ids(events):
    return [event.token_id for event in events]


def test_all_names_are_exported():
    assert sorted(rorqual.engine.__all__) == rorqual.engine.__all__
    assert all(hasattr(rorqual.engine, name) for name in rorqual.engine.__all__)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200])
def test_cached_logits_equal_the_full_forward(engine, prompt, length):
    ids = prompt(length)
    with torch.no_grad():
        full = engine.model(torch.tensor([ids]))[:, -1]
    # fp32, two orders of summation; logits are of size 1
    torch.testing.assert_close(engine.open(ids).logits, full, atol=2e-5, rtol=0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_any_chunking_gives_the_same_logits(engine, prompt, chunks):
    ids = prompt(sum(chunks), seed=1)
    sequence, start = engine.open(ids[: chunks[0]]), chunks[0]
    for size in chunks[1:]:
        sequence.append(ids[start : start + size])
        start += size
    torch.testing.assert_close(sequence.logits, engine.open(ids).logits, atol=2e-5, rtol=0)


def test_greedy_generation_equals_recomputing_every_step(engine, prompt):
    ids = prompt(40)
    with torch.no_grad():
        for expected in _ids(engine.generate(ids, GREEDY)):
            assert int(engine.model(torch.tensor([ids]))[0, -1].argmax()) == expected
            ids = [*ids, expected]


def test_generation_continues_the_last_one_without_feeding_it_again(engine, prompt):
    first = _ids(engine.generate(prompt(30), GREEDY))
    longer = prompt(30) + first + prompt(9, seed=5)
    continued = _ids(engine.generate(longer, GREEDY))
    fresh = Engine(engine.model)
    assert continued == _ids(fresh.generate(longer, GREEDY))
    assert engine.usage().tokens == len(longer) + len(continued) - 1


def test_a_dropped_generation_leaves_no_half_fed_state(engine, prompt):
    events = engine.generate(prompt(30), GREEDY)
    next(events)
    events.close()
    again = _ids(engine.generate(prompt(30), GREEDY))
    assert again == _ids(Engine(engine.model).generate(prompt(30), GREEDY))


def test_generation_ends_at_a_stop_id_and_says_why(engine, prompt):
    tokens = _ids(engine.generate(prompt(20), GREEDY))
    stop = SamplingParams(temperature=0.0, max_tokens=12, stop_ids=(tokens[3],))
    events = list(engine.generate(prompt(20), stop))
    assert events[-1].token_id == tokens[3] and events[-1].finish_reason == "stop"
    assert list(engine.generate(prompt(20), GREEDY))[-1].finish_reason == "length"


def test_forks_are_independent(engine, prompt):
    trunk = engine.open(prompt(50))
    twin = trunk.fork()
    twin.append(prompt(20, seed=2))
    torch.testing.assert_close(trunk.logits, engine.open(prompt(50)).logits, atol=0, rtol=0)
    whole = engine.open(prompt(50) + prompt(20, seed=2)).logits
    torch.testing.assert_close(twin.logits, whole, atol=2e-5, rtol=0)


def test_rewind_goes_back_to_the_same_state(engine, prompt):
    sequence = engine.open(prompt(70))
    sequence.rewind(33)
    torch.testing.assert_close(sequence.logits, engine.open(prompt(70)[:33]).logits, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="holds 33"):
        sequence.rewind(34)


def test_a_saved_sequence_goes_on_as_if_it_had_stayed(engine, prompt, tmp_path):
    sequence = engine.open(prompt(45))
    sequence.save(tmp_path / "a.seq")
    loaded = engine.load(tmp_path / "a.seq")
    params = SamplingParams(seed=4, max_tokens=20)
    assert _ids(loaded.generate(params)) == _ids(sequence.generate(params))
    assert [path.name for path in tmp_path.iterdir()] == ["a.seq"]


def test_a_file_of_another_model_is_refused(engine, prompt, tmp_path):
    engine.open(prompt(20)).save(tmp_path / "a.seq")
    other = Engine(Model(engine.config).initialize(1))
    with pytest.raises(SequenceFileError, match="another model"):
        other.load(tmp_path / "a.seq")


@pytest.mark.parametrize("damage", ["empty", "torn", "text"])
def test_a_damaged_file_is_refused(engine, prompt, tmp_path, damage):
    path = tmp_path / "a.seq"
    engine.open(prompt(20)).save(path)
    raw = path.read_bytes()
    path.write_bytes({"empty": b"", "torn": raw[: len(raw) // 2], "text": b"hello" * 99}[damage])
    with pytest.raises(SequenceFileError, match=r"a\.seq"):
        engine.load(path)


def test_the_bytes_held_are_the_bytes_predicted(engine, prompt):
    for length in (1, 15, 16, 17, 64, 129):
        before = engine.pool.statistics()
        sequence = engine.open(prompt(length, seed=6))
        usage, now = sequence.usage(), engine.pool.statistics()
        assert usage.held_bytes == engine.predicted_bytes(length)
        charged = now.charged_bytes - before.charged_bytes
        assert now.used_bytes - before.used_bytes == usage.held_bytes + charged
        assert usage.content_bytes == engine.pool.layout.content_bytes(length)
        del sequence


@pytest.mark.parametrize(("ids", "error"), [([], "empty"), ([97], "97"), ([-1], "-1")])
def test_bad_prompts_are_refused(engine, ids, error):
    with pytest.raises(PromptError, match=error):
        engine.open(ids)


def test_too_long_a_prompt_is_refused_with_numbers_and_changes_nothing(engine, prompt):
    sequence = engine.open(prompt(500))
    before = sequence.logits.clone()
    with pytest.raises(ContextOverflow, match="520 tokens do not fit the context of 512") as caught:
        sequence.append(prompt(20))
    assert (caught.value.tokens, caught.value.limit) == (520, 512)
    assert sequence.length == 500 and torch.equal(sequence.logits, before)


def test_too_small_a_cache_budget_is_refused(engine, prompt):
    small = Engine(engine.model, kv_bytes=100_000)
    with pytest.raises(ContextOverflow, match="raise kv_bytes"):
        small.open(prompt(400))


def test_generation_stops_at_the_end_of_the_context(engine, prompt):
    events = list(engine.generate(prompt(505), SamplingParams(max_tokens=50)))
    assert len(events) == 7 and events[-1].finish_reason == "length"


def test_missing_weights_are_one_clear_error(tmp_path):
    from rorqual.model import ModelError

    with pytest.raises(ModelError, match="config"):
        Engine(tmp_path)


def test_gradients_reach_every_parameter():
    """The indexer's come from its own loss (spec/rl.md 6); hash layers have no bias, score layers' is not trained."""
    from rorqual.model import AttentionMode

    model = Model(Config.preset("tiny")).initialize(0)
    ids = torch.randint(0, 1024, (2, 140), generator=torch.Generator().manual_seed(0))
    out = model.train_pass(ids, mode=AttentionMode(index_loss=True), mtp=True)
    total = (
        model.logits(out.hidden).square().mean()
        + model.logits(out.mtp_hidden).square().mean()
        + out.index_loss
    )
    total.backward()
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert without == []


def test_expert_bytes_keeps_a_directory_packed_and_gives_the_same_logits(tmp_path):
    model = Model(Config.preset("tiny"), mtp=False).initialize(3)
    model.save_pretrained(tmp_path)
    whole = Engine(PackedWeights(tmp_path), kv_bytes=1 << 22)
    streamed = Engine(tmp_path, kv_bytes=1 << 22, expert_bytes=1 << 20)
    one, two = whole.open([1, 2, 3]).logits, streamed.open([1, 2, 3]).logits
    assert one is not None and two is not None and one.equal(two)
    assert streamed.weights.experts_resident is False
    streamed.close()
    streamed.close()
    with pytest.raises(ValueError, match="expert_bytes is for a directory"):
        Engine(model, expert_bytes=1 << 20)
