"""The paper's own pages (arXiv 2604.10539, section 4; M-DCI), to be measured against.

Keys are lifted to the sphere, k' = [k/c, sqrt(1 - |k|^2/c^2)] with c the largest |k|, where the
nearest neighbour of q' = [q/|q|, 0] is the key of largest inner product. Every 33rd key (a ratio
of 0.03) is promoted to a parent, each key joins its nearest parent, and a parent's keys, ordered
along one random direction, are cut into pages three quarters full, as a B+-tree keeps its leaves.
"""

import math

import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.tree.build import Leaves, siblings_together
from icecache.tree.cluster import sort_within

__all__ = ["lift", "paper_leaves"]

_PROMOTION_STRIDE = 33


def lift(keys: Tensor) -> Tensor:
    """Return k' of keys, shape [tokens, head_dim] -> [tokens, head_dim + 1]."""
    squared = keys.square().sum(1)
    largest = squared.max().clamp(min=1e-20)
    height = (1 - squared / largest).clamp(min=0).sqrt()
    return torch.cat([keys / largest.sqrt(), height[:, None]], 1)


def paper_leaves(keys: Tensor, row_lens: list[int], config: IceCacheConfig) -> Leaves:
    """Cluster keys the paper's way; arguments and result as `build_leaves`, a leaf a page."""
    generator = torch.Generator().manual_seed(config.seed)
    direction = torch.randn(keys.shape[1] + 1, generator=generator)
    ids, per_row, parents = [], [], []
    num_leaves = num_parents = 0
    for row_keys in torch.split(keys, row_lens):
        if row_keys.shape[0] == 0:
            per_row.append(0)
            continue
        lifted = lift(row_keys.float())
        promoted = lifted[::_PROMOTION_STRIDE]
        cell = torch.cat([(x @ promoted.T).argmax(1) for x in torch.split(lifted, 4096)])
        order = sort_within(cell, lifted @ direction)
        leaf, parent = _cut_cells(cell[order], config.leaf_target, 2 * config.fan_out)
        row_ids = torch.empty_like(leaf)
        row_ids[order] = leaf + num_leaves
        ids.append(row_ids)
        parents.append(parent + num_parents)
        per_row.append(parent.numel())
        num_leaves += parent.numel()
        num_parents += int(parent[-1]) + 1
    return siblings_together(Leaves(torch.cat(ids), per_row, torch.cat(parents)))


def _cut_cells(cell: Tensor, target: int, most: int) -> tuple[Tensor, Tensor]:
    """Cut each cell, given sorted, in runs of about `target`; a parent has `most` of its leaves."""
    leaf = torch.empty_like(cell)
    parents: list[int] = []
    start, number = 0, -1
    for size in torch.bincount(cell).tolist():
        pieces = math.ceil(size / target)
        runs = torch.arange(start, start + size).tensor_split(pieces) if size else ()
        for piece, run in enumerate(runs):
            number += piece % most == 0
            leaf[run] = len(parents)
            parents.append(number)
        start += size
    return leaf, torch.tensor(parents, dtype=torch.int64)
