"""Insert: each token joins its nearest leaf, and a leaf that grows too large is cut in two."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.errors import HostMemoryExceeded
from icecache.ops.batched import nearest_leaf
from icecache.ops.native import Shape, load, pointer
from icecache.tree.cluster import split_oversized
from icecache.tree.table import LeafTable

__all__ = ["NO_LEAF", "Pieces", "assign", "cut"]

NO_LEAF = -1


class Pieces(NamedTuple):
    """What leaves with new tokens become.

    Attributes
    ----------
    ids : shape [tokens], int64. Each token's piece.
    leaf : shape [pieces], int64. The leaf each piece comes from; the first of it keeps its place.
    """

    ids: Tensor
    leaf: Tensor


def assign(table: LeafTable, keys: Tensor, row: Tensor, native: bool) -> Tensor:
    """Return the nearest leaf of each key in its row, `NO_LEAF` where the row has none.

    keys: shape [tokens, head_dim], float32; row: shape [tokens], int64, rising; native: by the
    compiled op.
    """
    if native:
        return _assign_native(table, keys.contiguous(), row)
    counts = torch.bincount(row, minlength=table.num_rows)
    starts = counts.cumsum(0) - counts
    column = torch.arange(row.shape[0]) - starts[row]
    padded = keys.new_zeros(table.num_rows, int(counts.max()), keys.shape[1])
    padded[row, column] = keys
    leaves = table.view()
    if leaves.count.shape[1] == 0:
        return torch.full_like(row, NO_LEAF)
    nearest = nearest_leaf(padded, leaves.key_mean, leaves.key_scale, leaves.count)
    has_leaves = torch.tensor([num > 0 for num in table.num_leaves])
    return torch.where(has_leaves[row], nearest[row, column], NO_LEAF)


def _assign_native(table: LeafTable, keys: Tensor, row: Tensor) -> Tensor:
    leaves, num_leaves = table.native_leaves()
    shape = Shape(rows=num_leaves.numel(), dim=keys.shape[1], capacity=table.capacity)
    nearest = torch.empty_like(row)
    failed = load().icecache_nearest_leaf(
        ctypes.byref(shape),
        ctypes.byref(leaves),
        pointer(keys),
        pointer(row),
        row.numel(),
        pointer(nearest),
    )
    if failed:
        raise HostMemoryExceeded(keys.shape[1] * 4, 0)
    return nearest


def cut(keys: Tensor, leaf: Tensor, num_leaves: int, leaf_size: int) -> Pieces:
    """Cut leaves of more than `leaf_size` tokens.

    keys: shape [tokens, head_dim], float32, all tokens of the leaves; leaf: shape [tokens], int64.
    """
    ids, owner = split_oversized(keys, leaf, num_leaves, leaf_size, torch.arange(num_leaves))
    return Pieces(ids, owner)
