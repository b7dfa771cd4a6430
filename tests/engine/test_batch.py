"""Lock-step batches give each sequence what it would get alone."""

import numpy as np
import pytest

from rorqual.engine import Allowed, Batch, Engine, EngineError, SamplingParams


def _params(key, tokens=15):
    return SamplingParams(seed=3, sequence=key, max_tokens=tokens)


def _drain(batch):
    out = {}
    while batch.busy:
        for event in batch.step():
            out.setdefault(event.key, []).append(event.token_id)
    return out


def _alone(engine, ids, params):
    return [event.token_id for event in Engine(engine.model).generate(ids, params)]


def test_sequences_of_different_lengths_equal_single_generation(engine, prompt):
    prompts = {0: prompt(5), 1: prompt(70), 2: prompt(70), 3: prompt(33), 4: prompt(1)}
    batch = Batch(engine)
    batch.add(prompts, {key: _params(key) for key in prompts})
    assert _drain(batch) == {key: _alone(engine, ids, _params(key)) for key, ids in prompts.items()}


def test_sequences_go_on_after_being_fed(engine, prompt):
    prompts = {key: prompt(20 + key) for key in range(6)}
    batch = Batch(engine)
    batch.add(prompts, {key: _params(key, tokens=4 + 3 * key) for key in prompts})
    first = _drain(batch)
    extra = {key: prompt(3 + 4 * key, seed=9) for key in (0, 2, 5)}
    for key, ids in extra.items():
        batch.feed(key, ids, _params(key + 100))
    second = _drain(batch)
    assert set(second) == {0, 2, 5}
    for key, ids in extra.items():
        assert second[key] == _alone(engine, prompts[key] + first[key] + ids, _params(key + 100))


def test_sequences_may_be_added_and_removed_while_others_run(engine, prompt):
    batch = Batch(engine)
    batch.add({0: prompt(10), 1: prompt(20)}, {0: _params(0), 1: _params(1, tokens=30)})
    got = {0: [], 1: [], 2: []}
    for _ in range(5):
        for event in batch.step():
            got[event.key].append(event.token_id)
    batch.remove(0)
    batch.add({2: prompt(40)}, {2: _params(2)})
    for key, ids in _drain(batch).items():
        got[key] += ids
    assert got[1] == _alone(engine, prompt(20), _params(1, tokens=30))
    assert got[2] == _alone(engine, prompt(40), _params(2))
    assert len(batch) == 2


def test_wrong_use_is_refused(engine, prompt):
    batch = Batch(engine)
    batch.add({0: prompt(10)}, {0: _params(0)})
    with pytest.raises(EngineError, match="already"):
        batch.add({0: prompt(10)}, {0: _params(0)})
    with pytest.raises(EngineError, match="still generating"):
        batch.feed(0, [1], _params(0))


def test_a_guide_sees_every_token_and_decides_about_the_next(engine, prompt):
    seen = []

    def guide(token):
        """Only tokens of the parity that the last one had not."""
        seen.append(token)
        parity = 0 if token is None else (token + 1) % 2
        words = np.zeros(4, dtype=np.uint32)
        for allowed in range(parity, 97, 2):
            words[allowed // 32] |= np.uint32(1 << allowed % 32)
        return Allowed(bits=words)

    prompts = {0: prompt(40), 1: prompt(41)}
    batch = Batch(engine)
    batch.add(prompts, {key: _params(key) for key in prompts}, guides={0: guide})
    out = _drain(batch)
    assert [token % 2 for token in out[0]] == [n % 2 for n in range(15)]
    assert seen == [None, *out[0]]
    assert out[1] == _alone(engine, prompts[1], _params(1))


def test_a_guide_survives_preemption(prompt, engine):
    def guide(token):
        return Allowed(bits=np.array([0, 1 << 5, 0, 0], dtype=np.uint32))

    layout = engine.pool.layout
    small = Engine(engine.model, kv_bytes=2 * layout.held_bytes(330), prefill_chunk=32)
    batch = Batch(small)
    prompts = {key: prompt(250, seed=key) for key in range(4)}
    batch.add(prompts, {key: _params(key) for key in prompts}, guides={2: guide, 3: guide})
    out = _drain(batch)
    assert batch.preemptions > 0
    assert out[2] == out[3] == [37] * 15
    assert out[0] == _alone(engine, prompts[0], _params(0))
