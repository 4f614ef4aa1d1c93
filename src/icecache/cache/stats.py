"""What a layer counts."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["LayerStats", "Phase"]


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
        ``DENSE`` until the context passes the budget, ``INDEXED`` from then on.
    tokens : int
        Tokens of the longest batch row, padding not counted.
    pages, leaves : int
        Over all rows; a shared page counts once.
    fill : float
        Share of the pages' slots that hold a token; 1.0 without pages.
    kv_bytes : int
        Keys and values: sink, window and pages.
    index_bytes : int
        Summaries and where tokens are.
    device_bytes, host_bytes : int
        Of both together, where they are; on a CPU all is host memory.
    full_cache_bytes : int
        What the keys and values of the same tokens take in a full cache.
    sparse_steps, dense_steps : int
        Calls of `attend` that selected, and that attended to everything.
    inserted, built : int
        Tokens (per row, summed) that entered the tree one leaf at a time, and in builds.
    leaves_scored : int
        Leaves scored by all sparse steps, over all rows.
    tokens_attended : float
        Tokens attended exactly in the last step with one query token, mean over rows.
    backend : str
        Which ops run: ``"native"``, ``"torch"`` or ``"reference"``.
    """

    phase: Phase
    tokens: int
    pages: int
    leaves: int
    fill: float
    kv_bytes: int
    index_bytes: int
    device_bytes: int
    host_bytes: int
    full_cache_bytes: int
    sparse_steps: int
    dense_steps: int
    inserted: int
    built: int
    leaves_scored: int
    tokens_attended: float
    backend: str
