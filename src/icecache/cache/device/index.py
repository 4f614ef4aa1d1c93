"""The tokens of a context past its budget, on a device: sink, window, leaves and pages.

What a step changes lies in tensors of fixed shape; what the host has to know of it (how long rows
are, whether there is room) it counts along, without asking the device.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icecache.cache.device.build import Built, NewTokens, build, store
from icecache.cache.device.settings import DeviceSettings
from icecache.cache.device.transfer import Outbound
from icecache.ops.device.records import DevicePages, DeviceTree, Fixed, Leaving
from icecache.store.device_pool import DevicePool, PoolShape

__all__ = ["DeviceIndex", "Fresh"]

# more tokens of a row than this become leaves of their own: each insert scans all leaves
_INSERT_AT_MOST = 32
_BUILD_ELEMENTS = 1 << 26


class Fresh(NamedTuple):
    """New tokens of all batch rows.

    Attributes
    ----------
    keys, values : shape [batch, num_kv_heads, tokens, head_dim]
    counts : each batch row's own tokens, the last of its columns.
    """

    keys: Tensor
    values: Tensor
    counts: list[int]

    def of_row(self, row: int) -> tuple[Tensor, Tensor]:
        """Return a batch row's tokens, two of shape [num_kv_heads, tokens, head_dim]."""
        start = self.keys.shape[2] - self.counts[row]
        return self.keys[row, :, start:], self.values[row, :, start:]


