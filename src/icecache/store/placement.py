"""Which page a leaf's tokens go to: whole leaves share pages, and pages stay full.

A row's pages are kept by their number of free slots, so that finding the fullest page with room
takes constant time.
"""

from icecache.store.pool import PagePool

__all__ = ["RowPages", "pack"]


class RowPages:
    """The pages that one row holds.

    Parameters
    ----------
    pool : PagePool
        Where they are allocated.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._free_slots: dict[int, int] = {}
        self._by_free_slots: list[dict[int, None]] = [{} for _ in range(pool.page_size + 1)]

    @property
    def pages(self) -> list[int]:
        """The pages held, in the order in which they came."""
        return list(self._free_slots)

    def free_slots(self, page: int) -> int:
        """Return the number of free slots of a held page."""
        return self._free_slots[page]

    def hold(self, page: int, free_slots: int) -> None:
        """Take note of a page, or of its new number of free slots."""
        if page in self._free_slots:
            del self._by_free_slots[self._free_slots[page]][page]
        self._free_slots[page] = free_slots
        self._by_free_slots[free_slots][page] = None

    def drop(self, page: int) -> None:
        """Give a page back."""
        del self._by_free_slots[self._free_slots.pop(page)][page]
        self._pool.release([page])

    def fullest_with(self, room: int, besides: int | None = None) -> int:
        """Return the fullest page with room for that many tokens; a new one if there is none.

        besides: a page that is not wanted.
        """
        for pages in self._by_free_slots[room:-1]:
            for page in pages:
                if page != besides:
                    return page
        (page,) = self._pool.allocate(1)
        self.hold(page, self._pool.page_size)
        return page

    def copy(self) -> "RowPages":
        """Return another row's hold on the same pages."""
        other = RowPages(self._pool)
        self._pool.share(self.pages)
        for page, free_slots in self._free_slots.items():
            other.hold(page, free_slots)
        return other


def pack(sizes: list[int], parents: list[int], page_size: int) -> tuple[list[int], int]:
    """Pack leaves into pages, siblings together, largest first.

    Parameters
    ----------
    sizes : list of int
        Tokens of each leaf, at most `page_size`.
    parents : list of int
        Each leaf's parent; rising numbers are near each other.
    page_size : int

    Returns
    -------
    page : list of int
        Each leaf's page, numbered from 0.
    num_pages : int
        Pages left open by one parent's leaves are filled up by the next parents', latest first.
    """
    order = sorted(range(len(sizes)), key=lambda leaf: (parents[leaf], -sizes[leaf]))
    page_of = [0] * len(sizes)
    num_pages = 0
    open_: list[list[int]] = [[] for _ in range(page_size + 1)]
    for leaf in order:
        size = sizes[leaf]
        for room in range(size, page_size + 1):
            if open_[room]:
                page = open_[room].pop()
                break
        else:
            page, room = num_pages, page_size
            num_pages += 1
        page_of[leaf] = page
        open_[room - size].append(page)
    return page_of, num_pages
