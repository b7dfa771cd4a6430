"""The names that the design promises, called exactly as it spells them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import AsyncSandbox, Sandbox, SandboxError, Unsupported

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def test_chat_renders_and_parses_text() -> None:
    from rorqual.chat import StreamParser, parse, render

    messages = [{"role": "user", "content": "Add 1."}]
    text = render(
        messages,
        tools=[TOOL],
        thinking_mode="thinking",
        reasoning_effort=None,
        drop_thinking=True,
        add_default_bos_token=True,
        context=None,
        keep="auto",
    )
    assert text.startswith("<｜begin▁of▁sentence｜>") and "Add 1." in text and text.endswith("<think>")
    assert render(messages, keep="official")
    completion = (
        'One call.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n'
        '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
    )
    message = parse(completion, thinking_mode="thinking", tools=[TOOL])
    assert (message.reasoning_content, message.content or "") == ("One call.", "")
    assert (message.tool_calls[0].name, message.finish_reason) == ("add", "tool_calls")
    assert list(message.diagnostics) == []
    parser = StreamParser(thinking_mode="thinking", tools=[TOOL])
    for character in completion:
        parser.push(character)
    parser.close()
    assert parser.message.tool_calls[0].arguments == message.tool_calls[0].arguments


def test_cost_is_computed_from_a_preset() -> None:
    from rorqual.model import Config, cost

    config = Config.preset("pro")
    assert cost.kv_bytes(Config.preset("pro"), context=2**20) == 5_280_404_480
    assert cost.flops_per_token(config, 2**20) == pytest.approx(319.4e9, rel=1e-3)


def test_model_and_engine_generate_fork_rewind_save_and_load(tmp_path: Path) -> None:
    import torch

    from rorqual.engine import Engine, SamplingParams
    from rorqual.model import Config, Model

    config = Config.preset("tiny").replace(vocab_size=97)
    Model(config).initialize(0).save_pretrained(tmp_path / "model")
    model = Model.from_pretrained(tmp_path / "model")
    token_ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        logits = model(token_ids)
    assert logits.shape == (2, 3, 97)

    prompt_ids = [1, 2, 3]
    engine = Engine(tmp_path / "model", kv_bytes=2 << 30)
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=7, max_tokens=4, stop_ids=())
    ids = [event.token_id for event in engine.generate(prompt_ids, params)]
    assert len(ids) == 4 and ids == [event.token_id for event in Engine(model).generate(prompt_ids, params)]
    seq = engine.open(prompt_ids)
    twin = seq.fork()
    twin.append([4])
    assert (seq.length, twin.length) == (3, 4)
    seq.rewind(2)
    seq.save(tmp_path / "seq")
    assert engine.load(tmp_path / "seq").token_ids == [1, 2]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        made = Sandbox.create(
            substrate="container", image="base", timeout=300, cpu=1, memory_mb=512, network="offline"
        )
    except SandboxError as error:
        pytest.skip(f"no container on this host: {error}")
    with made:
        yield made


def test_a_sandbox_runs_commands_and_moves_files(sandbox: Sandbox) -> None:
    r = sandbox.commands.run("echo out; echo err >&2; exit 3", timeout=60)
    assert (r.stdout, r.stderr, r.exit_code) == ("out\n", "err\n", 3)
    assert (r.timed_out, r.truncated) == (False, False) and r.seq >= 1
    sandbox.files.write("/home/user/a.txt", b"bytes")
    assert sandbox.files.read("/home/user/a.txt") == "bytes"
    assert Sandbox.connect(sandbox.id).commands.run("cat a.txt").stdout == "bytes"


def test_what_is_built_later_works_or_is_refused_by_name(sandbox: Sandbox) -> None:
    def pause_and_resume() -> None:
        sandbox.pause()
        sandbox.resume()

    def fork() -> None:
        for twin in sandbox.fork(count=2):
            twin.kill()

    calls = {
        "attach": lambda: Sandbox.attach(sandbox.id, fast_forward=True),
        "pause": pause_and_resume,
        "snapshot": sandbox.snapshot,
        "fork": fork,
        "microvm": lambda: Sandbox.create(substrate="microvm").kill(),
    }
    for name, call in calls.items():
        try:
            call()
        except Unsupported as error:
            assert " is not supported: " in str(error), name
            assert error.available or len(error.reason) > 20, name
    assert sandbox.commands.run("echo on").stdout == "on\n"


async def test_the_twin_is_the_same_with_await(sandbox: Sandbox) -> None:
    async with await AsyncSandbox.create(
        substrate="container", image="base", timeout=300, cpu=1, memory_mb=512, network="offline"
    ) as sb:
        assert (await sb.commands.run("echo hi", timeout=60)).stdout == "hi\n"
        assert await sb.kill()


def test_an_agent_works_on_a_task_with_chosen_tools(sandbox: Sandbox) -> None:
    from rorqual.agent import DEFAULT_TOOLS, Agent, RemoteConfig, RemoteModel
    from tests.agent.scripted import Say, serving

    steps = [Say(calls=[("bash", {"command": "echo 42"})]), Say(calls=[("submit", {"answer": "42"})])]
    with serving(*steps) as server:
        model = RemoteModel(RemoteConfig(url=server.url, model="m"))
        result = Agent(model=model, sandbox=sandbox, tools=[*DEFAULT_TOOLS]).run("TASK")
    assert (result.answer, result.outcome) == ("42", "submitted")
    assert [event.kind for event in result.events][:2] == ["run.start", "goal"]
