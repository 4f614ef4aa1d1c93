"""Which pages each row holds, and how many of their slots are free.

    pages  [row, i]   the row's pages, in no order that means anything
    free   [row, i]   their free slots

Arrays, because the compiled insert reads and writes them too. Finding the fullest page with room
looks at one byte a page.
"""

import numpy as np

from icecache.ops.native import Pages
from icecache.store.pool import PagePool

__all__ = ["PageTable"]


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

    def native_pages(self) -> Pages:
        """Return the addresses of pool and table for the compiled ops, valid until they grow."""
        arrays = (self.num_pages, self.page_of, self.free)
        num_pages, page_of, free = (array.ctypes.data for array in arrays)
        return Pages(
            data=self._pool.address,
            positions=self._pool.positions_address,
            holders=self._pool.holders_address,
            num_pages=num_pages,
            page_of=page_of,
            free=free,
            page_capacity=self.page_of.shape[1],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in use."""
        return int(self.num_pages.sum()) * (self.page_of.itemsize + self.free.itemsize)

    def pages(self, row: int) -> list[int]:
        """Return the pages that a row holds."""
        pages: list[int] = self.page_of[row, : self.num_pages[row]].tolist()
        return pages

    def free_slots(self, row: int, page: int) -> int:
        """Return the number of free slots of a held page."""
        return int(self.free[row, self._find(row, page)])

    def hold(self, row: int, pages: list[int], free_slots: list[int]) -> None:
        """Take note of new pages, which the row holds from now on."""
        first = int(self.num_pages[row])
        self._reserve(first + len(pages))
        self.page_of[row, first : first + len(pages)] = pages
        self.free[row, first : first + len(pages)] = free_slots
        self.num_pages[row] += len(pages)

    def change_free(self, row: int, page: int, change: int) -> None:
        """Add to the number of free slots of a held page."""
        at = self._find(row, page)
        self.free[row, at] = int(self.free[row, at]) + change

    def drop(self, row: int, page: int) -> None:
        """Give a page back."""
        at, last = self._find(row, page), int(self.num_pages[row]) - 1
        self.page_of[row, at], self.free[row, at] = self.page_of[row, last], self.free[row, last]
        self.num_pages[row] = last
        self._pool.release([page])

    def replace(self, row: int, page: int, other: int) -> None:
        """Hold another page, as full, instead of one that other rows hold too."""
        self.page_of[row, self._find(row, page)] = other
        self._pool.release([page])

    def fullest_with(self, row: int, room: int, besides: int | None = None) -> int:
        """Return the fullest page with room for that many tokens; a new one if there is none.

        besides: a page that is not wanted.
        """
        num = int(self.num_pages[row])
        fits = self.free[row, :num] >= room
        if besides is not None:
            fits &= self.page_of[row, :num] != besides
        where = np.flatnonzero(fits)
        if where.size:
            return int(self.page_of[row, where[self.free[row, where].argmin()]])
        (page,) = self._pool.allocate(1)
        self.hold(row, [page], [self._pool.page_size])
        return page

    def reorder(self, rows: list[int]) -> None:
        """Take rows in a new order; repeated rows share their pages, dropped ones let go."""
        times = np.bincount(rows, minlength=self.num_pages.size)
        for row, number in enumerate(times.tolist()):
            pages = self.pages(row)
            for _ in range(number - 1):
                self._pool.share(pages)
            if number == 0:
                self._pool.release(pages)
        self.num_pages = self.num_pages[rows]
        self.page_of, self.free = self.page_of[rows], self.free[rows]

    def _find(self, row: int, page: int) -> int:
        return int(np.flatnonzero(self.page_of[row, : self.num_pages[row]] == page)[0])

    def _reserve(self, capacity: int) -> None:
        have = self.page_of.shape[1]
        if capacity <= have:
            return
        grown = max(capacity, have * 3 // 2, 64)
        for name in ("page_of", "free"):
            old = getattr(self, name)
            new = np.zeros((old.shape[0], grown), dtype=old.dtype)
            new[:, :have] = old
            setattr(self, name, new)
