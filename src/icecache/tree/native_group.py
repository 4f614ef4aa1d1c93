"""Grouping as one call of the compiled ops; `cluster.group` is its twin."""

import ctypes

import torch
from torch import Tensor

from icecache.errors import HostMemoryExceeded
from icecache.ops.native import DTYPES, load, pointer
from icecache.tree.cluster import COARSE_CELL, MAX_COARSE_CELLS, GroupRule

__all__ = ["group_native"]


class _Rule(ctypes.Structure):
    """`Rule` of group.c."""

    _fields_ = [
        (name, ctypes.c_int64) for name in (*GroupRule._fields, "coarse_cell", "most_cells")
    ]


def group_native(
    points: Tensor, row_lens: list[int], rule: GroupRule, means: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """Group the points of every row; arguments and result as `cluster.group`.

    The points may have the model's dtype: they are converted segment by segment. `means`, shape
    [points, dim], float32, takes the groups' means, one after the other, each seen from the mean
    of its row.
    """
    points = (points if points.dtype in DTYPES else points.float()).contiguous()
    lens = torch.tensor(row_lens, dtype=torch.int64)
    ids = torch.empty(points.shape[0], dtype=torch.int64)
    per_row = torch.empty_like(lens)
    failed = load().icecache_group(
        pointer(points),
        DTYPES[points.dtype],
        pointer(lens),
        lens.numel(),
        points.shape[1],
        ctypes.byref(_Rule(*rule, COARSE_CELL, MAX_COARSE_CELLS)),
        pointer(ids),
        pointer(per_row),
        pointer(means),
    )
    if failed:
        raise HostMemoryExceeded(4 * points.shape[1] * 4 * min(rule.segment, max(row_lens)), 0)
    return ids, per_row.tolist()
