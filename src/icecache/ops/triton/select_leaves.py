"""Select leaves: those of the largest votes a token that fit in the room, from a few pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import DeviceTree, Selected
from icecache.ops.triton.best import NUMBER_BITS, best_of, number_of
from icecache.ops.triton.launch import check_contiguous, on_device_of, tile

__all__ = ["select_leaves"]


def select_leaves(votes: Tensor, tree: DeviceTree, room: int, most: int) -> Selected:
    """As `twin.select_leaves`; a row has room for at most 2**20 leaves.

    Raises
    ------
    InputError
        If there are more.
    """
    check_contiguous(votes=votes, **tree._asdict())
    num_rows, capacity = votes.shape
    num_pages = tree.page_used.shape[1]
    found = torch.zeros(num_rows, num_pages, dtype=torch.int32, device=votes.device)
    selected = Selected(
        torch.empty(num_rows, most, dtype=torch.int32, device=votes.device),
        torch.empty(num_rows, most, dtype=torch.int64, device=votes.device),
    )
    with on_device_of(votes):
        keys = best_of(votes, tree.num_tokens, min(room, capacity), are_masks=False)
        _fit_leaves_kernel[(num_rows,)](
            keys,
            tree.num_tokens,
            tree.leaf_page,
            tree.leaf_slots,
            found,
            *selected,
            capacity,
            num_pages,
            room,
            S=most,
            BITS=NUMBER_BITS,
            BK=keys.shape[1],
            BS=tile(most),
            num_warps=8,
        )
    return selected


@triton.jit
def _number_of_page(found, page, m_leaf, BK: tl.constexpr):
    """Return of each leaf how many pages the leaves before the first of its page lie in.

    found: per page, 0; what is left there is of no use to anybody.
    """
    o_leaf = tl.arange(0, BK)
    # the largest is the first leaf of the page
    tl.atomic_max(found + page, BK - o_leaf, m_leaf, sem="relaxed")
    tl.debug_barrier()
    # not from a line that was read before
    first = BK - tl.load(found + page, m_leaf, other=BK, cache_modifier=".cg")
    opens = m_leaf & (first == o_leaf)
    return tl.gather(tl.cumsum(opens.to(tl.int32), 0) - 1, first, 0)


@triton.jit(do_not_specialize=["L", "P", "room"])
def _fit_leaves_kernel(
    keys,
    num_tokens,
    leaf_page,
    leaf_slots,
    found,
    pages,
    tokens,
    L,
    P,
    room,
    S: tl.constexpr,
    BITS: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_leaf, o_page = tl.arange(0, BK), tl.arange(0, BS)
    tl.store(pages + i_row * S + o_page, -1, o_page < S)
    tl.store(tokens + i_row * S + o_page, 0, o_page < S)
    key = tl.load(keys + i_row * BK + o_leaf)
    m_leaf = (key >= 0) & (o_leaf < room)
    p_leaf = i_row * L + number_of(key, BITS)
    size = tl.load(num_tokens + p_leaf, m_leaf, other=0)
    page = tl.load(leaf_page + p_leaf, m_leaf, other=0)
    slots = tl.load(leaf_slots + p_leaf, m_leaf, other=0)
    number = _number_of_page(found + i_row * P, page, m_leaf, BK)

    m_may = m_leaf & (number < S)
    m_taken = m_may & (tl.cumsum(tl.where(m_may, size, 0), 0) <= room)
    left = room - tl.sum(tl.where(m_taken, size, 0), 0)
    # the next would not fit, so there is less room than in a leaf: few rounds
    following = tl.min(tl.where(m_may & (m_taken == 0) & (size <= left), o_leaf, BK), 0)
    while following < BK:
        m_taken = m_taken | (o_leaf == following)
        left -= tl.sum(tl.where(o_leaf == following, size, 0), 0)
        following = tl.min(tl.where(m_may & (m_taken == 0) & (size <= left), o_leaf, BK), 0)
    # the leaves of a page have different slots; the first barrier came after they were cleared
    tl.atomic_add(tokens + i_row * S + number, slots, m_taken, sem="relaxed")
    tl.store(pages + i_row * S + number, page, m_taken)
