"""Search: what the summaries say of a query.

The score of a leaf is the logarithm of its share of the attention's weight: of its n keys with
mean m and spread s, log sum exp(q.k) is about log n + q.m + |q|^2 s / (2 dim), the last term for
keys spread evenly in all directions. Close keys lie along few directions, so the term is too
large for most queries; it is capped, and the remainder takes only a part of it (docs/design.md).

A row of few leaves is scanned flat. A longer one is searched from the top of its tree: the nodes
of a level are scored in the same way, the best are expanded (`field_of_view` of the nodes above
the leaves, half as many of a level further up), and the others stay as they are: the far field,
attended through the nodes' own summaries.
"""

import math
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.tree.tree import Tree

__all__ = ["Far", "Index", "LeafScores", "TreeIndex"]

LARGEST_LEAF_CORRECTION = 2.0
LARGEST_NODE_CORRECTION = 4.0


class Far(NamedTuple):
    """Nodes that were not expanded, padded to the row that has most.

    Attributes
    ----------
    logits, correction : shape [rows, heads, nodes], float32; -inf and 0 where padded.
    value_mean : shape [rows, nodes, head_dim], int8
    value_scale : shape [rows, nodes]
    """

    logits: Tensor
    correction: Tensor
    value_mean: Tensor
    value_scale: Tensor


class LeafScores(NamedTuple):
    """Scores of the leaves for every query head.

    Attributes
    ----------
    logits : shape [rows, heads, leaves], float32. log n + q.m, -inf where there is no leaf or its
        node was not expanded.
    correction : shape [rows, heads, leaves], float32. The spread's share, at most 2.
    beside : shape [rows, heads], float32. Log-sum-exp of all that is attended beside the leaves.
    far : Far, optional
    nodes_scored, leaves_scored : int, over all rows.
    """

    logits: Tensor
    correction: Tensor
    beside: Tensor
    far: Far | None
    nodes_scored: int
    leaves_scored: int


class Index(Protocol):
    """What can say how much of the attention's weight each of its leaves has."""

    def search(
        self, query: Tensor, beside: Tensor, scaling: float, softcap: float | None
    ) -> LeafScores:
        """Score leaves; query: [rows, heads, head_dim], beside: [rows, heads], both float32."""


class _Scored(NamedTuple):
    """Nodes of one row and level, scored: ids [n], logits and correction [heads, n]."""

    level: int
    ids: Tensor
    logits: Tensor
    correction: Tensor

    def pick(self, index: Tensor) -> "_Scored":
        return _Scored(
            self.level, self.ids[index], self.logits[:, index], self.correction[:, index]
        )


