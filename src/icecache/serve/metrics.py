"""Prometheus metrics of a server."""

import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from icecache.engine import Engine, EngineStats, Request

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_WINDOW_SECONDS = 10.0
_REFRESH_SECONDS = 0.5

_GAUGES = {
    "running": ("requests_running", "Requests that are worked on."),
    "waiting": ("requests_waiting", "Requests in the queue."),
    "reserved_bytes": ("reserved_bytes", "Host memory that requests have set aside."),
    "limit_bytes": ("host_limit_bytes", "Host memory that there is for all."),
    "running_bytes": ("running_bytes", "Host memory that running requests take."),
    "conversation_bytes": ("conversation_bytes", "Host memory of stored conversations."),
    "conversations": ("conversations", "Stored conversations, in memory or on disk."),
    "disk_bytes": ("disk_bytes", "Bytes of conversations on disk."),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens read."),
    "cached_tokens": ("cached_tokens", "Prompt tokens taken from stored conversations."),
    "answer_tokens": ("answer_tokens", "Tokens answered."),
    "native_steps": ("native_steps", "Tokens of answers taken in by one compiled call."),
    "disk_failures": ("disk_failures", "Conversations that could not be written."),
}


class Metrics(Collector):
    """The metrics of one server; the engine's own are a copy, made by its thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = {"registry": self.registry, "namespace": "icecache"}
        self._ended = Counter("requests", "Requests that ended.", ["finish"], **labels)  # type: ignore[arg-type]
        self._refused = Counter("refused", "Requests answered by an error.", ["status"], **labels)  # type: ignore[arg-type]
        self._ttft = Histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            **labels,  # type: ignore[arg-type]
        )
        self._tpot = Histogram(
            "time_per_output_token_seconds",
            "Mean over a request's tokens after the first.",
            buckets=_TOKEN_SECONDS,
            **labels,  # type: ignore[arg-type]
        )
        self._stats: EngineStats | None = None
        self._recent: deque[tuple[float, int]] = deque()
        self.registry.register(self)

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def update(self, engine: Engine) -> None:
        """Copy the engine's figures, now and then; from the engine's thread."""
        now = time.monotonic()
        if not self._recent or now - self._recent[-1][0] >= _REFRESH_SECONDS:
            self._stats = engine.stats()
            self._recent.append((now, self._stats.answer_tokens))
            while now - self._recent[0][0] > _WINDOW_SECONDS:
                self._recent.popleft()

    def first_token(self, request: Request) -> None:
        """Count a first token."""
        if request.seconds_to_first_token is not None:
            self._ttft.observe(request.seconds_to_first_token)

    def ended(self, request: Request) -> None:
        """Count a request that has ended."""
        self._ended.labels(request.finish.value if request.finish else "unknown").inc()
        if request.seconds_per_token is not None:
            self._tpot.observe(request.seconds_per_token)

    def refused(self, status: int) -> None:
        """Count a request that was answered by an error."""
        self._refused.labels(str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's metrics; called by the registry."""
        stats = self._stats
        if stats is None:
            return
        for name, (metric, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"icecache_{metric}", text, value=getattr(stats, name))
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"icecache_{metric}", text, value=getattr(stats, name))
        steps = stats.sparse_steps + stats.dense_steps
        yield GaugeMetricFamily(
            "icecache_sparse_share",
            "Share of attention calls that stayed within the budget.",
            value=stats.sparse_steps / steps if steps else 0.0,
        )
        yield GaugeMetricFamily(
            "icecache_device_bytes", "Bytes on an accelerator: 0 on a CPU.", value=0
        )
        yield CounterMetricFamily(
            "icecache_pages_fetched", "Pages moved to an accelerator: 0 on a CPU.", value=0
        )
        yield GaugeMetricFamily(
            "icecache_tokens_per_second",
            "Tokens answered a second, over the last ten seconds.",
            value=self._rate(),
        )

    def _rate(self) -> float:
        if len(self._recent) < 2:
            return 0.0
        (begin, before), (end, after) = self._recent[0], self._recent[-1]
        return (after - before) / (end - begin) if end > begin else 0.0
