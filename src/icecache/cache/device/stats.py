"""What a layer on a device counts and holds; what the device counted is asked for only here."""

from icecache.cache.device.context import DeviceContext
from icecache.cache.device.index import DeviceIndex
from icecache.cache.device.step import Stepped
from icecache.cache.stats import LayerStats, Phase

__all__ = ["DeviceCounters", "device_stats"]


class DeviceCounters:
    """The work of a layer so far.

    Attributes
    ----------
    sparse_steps, dense_steps : int
        As in `LayerStats`.
    """

    def __init__(self) -> None:
        self.sparse_steps = self.dense_steps = 0
        self._attended = 0.0
        self._last: Stepped | None = None

    def count_dense(self, tokens: int) -> None:
        """Count a call that attended to everything."""
        self.dense_steps += 1
        self._attended, self._last = float(tokens), None

    def count_sparse(self, step: Stepped) -> None:
        """Count a step, without waiting for what it did."""
        self.sparse_steps += 1
        self._last = step

    def mark(self) -> tuple[int, float, Stepped | None]:
        """Return the counts that a step changes, for `rewind`."""
        return self.sparse_steps, self._attended, self._last

    def rewind(self, mark: tuple[int, float, Stepped | None]) -> None:
        """Count as at a mark."""
        self.sparse_steps, self._attended, self._last = mark

    def tokens_attended(self) -> float:
        """Return the tokens attended in the last step, mean over rows; waits for the device."""
        if self._last is not None:
            self._attended = float(self._last.num_attended().float().mean())
        return self._attended


def device_stats(
    context: DeviceContext | None, counters: DeviceCounters, phase: Phase, backend: str
) -> LayerStats:
    """Put together what a layer holds and what it has done; waits for the device."""
    index = None if context is None else context.index
    if index is not None:
        index.wait_for_transfers()
    selected, fetched = (0, 0) if index is None else _pages_of(index)
    sizes = _sizes(context)
    tokens = 0 if index is None else int((index.pages.positions >= 0).sum())
    slots = 0 if index is None else int(index.tree.num_pages.sum()) * index.pages.host.shape[3]
    return LayerStats(
        phase=phase,
        tokens=0 if context is None else max(context.row_lens, default=0),
        pages=0 if index is None else int(index.tree.num_pages.sum()),
        leaves=0 if index is None else int(index.tree.num_leaves.sum()),
        nodes=0,
        fill=tokens / slots if slots else 1.0,
        **sizes,
        sparse_steps=counters.sparse_steps,
        dense_steps=counters.dense_steps,
        reused_steps=0,
        inserted=0 if context is None else context.inserted,
        built=0 if context is None else context.built,
        nodes_scored=0,
        leaves_scored=0,
        tokens_attended=counters.tokens_attended(),
        backend=backend,
        offload="none" if index is not None and not index.pool.shape.offloads else "host",
        pages_selected=selected,
        pages_fetched=fetched,
    )


def _pages_of(index: DeviceIndex) -> tuple[int, int]:
    """Return how many pages were selected and fetched by all steps of an index."""
    work = index.pages.work
    if work is None:
        return 0, 0
    selected, fetched = work.sum(0).tolist()
    return selected, fetched


def _sizes(context: DeviceContext | None) -> dict[str, int]:
    """Return all byte counts of a layer."""
    if context is None:
        return dict.fromkeys(
            ("kv_bytes", "index_bytes", "device_bytes", "host_bytes", "full_cache_bytes"), 0
        )
    settings = context.settings
    kv = index_bytes = host = 0
    if context.tail is not None:
        kv = context.tail.nbytes
    if context.fresh is not None:
        kv += 2 * context.fresh.keys.numel() * context.fresh.keys.element_size()
    if context.index is not None:
        shape, fixed = context.index.pool.shape, context.index.window.fixed
        kv += shape.page_bytes + shape.slot_bytes
        kv += 2 * fixed.keys.numel() * fixed.keys.element_size()
        index_bytes, host = shape.summary_bytes, shape.host_bytes
    token = 2 * settings.heads * settings.dim * settings.dtype.itemsize
    return {
        "kv_bytes": kv,
        "index_bytes": index_bytes,
        "device_bytes": kv + index_bytes - host,
        "host_bytes": host,
        "full_cache_bytes": token * sum(context.row_lens),
    }
