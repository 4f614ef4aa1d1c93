"""Which pages each row holds, and which of them have room.

page_of        [row, i]       the pool's page; i is the page's number within the row
free           [row, i]       its free slots
before, after  [row, i]       neighbours among the row's pages with as many free slots
head           [row, slots]   the first of those with so many free slots

Lists by free slots find the fullest page with room without looking at the others. Arrays, because
the compiled insert reads and writes them too. A page keeps its number as long as the row holds it.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.ops.bounds import check_range
from icecache.ops.native import Pages
from icecache.store.pool import PagePool

__all__ = ["PageTable"]

_NONE = -1
_GROWTH = 64
_PER_PAGE = ("page_of", "free", "_before", "_after")


class PageTable:
    """The pages of every row of a layer.

    Parameters
    ----------
    pool : PagePool
        Where they are allocated.
    num_rows : int
    """

    def __init__(self, pool: PagePool, num_rows: int) -> None:
        self._pool = pool
        self.num_pages = np.zeros(num_rows, dtype=np.int32)
        self.page_of = np.zeros((num_rows, 0), dtype=np.int32)
        self.free = np.zeros((num_rows, 0), dtype=np.uint8)
        self._before = np.zeros((num_rows, 0), dtype=np.int32)
        self._after = np.zeros((num_rows, 0), dtype=np.int32)
        self._head = np.full((num_rows, pool.page_size + 1), _NONE, dtype=np.int32)
        self._native: Pages | None = None
        self._native_pool = (0, 0, 0)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_native": None}

    def native(self) -> Pages:
        """Return the addresses of pool and table for the compiled ops, valid until they grow."""
        pool = (self._pool.address, self._pool.positions_address, self._pool.holders_address)
        # a pool that grew twice may lie where it was, and its positions elsewhere
        if self._native is None or self._native_pool != pool:
            arrays = (self.num_pages, self.page_of, self.free)
            lists = (self._before, self._after, self._head)
            addresses = (array.ctypes.data for array in (*arrays, *lists))
            self._native = Pages(*pool, *addresses, self.page_of.shape[1])
            self._native_pool = pool
        return self._native

    @property
    def entry_bytes(self) -> int:
        """Bytes of one page's entry."""
        arrays = (self.page_of, self.free, self._before, self._after)
        return sum(array.itemsize for array in arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in use, and of the lists' heads where there are any."""
        heads = int((self.num_pages > 0).sum()) * self._head.shape[1] * self._head.itemsize
        return int(self.num_pages.sum()) * self.entry_bytes + heads

    def pages(self, row: int) -> list[int]:
        """Return the pool's pages that a row holds."""
        pages: list[int] = self.page_of[row, : self.num_pages[row]].tolist()
        return pages

    def in_pool(self, row: Tensor | int, tokens: Tensor) -> Tensor:
        """Return where tokens are in the pool, page * page_size + slot; shapes as given.

        tokens: the same with the pages' numbers within the row; row: broadcast with them.
        """
        size = self._pool.page_size
        page_of = torch.from_numpy(self.page_of)
        return page_of[row, tokens // size].long() * size + tokens % size

    def hold(self, row: int, pages: list[int], free_slots: list[int]) -> int:
        """Take note of new pages, which the row holds from now on; return the first's number."""
        first = int(self.num_pages[row])
        self._reserve(first + len(pages))
        self.page_of[row, first : first + len(pages)] = pages
        self.free[row, first : first + len(pages)] = free_slots
        self.num_pages[row] += len(pages)
        for slots in sorted(set(free_slots)):
            same = first + np.flatnonzero(self.free[row, first : first + len(pages)] == slots)
            self._link(row, same.astype(np.int32), slots)
        return first

    def grow(self, row: int) -> None:
        """Give a row empty pages: one, and longer rows a 64th of what they have."""
        num = max(1, int(self.num_pages[row]) // _GROWTH)
        self.hold(row, self._pool.allocate(num), [self._pool.page_size] * num)

    def change_free(self, row: int, page: int, change: int) -> None:
        """Add to the number of free slots of a held page."""
        before, after = int(self._before[row, page]), int(self._after[row, page])
        if before != _NONE:
            self._after[row, before] = after
        else:
            self._head[row, self.free[row, page]] = after
        if after != _NONE:
            self._before[row, after] = before
        self.free[row, page] = int(self.free[row, page]) + change
        self._link(row, np.asarray([page], dtype=np.int32), int(self.free[row, page]))

    def replace(self, row: int, page: int, other: int) -> None:
        """Hold another page of the pool, with the same tokens, instead of one."""
        old = int(self.page_of[row, page])
        self.page_of[row, page] = other
        self._pool.release([old])

    def fullest_with(self, row: int, room: int, besides: int = _NONE) -> int:
        """Return the number of the fullest page with room for that many tokens, -1 without one.

        besides: a page that is not wanted.
        """
        for page in self._head[row, room:].tolist():
            if page != _NONE and page == besides:
                page = int(self._after[row, page])
            if page != _NONE:
                return int(page)
        return _NONE

    def reorder(self, rows: list[int]) -> None:
        """Take rows in a new order; repeated rows share their pages, dropped ones let go."""
        times = np.bincount(np.asarray(rows, dtype=np.int64), minlength=self.num_pages.size)
        for row, number in enumerate(times.tolist()):
            pages = self.pages(row)
            for _ in range(number - 1):
                self._pool.share(pages)
            if number == 0:
                self._pool.release(pages)
        for name in ("num_pages", *_PER_PAGE, "_head"):
            setattr(self, name, getattr(self, name)[rows])
        self._native = None

    def fork(self) -> "PageTable":
        """Return a table with the same content; both hold the pages until one of them writes."""
        other = copy.copy(self)
        for name in ("num_pages", *_PER_PAGE, "_head"):
            setattr(other, name, getattr(self, name).copy())
        other._native = None
        for row in range(self.num_pages.size):
            self._pool.share(self.pages(row))
        self._pool.num_tables += 1
        return other

    def release(self) -> None:
        """Let all pages go, before the table itself goes while forks of it stay."""
        self.reorder([])
        self._pool.num_tables -= 1

    def held(self) -> list[int]:
        """Return the pool's pages that some row holds, rising, each once."""
        in_use = np.arange(self.page_of.shape[1])[None] < self.num_pages[:, None]
        held: list[int] = np.unique(self.page_of[in_use]).tolist()
        return held

    def state(self, held: list[int]) -> dict[str, Any]:
        """Return what the table holds, by name; the pool's pages numbered as in `held`."""
        most = int(self.num_pages.max(initial=0))
        arrays = {name.strip("_"): getattr(self, name)[:, :most] for name in _PER_PAGE}
        # beyond a row's last page anything may stand
        arrays["page_of"] = np.searchsorted(held, arrays["page_of"]).astype(np.int32)
        return {"num_pages": self.num_pages, "head": self._head, **arrays}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back into an empty table, whose pool has been loaded."""
        num_pages = state["num_pages"].numpy()
        most = int(num_pages.max(initial=0))
        check_range("num_pages", num_pages, 0, most)
        check_range("free", state["free"], 0, self._pool.page_size)
        for name in ("head", "before", "after"):
            check_range(name, state[name], _NONE, most - 1)
        self._reserve(most)
        for name in _PER_PAGE:
            getattr(self, name)[:, :most] = state[name.strip("_")].numpy()
        self._head[:] = state["head"].numpy()
        self.num_pages[:] = num_pages
        for row in range(num_pages.size):
            self._pool.claim_pages(self.page_of[row, : num_pages[row]])

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the lists hold each page once, by its free slots."""
        for row, num in enumerate(self.num_pages.tolist()):
            for page, slots in enumerate(self.free[row, :num].tolist()):
                if slots != len(self._pool.free_slots(int(self.page_of[row, page]))):
                    raise IntegrityError(f"row {row}: free slots of page {page} are miscounted")
            listed: list[int] = []
            for slots, page in enumerate(self._head[row].tolist()):
                before = _NONE
                while page != _NONE:
                    is_new = 0 <= page < num and len(listed) < num
                    if not is_new or self.free[row, page] != slots:
                        raise IntegrityError(f"row {row}: page {page} is in a wrong list")
                    if self._before[row, page] != before:
                        raise IntegrityError(f"row {row}: page {page} names a wrong neighbour")
                    listed.append(page)
                    before, page = page, int(self._after[row, page])
            if len(listed) != num:
                raise IntegrityError(f"row {row}: a page is in no list")

    def _link(self, row: int, pages: np.ndarray, slots: int) -> None:
        """Put pages at the head of a list, one before the other."""
        old = self._head[row, slots]
        self._after[row, pages] = np.concatenate([[old], pages[:-1]])
        self._before[row, pages] = np.concatenate([pages[1:], [_NONE]])
        if old != _NONE:
            self._before[row, old] = pages[0]
        self._head[row, slots] = pages[-1]

    def _reserve(self, capacity: int) -> None:
        have = self.page_of.shape[1]
        if capacity <= have:
            return
        grown = max(capacity, have * 3 // 2, 64)
        for name in _PER_PAGE:
            old = getattr(self, name)
            new = np.zeros((old.shape[0], grown), dtype=old.dtype)
            new[:, :have] = old
            setattr(self, name, new)
        self._native = None
