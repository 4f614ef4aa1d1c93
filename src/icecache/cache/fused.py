"""One decode step as one compiled call; `IceCacheLayer.append` and `attend` are its twin.

Between two steps the window has room for the next token: its oldest has entered the tree.

What lasts from step to step (addresses, lengths, room to work in) is prepared once, and anew as
soon as anything else has changed the context.
"""

import ctypes
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from icecache.attention.native import Span, can_attend, can_attend_spans, segment
from icecache.cache.context import Context
from icecache.cache.indexed import IndexedTokens
from icecache.cache.native_insert import provide
from icecache.cache.stats import Counters
from icecache.config import IceCacheConfig
from icecache.errors import HostMemoryExceeded, InputError
from icecache.ops.native import DTYPES, Answer, Decode, Shape, Tokens, View, load

__all__ = ["ATTENDED", "NOTHING", "STOPPED", "FusedStep", "NewToken"]

ATTENDED, NOTHING, STOPPED, _NO_MEMORY, _OVERFLOWED = range(5)


class NewToken(NamedTuple):
    """A token of each row of the batch, and what the model makes of its logits.

    Attributes
    ----------
    query : shape [batch, num_q_heads, 1, head_dim]
    keys, values : shape [batch, num_kv_heads, 1, head_dim]
    scaling : float
    softcap : float, optional
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None


class FusedStep:
    """The decode steps of one context.

    Parameters
    ----------
    config : IceCacheConfig
    context : Context
    num_kv_heads : int
    """

    def __init__(self, config: IceCacheConfig, context: Context, num_kv_heads: int) -> None:
        self.context = context
        self._config, self._num_kv_heads = config, num_kv_heads
        self._call = load().icecache_decode
        self._decode, self._stopped, self._answer = Decode(), ctypes.c_int64(), Answer()
        parts = (self._decode, self._stopped, self._answer)
        self._references = tuple(ctypes.byref(part) for part in parts)
        self._scaling = 0.0
        self._softcap: float | None = None
        self._query_shape: tuple[int, ...] = ()
        self._token_shape: tuple[int, ...] = ()
        # what was prepared: the tail as it was left, and whether there was an index
        self._lens: list[int] | None = None
        self._end = 0
        self._buffer: Tensor | None = None
        self._indexed: IndexedTokens | None = None
        self._pointed: NewToken | None = None
        self.took_in = False

    def run(self, new: NewToken, counters: Counters) -> Tensor | None:
        """Take in a token of each row and attend its query; shape and dtype of the query.

        None, and nothing has changed, where only the twin can do that, or say what is wrong. After
        an error `took_in` says whether the token is there all the same.
        """
        if not self.ready(new):
            return None
        out = torch.empty(self._query_shape, dtype=self.context.tail.dtype)
        # the tensors of a forward are not to be kept
        self._pointed = None
        self.open(out)
        stopped, answer = self._stopped, self._answer
        stopped.value = -1
        while True:
            status: int = self._call(*self._references)
            if status != STOPPED:
                break
            self.provide(stopped.value, answer)
        return out if self.close(status, stopped.value, counters) else None

    def ready(self, new: NewToken) -> bool:
        """Prepare for a token of each row; False, and nothing has changed, if only the twin can."""
        self.took_in = False
        if new is self._pointed and self._is_prepared(new):
            return True
        if not all(isinstance(x, Tensor) for x in (new.query, new.keys, new.values)):
            return False
        if not (self._is_prepared(new) or self._prepare(new)):
            return False
        decode, dtype, self._pointed = self._decode, self.context.tail.dtype, None
        if not (
            _point(decode.query, new.query, self._query_shape, dtype)
            and _point(decode.key, new.keys, self._token_shape, dtype)
            and _point(decode.value, new.values, self._token_shape, dtype)
        ):
            return False
        self._pointed = new
        return True

    def open(self, out: Tensor) -> Decode:
        """Begin a step that is `ready`; `out`: where its output goes, contiguous.

        What is returned is for the compiled call; `close` has to follow it.
        """
        decode, indexed = self._decode, self._indexed
        decode.out, decode.threads, decode.end = out.data_ptr(), torch.get_num_threads(), self._end
        # an interrupt may come right behind the call: what was prepared holds only if all went well
        self._lens = None
        if indexed is None:
            self._lengths += 1
        else:
            # what is interrupted between here and the end is in two places or in none
            self.context.is_torn = True
            self._point_to(indexed)
        return decode

    def provide(self, row: int, answer: Answer) -> None:
        """Give a row what the compiled call stopped for."""
        indexed = self._indexed
        assert indexed is not None
        provide(answer, row, indexed.tree, indexed.pool, indexed.pages)
        self._point_to(indexed)

    def point(self) -> None:
        """Look anew where tree and pages of an open step lie: its pool has grown for another."""
        if self._indexed is not None:
            self._point_to(self._indexed)

    def close(self, status: int, row: int, counters: Counters) -> bool:
        """Count what the compiled call did; False where it did nothing, not finite as tokens were.

        row: as the call left it. `NOTHING, -1` is a step that never began.
        """
        indexed = self._indexed
        if indexed is None:
            self._close_dense(status)
        else:
            self._close_sparse(row, indexed)
        if status == NOTHING:
            return False
        if status == _NO_MEMORY:
            raise HostMemoryExceeded(self._wide.nbytes, 0)
        if status == _OVERFLOWED:
            raise InputError("attention overflowed: keys or query are too large for float32")
        self._lens, self._end = self.context.tail.lens, self.context.tail.end
        if indexed is None:
            counters.count_dense(self._tokens)
        else:
            done, attended = self._decode.result, self._attended
            counters.inserted += attended.size
            counters.count_sparse(done.nodes_scored, done.leaves_scored, attended)
        return True

    def _close_dense(self, status: int) -> None:
        """All was attended, the new token with it."""
        if status == ATTENDED:
            self.context.tail.advance(slides=False)
            self.took_in = True
            self._tokens += 1

    def _close_sparse(self, row: int, indexed: IndexedTokens) -> None:
        """The oldest token of each row's window has entered the tree."""
        context, rows = self.context, self._attended.size
        if row == rows:
            self._start += 1
            indexed.lens = [have + 1 for have in indexed.lens]
            self._position += 1
            context.tail.advance(slides=True)
            self.took_in = True
        context.is_torn = 0 <= row < rows

    def _is_prepared(self, new: NewToken) -> bool:
        context, tail = self.context, self.context.tail
        return (
            tail.lens is self._lens
            and tail.end == self._end < tail.capacity
            and tail.keys is self._buffer
            and context.indexed is self._indexed
            and not context.is_torn
            and (self._indexed is not None or self._tokens < self._config.most_dense_tokens)
            and new.query.shape == self._query_shape
            and new.scaling == self._scaling
            and new.softcap == self._softcap
        )

    def _prepare(self, new: NewToken) -> bool:
        """Prepare for the context as it is; False where only the twin can do this step."""
        context, query, self._lens = self.context, new.query, None
        if context.is_torn or not self._can_run(new):
            return False
        context.tail.make_room(1)
        spans = context.whole() if context.indexed is None else context.spans()[::-1]
        if not (self._stays_dense(spans) if context.indexed is None else self._is_steady(spans)):
            return False
        batch, kv_heads, _, dim = context.tail.keys.shape
        self._query_shape, self._token_shape = tuple(query.shape), (batch, kv_heads, 1, dim)
        self._scaling, self._softcap = new.scaling, new.softcap
        rows, heads = batch * kv_heads, query.shape[1] // kv_heads
        self._wide = np.empty((2, rows, heads, dim), dtype=np.float32)
        self._attended = np.empty(rows, dtype=np.int32)
        self._fill(spans, rows, heads, dim)
        self._lens, self._end = context.tail.lens, context.tail.end
        self._buffer, self._indexed = context.tail.keys, context.indexed
        return True

    def _can_run(self, new: NewToken) -> bool:
        context, query = self.context, new.query
        heads, dtype = self._num_kv_heads, context.tail.dtype
        if query.dim() != 4 or query.shape[0] != context.batch_size or query.shape[2] != 1:
            return False
        if query.shape[1] == 0 or query.shape[1] % heads:
            return False
        if query.shape[3] != context.tail.keys.shape[3]:
            return False
        softcap = 1.0 if new.softcap is None else new.softcap
        if not (math.isfinite(new.scaling) and math.isfinite(softcap) and softcap > 0):
            return False
        rows = query.reshape(query.shape[0] * heads, -1, query.shape[3])
        if context.indexed is None:
            return can_attend_spans(rows, dtype)
        return can_attend(self._config, rows, dtype)

    def _stays_dense(self, spans: list[Span]) -> bool:
        self._tokens = int(spans[0].lens.max())
        return self._tokens < self._config.most_dense_tokens

    def _is_steady(self, spans: list[Span]) -> bool:
        """Whether sinks are full, and windows with the next token: one of each row leaves."""
        tail, sink = spans
        indexed = self.context.indexed
        return bool(
            (tail.lens == self._config.window - 1).all()
            and (sink.lens == self._config.sink).all()
            and indexed is not None
            and min(indexed.lens) > 0
        )

    def _fill(self, spans: list[Span], rows: int, heads: int, dim: int) -> None:
        config, context, decode = self._config, self.context, self._decode
        self._start, self._lengths = spans[0].start, spans[0].lens
        if context.indexed is not None:
            self._lengths += 1
        decode.shape = Shape(
            rows=rows,
            heads=heads,
            dim=dim,
            leaf_size=config.leaf_size,
            page_size=config.page_size,
            room=0 if context.indexed is None else config.budget - config.sink - config.window,
            most_children=2 * config.fan_out,
            crossover=config.most_flat_leaves,
            field_of_view=config.field_of_view,
            dtype=DTYPES[context.tail.dtype],
            remainder=config.estimates_remainder,
            scaling=self._scaling,
            softcap=self._softcap or 0.0,
            spread_weight=config.spread_weight,
        )
        for i, span in enumerate(spans):
            decode.segments[i] = segment(span)
        self._spans = spans
        decode.num_segments, decode.kv_heads = len(spans), self._num_kv_heads
        decode.wide, decode.result.num_attended = self._wide.ctypes.data, self._attended.ctypes.data
        decode.tree = decode.pages = None
        if context.indexed is not None:
            self._list_leaving(context.indexed)

    def _list_leaving(self, indexed: IndexedTokens) -> None:
        """Name what leaves the window: a token of each row."""
        decode, rows = self._decode, self._attended.size
        self._row, self._offset = np.arange(rows), np.empty(rows, dtype=np.int64)
        self._position = np.asarray(indexed.lens, dtype=np.int64) + self._config.sink
        tail = decode.segments[0]
        arrays = (self._row, self._offset, self._position)
        decode.leaving = Tokens(tail.keys, tail.values, *(array.ctypes.data for array in arrays))
        decode.offset = self._offset.ctypes.data
        self._answers = (Answer * rows)()
        decode.answers = ctypes.addressof(self._answers)

    def _point_to(self, indexed: IndexedTokens) -> None:
        self._tree, self._pages = indexed.to_write()
        self._decode.tree = ctypes.addressof(self._tree)
        self._decode.pages = ctypes.addressof(self._pages)


def _point(view: View, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Let a view show a tensor; False if it is not what was prepared for."""
    if x.shape != shape or x.dtype is not dtype or not x.is_cpu:
        return False
    batch_stride, head_stride, _, stride = x.stride()
    view.data, view.batch_stride, view.head_stride = x.data_ptr(), batch_stride, head_stride
    return stride == 1
