"""Which pages the leaves of a build go to: whole leaves, siblings together, pages full."""

import torch
from torch import Tensor

from icecache.errors import HostMemoryExceeded
from icecache.ops.native import load, pointer

__all__ = ["pack", "pack_native"]


def pack(sizes: Tensor, parents: Tensor, page_size: int) -> tuple[Tensor, int]:
    """Pack leaves into pages, siblings together, largest first.

    Parameters
    ----------
    sizes : Tensor, shape [leaves], int64
        Tokens of each leaf, at most `page_size`.
    parents : Tensor, shape [leaves], int64
        Each leaf's parent; near numbers are near each other, and few are left out.
    page_size : int

    Returns
    -------
    page : Tensor, shape [leaves], int64
        Each leaf's page, numbered from 0.
    num_pages : int
        Pages left open by one parent's leaves are filled up by the next parents', latest first.
    """
    size_of, parent_of = sizes.tolist(), parents.tolist()
    page_of = [0] * len(size_of)
    num_pages = 0
    open_: list[list[int]] = [[] for _ in range(page_size + 1)]
    for leaf in sorted(range(len(size_of)), key=lambda leaf: (parent_of[leaf], -size_of[leaf])):
        size = size_of[leaf]
        for room in range(size, page_size + 1):
            if open_[room]:
                page = open_[room].pop()
                break
        else:
            page, room = num_pages, page_size
            num_pages += 1
        page_of[leaf] = page
        open_[room - size].append(page)
    return torch.tensor(page_of, dtype=torch.int64), num_pages


def pack_native(sizes: Tensor, parents: Tensor, page_size: int) -> tuple[Tensor, int]:
    """Pack leaves into pages by the compiled op; arguments and result as `pack`."""
    sizes, parents = sizes.contiguous(), parents.contiguous()
    page_of = torch.empty_like(sizes)
    num_pages: int = load().icecache_pack(
        pointer(sizes), pointer(parents), sizes.numel(), page_size, pointer(page_of)
    )
    if num_pages < 0:
        raise HostMemoryExceeded(16 * sizes.numel(), 0)
    return page_of, num_pages
