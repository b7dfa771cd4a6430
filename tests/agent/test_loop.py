"""The loop: outcomes, budgets, recoveries, and the order of events. The model is a real server with a
script."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rorqual.agent import (
    DEFAULT_TOOLS,
    Agent,
    AgentResult,
    AsyncAgent,
    Budget,
    Event,
    RemoteConfig,
    RemoteModel,
    SetupError,
    Tool,
    ToolOutput,
    project,
    read_log,
)

from .local import LocalEnvironment
from .scripted import Fail, Say, Step, serving, wait_until


def bash(command: str) -> tuple[str, dict[str, str]]:
    return "bash", {"command": command}


SUBMIT = ("submit", {"answer": "42"})


def work(
    tmp_path: Path, *steps: Step, strict: bool = True, loop: bool = False, **options: Any
) -> tuple[AgentResult, list[dict[str, Any]], LocalEnvironment]:
    """Run an agent against the script: result, the messages of each request, the environment."""
    environment = options.pop("environment", None) or LocalEnvironment(tmp_path)
    options.setdefault("workdir", "/work")
    with serving(*steps, strict=strict, loop=loop) as server:
        model = RemoteModel(RemoteConfig(url=server.url, model="m", first_wait=0.01, attempts=3))
        agent = Agent(model=model, sandbox=environment, runs_dir=tmp_path / "runs", **options)
        result = agent.run("Find the answer.")
    return result, [request["messages"] for request in server.requests], environment


def has_text(path: Path) -> bool:
    return path.exists() and path.read_text() != ""


def alive(pid_file: Path) -> bool:
    return Path(f"/proc/{pid_file.read_text().strip()}").exists()


def kinds(events: Sequence[Event]) -> list[str]:
    return [event.kind for event in events if event.kind not in ("budget", "model.request")]


def test_a_task_is_worked_on_and_submitted(tmp_path: Path) -> None:
    result, asked, _ = work(
        tmp_path,
        Say(reasoning="write first", calls=[("write_file", {"path": "a.txt", "content": "6*7\n"})]),
        Say(reasoning="compute", calls=[bash("echo $(($(cat a.txt))); echo oops >&2; exit 3")]),
        Say(reasoning="read", calls=[("read_file", {"path": "/work/a.txt"})]),
        Say(reasoning="done", calls=[SUBMIT]),
    )
    assert (result.outcome, result.answer, result.steps, result.error) == ("submitted", "42", 4, None)
    assert result.done and result.recovered == 0
    results = [message["content"] for message in asked[-1] if message["role"] == "tool"]
    assert results == ["Wrote 4 bytes to /work/a.txt", "42\noops\n[exit 3]", "6*7"]
    assert result.usage.completion_tokens == 40 and result.usage.cached_tokens == 256
    assert kinds(result.events)[:6] == [
        "run.start",
        "goal",
        "model.response",
        "tool.intent",
        "tool.result",
        "model.response",
    ]
    assert result.log_path is not None and read_log(result.log_path).events == result.events


def test_requests_only_ever_grow(tmp_path: Path) -> None:
    calls = [Say(reasoning=f"r{n}", calls=[bash(f"echo {n}")]) for n in range(4)]
    _, asked, _ = work(tmp_path, *calls, Say(content="well"), Say(reasoning="x", calls=[SUBMIT]))
    for before, after in itertools.pairwise(asked):
        assert after[: len(before)] == before
    assert all("reasoning_content" in m for messages in asked for m in messages if m["role"] == "assistant")


def test_the_log_is_on_disk_before_the_effect(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    async def spy(context: Any, arguments: Mapping[str, Any]) -> ToolOutput:
        [path] = (tmp_path / "runs").iterdir()
        seen.append(kinds(read_log(path).events))
        return ToolOutput(text="ok")

    tool = Tool(name="spy", description="Look.", parameters={"type": "object", "properties": {}}, call=spy)
    work(tmp_path, Say(calls=[("spy", {})]), Say(calls=[SUBMIT]), tools=[tool, *DEFAULT_TOOLS], strict=False)
    assert seen == [["run.start", "goal", "model.response", "tool.intent"]]


def test_prose_is_nudged_once_then_taken_as_the_answer(tmp_path: Path) -> None:
    result, asked, _ = work(tmp_path, Say(content="It is 42."), Say(content="42, as I said."))
    assert (result.outcome, result.answer, result.steps) == ("answered", "42, as I said.", 2)
    assert "submit tool" in asked[1][-1]["content"] and asked[1][-1]["role"] == "user"


def test_prose_then_a_call_is_no_answer(tmp_path: Path) -> None:
    result, _, _ = work(
        tmp_path,
        Say(content="I will look."),
        Say(calls=[bash("echo 42")]),
        Say(content="So it is 42."),
        Say(calls=[SUBMIT]),
        strict=False,
    )
    assert (result.outcome, result.answer, result.steps) == ("submitted", "42", 4)


def test_empty_messages_are_an_error_not_an_answer(tmp_path: Path) -> None:
    result, _, _ = work(tmp_path, Say(), Say())
    assert (result.outcome, result.error) == (
        "model_error",
        "the model returned an empty message twice in a row",
    )


def test_without_a_submit_tool_prose_is_the_answer(tmp_path: Path) -> None:
    result, asked, _ = work(tmp_path, Say(content=" It is 42. "), tools=[DEFAULT_TOOLS[0]])
    assert (result.outcome, result.answer, len(asked)) == ("answered", "It is 42.", 1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("bash", '{"command": "ls'), "Error: the arguments of bash are not valid JSON"),
        (("bash", "[1]"), "Error: the arguments of bash must be an object with named parameters"),
        (("bash", {}), "Error: bash: the parameter 'command' is missing"),
        (("bash", {"command": 5}), "Error: bash: the parameter 'command' must be of type string"),
        (("bash", {"command": "x", "cwd": "/"}), "Error: bash: no parameter 'cwd'; it has command"),
        (("shell", {}), "Error: there is no tool 'shell'; the tools are bash, read_file, submit, write_file"),
        (("read_file", {"path": "no"}), "Error: /work/no: No such file or directory"),
        (("read_file", {"path": "/work/"}), "Error: /work: "),
    ],
)
def test_bad_calls_are_told_to_the_model(tmp_path: Path, call: tuple[str, Any], said: str) -> None:
    result, asked, environment = work(tmp_path, Say(calls=[call]), Say(calls=[SUBMIT]), strict=False)
    assert result.outcome == "submitted" and environment.ran == []
    assert asked[1][-1]["content"].startswith(said)


def test_a_repeating_model_is_warned_blocked_and_stopped(tmp_path: Path) -> None:
    result, _, environment = work(tmp_path, Say(reasoning="hm", calls=[bash("echo same")]), loop=True)
    assert result.outcome == "loop" and result.error == "bash was called 6 times with the same result"
    assert len(environment.ran) == 3 and result.steps == 6
    results = [m["content"] for m in project(result.events) if m["role"] == "tool"]
    assert results[:2] == ["same", "same"] and results[2].startswith("same\n[warning: ")
    assert results[3].startswith("[blocked: ") and results[5].startswith("[blocked: ")
    assert [e.data["action"] for e in result.events if e.kind == "guard.verdict"] == [
        "warn",
        "block",
        "block",
        "stop",
    ]


def test_step_and_token_budgets_end_a_run(tmp_path: Path) -> None:
    def step(body: dict[str, Any]) -> Say:
        return Say(calls=[bash(f"echo {len(body['messages'])}")])

    for budget, outcome, steps in (
        (Budget(max_steps=3), "step_limit", 3),
        (Budget(max_completion_tokens=20), "token_limit", 2),
        (Budget(max_total_tokens=300), "token_limit", 3),
    ):
        result, _, _ = work(tmp_path, step, loop=True, budget=budget, strict=False)
        assert (result.outcome, result.steps) == (outcome, steps) and result.error
    with pytest.raises(SetupError, match="max_steps is 0: expected 1 or more"):
        Budget(max_steps=0)


def test_answers_that_are_cut_twice_end_the_run(tmp_path: Path) -> None:
    result, asked, _ = work(tmp_path, Say(content="bla bla", finish="length"), loop=True)
    assert (result.outcome, len(asked)) == ("token_limit", 2)
    assert "cut off by the token limit" in asked[1][-1]["content"]


def test_a_failing_model_is_an_outcome_with_its_line(tmp_path: Path) -> None:
    result, _, _ = work(tmp_path, Say(calls=[bash("true")]), Fail(401), strict=False)
    assert result.outcome == "model_error" and result.error and "answered 401" in result.error
    assert kinds(result.events)[-2:] == ["error", "run.end"]


def test_retries_are_in_the_log(tmp_path: Path) -> None:
    result, _, _ = work(tmp_path, Fail(429), Say(calls=[SUBMIT]))
    assert result.outcome == "submitted" and result.recovered == 1
    [error] = [event for event in result.events if event.kind == "error"]
    assert error.data["recovered"] and "answered 429" in error.data["error"]


def test_a_dead_sandbox_ends_the_run(tmp_path: Path) -> None:
    environment = LocalEnvironment(tmp_path)
    environment.gone = True
    result, _, _ = work(tmp_path, Say(calls=[bash("true")]), strict=False, environment=environment)
    assert result.outcome == "sandbox_error" and result.error == "the sandbox failed: it was killed"


def test_a_command_that_never_ends_is_stopped_and_said(tmp_path: Path) -> None:
    result, asked, _ = work(
        tmp_path, Say(calls=[bash("sleep 100")]), Say(calls=[SUBMIT]), strict=False, command_timeout=0.2
    )
    assert result.outcome == "submitted" and asked[1][-1]["content"] == "[timed out after 0.2s]"


def test_calls_after_a_submit_are_not_run_but_answered(tmp_path: Path) -> None:
    result, _, environment = work(tmp_path, Say(calls=[SUBMIT, bash("echo late")]), strict=False)
    assert result.outcome == "submitted" and environment.ran == []
    results = [m["content"] for m in project(result.events) if m["role"] == "tool"]
    assert results == ["Submitted.", "[not run: the run has ended]"]


def test_an_empty_task_and_twice_the_same_tool_are_refused(tmp_path: Path) -> None:
    model = RemoteModel(RemoteConfig(url="http://localhost:1", model="m"))
    with pytest.raises(SetupError, match="the task is empty"):
        Agent(model=model, sandbox=LocalEnvironment(tmp_path)).run("  ")
    with pytest.raises(SetupError, match="two tools have the same name"):
        Agent(model=model, sandbox=LocalEnvironment(tmp_path), tools=[DEFAULT_TOOLS[0]] * 2)
    with pytest.raises(SetupError, match="sandbox is a dict: expected"):
        Agent(model=model, sandbox={})


async def test_the_sync_agent_refuses_a_running_loop(tmp_path: Path) -> None:
    model = RemoteModel(RemoteConfig(url="http://localhost:1", model="m"))
    with pytest.raises(SetupError, match="use AsyncAgent"):
        Agent(model=model, sandbox=LocalEnvironment(tmp_path)).run("x")


async def test_cancelling_writes_the_end_and_ends_the_command(tmp_path: Path) -> None:
    environment = LocalEnvironment(tmp_path)
    with serving(Say(calls=[bash("echo $$ > pid; sleep 100")])) as server:
        async with RemoteModel(RemoteConfig(url=server.url, model="m")) as model:
            agent = AsyncAgent(model=model, sandbox=environment, runs_dir=tmp_path / "runs")
            task = asyncio.create_task(agent.run("x", run_id="r"))
            await asyncio.to_thread(wait_until, lambda: has_text(tmp_path / "pid"))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert environment.abandoned and not alive(tmp_path / "pid")
    assert read_log(tmp_path / "runs" / "r.jsonl").events[-1].data["outcome"] == "interrupted"


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from agent.local import LocalEnvironment
from rorqual.agent import Agent, RemoteConfig, RemoteModel
root = Path(sys.argv[1])
model = RemoteModel(RemoteConfig(url=sys.argv[2], model="m"))
agent = Agent(model=model, sandbox=LocalEnvironment(root), runs_dir=root)
agent.run("x", run_id="r")
"""


