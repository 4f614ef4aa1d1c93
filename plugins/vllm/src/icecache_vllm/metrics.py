"""Counters on their way from the workers to the log and to ``/metrics``."""

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

__all__ = ["IceMetrics", "IceStats"]

_STEP_BUCKETS = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass
class IceStats(KVConnectorStats):  # type: ignore[misc]
    """What happened since the last report, and what is held now.

    ``data``: ``sparse_steps`` and ``dense_steps`` since the last report; ``requests``, the sparse
    steps of each request that ended; ``host_bytes`` of each rank, by its number.
    """

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.data = {"sparse_steps": 0, "dense_steps": 0, "requests": [], "host_bytes": {}}

    def aggregate(self, other: KVConnectorStats) -> "IceStats":
        """Add another rank's report, or a later one."""
        for name in ("sparse_steps", "dense_steps", "requests"):
            self.data[name] += other.data[name]
        self.data["host_bytes"].update(other.data["host_bytes"])
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the line of vLLM's periodic log."""
        return {
            "icecache_sparse_steps": self.data["sparse_steps"],
            "icecache_dense_steps": self.data["dense_steps"],
            "icecache_requests_ended": len(self.data["requests"]),
            "icecache_host_bytes": sum(self.data["host_bytes"].values()),
        }

    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not self.data["host_bytes"]


class IceMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The plugin's part of ``/metrics``, one series an engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sparse = self._made(
            self._counter_cls, "sparse_steps", "Decode steps in which all managed layers selected."
        )
        self._dense = self._made(
            self._counter_cls, "dense_steps", "Steps and prompt chunks attended in full."
        )
        self._requests = self._made(
            self._histogram_cls,
            "request_sparse_steps",
            "Sparse decode steps of each request that ended.",
            buckets=_STEP_BUCKETS,
        )
        self._bytes = self._made(
            self._gauge_cls,
            "host_bytes",
            "Bytes of pages and index in host memory, over all ranks.",
            multiprocess_mode="mostrecent",
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take a report in."""
        data = transfer_stats_data
        self._sparse[engine_idx].inc(data["sparse_steps"])
        self._dense[engine_idx].inc(data["dense_steps"])
        for steps in data["requests"]:
            self._requests[engine_idx].observe(steps)
        self._bytes[engine_idx].set(sum(data["host_bytes"].values()))

    def _made(
        self, kind: type[Counter | Gauge | Histogram], name: str, text: str, **more: Any
    ) -> dict[int, Any]:
        metric = kind(
            name=f"icecache:{name}", documentation=text, labelnames=self._labelnames, **more
        )
        made: dict[int, Any] = create_metric_per_engine(metric, self.per_engine_labelvalues)
        return made