class TreeIndex(NamedTuple):
    """Leaves scored by their summaries, all of them or those below the best nodes.

    Attributes
    ----------
    tree : Tree
    config : IceCacheConfig
    ops : the ops that score
    is_flat : whether rows of any length are scanned flat
    """

    tree: Tree
    config: IceCacheConfig
    ops: ModuleType
    is_flat: bool = False

    def search(
        self, query: Tensor, beside: Tensor, scaling: float, softcap: float | None
    ) -> LeafScores:
        """Score leaves; query: [rows, heads, head_dim], beside: [rows, heads], both float32."""
        s = self.tree.leaves.view()
        logits, correction = self.ops.score_leaves(
            query,
            self.tree.leaves.centre,
            s.key_mean,
            s.key_scale,
            s.count,
            s.spread,
            scaling,
            softcap,
        )
        correction = correction.clamp(max=LARGEST_LEAF_CORRECTION)
        num = self.tree.leaves.num
        far: list[list[_Scored]] = []
        nodes_scored, leaves_scored, beside = 0, 0, beside.clone()
        for row in range(self.tree.num_rows):
            far.append([])
            leaves_scored += int(num[row])
            is_short = num[row] <= self.config.most_flat_leaves
            if self.is_flat or is_short or self.tree.top(row) == 0:
                continue
            near, far[row], scored = self._descend(row, query[row], beside[row], scaling, softcap)
            unseen = torch.ones(logits.shape[2], dtype=torch.bool)
            unseen[near] = False
            logits[row, :, unseen] = -math.inf
            beside[row] = _log_sum_exp(beside[row], far[row])
            nodes_scored += scored
            leaves_scored += len(near) - int(num[row])
        return LeafScores(
            logits, correction, beside, self._pad(far, query), nodes_scored, leaves_scored
        )

    def _descend(
        self, row: int, query: Tensor, beside: Tensor, scaling: float, softcap: float | None
    ) -> tuple[list[int], list[_Scored], int]:
        """Return the leaves below the best nodes, the other nodes, and how many were scored."""
        levels = self.tree.levels
        far: list[_Scored] = []
        nodes_scored, top = 0, self.tree.top(row)
        frontier = list(range(int(levels[top].num[row])))
        for level in range(top, 0, -1):
            expanded = frontier
            field = self.config.field_of_view if level == 1 else -(-self.config.field_of_view // 2)
            if len(frontier) > field:
                nodes = self._score(level, row, frontier, query, scaling, softcap)
                nodes_scored += len(frontier)
                worth = self._worth(nodes, _log_sum_exp(beside, far))
                best = np.lexsort((nodes.ids.numpy(), -worth.numpy()))[:field]
                is_best = torch.zeros(len(frontier), dtype=torch.bool)
                is_best[torch.from_numpy(best)] = True
                far.append(nodes.pick(~is_best))
                expanded = nodes.ids[is_best].tolist()
            frontier = [
                child
                for node in expanded
                for child in levels[level].children(row, node, levels[level - 1])
            ]
        return frontier, far, nodes_scored

    def _score(
        self,
        level: int,
        row: int,
        ids: list[int],
        query: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> _Scored:
        at = torch.tensor(ids)
        s = self.tree.levels[level].at(row, at)
        logits, correction = self.ops.score_leaves(
            query[None],
            self.tree.leaves.centre[row][None],
            s.key_mean[None],
            s.key_scale[None],
            s.count[None],
            s.spread[None],
            scaling,
            softcap,
        )
        return _Scored(level, at, logits[0], correction[0].clamp(max=LARGEST_NODE_CORRECTION))

    def _worth(self, nodes: _Scored, beside: Tensor) -> Tensor:
        likely = nodes.logits + nodes.correction
        share = (likely - torch.logaddexp(likely.logsumexp(1), beside)[:, None]).exp()
        if self.config.estimates_remainder:
            share = share * nodes.correction.sqrt()
        return share.sum(0)

    def _pad(self, far: list[list[_Scored]], query: Tensor) -> Far | None:
        """Put the rows' nodes side by side."""
        rows, heads, dim = query.shape
        most = max(sum(part.ids.numel() for part in parts) for parts in far)
        if most == 0:
            return None
        logits = torch.full((rows, heads, most), -math.inf)
        correction = torch.zeros(rows, heads, most)
        value_mean = torch.zeros(rows, most, dim, dtype=torch.int8)
        value_scale = torch.zeros(rows, most, dtype=torch.bfloat16)
        for row, parts in enumerate(far):
            start = 0
            for part in parts:
                span = slice(start, start + part.ids.numel())
                s = self.tree.levels[part.level].at(row, part.ids)
                logits[row, :, span], correction[row, :, span] = part.logits, part.correction
                value_mean[row, span], value_scale[row, span] = s.value_mean, s.value_scale
                start = span.stop
        return Far(logits, correction, value_mean, value_scale)


def _log_sum_exp(beside: Tensor, far: list[_Scored]) -> Tensor:
    parts = [beside[:, None], *(part.logits + part.correction for part in far)]
    return torch.cat(parts, 1).logsumexp(1)
