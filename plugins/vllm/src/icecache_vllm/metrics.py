"""Counters on their way from the workers to the log and to ``/metrics``."""

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1 import metrics
from vllm.v1.metrics.utils import create_metric_per_engine

from icecache.cache.granting import Report

__all__ = ["IceMetrics", "IceStats"]

_STEP_BUCKETS = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass
class IceStats(metrics.KVConnectorStats):
    """What happened since the last report, and what is held now.

    ``data``: ``sparse_steps`` and ``dense_steps`` since the last report; ``requests``, the sparse
    steps of each request that ended; ``host_bytes`` of each rank, by its number.
    """

    def __post_init__(self) -> None:
        empty = {"sparse_steps": 0, "dense_steps": 0, "requests": [], "host_bytes": {}}
        self.data: dict[str, Any] = self.data or empty

    @classmethod
    def of(cls, report: Report, rank: int) -> "IceStats":
        """Return a rank's report; steps are counted on rank 0 alone, for all ranks do the same."""
        stats = cls()
        stats.data["host_bytes"] = {str(rank): report.host_bytes}
        if rank == 0:
            stats.data |= report.work._asdict()
            stats.data["requests"] = [ended.work.sparse_steps for ended in report.ended]
        return stats

    def aggregate(self, other: metrics.KVConnectorStats) -> "IceStats":
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


class IceMetrics(metrics.KVConnectorPromMetrics):
    """The plugin's part of ``/metrics``, one series an engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        made, count = self._made, self._counter_cls
        self._sparse = made(count, "sparse_steps", "Decode steps in which every layer selected.")
        self._dense = made(count, "dense_steps", "Steps and prompt chunks attended in full.")
        text = "Sparse decode steps of each request that ended."
        self._requests = made(
            self._histogram_cls, "request_sparse_steps", text, buckets=_STEP_BUCKETS
        )
        text = "Bytes of pages and index in host memory, over all ranks."
        self._bytes = made(self._gauge_cls, "host_bytes", text, multiprocess_mode="mostrecent")

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
        return create_metric_per_engine(metric, self.per_engine_labelvalues)
