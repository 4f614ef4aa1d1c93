"""The sparse step as one call of the compiled ops; `attend.attend_sparse` is its twin."""

import ctypes
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from icecache.attention.ask import Ask
from icecache.attention.attend import Stored
from icecache.config import IceCacheConfig
from icecache.errors import HostMemoryExceeded
from icecache.ops.native import DTYPES, MAX_DIM, MAX_HEADS, Result, Segment, Shape, load, pointer

__all__ = [
    "Outcome",
    "Span",
    "attend_native",
    "attend_spans",
    "can_attend",
    "can_attend_spans",
    "search_native",
    "segment",
]

_EVERY_LEAF = 1 << 62
_POSITIONS = (1 << 31) - 1


class Span(NamedTuple):
    """Tokens of every row inside a buffer.

    Attributes
    ----------
    keys, values : shape [batch, num_kv_heads, capacity, head_dim], contiguous
    start, lens : shape [rows], int32. First token and number of tokens of each row.
    """

    keys: Tensor
    values: Tensor
    start: np.ndarray
    lens: np.ndarray


class Outcome(NamedTuple):
    """What a step gives.

    Attributes
    ----------
    out : shape [rows, heads, head_dim], float32; None of a search
    num_attended : shape [rows], int32
    positions : shape [rows, room], int32; of the selected tokens, -1 behind; None of a step whose
        selection no other layer reuses
    nodes_scored, leaves_scored : int, over all rows
    """

    out: Tensor | None
    num_attended: Tensor
    positions: Tensor | None
    nodes_scored: int
    leaves_scored: int


def can_attend(config: IceCacheConfig, query: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled step does what the config asks for."""
    plain = config.selection == "tree" and config.unit == "leaf"
    return plain and can_attend_spans(query, dtype)


def can_attend_spans(query: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled step takes such a query, shape [rows, heads, head_dim]."""
    return query.shape[1] <= MAX_HEADS and query.shape[2] <= MAX_DIM and dtype in DTYPES


def attend_native(ask: Ask, spans: list[Span], stored: Stored, config: IceCacheConfig) -> Outcome:
    """Attend one query token per head; spans: what is attended anyhow, sink and window."""
    out, room = torch.empty_like(ask.query), _room(spans, config)
    selects = config.layer_reuse > 1 and ask.positions is None
    positions = _no_positions(ask, room) if selects else None
    return _call(ask, spans, stored, config, room, out, positions)


def attend_spans(ask: Ask, spans: list[Span], config: IceCacheConfig) -> Tensor:
    """Attend to spans alone, exactly; shape of the query."""
    out = torch.empty_like(ask.query)
    _call(ask, spans, None, config, 0, out, None)
    return out


def search_native(ask: Ask, spans: list[Span], stored: Stored, config: IceCacheConfig) -> Outcome:
    """Say which tokens a step would select; arguments as in `attend_native`."""
    room = _room(spans, config)
    return _call(ask, spans, stored, config, room, None, _no_positions(ask, room))


def _room(spans: list[Span], config: IceCacheConfig) -> int:
    return config.budget - _most_fixed(spans)


def _no_positions(ask: Ask, room: int) -> Tensor:
    return torch.full((ask.query.shape[0], max(0, room)), -1, dtype=torch.int32)


def _padded(ask: Ask, room: int) -> Tensor | None:
    """Return the given positions, as many a row as there is room for."""
    if ask.positions is None:
        return None
    positions, given = _no_positions(ask, room), ask.positions.long()
    # the tree holds no position that int32 does not
    given = given.masked_fill((given < 0) | (given >= _POSITIONS), -1)
    positions[:, : given.shape[1]] = given
    return positions


def segment(span: Span) -> Segment:
    """Return where a span is, for the compiled ops; valid as long as the span is there."""
    return Segment(
        keys=pointer(span.keys),
        values=pointer(span.values),
        row_stride=span.keys.shape[2] * span.keys.shape[3],
        start=span.start.ctypes.data,
        len=span.lens.ctypes.data,
    )


def _most_fixed(spans: list[Span]) -> int:
    total = spans[0].lens if len(spans) == 1 else spans[0].lens + spans[1].lens
    return int(total.max())


def _call(
    ask: Ask,
    spans: list[Span],
    stored: Stored | None,
    config: IceCacheConfig,
    room: int,
    out: Tensor | None,
    positions: Tensor | None,
) -> Outcome:
    rows, heads, dim = ask.query.shape
    shape = Shape(
        rows=rows,
        heads=heads,
        dim=dim,
        leaf_size=config.leaf_size,
        page_size=config.page_size,
        room=room,
        most_children=2 * config.fan_out,
        crossover=config.most_flat_leaves if ask.positions is None else _EVERY_LEAF,
        field_of_view=config.field_of_view,
        dtype=DTYPES[spans[0].keys.dtype],
        remainder=config.estimates_remainder,
        scaling=ask.scaling,
        softcap=ask.softcap or 0.0,
        spread_weight=config.spread_weight,
    )
    segments = (Segment * len(spans))()
    for i, span in enumerate(spans):
        segments[i] = segment(span)
    sinks = None if ask.sink_logits is None else ask.sink_logits.float().contiguous()
    num_attended = torch.empty(rows, dtype=torch.int32)
    given = _padded(ask, room)
    result = Result(pointer(out), pointer(num_attended), pointer(positions), pointer(given))
    failed = load().icecache_sparse_step(
        ctypes.byref(shape),
        None if stored is None else ctypes.byref(stored.tree.native()),
        None if stored is None else ctypes.byref(stored.pages.native()),
        segments,
        len(spans),
        pointer(ask.query),
        pointer(sinks),
        torch.get_num_threads(),
        ctypes.byref(result),
    )
    if failed:
        longest = _most_fixed(spans) if stored is None else stored.tree.leaves.longest
        raise HostMemoryExceeded(longest * heads * 16, 0)
    return Outcome(out, num_attended, positions, result.nodes_scored, result.leaves_scored)
