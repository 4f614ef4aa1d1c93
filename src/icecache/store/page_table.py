"""Which pages each row holds, and which of them have room.

page_of        [row, i]       the pool's page; i is the page's number within the row
free           [row, i]       its free slots
before, after  [row, i]       neighbours among the row's pages with as many free slots
head           [row, slots]   the first of those with so many free slots

Lists by free slots find the fullest page with room without looking at the others. Arrays, because
the compiled insert reads and writes them too. A page keeps its number as long as the row holds it.
"""

import numpy as np
import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.ops.native import Pages
from icecache.store.pool import PagePool

__all__ = ["PageTable"]

_NONE = -1


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
        times = np.bincount(rows, minlength=self.num_pages.size)
        for row, number in enumerate(times.tolist()):
            pages = self.pages(row)
            for _ in range(number - 1):
                self._pool.share(pages)
            if number == 0:
                self._pool.release(pages)
        for name in ("num_pages", "page_of", "free", "_before", "_after", "_head"):
            setattr(self, name, getattr(self, name)[rows])
        self._native = None

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
        for name in ("page_of", "free", "_before", "_after"):
            old = getattr(self, name)
            new = np.zeros((old.shape[0], grown), dtype=old.dtype)
            new[:, :have] = old
            setattr(self, name, new)
        self._native = None
