"""GRPO: draws, the update, resume; with hand-made episodes, so that no sandbox is needed."""

import copy
import dataclasses

import pytest
import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.model import Config, Model
from rorqual.rl import tasks
from rorqual.rl.episodes import Episode, Request
from rorqual.rl.grpo import RECIPES, draw, update
from rorqual.rl.optim import OptimConfig, Optimizers

CONFIG = dataclasses.replace(RECIPES["hop-recover"], optim=OptimConfig(use_muon=False, adam_lr=1e-2))


def _episodes(model, *, count=6, group_size=3):
    """Sampled continuations of random prompts; reward is whether an even token came first."""
    engine, episodes = Engine(model), []
    task = tasks.sample("hop-recover", depth=1, seed=0, split="rl")
    for number in range(count):
        prompt = torch.randint(
            0, 97, (20 + number // group_size,), generator=torch.Generator().manual_seed(1)
        ).tolist()
        episode = Episode(Request(task=task, seed=5, sequence=number, group=number // group_size))
        episode.push(prompt, sampled=False)
        events = list(engine.generate(prompt, SamplingParams(seed=5, sequence=number, max_tokens=8)))
        episode.push([e.token_id for e in events], sampled=True, logprobs=[e.logprob for e in events])
        episode.status, episode.reward = "submitted", float(events[0].token_id % 2 == 0)
        episodes.append(episode)
    return episodes


@pytest.fixture
def model():
    return Model(Config.preset("tiny").replace(vocab_size=97)).initialize(0).eval()


def test_draws_depend_on_seed_and_step_only():
    first, again, other = draw(CONFIG, 3), draw(CONFIG, 3), draw(CONFIG, 4)
    assert first == again != other
    assert len(first) == CONFIG.prompts * CONFIG.group_size
    assert {request.task.split for request in first} == {"rl"}
    sequences = {request.sequence for step in range(5) for request in draw(CONFIG, step)}
    assert len(sequences) == 5 * len(first)  # no two episodes share their randomness
    groups = [request.group for request in first]
    assert groups == sorted(groups) and groups.count(0) == CONFIG.group_size


def test_sampled_and_trained_log_probabilities_agree(model):
    """On policy the ratio is 1: what is left is the gap between cached decoding and the full forward, fp32."""
    stats = update(model, Optimizers(model, CONFIG.optim), _episodes(model), CONFIG)
    assert stats["log_gap"] < 1e-5 and stats["clip_share"] == 0.0


def test_an_update_makes_rewarded_episodes_likelier(model):
    episodes = _episodes(model)
    assert len({e.reward for e in episodes[:3]} | {e.reward for e in episodes[3:]}) == 2

    def log_prob(episode):
        ids = torch.tensor([episode.ids])
        with torch.no_grad():
            table = torch.log_softmax(model(ids), -1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return float(table[torch.tensor(episode.mask[1:])].sum())

    used = [
        e for e in episodes if len({x.reward for x in episodes if x.request.group == e.request.group}) > 1
    ]
    before = {id(e): log_prob(e) for e in used}
    update(model, Optimizers(model, CONFIG.optim), episodes, CONFIG)
    for episode in used:
        change = log_prob(episode) - before[id(episode)]
        assert change > 0 if episode.reward else change < 0


def test_groups_without_spread_change_nothing(model):
    episodes = _episodes(model)
    for episode in episodes:
        episode.reward = 1.0
    state = copy.deepcopy(model.state_dict())
    stats = update(model, Optimizers(model, CONFIG.optim), episodes, CONFIG)
    assert stats["zero_groups"] == 1.0
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_prompt_tokens_do_not_count(model):
    """Changing what the loss masks out (old log-probabilities of prompt tokens) changes no gradient."""
    episodes = _episodes(model)
    twin = copy.deepcopy(model)
    update(model, Optimizers(model, CONFIG.optim), episodes, CONFIG)
    for episode in episodes:
        episode.logprobs = [
            value if own else 7.0 for value, own in zip(episode.logprobs, episode.mask, strict=True)
        ]
    update(twin, Optimizers(twin, CONFIG.optim), episodes, CONFIG)
    ours = twin.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())
