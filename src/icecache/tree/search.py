"""Search: what the summaries say of a query.

The score of a leaf is the logarithm of its share of the attention's weight: of its n keys with
mean m and spread s, log sum exp(q.k) is about log n + q.m + |q|^2 s / (2 dim), the last term for
keys spread evenly in all directions. Close keys lie along few directions, so the term is too
large for most queries; it is capped, and the remainder takes only a part of it (docs/design.md).
"""

from types import ModuleType
from typing import NamedTuple, Protocol

from torch import Tensor

from icecache.tree.table import LeafTable

__all__ = ["Index", "LeafScores", "SummaryIndex"]

_LARGEST_CORRECTION = 2.0


class LeafScores(NamedTuple):
    """Scores of every leaf for every query head.

    Attributes
    ----------
    logits : shape [rows, heads, leaves], float32. log n + q.m, -inf where there is no leaf.
    correction : shape [rows, heads, leaves], float32. The spread's share, at most 2.
    """

    logits: Tensor
    correction: Tensor


class Index(Protocol):
    """What can say how much of the attention's weight each of its leaves has."""

    def search(self, query: Tensor, scaling: float, softcap: float | None) -> LeafScores:
        """Score all leaves; query: shape [rows, heads, head_dim], float32."""


class SummaryIndex(NamedTuple):
    """Leaves scored by their summaries.

    Attributes
    ----------
    table : LeafTable
    ops : the ops that score
    """

    table: LeafTable
    ops: ModuleType

    def search(self, query: Tensor, scaling: float, softcap: float | None) -> LeafScores:
        """Score all leaves; query: shape [rows, heads, head_dim], float32."""
        leaves = self.table.view()
        logits, correction = self.ops.score_leaves(
            query,
            leaves.key_mean,
            leaves.key_scale,
            leaves.count,
            leaves.spread,
            scaling,
            softcap,
        )
        return LeafScores(logits, correction.clamp(max=_LARGEST_CORRECTION))
