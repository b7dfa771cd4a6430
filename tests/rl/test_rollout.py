"""Episodes in real containers with the embedded model: what is kept is what was sampled, and it can be graded."""

import dataclasses

import pytest
import torch

from rorqual import chat
from rorqual._cli.embedded import EMBEDDED_DIR
from rorqual.chat import Tokenizer
from rorqual.engine import Engine
from rorqual.rl import Request, RolloutConfig, SandboxPool, rollout, tasks
from rorqual.rl.traces import TOOLS, prompt_messages

pytestmark = pytest.mark.usefixtures("container_host")


@pytest.fixture(scope="module")
def container_host():
    from rorqual.sandbox import Sandbox, SandboxError

    try:
        with Sandbox.create(timeout=30):
            pass
    except SandboxError as error:
        pytest.skip(f"no container here: {error}")


@pytest.fixture(scope="module")
def parts():
    return Engine(EMBEDDED_DIR), Tokenizer.from_file(EMBEDDED_DIR)


def _requests(count=8, *, temperature=1.0):
    kinds = [("hop-recover", 1), ("hop-recover", 2), ("calc-tool", 1)]
    return [
        Request(
            task=tasks.sample(*kinds[n % 3][:1], depth=kinds[n % 3][1], seed=n, split="test"),
            seed=11, sequence=n, temperature=temperature,
        )
        for n in range(count)
    ]  # fmt: skip


async def _run(parts, requests, config=None):
    async with SandboxPool.open(8) as pool:
        return await rollout(*parts, pool, requests, config)


async def test_episodes_are_token_in_token_out(parts):
    engine, tokenizer = parts
    episodes = await _run(parts, _requests())
    assert {episode.status for episode in episodes} <= {"submitted", "no_call", "malformed", "token_limit"}
    for episode in episodes:
        assert len(episode.ids) == len(episode.mask) == len(episode.logprobs)
        prompt = tokenizer.encode_segments(
            chat.render_segments(prompt_messages(episode.request.task), tools=TOOLS)
        )
        assert episode.ids[: len(prompt)] == prompt and not any(episode.mask[: len(prompt)])
        # Each sampled stretch is one answer: it ends with EOS, and nothing else in it is EOS.
        runs, current = [], []
        for token, own in zip(episode.ids, episode.mask, strict=True):
            if own:
                current.append(token)
            elif current:
                runs, current = [*runs, current], []
        runs = [run for run in [*runs, current] if run]
        assert len(runs) == episode.turns
        if episode.status != "token_limit":
            assert all(run[-1] == tokenizer.eos_id and tokenizer.eos_id not in run[:-1] for run in runs)
        # The log-probabilities are the model's own, by the full forward pass.
        with torch.no_grad():
            table = torch.log_softmax(engine.model(torch.tensor([episode.ids])), -1)[0, :-1]
        ids = torch.tensor(episode.ids[1:])
        mask = torch.tensor(episode.mask[1:])
        full = table.gather(1, ids[:, None])[:, 0][mask]
        torch.testing.assert_close(full, torch.tensor(episode.logprobs[1:])[mask], atol=2e-3, rtol=0)


async def test_an_episode_does_not_depend_on_its_company(parts):
    requests = _requests(6)
    together = await _run(parts, requests)
    alone = await _run(parts, [requests[4]])
    assert alone[0].ids == together[4].ids and alone[0].reward == together[4].reward


async def test_the_easiest_tasks_are_sometimes_solved_and_grading_is_exact(parts):
    requests = [
        Request(task=tasks.sample("hop-recover", depth=1, seed=n, split="test"), seed=3, sequence=n)
        for n in range(16)
    ]
    episodes = await _run(parts, requests)
    solved = [episode for episode in episodes if episode.reward == 1.0]
    assert len(solved) >= 4  # about 12 of 16 are expected; 4 is far below chance fluctuation
    assert all(episode.answer == episode.request.task.answer for episode in solved)
    assert all(episode.status == "submitted" for episode in solved)


async def test_limits_end_an_episode(parts):
    config = RolloutConfig(max_turns=1)
    episodes = await _run(parts, [r for r in _requests(6) if r.task.family == "hop-recover"], config)
    assert {episode.status for episode in episodes} <= {"turn_limit", "submitted", "malformed", "no_call"}
    assert all(episode.turns == 1 for episode in episodes)
    short = dataclasses.replace(config, max_turn_tokens=3)
    assert {e.status for e in await _run(parts, _requests(3), short)} == {"token_limit"}


async def test_a_dead_sandbox_is_an_infrastructure_failure_and_no_reward(parts):
    async with SandboxPool.open(4) as pool:
        await pool.sandboxes[0].kill()
        episodes = await rollout(*parts, pool, _requests(4))
    failed = [episode for episode in episodes if episode.status == "infra_error"]
    assert len(failed) == 1 and failed[0].error and failed[0].reward == 0.0
    assert len([episode for episode in episodes if episode.status != "infra_error"]) == 3


async def test_no_sandbox_outlives_its_pool():
    from rorqual.sandbox import AsyncSandbox

    async with SandboxPool.open(3) as pool:
        ids = {sandbox.id for sandbox in pool.sandboxes}
    assert ids.isdisjoint({info.id for info in await AsyncSandbox.list()})
