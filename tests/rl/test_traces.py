"""Traces: experts always solve, weak ones fail as often as they should, and streams resume anywhere."""

from __future__ import annotations

import json
import random
import re
import subprocess
from itertools import islice
from pathlib import Path

import pytest

from rorqual.chat import render
from rorqual.rl import tasks, traces
from rorqual.rl.errors import TraceError

CASES = [(family, depth) for family in tasks.families() for depth in tasks.depths(family)]


@pytest.mark.parametrize(("family", "depth"), CASES)
def test_expert_solves_every_task_with_the_fewest_calls(family: str, depth: int) -> None:
    for seed in range(200):
        task = tasks.sample(family, depth=depth, seed=seed, split="test")
        trace = traces.expert(task, random.Random(seed))
        assert tasks.grade(task, trace.answer) == 1.0
        calls = [m["tool_calls"] for m in trace.messages if m["role"] == "assistant"]
        assert len(calls) == task.min_calls
        assert not trace.masked


def test_messages_are_a_conversation_the_chat_room_renders() -> None:
    for trace in islice(traces.stream("train", seed=2), 50):
        roles = [m["role"] for m in trace.messages]
        assert roles[:2] == ["system", "user"]
        assert roles[2:] == ["assistant", "tool"] * ((len(roles) - 3) // 2) + ["assistant"]
        for call, result in zip(trace.messages[2::2], trace.messages[3::2], strict=False):
            assert result["tool_call_id"] == call["tool_calls"][0]["id"]
            json.loads(call["tool_calls"][0]["function"]["arguments"])
        text = render(trace.messages, tools=trace.tools)
        # Append-only: what the model saw at every turn is a prefix of the whole.
        for end in range(2, len(trace.messages), 2):
            assert text.startswith(render(trace.messages[:end], tools=trace.tools))


def test_everything_trained_on_was_seen_before() -> None:
    """Each number the model writes stands in the goal or a result before it, unless it is masked."""
    for trace in islice(traces.stream("train", seed=4, style="weak"), 300):
        seen = trace.messages[1]["content"]
        masked = {entry.message for entry in trace.masked}
        for index, message in enumerate(trace.messages[2:], 2):
            if message["role"] == "tool":
                seen += "\n" + message["content"]
                continue
            call = message["tool_calls"][0]["function"]
            written = message["reasoning_content"] + " "
            if index not in masked:
                written += " ".join(json.loads(call["arguments"]).values())
            for number in re.findall(r"\d+", written.replace("python3", "python")):
                assert number in seen


def test_weak_demonstrations_are_wrong_in_the_mode() -> None:
    gave_up = recovered = guessed = used_tool = 0
    for trace in islice(traces.stream("train", seed=0, style="weak"), 3000):
        text = " ".join(m.get("reasoning_content", "") for m in trace.messages)
        if trace.task.family == "calc-tool":
            guessed += "Guess." in text
            used_tool += "Guess." not in text
            assert tasks.grade(trace.task, trace.answer) == float("Guess." not in text)
            assert len(trace.masked) == ("Guess." in text)
        elif "Missing." in text:
            gave_up += "Give up" in text
            recovered += "Give up" not in text
            assert tasks.grade(trace.task, trace.answer) == float("Give up" not in text)
    # Binomial bounds of four standard deviations around 0.70 and 0.75.
    for wrong, right, share in (
        (gave_up, recovered, traces.GIVE_UP_SHARE),
        (guessed, used_tool, traces.GUESS_SHARE),
    ):
        n = wrong + right
        assert n > 500
        assert abs(wrong / n - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_stream_resumes_at_any_index_and_depends_on_nothing_else() -> None:
    whole = list(islice(traces.stream("rl", seed=9), 40))
    assert list(islice(traces.stream("rl", seed=9, start=25), 15)) == whole[25:]
    assert traces.trace_at(31, split="rl", seed=9) == whole[31]
    assert traces.trace_at(31, split="rl", seed=10) != whole[31]
    assert {trace.task.split for trace in whole} == {"rl"}


def test_stream_draws_families_by_weight_and_depths_of_the_split() -> None:
    drawn = list(islice(traces.stream("train", seed=1), 2000))
    hops = sum(trace.task.family == "hop-recover" for trace in drawn)
    share = traces.WEIGHTS["hop-recover"] / sum(traces.WEIGHTS.values())
    assert abs(hops - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    for family in tasks.families():
        depths = {trace.task.depth for trace in drawn if trace.task.family == family}
        assert depths == set(tasks.depths(family, split="train"))
    only = islice(traces.stream("train", seed=1, families=["calc-tool"], weights={"calc-tool": 1}), 50)
    assert {trace.task.family for trace in only} == {"calc-tool"}


def test_bad_arguments_are_named() -> None:
    task = tasks.sample("calc-tool", depth=1, seed=0)
    with pytest.raises(TraceError, match="unknown style 'sloppy'; known: expert, weak"):
        traces.expert(task, random.Random(0), style="sloppy")
    with pytest.raises(TraceError, match="need a positive weight each"):
        traces.trace_at(0, split="train", seed=0, weights={"calc-tool": 1.0})
    with pytest.raises(TraceError, match="rm -rf"):
        traces.simulate(task, "rm -rf /")
    with pytest.raises(TraceError, match=r"integers with \+ - \* only"):
        traces.simulate(task, "python3 -c 'print(2**9)'")


def commands(trace: traces.Trace) -> list[tuple[str, str]]:
    """(command, result) pairs of a trace."""
    pairs = []
    for index, message in enumerate(trace.messages):
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] == "bash":
                command = json.loads(call["function"]["arguments"])["command"]
                pairs.append((command, trace.messages[index + 1]["content"]))
    return pairs


def test_simulator_agrees_with_the_real_programs(tmp_path: Path) -> None:
    for index, (family, depth) in enumerate(CASES):
        task = tasks.sample(family, depth=depth, seed=21, split="test")
        root = tmp_path / str(index)
        subprocess.run(["sh", "-c", tasks.setup_script(task, str(root))], check=True)
        for command, expected in commands(traces.expert(task, random.Random(0))):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"},
            )
            note = f"\n[exit {done.returncode}]" if done.returncode else ""
            assert done.stdout.rstrip("\n") + note == expected


@pytest.mark.slow
async def test_simulator_agrees_with_a_real_container() -> None:
    sandbox = pytest.importorskip("rorqual.sandbox")
    agent = pytest.importorskip("rorqual.agent.tools")
    if not hasattr(sandbox, "AsyncSandbox"):
        pytest.skip("rorqual.sandbox has no AsyncSandbox yet")
    try:
        created = await sandbox.AsyncSandbox.create(substrate="container", timeout=300)
    except sandbox.HostUnfit as error:
        pytest.skip(str(error))
    async with created as box:
        for index, (family, depth) in enumerate(CASES):
            task = tasks.sample(family, depth=depth, seed=22, split="test")
            root = f"/tmp/task{index}"
            await tasks.setup(task, box, root)
            for command, expected in commands(traces.expert(task, random.Random(0))):
                done = await box.commands.run(agent.shell_command(command), cwd=root)
                assert agent.format_result(done.stdout, exit_code=done.exit_code) == expected
