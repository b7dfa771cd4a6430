"""Rollout: the model acts in real sandboxes; every episode keeps the ids it was sampled as.

Token in, token out: the prompt is rendered once, each turn appends the sampled ids and the bridge to the next
cue, nothing is re-tokenized (spec/rl.md 4). Rows that wait for a command leave the decode batch; commands of all
episodes run side by side. Grading is on the host. An infrastructure failure is a status, never a reward.
Owns episodes and their schedule. The engine's batch decodes; sandboxes run commands; tasks grade.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rorqual import chat
from rorqual.agent.environment import SandboxEnvironment
from rorqual.agent.errors import AgentError
from rorqual.agent.tools import TASK_TOOLS, ToolContext, check_arguments
from rorqual.chat import Tokenizer
from rorqual.engine import Batch, Engine, SamplingParams
from rorqual.rl import tasks
from rorqual.rl.errors import RlError, RolloutError
from rorqual.rl.tasks import Task
from rorqual.rl.traces import TOOLS, prompt_messages
from rorqual.sandbox import AsyncSandbox
from rorqual.sandbox.errors import SandboxError

__all__ = ["Episode", "Request", "RolloutConfig", "SandboxPool", "Status", "rollout"]

Status = Literal["submitted", "no_call", "malformed", "turn_limit", "token_limit", "infra_error"]
HOME = "/home/user"


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Limits of one episode."""

    max_turns: int = 16
    max_turn_tokens: int = 128
    max_tokens: int = 768
    """Prompt, answers and results together."""
    command_timeout: float = 10.0
    """Seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One episode to run."""

    task: Task
    seed: int
    sequence: int
    """Names the episode within the seed: its randomness depends on nothing else."""
    temperature: float = 1.0
    group: int = 0


@dataclass(slots=True)
class Episode:
    """What happened. `ids`, `mask` and `logprobs` have one length: mask is True on sampled tokens."""

    request: Request
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    status: Status = "infra_error"
    answer: str | None = None
    reward: float = 0.0
    turns: int = 0
    tool_seconds: float = 0.0
    error: str = ""

    def push(self, ids: Sequence[int], *, sampled: bool, logprobs: Sequence[float] | None = None) -> None:
        """Appends tokens."""
        self.ids.extend(ids)
        self.mask.extend([sampled] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))


class SandboxPool:
    """Containers that outlive episodes; an episode has one for itself, in a directory of its own."""

    def __init__(self, sandboxes: list[AsyncSandbox]) -> None:
        self.sandboxes = sandboxes
        self._free = list(sandboxes)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, count: int, *, lifetime: float = 4 * 3600.0) -> AsyncIterator[SandboxPool]:
        """`count` containers, killed on exit. Raises RolloutError when they do not start."""
        started: list[AsyncSandbox] = []
        try:
            for first in range(0, count, 16):
                wave = min(16, count - first)
                made = await asyncio.gather(
                    *(
                        AsyncSandbox.create(timeout=lifetime, memory_mb=128, pids=64, disk_mb=16)
                        for _ in range(wave)
                    ),
                    return_exceptions=True,
                )
                started += [sandbox for sandbox in made if isinstance(sandbox, AsyncSandbox)]
                failed = next((error for error in made if isinstance(error, BaseException)), None)
                if isinstance(failed, SandboxError):
                    raise RolloutError(f"{len(started)} of {count} sandboxes started: {failed}") from failed
                if failed is not None:
                    raise failed
            yield cls(started)
        finally:
            await asyncio.gather(*(sandbox.kill() for sandbox in started), return_exceptions=True)

    def take(self) -> AsyncSandbox:
        """A free sandbox."""
        if not self._free:
            raise RolloutError(f"all {len(self.sandboxes)} sandboxes of the pool are in use")
        return self._free.pop()

    def give_back(self, sandbox: AsyncSandbox) -> None:
        """Returns what `take` gave."""
        self._free.append(sandbox)


async def rollout(
    engine: Engine,
    tokenizer: Tokenizer,
    pool: SandboxPool,
    requests: Sequence[Request],
    config: RolloutConfig | None = None,
) -> list[Episode]:
    """Runs the episodes of `requests`, as many at once as the pool has sandboxes; results in their order."""
    config = config or RolloutConfig()
    episodes = [Episode(request) for request in requests]
    size = len(pool.sandboxes)
    for first in range(0, len(episodes), size):
        await _Wave(engine, tokenizer, pool, config).run(episodes[first : first + size])
    return episodes


