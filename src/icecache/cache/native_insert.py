"""The insert of a decode step as one call of the compiled ops; `placer` is its twin."""

import ctypes

from icecache.cache.flat import FlatTokens
from icecache.config import IceCacheConfig
from icecache.errors import HostMemoryExceeded
from icecache.ops.native import DTYPES, Answer, Shape, load, pointer
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.tree import Tree

__all__ = ["insert_native"]

_INSERTED, _NEEDS_PAGE, _NEEDS_COPY, _NEEDS_ROOM, _TOP_IS_WIDE = range(5)


def insert_native(
    tokens: FlatTokens, tree: Tree, pool: PagePool, pages: PageTable, config: IceCacheConfig
) -> None:
    """Insert tokens one after the other."""
    keys, values = tokens.keys.contiguous(), tokens.values.contiguous()
    shape = Shape(
        rows=tree.num_rows,
        dim=pool.head_dim,
        leaf_size=config.leaf_size,
        page_size=pool.page_size,
        most_children=tree.most_children,
        dtype=DTYPES[pool.dtype],
    )
    done, num, answer = 0, tokens.row.numel(), Answer()
    while done < num:
        done = load().icecache_insert(
            ctypes.byref(shape),
            ctypes.byref(tree.native()),
            ctypes.byref(pages.native()),
            pointer(keys),
            pointer(values),
            pointer(tokens.row),
            pointer(tokens.positions),
            done,
            num,
            ctypes.byref(answer),
        )
        if done < 0:
            raise HostMemoryExceeded(pool.head_dim * 4 * 400, 0)
        if answer.status != _INSERTED:
            last = done - (answer.status == _TOP_IS_WIDE)
            _provide(answer, int(tokens.row[last]), tree, pool, pages)


def _provide(answer: Answer, row: int, tree: Tree, pool: PagePool, pages: PageTable) -> None:
    """Give a row what its token lacked, or its tree the level that it outgrew."""
    if answer.status == _NEEDS_PAGE:
        pages.hold(row, pool.allocate(1), [pool.page_size])
    elif answer.status == _NEEDS_COPY:
        pages.replace(row, answer.page, pool.copy_page(int(pages.page_of[row, answer.page])))
    elif answer.status == _NEEDS_ROOM:
        tree.reserve_growth()
    else:
        tree.raise_top(row)
