"""Figures of a run, read off its events: tokens, speed, calls, KV-cache bytes. A pure projection of the
log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rorqual.agent.events import Event

__all__ = ["Figures", "human_bytes", "read_figures"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run cost."""

    steps: int = 0
    calls: int = 0
    """Tool calls that were executed."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    model_seconds: float = 0.0
    seconds: float = 0.0
    """From the first event to the last."""
    kv_bytes: int | None = None
    """KV-cache bytes held after the last answer, where the model tells (metric `kv_bytes`)."""
    gqa8_bytes: int | None = None
    """What GQA8-bf16 with the same layers would hold for the same tokens (metric `gqa8_bytes`)."""

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second of model time, prefill included."""
        return self.completion_tokens / self.model_seconds if self.model_seconds > 0 else 0.0

    def lines(self) -> tuple[str, ...]:
        """For people: one line of work and speed, and one of memory where the model tells."""
        parts = [f"{self.completion_tokens} tokens"]
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        parts.append(f"{self.calls} call{'' if self.calls == 1 else 's'}")
        if self.cached_tokens and self.prompt_tokens:
            parts.append(f"{100 * self.cached_tokens / self.prompt_tokens:.0f}% of prompts cached")
        parts.append(f"{self.seconds:.1f} s")
        work = " · ".join(parts)
        if self.kv_bytes is None:
            return (work,)
        memory = f"KV cache {human_bytes(self.kv_bytes)}"
        if self.gqa8_bytes:
            share = 100 * self.kv_bytes / self.gqa8_bytes
            memory += f"; GQA8-bf16 with the same layers: {human_bytes(self.gqa8_bytes)} ({share:.2g}%)"
        return (work, memory)


def human_bytes(count: float) -> str:
    """Decimal units, three digits: `38.1 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def read_figures(events: Iterable[Event]) -> Figures:
    """The figures of a run that ended, or of one that goes on."""
    usage = dict.fromkeys(
        ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "seconds"), 0.0
    )
    steps = calls = 0
    kv: float | None = None
    gqa8: float | None = None
    times: list[float] = []
    for event in events:
        times.append(event.time)
        if event.kind == "tool.intent":
            calls += 1
        if event.kind == "model.response":
            steps += 1
            for name in usage:
                usage[name] += event.data["usage"].get(name, 0)
            metrics = event.data.get("metrics", {})
            kv, gqa8 = metrics.get("kv_bytes", kv), metrics.get("gqa8_bytes", gqa8)
    return Figures(
        steps=steps,
        calls=calls,
        prompt_tokens=int(usage["prompt_tokens"]),
        cached_tokens=int(usage["cached_tokens"]),
        completion_tokens=int(usage["completion_tokens"]),
        reasoning_tokens=int(usage["reasoning_tokens"]),
        model_seconds=usage["seconds"],
        seconds=times[-1] - times[0] if times else 0.0,
        kv_bytes=None if kv is None else int(kv),
        gqa8_bytes=None if gqa8 is None else int(gqa8),
    )
