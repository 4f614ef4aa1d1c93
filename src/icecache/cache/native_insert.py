"""The insert of a decode step as one call of the compiled ops; `placer` has its twin's half."""

import ctypes

import torch
from torch import Tensor

from icecache.cache.flat import FlatTokens
from icecache.ops.native import DTYPES, Shape, load, pointer
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.table import LeafTable

__all__ = ["insert_native"]


def insert_native(
    tokens: FlatTokens, table: LeafTable, pool: PagePool, pages: PageTable
) -> Tensor | None:
    """Insert tokens, at most one a row.

    Returns the numbers of the tokens that met something rare (no page with room, a page that
    other rows hold too) and are left to the twin, None if there are none.
    """
    if pool.dtype not in DTYPES:
        return torch.arange(tokens.row.numel())
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
    done = torch.empty(tokens.row.numel(), dtype=torch.bool)
    failed = load().icecache_insert(
        ctypes.byref(shape),
        ctypes.byref(leaves),
        ctypes.byref(native_pages),
        pointer(keys),
        pointer(values),
        pointer(tokens.row),
        pointer(tokens.positions),
        tokens.row.numel(),
        pointer(done),
    )
    if failed:
        raise MemoryError("no memory for the scratch of an insert")
    table.take_native(num_leaves)
    return None if bool(done.all()) else (~done).nonzero()[:, 0]
