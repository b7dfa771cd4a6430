"""Metrics: the figures of /metrics, under vLLM's names where they mean the same. One registry per server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rorqual.engine import BatchFound

__all__ = ["Metrics"]

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and gauges; every method may be called from any thread."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model_name
        self.running = self._gauge("vllm:num_requests_running", "Requests in the engine.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests in the queue.")
        self.kv_usage = self._gauge(
            "vllm:kv_cache_usage_perc", "Share of kv_bytes that running requests may need."
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens sampled.")
        self.prefix_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.")
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found.")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "Submission to first token.")
        self.inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between tokens of one request."
        )
        self.preemptions = self._counter("vllm:num_preemptions", "Requests that had to make room for others.")
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", "Time in the queue.")
        self.latency = self._histogram("vllm:e2e_request_latency_seconds", "Submission to last token.")
        self.kept_bytes = self._gauge("rorqual:prefix_cache_bytes", "Bytes of kept prefixes.")
        self.kept_pages = self._gauge("rorqual:prefix_cache_pages", "Pages of kept prefixes.")
        self.disk_hits = self._counter("rorqual:prefix_cache_disk_hits", "Prompt tokens read from disk.")
        self.replayed_tokens = self._counter(
            "rorqual:prefix_cache_replayed", "Found tokens that were computed again for their windows."
        )
        self.replayed = self._counter("rorqual:replayed_turns", "Earlier answers given back as sampled.")
        self.reasoning_lost = self._counter(
            "rorqual:reasoning_lost", "Earlier calls whose reasoning nobody had any more."
        )
        self._found = Counter(
            "rorqual:prefix_lookups",
            "Prompts by what the cache knew of them; the reasons are those of x_v4.cache.",
            ["model_name", "reason"],
            registry=self._registry,
        )
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._rejected = Counter(
            "rorqual:requests_rejected",
            "Refused or failed requests.",
            ["model_name", "code"],
            registry=self._registry,
        )
        self._parsed = Counter(
            "rorqual:parse_diagnostics",
            "What the parser repaired.",
            ["model_name", "kind"],
            registry=self._registry,
        )
        self._aborted = Counter(
            "rorqual:requests_aborted",
            "Requests whose client went away.",
            ["model_name"],
            registry=self._registry,
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self._registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["model_name"], registry=self._registry, buckets=SECONDS).labels(
            self._model
        )

    def found(self, found: BatchFound, reason: str) -> None:
        """A prompt was looked up."""
        self.prefix_hits.inc(found.match.tokens)
        self.disk_hits.inc(found.from_disk)
        self.replayed_tokens.inc(found.match.replay)
        self._found.labels(self._model, reason).inc()

    def finished(self, reason: str) -> None:
        """A request got its last token."""
        self._finished.labels(self._model, reason).inc()

    def rejected(self, code: str) -> None:
        """A request was refused or failed."""
        self._rejected.labels(self._model, code).inc()

    def diagnostic(self, kind: str) -> None:
        """The parser repaired or dropped something."""
        self._parsed.labels(self._model, kind).inc()

    def aborted(self) -> None:
        """A client went away."""
        self._aborted.labels(self._model).inc()

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
