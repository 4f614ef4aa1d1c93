"""Where the tokens of one layer are: sink, tree and pages, window.

    short context     tail (everything)
    past the budget   sink | indexed (tree and pages) | tail (the window)

A token's position counts from its row's first token, padding left out.
"""

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from icecache.attention.attend import Fixed
from icecache.attention.native import Span
from icecache.cache.flat import FlatTokens
from icecache.cache.granted import Granted
from icecache.cache.indexed import IndexedTokens
from icecache.cache.native_insert import TokensInPlace
from icecache.cache.tail import Tail
from icecache.config import IceCacheConfig
from icecache.errors import IntegrityError
from icecache.ops.bounds import check_range

__all__ = ["Context", "Dense"]

_TAIL_SLACK = 64


class Dense(NamedTuple):
    """All tokens: [batch, num_kv_heads, tokens, head_dim] twice, and [batch, tokens] bool."""

    keys: Tensor
    values: Tensor
    valid: Tensor | None


class Context:
    """Tokens of one layer.

    Parameters
    ----------
    config : IceCacheConfig
    batch, num_kv_heads, head_dim : int
    dtype : torch.dtype
    granted : Granted, optional
        Memory for sink and window, of one batch row.
    """

    def __init__(
        self,
        config: IceCacheConfig,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        granted: Granted | None = None,
    ) -> None:
        self._config, self._num_kv_heads, self._granted = config, num_kv_heads, granted
        slack = _TAIL_SLACK + config.draft
        self.tail = Tail(batch, num_kv_heads, head_dim, dtype, slack, granted=granted)
        self.indexed: IndexedTokens | None = None
        self.is_torn = False
        self._sink_keys = torch.zeros(batch, num_kv_heads, 0, head_dim, dtype=dtype)
        self._sink_values = torch.zeros_like(self._sink_keys)
        self._sink_lens = [0] * batch

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self.tail.lens)

    @property
    def row_lens(self) -> list[int]:
        """Tokens of each batch row."""
        parts = zip(self._sink_lens, self._indexed_lens(), self.tail.lens, strict=True)
        return [sum(part) for part in parts]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values held."""
        pages = 0 if self.indexed is None else self.indexed.pool.nbytes
        sink = 2 * self._sink_keys.numel() * self._sink_keys.element_size()
        return pages + sink + self.tail.nbytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the summaries and of where tokens are."""
        return 0 if self.indexed is None else self.indexed.index_bytes

    @property
    def granted_bytes(self) -> int:
        """Bytes of sink and window that lie in granted memory."""
        granted, sink = self._granted, 0
        if granted is not None and self._sink_keys is granted.sink_keys:
            sink = 2 * self._sink_keys.numel() * self._sink_keys.element_size()
        return sink + self.tail.granted_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of all that is held in memory of its own."""
        return self.kv_bytes + self.index_bytes - self.granted_bytes

    @property
    def full_cache_bytes(self) -> int:
        """Bytes of the same tokens' keys and values in a full cache."""
        _, heads, _, dim = self._sink_keys.shape
        return 2 * sum(self.row_lens) * heads * dim * self._sink_keys.element_size()

    def settle(self, keep: int) -> tuple[int, int]:
        """Move all but the latest `keep` tokens out of the tail, once the budget is passed.

        Returns
        -------
        inserted, built : int
            Tokens that entered the tree one leaf at a time, and in builds, over all rows.
        """
        self._check_whole()
        if self.indexed is None:
            if max(self.tail.lens) <= self._config.most_dense_tokens:
                return 0, 0
            self._start_index()
        if max(self.tail.lens) <= keep:
            return 0, 0
        self._fill_sink([max(0, length - keep) for length in self.tail.lens])
        leaving = [max(0, length - keep) for length in self.tail.lens]
        if not any(leaving):
            return 0, 0
        assert self.indexed is not None
        # what is interrupted between here and the end is in two places or in none
        self.is_torn = True
        inserted = self._enter(self.indexed, leaving)
        self.tail.drop_oldest(leaving)
        self.is_torn = False
        if max(leaving) > 2 * _TAIL_SLACK or self.tail.is_away:
            self.tail.release()
        return inserted, sum(leaving) * self._num_kv_heads - inserted

    @property
    def room(self) -> int:
        """Tokens that the budget leaves a row beside sink and window."""
        fixed = (sink + tail for sink, tail in zip(self._sink_lens, self.tail.lens, strict=True))
        return max(0, self._config.budget - max(fixed))

    def spans(self) -> list[Span]:
        """Return sink and window where they lie; the same tokens as `fixed`."""
        heads = self._num_kv_heads
        keys, values, start = self.tail.buffers()
        parts = (self._sink_lens, [0] * self.batch_size, self.tail.lens, start)
        sink, nothing, latest, first = np.array(parts, dtype=np.int32).repeat(heads, axis=1)
        return [
            Span(self._sink_keys, self._sink_values, nothing, sink),
            Span(keys, values, first, latest),
        ]

    def whole(self) -> list[Span]:
        """Return all tokens where they lie; only before there is an index."""
        keys, values, start = self.tail.buffers()
        first, lens = (
            np.array(_repeat(each, self._num_kv_heads), dtype=np.int32)
            for each in (start, self.tail.lens)
        )
        return [Span(keys, values, first, lens)]

    def fixed(self) -> Fixed:
        """Return sink and window, one row per KV head."""
        keys, values = self.tail.keys_values()
        valid = torch.cat([self._sink_valid(), self.tail.valid()], 1)
        return Fixed(
            torch.cat([self._sink_keys, keys], 2).flatten(0, 1),
            torch.cat([self._sink_values, values], 2).flatten(0, 1),
            valid.repeat_interleave(self._num_kv_heads, 0),
        )

    def dense(self) -> Dense:
        """Return all tokens of all rows, the latest at the end."""
        keys, values = self.tail.keys_values()
        if self.indexed is None:
            return Dense(keys, values, self.tail.valid() if self.tail.is_ragged else None)
        middle_keys, middle_values, middle_valid = self.indexed.read_all()
        shape = (self.batch_size, self._num_kv_heads, -1, keys.shape[3])
        valid = torch.cat(
            [self._sink_valid(), middle_valid[:: self._num_kv_heads], self.tail.valid()], 1
        )
        return Dense(
            torch.cat([self._sink_keys, middle_keys.view(shape), keys], 2),
            torch.cat([self._sink_values, middle_values.view(shape), values], 2),
            None if bool(valid.all()) else valid,
        )

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows in a new order, repeated or dropped."""
        self.tail.reorder(rows)
        self._granted = None
        self._sink_keys, self._sink_values = self._sink_keys[rows], self._sink_values[rows]
        self._sink_lens = [self._sink_lens[row] for row in rows.tolist()]
        if self.indexed is not None:
            heads = torch.arange(self._num_kv_heads)
            self.indexed.reorder((rows[:, None] * self._num_kv_heads + heads).flatten())

    def fork(self) -> "Context":
        """Return the same tokens; pages and tree are shared until one of the two writes."""
        self._check_whole()
        other = copy.copy(self)
        other.tail = self.tail.fork()
        other._granted = None
        other._sink_keys, other._sink_values = self._sink_keys.clone(), self._sink_values.clone()
        other._sink_lens = list(self._sink_lens)
        other.indexed = None if self.indexed is None else self.indexed.fork()
        return other

    def release(self) -> None:
        """Let the pages go, before the context itself goes while forks of it stay."""
        if self.indexed is not None:
            self.indexed.pages.release()

    def state(self) -> dict[str, Any]:
        """Return all that is held, by name; views, valid until it changes."""
        self._check_whole()
        return {
            "batch": self.batch_size,
            "tail": self.tail.state(),
            "sink": {
                "keys": self._sink_keys,
                "values": self._sink_values,
                "lens": self._sink_lens,
            },
            "indexed": None if self.indexed is None else self.indexed.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back into an empty context of as many rows."""
        self.tail.load_state(state["tail"])
        if state["indexed"] is None:
            return
        self._start_index()
        assert self.indexed is not None
        self.indexed.load_state(state["indexed"])
        sink = state["sink"]
        check_range("sink", np.asarray(sink["lens"]), 0, self._config.sink)
        self._sink_keys.copy_(sink["keys"])
        self._sink_values.copy_(sink["values"])
        self._sink_lens = [int(length) for length in sink["lens"]]

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every token is in exactly one place."""
        if self.indexed is None:
            return
        middles = [
            range(first, first + length)
            for first, length in zip(self._sink_lens, self._indexed_lens(), strict=True)
            for _ in range(self._num_kv_heads)
        ]
        self.indexed.check_integrity(middles)

    def _check_whole(self) -> None:
        if self.is_torn:
            raise IntegrityError(
                "an earlier call was interrupted while it moved tokens; call reset() to start anew"
            )

    def _indexed_lens(self) -> list[int]:
        if self.indexed is None:
            return [0] * self.batch_size
        return self.indexed.lens[:: self._num_kv_heads]

    def _sink_valid(self) -> Tensor:
        slot = torch.arange(self._sink_keys.shape[2])
        return slot[None] < torch.tensor(self._sink_lens)[:, None]

    def _start_index(self) -> None:
        shape = list(self._sink_keys.shape)
        shape[2] = self._config.sink
        if self._granted is not None and shape[0] == 1:
            self._sink_keys, self._sink_values = self._granted[:2]
        else:
            self._sink_keys = self._sink_keys.new_zeros(shape)
            self._sink_values = self._sink_values.new_zeros(shape)
        num_rows = self.batch_size * self._num_kv_heads
        dim, dtype = shape[3], self._sink_keys.dtype
        self.indexed = IndexedTokens(self._config, num_rows, dim, dtype)

    def _fill_sink(self, leaving: list[int]) -> None:
        """A row's first tokens to leave the tail are its sink, whenever that is."""
        sink = self._config.sink
        grow = [min(n, sink - have) for n, have in zip(leaving, self._sink_lens, strict=True)]
        if not any(grow):
            return
        for row, num in enumerate(grow):
            span = slice(self._sink_lens[row], self._sink_lens[row] + num)
            self._sink_keys[row, :, span], self._sink_values[row, :, span] = self.tail.oldest(
                row, num
            )
            self._sink_lens[row] += num
        self.tail.drop_oldest(grow)

    def _enter(self, indexed: IndexedTokens, leaving: list[int]) -> int:
        """Move tokens into the tree; return how many joined leaves, over all rows."""
        per_row = _repeat(leaving, self._num_kv_heads)
        if not indexed.takes_in_place(per_row):
            return indexed.add(self._flatten(leaving))
        keys, values, _ = self.tail.buffers()
        rows = np.arange(len(per_row))
        first = np.asarray(indexed.lens) + np.repeat(self._sink_lens, self._num_kv_heads)
        if max(leaving) > 1 or min(leaving) < 1:
            rows, first = np.repeat(rows, per_row), np.repeat(first, per_row)
            first += np.concatenate([np.arange(num) for num in per_row])
        offset = self.tail.offsets_of_oldest(leaving)
        indexed.join_in_place(TokensInPlace(keys, values, rows, offset, first))
        indexed.lens = [have + new for have, new in zip(indexed.lens, per_row, strict=True)]
        return sum(per_row)

    def _flatten(self, leaving: list[int]) -> FlatTokens:
        heads = self._num_kv_heads
        firsts = [s + m for s, m in zip(self._sink_lens, self._indexed_lens(), strict=True)]
        oldest = [self.tail.oldest(row, num) for row, num in enumerate(leaving)]
        positions = [
            torch.arange(first, first + num).repeat(heads)
            for first, num in zip(firsts, leaving, strict=True)
        ]
        per_row = np.repeat(leaving, heads)
        return FlatTokens(
            torch.cat([keys.flatten(0, 1) for keys, _ in oldest]),
            torch.cat([values.flatten(0, 1) for _, values in oldest]),
            torch.from_numpy(np.repeat(np.arange(per_row.size), per_row)),
            torch.cat(positions),
        )


def _repeat(items: list[int], times: int) -> list[int]:
    return [item for item in items for _ in range(times)]
