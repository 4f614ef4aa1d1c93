"""The fill of a build as one compiled call a row; `fill` is its twin."""

import ctypes
from itertools import accumulate

from torch import Tensor

from icecache.cache.flat import FlatTokens
from icecache.errors import HostMemoryExceeded
from icecache.ops.native import DTYPES, Build, Shape, load, pointer
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.build import Leaves
from icecache.tree.tree import Tree

__all__ = ["fill_native"]


def fill_native(
    tokens: FlatTokens,
    leaves: Leaves,
    page: Tensor,
    first: list[int],
    tree: Tree,
    pool: PagePool,
    pages: PageTable,
) -> None:
    """Store tokens in new leaves and summarise those; arguments as `fill`."""
    keys = tokens.keys.to(pool.dtype).contiguous()
    values = tokens.values.to(pool.dtype).contiguous()
    positions, page = tokens.positions.contiguous(), page.contiguous()
    shape = Shape(page_size=pool.page_size, dim=pool.head_dim, dtype=DTYPES[pool.dtype])
    starts = tokens.row_starts(len(first))
    numbers = list(accumulate(leaves.per_row, initial=0))
    for row, num in enumerate(leaves.per_row):
        start, number = starts[row], numbers[row]
        build = Build(
            *(pointer(each[start:]) for each in (keys, values, positions, leaves.ids)),
            page_of=pointer(page[number:]),
            num_tokens=starts[row + 1] - start,
            num_leaves=num,
            row=row,
            first_leaf=first[row],
            first_number=number,
        )
        failed = load().icecache_fill(
            ctypes.byref(shape),
            ctypes.byref(tree.native()),
            ctypes.byref(pages.native()),
            ctypes.byref(build),
        )
        if failed:
            raise HostMemoryExceeded(4 * (build.num_tokens + num), 0)
