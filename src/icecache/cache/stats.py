"""What a layer counts."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from torch import Tensor

from icecache.cache.context import Context

__all__ = ["Counters", "LayerStats", "Phase", "layer_stats"]


class Phase(Enum):
    """How a layer holds its context."""

    EMPTY = "empty"
    DENSE = "dense"
    INDEXED = "indexed"


@dataclass(frozen=True, slots=True)
class LayerStats:
    """State and work of one layer at one moment.

    Attributes
    ----------
    phase : Phase
        ``DENSE`` until the context passes the budget, ``INDEXED`` from then on; a prompt is
        indexed when it is first attended or extended.
    tokens : int
        Tokens of the longest batch row, padding not counted.
    pages, leaves, nodes : int
        Over all rows; a shared page counts once. Nodes are those above the leaves.
    fill : float
        Share of the pages' slots that hold a token; 1.0 without pages.
    kv_bytes : int
        Keys and values: sink, window and pages.
    index_bytes : int
        Summaries and where tokens are.
    device_bytes, host_bytes : int
        Of both together, where they are. On a CPU all is host memory, but for what lies in memory
        granted by `use_granted`, which counts as the device's.
    full_cache_bytes : int
        What the keys and values of the same tokens take in a full cache.
    sparse_steps, dense_steps : int
        Calls of `attend` that selected, and that attended to everything.
    reused_steps : int
        Sparse steps that attended to another layer's selection.
    inserted, built : int
        Tokens (per row, summed) that entered the tree one leaf at a time, and in builds.
    nodes_scored, leaves_scored : int
        Nodes and leaves scored by all sparse steps, over all rows.
    tokens_attended : float
        Tokens attended exactly in the last step with one query token, mean over rows.
    backend : str
        Which ops run: ``"native"``, ``"torch"`` or ``"reference"``; on the device path ``"triton"``
        or ``"twin"``.
    offload : str
        Where pages live: ``"host"``, or ``"none"`` for the device. On a CPU it is ``"host"``.
    pages_selected, pages_fetched : int
        Pages that all sparse steps attended tokens of, and those of them that had to be brought
        from host memory, over all rows; 0 where pages are read in place.
    """

    phase: Phase
    tokens: int
    pages: int
    leaves: int
    nodes: int
    fill: float
    kv_bytes: int
    index_bytes: int
    device_bytes: int
    host_bytes: int
    full_cache_bytes: int
    sparse_steps: int
    dense_steps: int
    reused_steps: int
    inserted: int
    built: int
    nodes_scored: int
    leaves_scored: int
    tokens_attended: float
    backend: str
    offload: str = "host"
    pages_selected: int = 0
    pages_fetched: int = 0


@dataclass(slots=True)
class Counters:
    """The work of a layer so far; fields as in `LayerStats`."""

    sparse_steps: int = 0
    dense_steps: int = 0
    reused_steps: int = 0
    inserted: int = 0
    built: int = 0
    nodes_scored: int = 0
    leaves_scored: int = 0
    tokens_attended: float = 0.0

    def count_dense(self, tokens: int) -> None:
        """Count a call that attended to everything."""
        self.dense_steps += 1
        self.tokens_attended = float(tokens)

    def count_sparse(self, nodes: int, leaves: int, num_attended: Tensor | np.ndarray) -> None:
        """Count a call that selected; num_attended: shape [rows]."""
        self.sparse_steps += 1
        self.nodes_scored += nodes
        self.leaves_scored += leaves
        self.tokens_attended = sum(num_attended.tolist()) / len(num_attended)


def layer_stats(
    context: Context | None, counters: Counters, phase: Phase, backend: str
) -> LayerStats:
    """Put together what a layer holds and what it has done."""
    indexed = None if context is None else context.indexed
    kv_bytes = 0 if context is None else context.kv_bytes
    index_bytes = 0 if context is None else context.index_bytes
    granted = 0 if context is None else context.granted_bytes
    slots = 0 if indexed is None else indexed.pool.num_pages * indexed.pool.page_size
    return LayerStats(
        phase=phase,
        tokens=0 if context is None else max(context.row_lens),
        pages=0 if indexed is None else indexed.pool.num_pages,
        leaves=0 if indexed is None else indexed.leaves.total,
        nodes=0 if indexed is None else indexed.tree.num_nodes,
        fill=indexed.pool.num_tokens / slots if indexed is not None and slots else 1.0,
        kv_bytes=kv_bytes,
        index_bytes=index_bytes,
        device_bytes=granted,
        host_bytes=kv_bytes + index_bytes - granted,
        full_cache_bytes=0 if context is None else context.full_cache_bytes,
        sparse_steps=counters.sparse_steps,
        dense_steps=counters.dense_steps,
        reused_steps=counters.reused_steps,
        inserted=counters.inserted,
        built=counters.built,
        nodes_scored=counters.nodes_scored,
        leaves_scored=counters.leaves_scored,
        tokens_attended=counters.tokens_attended,
        backend=backend,
    )
