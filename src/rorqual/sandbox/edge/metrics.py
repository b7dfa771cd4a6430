"""The figures of /metrics. One registry per edge."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and gauges."""

    def __init__(self, name: str) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        Gauge("rorqual_edge_info", "The edge's name.", ["edge"], registry=registry).labels(name).set(1)
        self.sandboxes = Gauge("rorqual_edge_sandboxes", "Live sandboxes.", registry=registry)
        self.sandboxes_limit = Gauge("rorqual_edge_sandboxes_limit", "At most.", registry=registry)
        self.memory = Gauge("rorqual_edge_memory_mb", "Sum of their memory limits, MiB.", registry=registry)
        self.memory_limit = Gauge("rorqual_edge_memory_mb_limit", "At most.", registry=registry)
        self.channels = Gauge("rorqual_edge_channels", "Open channels.", registry=registry)
        self.created = Counter("rorqual_edge_sandboxes_created", "Made here, forks too.", registry=registry)
        self.ended = Counter("rorqual_edge_sandboxes_ended", "Ended, by cause.", ["cause"], registry=registry)
        self.refused = Counter(
            "rorqual_edge_admission_refused", "Refused for want of room.", ["what"], registry=registry
        )
        self.leases_expired = Counter(
            "rorqual_edge_leases_expired", "Clients not heard any more.", registry=registry
        )
        self.requests = Counter(
            "rorqual_edge_requests",
            "HTTP requests and channel calls.",
            ["call", "outcome"],
            registry=registry,
        )
        self.create_seconds = Histogram(
            "rorqual_edge_create_seconds", "Making one.", registry=registry, buckets=_SECONDS
        )

    def render(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)
