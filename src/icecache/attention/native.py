"""The sparse step as one call of the compiled ops; `attend.attend_sparse` is its twin."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.errors import HostMemoryExceeded
from icecache.ops.native import DTYPES, MAX_HEADS, Segment, Shape, load, pointer
from icecache.store.pool import PagePool
from icecache.tree.table import LeafTable

__all__ = ["Span", "attend_native", "can_attend"]


class Span(NamedTuple):
    """Tokens of every row inside a buffer.

    Attributes
    ----------
    keys, values : shape [batch, num_kv_heads, capacity, head_dim], contiguous
    start, lens : first token and number of tokens of each row (batch x KV heads)
    """

    keys: Tensor
    values: Tensor
    start: list[int]
    lens: list[int]


def can_attend(config: IceCacheConfig, heads: int, dtype: torch.dtype) -> bool:
    """Whether the compiled step does what the config asks for."""
    return (
        config.selection == "tree"
        and config.unit == "leaf"
        and heads <= MAX_HEADS
        and dtype in DTYPES
    )


def attend_native(
    query: Tensor,
    spans: list[Span],
    table: LeafTable,
    pool: PagePool,
    config: IceCacheConfig,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend one query token per head.

    Parameters
    ----------
    query : Tensor, shape [rows, heads, head_dim], float32, contiguous
    spans : list of Span
        What is attended anyhow: sink and window.
    sink_logits : Tensor, shape [rows, heads], optional

    Returns
    -------
    out : Tensor, shape [rows, heads, head_dim], float32
    num_attended : Tensor, shape [rows], int32
    """
    rows, heads, dim = query.shape
    fixed = max(sum(lens) for lens in zip(*(span.lens for span in spans), strict=True))
    shape = Shape(
        rows=rows,
        heads=heads,
        dim=dim,
        leaf_size=table.leaf_size,
        page_size=pool.page_size,
        capacity=table.capacity,
        room=config.budget - fixed,
        dtype=DTYPES[pool.dtype],
        remainder=config.estimates_remainder,
        scaling=scaling,
        softcap=softcap or 0.0,
        spread_weight=config.spread_weight,
    )
    edges = torch.tensor([part for s in spans for part in (s.start, s.lens)], dtype=torch.int32)
    segments = (Segment * len(spans))()
    for i, span in enumerate(spans):
        segments[i] = Segment(
            keys=pointer(span.keys),
            values=pointer(span.values),
            row_stride=span.keys.shape[2] * dim,
            start=pointer(edges[2 * i]),
            len=pointer(edges[2 * i + 1]),
        )
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous()
    out = torch.empty_like(query)
    num_attended = torch.empty(rows, dtype=torch.int32)
    # held by name: the structure stores its tensor's address only
    leaves, num_leaves = table.native_leaves()
    failed = load().icecache_sparse_step(
        ctypes.byref(shape),
        ctypes.byref(leaves),
        pool.address,
        segments,
        len(spans),
        pointer(query),
        pointer(sink_logits),
        pointer(out),
        pointer(num_attended),
    )
    if failed:
        raise HostMemoryExceeded(int(num_leaves.max()) * heads * 16, 0)
    return out, num_attended
