"""The insert of a decode step as one call of the compiled ops; `placer` has its twin's half."""

import ctypes

import torch
from torch import Tensor

from icecache.cache.flat import FlatTokens
from icecache.errors import HostMemoryExceeded
from icecache.ops.native import DTYPES, Shape, load, pointer
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.table import LeafTable

__all__ = ["insert_native"]


_NEEDS_TWIN, _NEEDS_PAGE, _NEEDS_LEAF = 1, 2, 3


def insert_native(
    tokens: FlatTokens, table: LeafTable, pool: PagePool, pages: PageTable
) -> Tensor | None:
    """Insert tokens, at most one a row.

    Returns the numbers of the tokens that are left to the twin (rows without leaves, pages that
    other rows hold too), None if there are none.
    """
    if pool.dtype not in DTYPES:
        return torch.arange(tokens.row.numel())
    answer = _call(tokens, table, pool, pages)
    while bool((answer > _NEEDS_TWIN).any()):
        for row in tokens.row[answer == _NEEDS_PAGE].tolist():
            pages.hold(row, pool.allocate(1), [pool.page_size])
        if bool((answer == _NEEDS_LEAF).any()):
            table.reserve(table.capacity * 3 // 2)
        again = (answer > _NEEDS_TWIN).nonzero()[:, 0]
        answer[again] = _call(tokens.pick(again), table, pool, pages)
    return answer.nonzero()[:, 0] if bool(answer.any()) else None


def _call(tokens: FlatTokens, table: LeafTable, pool: PagePool, pages: PageTable) -> Tensor:
    leaves, num_leaves = table.native_leaves()
    native_pages = pages.native_pages()
    shape = Shape(
        rows=table.num_rows,
        dim=pool.head_dim,
        leaf_size=table.leaf_size,
        page_size=pool.page_size,
        capacity=table.capacity,
        dtype=DTYPES[pool.dtype],
    )
    keys, values = tokens.keys.contiguous(), tokens.values.contiguous()
    answer = torch.empty(tokens.row.numel(), dtype=torch.uint8)
    failed = load().icecache_insert(
        ctypes.byref(shape),
        ctypes.byref(leaves),
        ctypes.byref(native_pages),
        pointer(keys),
        pointer(values),
        pointer(tokens.row),
        pointer(tokens.positions),
        tokens.row.numel(),
        pointer(answer),
    )
    if failed:
        raise HostMemoryExceeded(pool.head_dim * 4 * 400, 0)
    table.take_native(num_leaves)
    return answer