def interrupt(tmp_path: Path, number: int, *steps: Step) -> tuple[int, list[Event]]:
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    with serving(*steps) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), server.url], stderr=subprocess.PIPE
        )
        wait_until(lambda: has_text(tmp_path / "pid"), limit=30)
        process.send_signal(number)
        process.communicate(timeout=20)
    return process.returncode, list(read_log(tmp_path / "r.jsonl").events)


def test_ctrl_c_in_a_command_is_clean(tmp_path: Path) -> None:
    code, events = interrupt(tmp_path, signal.SIGINT, Say(calls=[bash("echo $$ > pid; sleep 100")]))
    assert code in (-signal.SIGINT, 130) and events[-1].data["outcome"] == "interrupted"
    assert not alive(tmp_path / "pid")


def test_kill_9_in_a_command_leaves_the_intent_without_a_result(tmp_path: Path) -> None:
    _, events = interrupt(tmp_path, signal.SIGKILL, Say(calls=[bash("echo $$ > pid; sleep 3")]))
    assert [event.kind for event in events][-1] == "tool.intent"
    assert events[-1].data["arguments"] == {"command": "echo $$ > pid; sleep 3"}


def test_the_same_model_serves_several_sync_runs(tmp_path: Path) -> None:
    with serving(Say(calls=[SUBMIT]), loop=True) as server:
        model = RemoteModel(RemoteConfig(url=server.url, model="m"))
        agent = Agent(model=model, sandbox=LocalEnvironment(tmp_path))
        assert [agent.run("x").answer for _ in range(3)] == ["42"] * 3


def test_deltas_and_events_reach_the_callback(tmp_path: Path) -> None:
    seen: list[Event] = []
    result, _, _ = work(tmp_path, Say(reasoning="abc def", calls=[SUBMIT]), on_event=seen.append)
    assert tuple(event for event in seen if event.seq >= 0) == result.events
    shown = "".join(
        e.data["text"] for e in seen if e.kind == "model.delta" and e.data["channel"] == "reasoning"
    )
    assert shown == "abc def"


def test_intents_hold_arguments_as_json(tmp_path: Path) -> None:
    result, _, _ = work(tmp_path, Say(calls=[bash("echo 'ü'")]), Say(calls=[SUBMIT]), strict=False)
    [intent, _] = [event for event in result.events if event.kind == "tool.intent"]
    assert intent.data["arguments"] == {"command": "echo 'ü'"}
    assert json.loads(json.dumps(dict(intent.data))) == intent.data
