"""The loop: ask the model, run its calls, until an answer, a limit or an error.

Owns the order of events. Every intent is durable before its effect and every result before it is used
(events.py); the conversation is projected from the log at each step, so what the log holds is what the model
sees. Model, tools, guard and environment are parts it calls; it knows none of their insides.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rorqual.agent.environment import Environment, as_environment
from rorqual.agent.errors import ContextFull, EnvironmentGone, EventLogError, ModelError, SetupError
from rorqual.agent.events import Event, EventLog, Outcome, project
from rorqual.agent.guards import GuardConfig, LoopGuard, result_digest
from rorqual.agent.models.base import ChatModel, Completion, Delta, Usage
from rorqual.agent.prompts import REMOTE_SYSTEM_PROMPT, SYSTEM_PROMPT
from rorqual.agent.tools import (
    DEFAULT_TOOLS,
    TASK_TOOLS,
    Tool,
    ToolContext,
    ToolOutput,
    canonical_call,
    check_arguments,
)

__all__ = ["Agent", "AgentResult", "AsyncAgent", "Budget", "new_run_id"]

NUDGE = "Call the submit tool with the final answer, or go on with the task with another tool."
"""Sent once after a plain reply; a second plain reply is taken as the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Limits of one run. A limit that is reached ends the run with `step_limit` or `token_limit`."""

    max_steps: int = 60
    """Answers of the model."""
    max_completion_tokens: int | None = None
    """Tokens the model may write in all; None: no limit."""
    max_total_tokens: int | None = None
    """Prompt and written tokens over all requests, what a provider bills; None: no limit."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_completion_tokens", "max_total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SetupError(f"{name} is {value}: expected 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentResult:
    """What came of a run."""

    answer: str | None
    outcome: Outcome
    events: tuple[Event, ...]
    usage: Usage
    steps: int
    run_id: str
    log_path: Path | None
    error: str | None = None
    """One line, for `model_error` and `sandbox_error`."""
    recovered: int = 0
    """Steps that were repaired: malformed calls, cut answers, retried requests."""

    @property
    def done(self) -> bool:
        """The model gave an answer (which may still be wrong)."""
        return self.outcome in ("submitted", "answered")


