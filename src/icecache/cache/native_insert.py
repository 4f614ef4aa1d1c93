"""The insert of a decode step as one call of the compiled ops; `placer` is its twin."""

import ctypes
from typing import NamedTuple

import numpy as np
from torch import Tensor

from icecache.cache.flat import FlatTokens
from icecache.config import IceCacheConfig
from icecache.errors import HostMemoryExceeded
from icecache.ops.native import DTYPES, Answer, Shape, Tokens, load, pointer
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.tree import Tree

__all__ = ["TokensInPlace", "insert_native", "provide"]

_INSERTED, _NEEDS_PAGE, _NEEDS_COPY, _NEEDS_ROOM, _TOP_IS_WIDE = range(5)


class TokensInPlace(NamedTuple):
    """Tokens where they lie in a buffer.

    Attributes
    ----------
    keys, values : contiguous
    row, offset, position : shape [tokens], int64
        The row, the first element in keys and in values, the position in the row's context.
    """

    keys: Tensor
    values: Tensor
    row: np.ndarray
    offset: np.ndarray
    position: np.ndarray

    @classmethod
    def of_flat(cls, tokens: FlatTokens) -> "TokensInPlace":
        """Return the same tokens; keys and values are copied if they are not contiguous."""
        offset = np.arange(tokens.row.numel()) * tokens.keys.shape[1]
        keys, values = tokens.keys.contiguous(), tokens.values.contiguous()
        return cls(keys, values, tokens.row.numpy(), offset, tokens.positions.numpy())


def insert_native(
    tokens: TokensInPlace, tree: Tree, pool: PagePool, pages: PageTable, config: IceCacheConfig
) -> None:
    """Insert tokens one after the other."""
    arrays = (tokens.row, tokens.offset, tokens.position)
    source = Tokens(
        pointer(tokens.keys), pointer(tokens.values), *(array.ctypes.data for array in arrays)
    )
    shape = Shape(
        rows=tree.num_rows,
        dim=pool.head_dim,
        leaf_size=config.leaf_size,
        page_size=pool.page_size,
        most_children=tree.most_children,
        dtype=DTYPES[pool.dtype],
    )
    insert, answer = load().icecache_insert, Answer()
    done, num = 0, tokens.row.size
    while done < num:
        done = insert(
            ctypes.byref(shape),
            ctypes.byref(tree.native()),
            ctypes.byref(pages.native()),
            ctypes.byref(source),
            done,
            num,
            ctypes.byref(answer),
        )
        if done < 0:
            raise HostMemoryExceeded(pool.head_dim * 4 * 400, 0)
        if answer.status != _INSERTED:
            last = done - (answer.status == _TOP_IS_WIDE)
            provide(answer, int(tokens.row[last]), tree, pool, pages)


def provide(answer: Answer, row: int, tree: Tree, pool: PagePool, pages: PageTable) -> None:
    """Give a row what its token lacked, or its tree the level that it outgrew."""
    if answer.status == _NEEDS_PAGE:
        pages.grow(row)
    elif answer.status == _NEEDS_COPY:
        # another row may have taken its copy meanwhile, and left this one alone with the page
        shared = int(pages.page_of[row, answer.page])
        if pool.is_shared(shared):
            pages.replace(row, answer.page, pool.copy_page(shared))
    elif answer.status == _NEEDS_ROOM:
        tree.reserve_growth()
    else:
        tree.raise_top(row)
