"""The fill of a build in torch: tokens to their pages, leaves to the table."""

import torch
from torch import Tensor

from icecache.cache.flat import FlatTokens
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.build import Leaves
from icecache.tree.tree import Tree

__all__ = ["fill"]


def fill(
    tokens: FlatTokens,
    leaves: Leaves,
    page: Tensor,
    first: list[int],
    tree: Tree,
    pool: PagePool,
    pages: PageTable,
) -> None:
    """Store tokens in new leaves and summarise those.

    A page takes its leaves by rising number, a leaf its tokens in their order.

    Parameters
    ----------
    tokens : FlatTokens
    leaves : Leaves
    page : Tensor, shape [leaves], int64
        Each leaf's page, new and empty, by its number within the row's pages.
    first : list of int
        Each row's first new leaf in the table; it has been opened.
    tree, pool, pages
        What is filled.
    """
    row = torch.repeat_interleave(torch.tensor(leaves.per_row))
    leaf = torch.cat([torch.arange(f, f + n) for f, n in zip(first, leaves.per_row, strict=True)])
    slot = _slots(leaves, row * (int(page.max()) + 1) + page)
    at = pages.in_pool(row[leaves.ids], page[leaves.ids] * pool.page_size + slot)
    pool.write(at, tokens.keys, tokens.values, tokens.positions)
    own = torch.zeros(row.numel(), pool.page_size, dtype=torch.bool)
    own[leaves.ids, slot] = True
    tree.leaves.place_many(row, leaf, page, own)
    tree.leaves.summarize(row, leaf, leaves.ids, tokens.keys, tokens.values)


def _slots(leaves: Leaves, page: Tensor) -> Tensor:
    """Return each token's slot, shape [tokens], int64; page: each leaf's, unlike other rows'."""
    order = torch.argsort(page[leaves.ids] * (page.numel() + 1) + leaves.ids, stable=True)
    slot = torch.empty_like(order)
    slot[order] = _rank_within(page[leaves.ids][order])
    return slot


def _rank_within(ids: Tensor) -> Tensor:
    """Return each element's rank among equal neighbours of a sorted tensor."""
    counts = torch.bincount(ids)
    starts = counts.cumsum(0) - counts
    return torch.arange(ids.numel()) - starts[ids]
