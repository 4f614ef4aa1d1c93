"""Select pages: those of the largest votes a token that fit in the room."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import DeviceTree, Selected
from icecache.ops.triton.arithmetic import count_bits, everywhere
from icecache.ops.triton.best import NUMBER_BITS, best_of, number_of
from icecache.ops.triton.launch import check_contiguous, on_device_of, tile

__all__ = ["select_pages"]

_LEAF_TILE = 256


def select_pages(votes: Tensor, tree: DeviceTree, room: int, most: int) -> Selected:
    """As `twin.select_pages`; a row has room for at most 2**20 pages.

    Raises
    ------
    InputError
        If there are more.
    """
    check_contiguous(votes=votes, page_used=tree.page_used)
    num_rows, capacity = votes.shape
    of_page = torch.zeros_like(tree.page_used)
    leaf_tile = min(_LEAF_TILE, tile(capacity))
    selected = Selected(
        torch.empty(num_rows, most, dtype=torch.int32, device=votes.device),
        torch.empty(num_rows, most, dtype=torch.int64, device=votes.device),
    )
    with on_device_of(votes):
        _page_votes_kernel[(num_rows, triton.cdiv(capacity, leaf_tile))](
            votes,
            tree.leaf_page,
            tree.num_leaves,
            of_page,
            capacity,
            of_page.shape[1],
            BL=leaf_tile,
        )
        keys = best_of(of_page, tree.page_used, most, are_masks=True)
        _fit_pages_kernel[(num_rows,)](
            keys,
            tree.page_used,
            *selected,
            of_page.shape[1],
            room,
            S=most,
            BITS=NUMBER_BITS,
            BS=keys.shape[1],
        )
    return selected


@triton.jit(do_not_specialize=["L", "P"])
def _page_votes_kernel(votes, leaf_page, num_leaves, of_page, L, P, BL: tl.constexpr):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_leaf = i_tile * BL + tl.arange(0, BL)
    m_leaf = o_leaf < tl.minimum(tl.load(num_leaves + i_row), L)
    units = tl.load(votes + i_row * L + o_leaf, m_leaf, other=0)
    page = tl.load(leaf_page + i_row * L + o_leaf, m_leaf, other=0)
    # sums of integers have no order
    tl.atomic_add(of_page + i_row * P + page, units, m_leaf & (units > 0), sem="relaxed")


@triton.jit(do_not_specialize=["P", "room"])
def _fit_pages_kernel(
    keys,
    page_used,
    pages,
    tokens,
    P,
    room,
    S: tl.constexpr,
    BITS: tl.constexpr,
    BS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_best = tl.arange(0, BS)
    key = tl.load(keys + i_row * BS + o_best)
    m_best = (key >= 0) & (o_best < S)
    page = number_of(key, BITS)
    used = tl.load(page_used + i_row * P + page, m_best, other=0)
    # what does not fit leaves its room to the next
    size = tl.where(m_best, count_bits(used), 1 << BITS)
    left = room.to(tl.int64)
    taken = tl.zeros((BS,), tl.int32)
    for i in range(S):
        needed = tl.sum(tl.where(o_best == i, size, 0), 0)
        fits = needed <= left
        left -= tl.where(fits, needed, 0)
        taken = tl.where((o_best == i) & everywhere(fits, o_best), 1, taken)
    place = tl.cumsum(taken, 0) - 1
    num_taken = tl.sum(taken, 0)
    m_none = (o_best >= num_taken) & (o_best < S)
    tl.store(pages + i_row * S + place, page.to(tl.int32), taken == 1)
    tl.store(tokens + i_row * S + place, used, taken == 1)
    tl.store(pages + i_row * S + o_best, -1, m_none)
    tl.store(tokens + i_row * S + o_best, 0, m_none)
