"""Which pages the leaves of a build go to: whole leaves, siblings together, pages full."""

__all__ = ["pack"]


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
