"""The tokens of a context past its budget, on a device: sink, window, leaves and pages.

What a step changes lies in tensors of fixed shape; what the host has to know of it (how long rows
are, whether there is room) it counts along, without asking the device.
"""

import weakref
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icecache.cache.device.build import Built, NewTokens, build, store
from icecache.cache.device.settings import DeviceSettings
from icecache.cache.device.transfer import Outbound
from icecache.cache.device.window import DeviceWindow
from icecache.ops.device.records import DevicePages, DeviceTree, Leaving
from icecache.store.device_pool import DevicePool, PoolShape
from icecache.store.memory import check_host_limit

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

    Attributes
    ----------
    window : DeviceWindow
    leaving : Leaving, optional
        What the latest token displaced, while it waits for its insert.
    step_number : Tensor, shape [1], int64
    is_torn : bool
        Whether a call was interrupted while it moved tokens.
    most_leaves, most_pages : int
        No row has more; what is not counted exactly is counted too high.
    """

    def __init__(self, settings: DeviceSettings, ops: ModuleType, batch: int) -> None:
        self.settings, self._ops = settings, ops
        self.window = DeviceWindow(settings, batch)
        self.leaving: Leaving | None = None
        self._num_leaving = 0
        self.is_torn = False
        self.most_leaves = self.most_pages = 0
        self._outbound = Outbound(settings.device)
        self._host_bytes = 0
        self._pool = DevicePool(self._shape_for(0, 0), settings.device)
        self._host_bytes = self._pool.shape.host_bytes
        with torch.inference_mode(False):
            self.step_number = torch.zeros(1, dtype=torch.int64, device=settings.device)

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
    def num_fixed(self) -> list[int]:
        """Tokens of each batch row in sink and window, and what leaves it."""
        return [num + (self.leaving is not None) for num in self.window.num_fixed]

    @property
    def room(self) -> int:
        """Tokens that the budget leaves a row beside those."""
        return max(0, self.settings.config.budget - max(self.num_fixed))

    def push(self, keys: Tensor, values: Tensor) -> None:
        """Take one token of each row, [batch, num_kv_heads, 1, head_dim]; `settle` comes after."""
        assert self.leaving is None
        self.make_room(1, 1)
        num_leaving = sum(self.window.is_full)
        leaving = self.window.push(self._ops, keys, values)
        if num_leaving:
            self.leaving, self._num_leaving = leaving, num_leaving * self.settings.heads
            self._count_insert()

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
        sink = self.settings.config.sink
        has_leaves = [left > sink for left in self.window.left]
        leaving = [self.window.slide(row, *fresh.of_row(row)) for row in range(len(has_leaves))]
        self.window.publish()
        numbers = [tokens.keys.shape[1] for tokens in leaving]
        joins = [had and 0 < n <= _INSERT_AT_MOST for n, had in zip(numbers, has_leaves)]
        self._join_many(leaving, joins)
        self._build_rows({r: t for r, t in enumerate(leaving) if numbers[r] and not joins[r]})
        self.is_torn = False
        joined = self.settings.heads * sum(n for n, one in zip(numbers, joins, strict=True) if one)
        return inserted + joined, self.settings.heads * sum(numbers) - joined

    def crop(self, nums: list[int]) -> int:
        """Drop the latest tokens of each batch row; returns how many were inserted for it."""
        inserted = self.settle()
        self.window.crop(nums)
        return inserted

    def reorder(self, rows: Tensor) -> int:
        """Take batch rows in a new order; returns how many tokens were inserted for it."""
        inserted = self.settle()
        self.wait_for_transfers()
        self._pool, self.window = self._copies(rows)
        return inserted

    def fork(self) -> "DeviceIndex":
        """Return a copy that shares nothing; nothing may be leaving."""
        assert self.leaving is None
        self.wait_for_transfers()
        other = object.__new__(DeviceIndex)
        other.__dict__.update(self.__dict__)
        other._outbound = Outbound(self.settings.device)
        other._pool, other.window = self._copies(torch.arange(len(self.window.lens)))
        with torch.inference_mode(False):
            other.step_number = self.step_number.clone()
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
        self.wait_for_transfers()
        self._pool = self._pool.grown(self._shape_for(leaves, pages))
        self._host_bytes = self._pool.shape.host_bytes

    def addresses(self) -> tuple[object, ...]:
        """Return where a step reads and writes, and how much it selects.

        Equal only while it is the same memory of the same index: what took its place may lie at
        the same address. Nothing is kept alive.
        """
        return self.room, *(weakref.ref(part) for part in (self, self._pool, self.window))

    def count_step(self) -> int:
        """Take note of a whole step that the device did; returns how many tokens it inserted."""
        num = sum(self.window.is_full) * self.settings.heads
        self.window.count_push()
        self._count_insert()
        return num

    def mark(self) -> tuple[object, ...]:
        """Return what the host counts, for `rewind`."""
        return self.window.mark(), self.most_leaves, self.most_pages, self.leaving

    def rewind(self, mark: Any) -> None:
        """Count as at a mark."""
        window, self.most_leaves, self.most_pages, self.leaving = mark
        self.window.rewind(window)

    def join_transfers(self) -> None:
        """Let the steps from here on see pages that are still on their way to host memory."""
        self._outbound.join()

    def wait_for_transfers(self) -> None:
        """Wait until all pages are in host memory, and for all that was asked of the device."""
        self._outbound.wait()

    def close(self) -> None:
        """Let the memory go."""
        self.wait_for_transfers()
        self._pool.close()

    def _copies(self, rows: Tensor) -> tuple[DevicePool, DeviceWindow]:
        heads = self.settings.heads
        each = (rows[:, None] * heads + torch.arange(heads)).flatten()
        return self._pool.reordered(each), self.window.reordered(rows.tolist())

    def _join_many(self, leaving: list[NewTokens], joins: list[bool]) -> None:
        """Insert the leaving tokens of some rows, one after the other."""
        longest = max((t.keys.shape[1] for t, one in zip(leaving, joins) if one), default=0)
        self.make_room(longest, longest)
        for i in range(longest):
            takes = [one and i < t.keys.shape[1] for t, one in zip(leaving, joins, strict=True)]
            self._join(self._leaving_at(leaving, takes, i))
            self._count_insert()

    def _leaving_at(self, leaving: list[NewTokens], takes: list[bool], i: int) -> Leaving:
        heads, nothing = self.settings.heads, self.window.nothing_leaves
        keys, values = nothing.keys.clone(), nothing.values.clone()
        positions = []
        for row, (tokens, one) in enumerate(zip(leaving, takes, strict=True)):
            own = slice(row * heads, (row + 1) * heads)
            if one:
                keys[own], values[own] = tokens.keys[:, i], tokens.values[:, i]
            positions.append(tokens.first + i if one else -1)
        position = torch.tensor(positions, dtype=torch.int32, device=keys.device)
        position = position.repeat_interleave(heads)
        return Leaving(keys, values, position >= 0, position)

    def _join(self, leaving: Leaving) -> None:
        self.join_transfers()
        query = leaving.keys.new_zeros(leaving.keys.shape[0], 1, self.settings.dim)
        scores = self._ops.score(query, self.tree, leaving, 1.0, None, 0.0)
        leaf_size = self.settings.config.leaf_size
        self._ops.insert(self.tree, self.pages, leaving, scores, leaf_size)

    def _count_insert(self) -> None:
        self.most_leaves += 1
        self.most_pages += 1

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
        # new pages are not read before they have come; old ones may be written by inserts
        self.join_transfers()
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
        lens, limit = self.window.lens, self.settings.config.max_host_memory
        shape = self.settings.pool_shape(len(lens), max(lens), leaves, pages)
        # what grows is there twice for a moment
        check_host_limit(shape.host_bytes, self._host_bytes, limit)
        return shape