class _Wave:
    """Episodes that run together in one batch."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, pool: SandboxPool, config: RolloutConfig
    ) -> None:
        self.tokenizer, self.pool, self.config = tokenizer, pool, config
        self.batch = Batch(engine)
        self.episodes: dict[int, Episode] = {}
        self.contexts: dict[int, ToolContext] = {}
        self.turn: dict[int, tuple[list[int], list[float]]] = {}
        self.running: set[asyncio.Task[None]] = set()

    async def run(self, episodes: Sequence[Episode]) -> None:
        taken = [self.pool.take() for _ in episodes]
        try:
            await asyncio.gather(
                *(self._begin(k, e, s) for k, (e, s) in enumerate(zip(episodes, taken, strict=True)))
            )
            if self.episodes:
                prompts = {key: episode.ids for key, episode in self.episodes.items()}
                self.batch.add(
                    prompts, {key: self._params(episode) for key, episode in self.episodes.items()}
                )
            await self._loop()
        finally:
            for job in self.running:
                job.cancel()
            await asyncio.gather(*self.running, return_exceptions=True)
            for sandbox in taken:
                self.pool.give_back(sandbox)

    async def _begin(self, key: int, episode: Episode, sandbox: AsyncSandbox) -> None:
        workdir = f"{HOME}/w"
        try:
            await sandbox.commands.run(f"rm -rf -- {workdir}", timeout=10)
            await tasks.setup(episode.request.task, sandbox, workdir)
        except (SandboxError, RlError) as error:
            episode.error = str(error)
            return
        segments = chat.render_segments(prompt_messages(episode.request.task), tools=TOOLS)
        episode.push(self.tokenizer.encode_segments(segments), sampled=False)
        self.episodes[key] = episode
        self.turn[key] = ([], [])
        self.contexts[key] = ToolContext(
            environment=SandboxEnvironment(sandbox),
            workdir=workdir,
            command_timeout=self.config.command_timeout,
        )

    def _params(self, episode: Episode) -> SamplingParams:
        request = episode.request
        room = self.config.max_tokens - len(episode.ids)
        return SamplingParams(
            temperature=request.temperature,
            seed=request.seed,
            sequence=request.sequence,
            max_tokens=max(1, min(self.config.max_turn_tokens, room)),
            stop_ids=(self.tokenizer.eos_id,),
        )

    async def _loop(self) -> None:
        while self.batch.busy or self.running:
            if not self.batch.busy:
                await asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED)
                self._reap()
                continue
            for event in self.batch.step():
                ids, logprobs = self.turn[event.key]
                ids.append(event.token_id)
                logprobs.append(event.logprob)
                if event.finish_reason is not None:
                    self.running.add(asyncio.create_task(self._act(event.key, event.finish_reason)))
            await asyncio.sleep(0)
            self._reap()

    def _reap(self) -> None:
        for job in [job for job in self.running if job.done()]:
            self.running.remove(job)
            job.result()

    def _end(self, key: int, status: Status) -> None:
        episode = self.episodes[key]
        episode.status = status
        episode.reward = tasks.grade(episode.request.task, episode.answer) if status == "submitted" else 0.0
        self.batch.remove(key)

    async def _act(self, key: int, finish: str) -> None:
        """A turn has ended: run its call and feed the result, or end the episode."""
        episode = self.episodes[key]
        ids, logprobs = self.turn[key]
        self.turn[key] = ([], [])
        episode.push(ids, sampled=True, logprobs=logprobs)
        episode.turns += 1
        if finish == "length":
            return self._end(key, "token_limit")
        message = chat.parse_pieces(self.tokenizer.pieces(ids), tools=TOOLS, finish_reason="stop")
        if not message.tool_calls:
            return self._end(key, "malformed" if message.diagnostics else "no_call")
        results: list[dict[str, Any]] = []
        started = time.monotonic()
        for call in message.tool_calls:
            tool = next((tool for tool in TASK_TOOLS if tool.name == call.name), None)
            arguments = json.loads(call.arguments)
            if tool is None or check_arguments(tool, arguments) is not None:
                return self._end(key, "malformed")
            try:
                output = await tool.call(self.contexts[key], arguments)
            except (AgentError, SandboxError) as error:
                episode.error = str(error)
                return self._end(key, "infra_error")
            if output.answer is not None:
                episode.answer = output.answer
                return self._end(key, "submitted")
            results.append({"role": "tool", "tool_call_id": call.id, "content": output.text})
        episode.tool_seconds += time.monotonic() - started
        if episode.turns >= self.config.max_turns:
            return self._end(key, "turn_limit")
        calls = [call.to_openai() for call in message.tool_calls]
        bridge = self.tokenizer.encode_segments(chat.render_bridge(results, previous_calls=calls))
        if len(episode.ids) + len(bridge) + 1 >= self.config.max_tokens:
            return self._end(key, "token_limit")
        episode.push(bridge, sampled=False)
        self.batch.feed(key, bridge, self._params(episode))
