"""Forced calls: `tool_choice: required`, or a tool by name, without a mask in the engine.

The model thinks freely; when its reasoning ends, the beginning of a call is put behind it and the model goes on from
there. In the scheduler that is two jobs: the second one's prompt is the first one's prompt and answer, whose state
was just kept. Without reasoning it is one job whose prompt ends in the beginning of the call. Owns the seam; the
syntax after the beginning is the model's own.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

from rorqual import chat
from rorqual.serve.answer import ChatAnswer, EngineReason
from rorqual.serve.errors import ServeError
from rorqual.serve.scheduler import Job, Listener, Scheduler

__all__ = ["SPARE_TOKENS", "ForcedCall"]

SPARE_TOKENS = 4
"""What an answer must have room for behind the forced tokens."""

SEAM = "seam"
"""How the first of two jobs ends; never seen by the listener."""


class _Part:
    """The tokens of one job on their way into the whole answer. See `Answer`."""

    def __init__(self, whole: ChatAnswer, *, pending: Sequence[chat.Event] = ()) -> None:
        self.ids: list[int] = []
        self.finished = False
        self._whole = whole
        self._pending = list(pending)

    def push(self, token_id: int, reason: EngineReason | None) -> list[chat.Event]:
        """See `Answer`."""
        self.ids.append(token_id)
        events, self._pending = [*self._pending, *self._whole.push(token_id, reason)], []
        self.finished = self._whole.finished
        return events


class _Thoughts(_Part):
    """The reasoning: over at `</think>`, which also stands in for an end of the whole turn."""

    def __init__(self, whole: ChatAnswer, *, think_end: int) -> None:
        super().__init__(whole)
        self._think_end = think_end

    def push(self, token_id: int, reason: EngineReason | None) -> list[chat.Event]:
        """See `Answer`."""
        if reason == "stop":
            self.ids.append(token_id)
            self.finished = True
            return [*self._whole.push(self._think_end, None), chat.Event("end", SEAM)]
        return super().push(token_id, reason)


class ForcedCall:
    """Runs the jobs of one forced call. `whole` gets every token, the forced ones included."""

    def __init__(
        self, scheduler: Scheduler, job: Job, whole: ChatAnswer, *, forced: Sequence[int], think_end: int
    ) -> None:
        """job: the request as if nothing was forced. It must allow more than `SPARE_TOKENS` and the forced ones."""
        self._scheduler, self._whole = scheduler, whole
        self._forced = list(forced)
        self._listener: Listener = job.listener
        self._lock = threading.Lock()
        self._cancelled = False
        self._asked = job
        if whole.thinking:
            params = dataclasses.replace(
                job.params,
                stop_ids=(*job.params.stop_ids, think_end),
                max_tokens=job.params.max_tokens - len(self._forced) - SPARE_TOKENS,
            )
            self._job = dataclasses.replace(
                job,
                params=params,
                answer=_Thoughts(whole, think_end=think_end),
                listener=self,
                on_finish=None,
            )
        else:
            self._job = self._second(job.prompt)
        self.first = self._job

    @property
    def cached_tokens(self) -> int:
        """Of the prompt as it was asked."""
        return self.first.cached_tokens

    def submit(self) -> None:
        """Queues the first job. Raises Overloaded, ShuttingDown."""
        self._scheduler.submit(self._job)

    def cancel(self) -> None:
        """Nobody wants the answer any more. Idempotent."""
        with self._lock:
            self._cancelled = True
            self._scheduler.cancel(self._job)

    def on_events(self, events: Sequence[chat.Event]) -> None:
        """See `Listener`: of the first job; goes on with the second."""
        if not (events[-1].kind == "end" and events[-1].text == SEAM):
            self._finish_if_ended(events)
            return
        if said := events[:-1]:
            self._listener.on_events(said)
        prompt = [*self._asked.prompt, *self._whole.ids]
        with self._lock:
            if self._cancelled:
                return
            self._job = self._second(prompt)
            try:
                self._scheduler.submit(self._job)
            except ServeError as error:
                self._listener.on_error(error)

    def on_error(self, error: ServeError) -> None:
        """See `Listener`."""
        self._listener.on_error(error)

    def _finish_if_ended(self, events: Sequence[chat.Event]) -> None:
        if events[-1].kind == "end" and self._asked.on_finish is not None:
            self._asked.on_finish()
        self._listener.on_events(events)

    def _second(self, prompt: Sequence[int]) -> Job:
        """The job behind the seam. The whole answer takes in the forced ids here."""
        pending = [event for token in self._forced for event in self._whole.push(token, None)]
        left = self._asked.params.max_tokens - len(self._whole.ids)
        return dataclasses.replace(
            self._asked,
            prompt=[*prompt, *self._forced],
            params=dataclasses.replace(self._asked.params, max_tokens=left),
            answer=_Part(self._whole, pending=pending),
        )