def new_run_id() -> str:
    """Sorts by time, names the log file: `20261124-061500-3fa2c1`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


class _End(Exception):
    """The run is over; never leaves this module."""

    def __init__(self, outcome: Outcome, *, answer: str | None = None, error: str | None = None) -> None:
        super().__init__(outcome)
        self.outcome, self.answer, self.error = outcome, answer, error


@dataclass(kw_only=True)
class _Run:
    """State of one run that is not in the log, or counted from it."""

    log: EventLog
    guard: LoopGuard
    usage: Usage = field(default_factory=Usage)
    steps: int = 0
    recovered: int = 0
    plain: str | None = None
    """The plain reply that was nudged, until a call follows."""
    cut: int = 0
    """Answers in a row that ran into the token limit without a call."""
    in_call: bool = False


class _Core:
    """What both faces of the agent share: the parts, and the work."""

    def __init__(
        self,
        *,
        model: ChatModel,
        sandbox: Any,
        tools: Sequence[Tool] | None = None,
        system_prompt: str | None = None,
        budget: Budget | None = None,
        guard: GuardConfig | None = None,
        workdir: str | None = None,
        command_timeout: float = 60.0,
        runs_dir: Path | str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """`tools` and `system_prompt` default by the model's profile; `workdir` None is the sandbox's own;
        `runs_dir` None keeps the log in memory only."""
        embedded = model.profile == "embedded"
        self.model = model
        self.environment: Environment = as_environment(sandbox)
        self.tools = tuple(tools if tools is not None else TASK_TOOLS if embedded else DEFAULT_TOOLS)
        self.system_prompt = (
            system_prompt
            if system_prompt is not None
            else SYSTEM_PROMPT
            if embedded
            else REMOTE_SYSTEM_PROMPT
        )
        self.budget = budget or Budget()
        self.guard_config = guard or GuardConfig()
        self.workdir = workdir
        self.command_timeout = command_timeout
        self.runs_dir = Path(runs_dir) if runs_dir is not None else None
        self._on_event = on_event
        self._by_name = {tool.name: tool for tool in self.tools}
        if len(self._by_name) != len(self.tools):
            raise SetupError("tools: two tools have the same name")
        self._submit = next((tool.name for tool in self.tools if tool.ends_run), None)

    async def _work(self, task: str, run_id: str | None) -> AgentResult:
        if not task.strip():
            raise SetupError("the task is empty: say what should be done")
        run_id = run_id or new_run_id()
        path = self.runs_dir / f"{run_id}.jsonl" if self.runs_dir is not None else None
        with EventLog(path, on_event=self._on_event) as log:
            if log.events:
                raise SetupError(f"{path}: a run of this id exists already: choose another run_id")
            state = _Run(log=log, guard=LoopGuard(self.guard_config))
            self._start(state, task, run_id)
            end = await self._until_end(state)
            self._finish(state, end)
            return AgentResult(
                answer=end.answer,
                outcome=end.outcome,
                events=log.events,
                usage=state.usage,
                steps=state.steps,
                run_id=run_id,
                log_path=path,
                error=end.error,
                recovered=state.recovered,
            )

    def _start(self, state: _Run, task: str, run_id: str) -> None:
        state.log.append(
            "run.start",
            run=run_id,
            model=self.model.name,
            profile=self.model.profile,
            system=self.system_prompt,
            tools=[tool.schema() for tool in self.tools],
            budget=asdict(self.budget),
            workdir=self.workdir,
            command_timeout=self.command_timeout,
            sandbox=self.environment.info(),
        )
        state.log.append("goal", text=task)

    def _finish(self, state: _Run, end: _End) -> None:
        state.log.append(
            "run.end",
            outcome=end.outcome,
            answer=end.answer,
            error=end.error,
            steps=state.steps,
            usage=asdict(state.usage),
            recovered=state.recovered,
        )

    async def _until_end(self, state: _Run) -> _End:
        try:
            while True:
                await self._step(state)
        except _End as end:
            return end
        except ContextFull as error:
            state.log.append("error", where="model", error=str(error), recovered=False)
            return _End("token_limit", error=str(error))
        except ModelError as error:
            state.log.append("error", where="model", error=str(error), recovered=False)
            return _End("model_error", error=str(error))
        except EnvironmentGone as error:
            state.log.append("error", where="sandbox", error=str(error), recovered=False)
            return _End("sandbox_error", error=str(error))
        except (asyncio.CancelledError, KeyboardInterrupt):
            self._finish(state, _End("interrupted"))
            if state.in_call:
                await asyncio.shield(self._abandon())
            raise
        except EventLogError:
            raise
        except Exception as error:  # a bug, ours or a tool's: the log says so, then it is raised as it is
            state.log.append(
                "error", where="agent", error=f"{type(error).__name__}: {error}", recovered=False
            )
            raise

    async def _abandon(self) -> None:
        try:
            async with asyncio.timeout(10.0):
                await self.environment.abandon()
        except (EnvironmentGone, OSError, TimeoutError):
            pass  # it is gone already, which is what was wanted; its owner's `kill` reports the rest

    async def _step(self, state: _Run) -> None:
        self._check_budget(state)
        completion = await self._ask(state)
        message = completion.message
        calls: Sequence[Mapping[str, Any]] = message.get("tool_calls") or ()
        if completion.malformed:
            state.recovered += 1
        if calls:
            state.plain, state.cut = None, 0
            await self._run_calls(state, calls, completion.malformed)
        elif completion.malformed:
            detail = "; ".join(completion.malformed)
            text = f"Error: the tool call could not be read ({detail}). Write the call again."
            state.log.append("error", where="call", error=detail, recovered=True, text=text)
            self._count_cut(state, completion)
        elif completion.finish_reason == "length":
            self._count_cut(state, completion)
            state.recovered += 1
            text = "Error: the answer was cut off by the token limit. Be brief, and call a tool."
            state.log.append("error", where="model", error="answer cut off", recovered=True, text=text)
        else:
            self._plain_reply(state, str(message.get("content") or ""))

    def _count_cut(self, state: _Run, completion: Completion) -> None:
        if completion.finish_reason == "length":
            state.cut += 1
            if state.cut >= 2:
                raise _End("token_limit", error="two answers in a row ran into the token limit of one answer")

    def _check_budget(self, state: _Run) -> None:
        budget, usage = self.budget, state.usage
        state.log.append("budget", step=state.steps, usage=asdict(usage))
        if state.steps >= budget.max_steps:
            raise _End("step_limit", error=f"{state.steps} steps were taken (max_steps)")
        written = usage.completion_tokens
        if budget.max_completion_tokens is not None and written >= budget.max_completion_tokens:
            raise _End("token_limit", error=f"{written} tokens were written (max_completion_tokens)")
        total = usage.prompt_tokens + written
        if budget.max_total_tokens is not None and total >= budget.max_total_tokens:
            raise _End("token_limit", error=f"{total} tokens were used (max_total_tokens)")

    async def _ask(self, state: _Run) -> Completion:
        messages = project(state.log.events)
        state.log.append("model.request", step=state.steps, messages=len(messages))

        def on_delta(delta: Delta) -> None:
            state.log.show("model.delta", channel=delta.channel, text=delta.text, index=delta.index)

        completion = await self.model.complete(
            messages, [tool.schema() for tool in self.tools], on_delta=on_delta
        )
        message = completion.message
        ids: dict[str, Any] = {}
        if completion.prompt_ids is not None and completion.completion_ids is not None:
            ids = {
                "prompt_ids": list(completion.prompt_ids),
                "completion_ids": list(completion.completion_ids),
            }
        state.log.append(
            "model.response",
            step=state.steps,
            reasoning=message.get("reasoning_content", ""),
            content=message.get("content") or "",
            tool_calls=list(message.get("tool_calls") or ()),
            malformed=list(completion.malformed),
            usage=asdict(completion.usage),
            finish_reason=completion.finish_reason,
            metrics=dict(completion.metrics),
            **ids,
        )
        for note in completion.notes:
            state.recovered += 1
            state.log.append("error", where="model", error=note, recovered=True)
        state.steps += 1
        state.usage += completion.usage
        return completion

    def _plain_reply(self, state: _Run, content: str) -> None:
        if self._submit is None and content.strip():
            raise _End("answered", answer=content.strip())
        if state.plain is None:
            state.plain = content
            text = NUDGE if self._submit is not None else "Your reply was empty. Go on with the task."
            state.log.append("guard.verdict", guard="plain_reply", action="nudge", text=text)
            return
        answer = content.strip() or state.plain.strip()
        if not answer:
            raise _End("model_error", error="the model returned an empty message twice in a row")
        raise _End("answered", answer=answer)

    async def _run_calls(
        self, state: _Run, calls: Sequence[Mapping[str, Any]], malformed: Sequence[str]
    ) -> None:
        end: _End | None = None
        for position, call in enumerate(calls):
            note = ""
            if malformed and position == len(calls) - 1:
                lost = "; ".join(malformed)
                note = f"\n[{len(malformed)} more call(s) could not be read and were not run: {lost}]"
            if end is not None:  # every call gets its result, or the history is no valid conversation
                self._result(
                    state, call, "", ToolOutput(text="[not run: the run has ended]", failed=True), note=""
                )
                continue
            try:
                await self._run_call(state, call, note)
            except _End as reached:
                end = reached
        if end is not None:
            raise end

    async def _run_call(self, state: _Run, call: Mapping[str, Any], note: str) -> None:
        name, raw = call["function"]["name"], call["function"]["arguments"]
        tool, arguments, wrong = self._read_call(name, raw)
        key = canonical_call(name, arguments) if arguments is not None else f"{name} {raw}"
        verdict = state.guard.check(key)
        if verdict.action in ("block", "stop"):
            text = verdict.text or "[blocked: the run ends here, the same call was repeated too often]"
            state.log.append(
                "guard.verdict",
                guard="same_call",
                action=verdict.action,
                call=call["id"],
                count=verdict.count,
            )
            self._result(state, call, key, ToolOutput(text=text, failed=True), note=note, blocked=True)
            if verdict.action == "stop":
                raise _End("loop", error=f"{name} was called {verdict.count} times with the same result")
            return
        if tool is None or arguments is None:
            state.recovered += 1
            self._result(state, call, key, ToolOutput(text=f"Error: {wrong}", failed=True), note=note)
            return
        state.log.append("tool.intent", call=call["id"], name=name, arguments=arguments, key=key)
        started = time.monotonic()
        state.in_call = True
        output = await self._execute(state, tool, arguments, call["id"])
        state.in_call = False
        self._result(state, call, key, output, note=note, seconds=time.monotonic() - started)
        if tool.ends_run and not output.failed:
            raise _End("submitted", answer=output.answer)

    async def _execute(
        self, state: _Run, tool: Tool, arguments: Mapping[str, Any], call_id: str
    ) -> ToolOutput:
        context = ToolContext(
            environment=self.environment,
            workdir=self.workdir,
            command_timeout=self.command_timeout,
            on_output=lambda text: state.log.show("tool.output", call=call_id, text=text),
        )
        try:
            return await tool.call(context, arguments)
        except OSError as error:  # a tool of the user's that did not translate it
            return ToolOutput(text=f"Error: {tool.name}: {error}", failed=True)

    def _read_call(self, name: str, raw: str) -> tuple[Tool | None, dict[str, Any] | None, str]:
        """The tool and its arguments, or what is wrong with them."""
        tool = self._by_name.get(name)
        if tool is None:
            return None, None, f"there is no tool {name!r}; the tools are {', '.join(sorted(self._by_name))}"
        try:
            arguments = json.loads(raw)
        except (ValueError, RecursionError) as error:
            return tool, None, f"the arguments of {name} are not valid JSON ({error}): {raw[:200]}"
        if not isinstance(arguments, dict):
            return tool, None, f"the arguments of {name} must be an object with named parameters"
        wrong = check_arguments(tool, arguments)
        return (tool, None, wrong) if wrong else (tool, arguments, "")

    def _result(
        self,
        state: _Run,
        call: Mapping[str, Any],
        key: str,
        output: ToolOutput,
        *,
        note: str,
        blocked: bool = False,
        seconds: float = 0.0,
    ) -> None:
        digest = result_digest(output.text)
        verdict = state.guard.record(key, None if blocked else digest)
        text = output.text + note
        if verdict.action == "warn":
            text += f"\n{verdict.text}"
            state.log.append(
                "guard.verdict", guard="same_call", action="warn", call=call["id"], count=verdict.count
            )
        state.log.append(
            "tool.result",
            call=call["id"],
            name=call["function"]["name"],
            key=key,
            text=text,
            output=output.text if text != output.text else None,
            failed=output.failed,
            details=dict(output.details),
            digest=digest,
            seconds=round(seconds, 6),
            blocked=blocked,
            answer=output.answer,
        )


class AsyncAgent(_Core):
    """An agent: a model with tools in an environment. One `run` at a time; it may be used for many.

    The sandbox stays the caller's: close it (or leave its `with`) after the run, whatever happened.
    """

    async def run(self, task: str, *, run_id: str | None = None) -> AgentResult:
        """Work on `task` until the end. Model and sandbox failures are outcomes; a log that cannot be written
        raises EventLogError. Cancelled: `run.end(interrupted)` is written, the call in flight is ended, then
        it raises."""
        return await self._work(task, run_id)


class Agent(_Core):
    """The same agent for code without an event loop, with a `Sandbox`."""

    def run(self, task: str, *, run_id: str | None = None) -> AgentResult:
        """Work on `task` until the end; see `AsyncAgent.run`. Ctrl-C writes `run.end(interrupted)`, ends the
        sandbox if a command is in flight, and raises KeyboardInterrupt."""
        if getattr(self.environment, "needs_loop", False):
            raise SetupError("Agent.run needs a Sandbox: with an AsyncSandbox, await AsyncAgent.run")
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._run_and_close(task, run_id))
        raise SetupError("Agent.run was called inside an event loop: use AsyncAgent, or await Agent.arun")

    async def arun(self, task: str, *, run_id: str | None = None) -> AgentResult:
        """The async way in."""
        return await self._work(task, run_id)

    async def _run_and_close(self, task: str, run_id: str | None) -> AgentResult:
        try:
            return await self._work(task, run_id)
        finally:
            await self.model.aclose()  # its connections belong to this event loop; the next run opens its own
