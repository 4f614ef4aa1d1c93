"""Children to nodes, and those nodes' summaries, as one call of the compiled ops."""

import ctypes

from torch import Tensor

from icecache.ops.native import Tree as NativeTree
from icecache.ops.native import load, pointer

__all__ = ["adopt_native"]


def adopt_native(
    tree: NativeTree, level: int, head_dim: int, row: Tensor, child: Tensor, node: Tensor
) -> None:
    """Make children the children of nodes of `level` and summarise these.

    The twins are `Level.link` and `merge_summaries`. row, child, node: shape [n], int64; a node's
    children, all that it has, come one after the other.
    """
    load().icecache_adopt(
        ctypes.byref(tree),
        level,
        head_dim,
        pointer(row.contiguous()),
        pointer(child.contiguous()),
        pointer(node.contiguous()),
        row.numel(),
    )
