"""Rows that run the real model and caches, but write what a script says instead of what was sampled.

For the shapes a random model cannot produce: calls, reasoning, a clean end.
"""

from collections.abc import Callable

from rorqual.engine import Batch, BatchEvent, Engine

Script = Callable[[list[int]], list[int] | None]
"""Ids of the answer to a prompt; None: the model's own."""


def scripted_rows(script: Script) -> Callable[[Engine], Batch]:
    return lambda engine: ScriptedRows(engine, script)


class ScriptedRows(Batch):
    def __init__(self, engine: Engine, script: Script) -> None:
        super().__init__(engine, prefixes=True, frontiers=True)
        self.script = script
        self.prompts: list[list[int]] = []
        self._lines: dict[int, list[int]] = {}

    def add(self, prompts, params, **options):
        super().add(prompts, params, **options)
        for key, prompt in prompts.items():
            self.prompts.append(list(prompt))
            line = self.script(list(prompt))
            if line is not None:
                self._lines[key] = list(line)

    def step(self):
        return [self._rewritten(event) for event in super().step()]

    def _rewritten(self, event: BatchEvent) -> BatchEvent:
        line = self._lines.get(event.key)
        if not line:
            return event
        row = self._rows[event.key]
        token = line.pop(0)
        row.pending[-1] = token
        reason = "stop" if token in row.params.stop_ids else None
        if reason is None and row.sampled >= row.params.max_tokens:
            reason = "length"
        row.waiting = reason is not None
        return BatchEvent(event.key, token, 0.0, reason)