class DeviceIndex:
    """Sink, window, leaves and pages of one layer.

    Parameters
    ----------
    settings : DeviceSettings
    ops : module
        `icecache.ops.device.twin` or `icecache.ops.triton`.
    batch : int
    """

    def __init__(self, settings: DeviceSettings, ops: ModuleType, batch: int) -> None:
        self.settings, self._ops = settings, ops
        self.lens, self.left = [0] * batch, [settings.config.sink] * batch
        self.is_torn = False
        self._outbound = Outbound(settings.device)
        self.most_leaves = self.most_pages = 0
        self._pool = DevicePool(self._shape_for(0, 0), settings.device)
        config = settings.config
        shape = (batch * settings.heads, config.sink + config.window, settings.dim)
        with torch.inference_mode(False):
            lens = torch.zeros(batch, dtype=torch.int32, device=settings.device)
            keys = torch.zeros(shape, dtype=settings.dtype, device=settings.device)
            left = torch.full_like(lens, config.sink)
            self.fixed = Fixed(keys, torch.zeros_like(keys), lens, left, config.sink)
            self.step_number = torch.zeros_like(lens[:1])
        self.leaving: Leaving | None = None
        self._num_leaving = 0
        self._nobody = self._nothing_leaves()

    @property
    def tree(self) -> DeviceTree:
        """The leaves."""
        return self._pool.tree

    @property
    def pages(self) -> DevicePages:
        """The pages."""
        return self._pool.pages

    @property
    def pool(self) -> DevicePool:
        """The memory of both."""
        return self._pool

    @property
    def in_tree(self) -> list[int]:
        """Tokens of each batch row that are in the tree, or wait for their insert."""
        return [left - self.settings.config.sink for left in self.left]

    @property
    def may_crop(self) -> list[int]:
        """Tokens that each batch row can lose: what has not gone into the tree."""
        sink = self.settings.config.sink
        ends = zip(self.lens, self.left, strict=True)
        return [n if left == sink else n - left for n, left in ends]

    @property
    def num_fixed(self) -> list[int]:
        """Tokens of each row (batch row x KV head) in sink and window, and what leaves it."""
        sink, more = self.settings.config.sink, int(self.leaving is not None)
        each = zip(self.lens, self.left, strict=True)
        fixed = [min(n, sink) + max(0, n - left) + more for n, left in each]
        return [num for num in fixed for _ in range(self.settings.heads)]

    @property
    def room(self) -> int:
        """Tokens that the budget leaves a row beside those."""
        return max(0, self.settings.config.budget - max(self.num_fixed))

    @property
    def is_steady(self) -> bool:
        """Whether each row's window is full: every step does the same from now on."""
        window = self.settings.config.window
        return all(n - left == window for n, left in zip(self.lens, self.left, strict=True))

    @property
    def nothing_leaves(self) -> Leaving:
        """No leaving token."""
        return self._nobody

    def push(self, keys: Tensor, values: Tensor) -> None:
        """Take one token of each row, [batch, num_kv_heads, 1, head_dim]; `settle` comes after."""
        assert self.leaving is None
        self.make_room(1, 1)
        window = self.settings.config.window
        leaves = [n - left == window for n, left in zip(self.lens, self.left, strict=True)]
        rows = self.settings.rows_of(keys), self.settings.rows_of(values)
        leaving = self._ops.push(self.fixed, *rows)
        self.leaving = leaving if any(leaves) else None
        self._num_leaving = self.settings.heads * sum(leaves)
        self.lens = [n + 1 for n in self.lens]
        self.left = [left + one for left, one in zip(self.left, leaves, strict=True)]
        if any(leaves):
            self.most_leaves += 1
            self.most_pages += 1

    def addresses(self) -> tuple[int, ...]:
        """Return where a step reads and writes, and how much it selects."""
        parts = (self.fixed.keys, self.tree.key_mean, self.pages.host, self.step_number)
        return (self.room, *(part.data_ptr() for part in parts))

    def count_step(self) -> int:
        """Take note of a whole step that the device did; returns how many tokens it inserted."""
        self.lens = [n + 1 for n in self.lens]
        self.left = [n + 1 for n in self.left]
        self.most_leaves += 1
        self.most_pages += 1
        return len(self.lens) * self.settings.heads

    def mark(self) -> tuple[object, ...]:
        """Return what the host counts, for `rewind`."""
        return list(self.lens), list(self.left), self.most_leaves, self.most_pages, self.leaving

    def rewind(self, mark: Any) -> None:
        """Count as at a mark."""
        self.lens, self.left, self.most_leaves, self.most_pages, self.leaving = mark

    def settle(self) -> int:
        """Insert what the last `push` displaced, unless a step has; returns how many tokens."""
        if self.leaving is None:
            return 0
        self._join(self.leaving)
        return self.inserted()

    def inserted(self) -> int:
        """Take note that a step has inserted what was leaving; returns how many tokens."""
        self.leaving = None
        return self._num_leaving

    def enter(self, fresh: Fresh) -> tuple[int, int]:
        """Take many tokens in; what passes the window goes into the tree.

        Returns
        -------
        inserted, built : int
            Tokens that joined leaves, and that became leaves of their own, over all rows.
        """
        inserted = self.settle()
        self.is_torn = True
        had = self.in_tree
        leaving = [self._slide(row, *fresh.of_row(row)) for row in range(len(fresh.counts))]
        self.fixed.lens.copy_(torch.tensor(self.lens, dtype=torch.int32))
        self.fixed.left.copy_(torch.tensor(self.left, dtype=torch.int32))
        numbers = [tokens.keys.shape[1] for tokens in leaving]
        joins = [0 < n <= _INSERT_AT_MOST and old > 0 for n, old in zip(numbers, had, strict=True)]
        self._join_many(leaving, joins)
        self._build_rows({r: t for r, t in enumerate(leaving) if t.keys.shape[1] and not joins[r]})
        self.is_torn = False
        joined = self.settings.heads * sum(n for n, one in zip(numbers, joins, strict=True) if one)
        return inserted + joined, self.settings.heads * sum(numbers) - joined

    def crop(self, nums: list[int]) -> int:
        """Drop the latest tokens of each batch row; returns how many were inserted for it."""
        inserted = self.settle()
        self.lens = [n - num for n, num in zip(self.lens, nums, strict=True)]
        self.fixed.lens.copy_(torch.tensor(self.lens, dtype=torch.int32))
        return inserted

    def reorder(self, rows: Tensor) -> int:
        """Take batch rows in a new order; returns how many tokens were inserted for it."""
        inserted = self.settle()
        self._outbound.wait()
        heads = torch.arange(self.settings.heads)
        each = (rows[:, None] * self.settings.heads + heads).flatten()
        self._pool = self._pool.reordered(each)
        where, each = rows.to(self.settings.device), each.to(self.settings.device)
        keys, values, lens, left, sink = self.fixed
        with torch.inference_mode(False):
            self.fixed = Fixed(keys[each], values[each], lens[where], left[where], sink)
        self.lens = [self.lens[row] for row in rows.tolist()]
        self.left = [self.left[row] for row in rows.tolist()]
        self._nobody = self._nothing_leaves()
        return inserted

    def fork(self) -> "DeviceIndex":
        """Return a copy that shares nothing."""
        self.settle()
        other = object.__new__(DeviceIndex)
        other.__dict__.update(self.__dict__)
        self._outbound.wait()
        batch = len(self.lens)
        other._pool = self._pool.reordered(torch.arange(batch * self.settings.heads))
        with torch.inference_mode(False):
            other.fixed = self.fixed.to(self.settings.device)
            other.step_number = self.step_number.clone()
        other.lens, other.left = list(self.lens), list(self.left)
        other._outbound = Outbound(self.settings.device)
        return other

    def make_room(self, leaves: int, pages: int) -> None:
        """Make sure that rows can gain so many leaves and pages; moves all to a larger pool if not.

        A pool that moves has other addresses: what has recorded them must record anew.
        """
        shape = self._pool.shape
        if self.most_leaves + leaves <= shape.leaves and self.most_pages + pages <= shape.pages:
            return
        # the bounds count a leaf and a page for every insert: ask how many there are
        self.most_leaves = int(self.tree.num_leaves.max())
        self.most_pages = int(self.tree.num_pages.max())
        leaves, pages = leaves + self.most_leaves, pages + self.most_pages
        if leaves <= shape.leaves and pages <= shape.pages:
            return
        self._outbound.wait()
        self._pool = self._pool.grown(self._shape_for(leaves, pages))

    def join_transfers(self) -> None:
        """Let the steps from here on see pages that are still on their way to host memory."""
        self._outbound.join()

    def wait_for_transfers(self) -> None:
        """Wait until all pages are in host memory."""
        self._outbound.wait()

    def close(self) -> None:
        """Let the memory go."""
        self._outbound.wait()
        self._pool.close()

    def _slide(self, row: int, keys: Tensor, values: Tensor) -> NewTokens:
        """Move a row's sink and window on by its new tokens; returns what leaves them."""
        config = self.settings.config
        sink, window = config.sink, config.window
        own = slice(row * self.settings.heads, (row + 1) * self.settings.heads)
        stores = self.fixed.keys[own], self.fixed.values[own]
        length, left = self.lens[row], self.left[row]
        fill = min(keys.shape[1], max(0, sink - length))
        new_length = length + keys.shape[1]
        new_left = max(left, new_length - window)
        first = max(length, sink)
        in_ring = self._ring(left, min(new_left, first))
        kept = max(first, new_left)
        moved: list[Tensor] = []
        for held, part in zip(stores, (keys, values), strict=True):
            held[:, length : length + fill] = part[:, :fill]
            rest = part[:, fill:]
            moved.append(torch.cat([held[:, in_ring], rest[:, : kept - first]], 1))
            if new_length > kept:
                held[:, self._ring(kept, new_length)] = rest[:, kept - first :]
        self.lens[row], self.left[row] = new_length, new_left
        return NewTokens(moved[0], moved[1], left)

    def _ring(self, start: int, end: int) -> Tensor:
        """Return where the window keeps positions from start to end."""
        sink, window = self.settings.config.sink, self.settings.config.window
        positions = torch.arange(start, max(start, end), device=self.settings.device)
        return sink + (positions - sink) % window

    def _join_many(self, leaving: list[NewTokens], joins: list[bool]) -> None:
        """Insert the leaving tokens of some rows, one after the other."""
        longest = max((t.keys.shape[1] for t, one in zip(leaving, joins) if one), default=0)
        self.make_room(longest, longest)
        for i in range(longest):
            takes = [one and i < t.keys.shape[1] for t, one in zip(leaving, joins, strict=True)]
            self._join(self._leaving_at(leaving, takes, i))
            self.most_leaves += 1
            self.most_pages += 1

    def _leaving_at(self, leaving: list[NewTokens], takes: list[bool], i: int) -> Leaving:
        heads, device = self.settings.heads, self.settings.device
        nothing = self.nothing_leaves
        keys, values = nothing.keys.clone(), nothing.values.clone()
        positions = []
        for row, (tokens, one) in enumerate(zip(leaving, takes, strict=True)):
            own = slice(row * heads, (row + 1) * heads)
            if one:
                keys[own], values[own] = tokens.keys[:, i], tokens.values[:, i]
            positions.append(tokens.first + i if one else -1)
        position = torch.tensor(positions, dtype=torch.int32, device=device)
        position = position.repeat_interleave(heads)
        return Leaving(keys, values, position >= 0, position)

    def _join(self, leaving: Leaving) -> None:
        ops, dim = self._ops, self.settings.dim
        self.join_transfers()
        query = leaving.keys.new_zeros(leaving.keys.shape[0], 1, dim)
        scores = ops.score(query, self.tree, leaving, 1.0, None, 0.0)
        ops.insert(self.tree, self.pages, leaving, scores, self.settings.config.leaf_size)

    def _build_rows(self, rows: dict[int, NewTokens]) -> None:
        """Make leaves of batch rows' leaving tokens; a pool of the size that they need."""
        if not rows:
            return
        heads = self.settings.heads
        built = {row: self._cluster(tokens.keys) for row, tokens in rows.items()}
        leaves, pages = self.tree.num_leaves.tolist(), self.tree.num_pages.tolist()
        each = [(row * heads + h, one) for row, many in built.items() for h, one in enumerate(many)]
        self.most_leaves, self.most_pages = max(leaves), max(pages)
        most_leaves = max(leaves[row] + one.num_leaves for row, one in each)
        most_pages = max(pages[row] + one.num_pages for row, one in each)
        self.make_room(max(0, most_leaves - max(leaves)), max(0, most_pages - max(pages)))
        for row, one in each:
            tokens, head = rows[row // heads], row % heads
            own = NewTokens(tokens.keys[head], tokens.values[head], tokens.first)
            at = leaves[row], pages[row]
            store(row, one, own, self.tree, self.pages, at, self._outbound)
        self.most_leaves = max(self.most_leaves, most_leaves)
        self.most_pages = max(self.most_pages, most_pages)

    def _cluster(self, keys: Tensor) -> list[Built]:
        """Make leaves of rows, [rows, tokens, head_dim], as many at a time as there is room for."""
        rows, num, dim = keys.shape
        at_once = max(1, _BUILD_ELEMENTS // (num * dim))
        parts = (keys[start : start + at_once] for start in range(0, rows, at_once))
        return [one for part in parts for one in build(part, self.settings.build_config)]

    def _shape_for(self, leaves: int, pages: int) -> PoolShape:
        tokens = max(self.lens)
        return self.settings.pool_shape(len(self.lens), tokens, leaves, pages)

    def _nothing_leaves(self) -> Leaving:
        rows = len(self.lens) * self.settings.heads
        device = self.settings.device
        with torch.inference_mode(False):
            nothing = torch.zeros(rows, self.settings.dim, dtype=self.settings.dtype, device=device)
            position = torch.full((rows,), -1, dtype=torch.int32, device=device)
            return Leaving(nothing, nothing, position >= 0, position)
