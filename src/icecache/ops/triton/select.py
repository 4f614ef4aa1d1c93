"""Select: the pages of the largest votes a token that fit in the room, in two stages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from icecache.errors import InputError
from icecache.ops.triton.arithmetic import count_bits, everywhere
from icecache.ops.triton.launch import check_contiguous, on_device_of, tile

__all__ = ["select"]

_PAGE_TILE = 512
# a key is votes, then the page from behind: the largest key is the first of the best
_PAGE_BITS = 20


def select(votes: Tensor, page_used: Tensor, room: int, most: int) -> Tensor:
    """As `twin.select`; a row has room for at most 2**20 pages.

    Raises
    ------
    InputError
        If there are more.
    """
    check_contiguous(votes=votes, page_used=page_used)
    num_rows, num_pages = votes.shape
    if num_pages > 1 << _PAGE_BITS:
        raise InputError(f"a row must have at most {1 << _PAGE_BITS} pages, got {num_pages}")
    best = tile(most)
    page_tile = max(best, min(_PAGE_TILE, tile(num_pages)))
    tiles = triton.cdiv(num_pages, page_tile)
    keys = torch.empty(num_rows, tiles, best, dtype=torch.int64, device=votes.device)
    selected = torch.empty(num_rows, most, dtype=torch.int32, device=votes.device)
    with on_device_of(votes):
        _best_of_tile_kernel[(num_rows, tiles)](
            votes, page_used, keys, num_pages, BITS=_PAGE_BITS, BP=page_tile, BS=best
        )
        _best_kernel[(num_rows,)](
            keys,
            page_used,
            selected,
            num_pages,
            room,
            tiles * best,
            S=most,
            BITS=_PAGE_BITS,
            BK=tile(tiles * best),
            BS=best,
        )
    return selected


@triton.jit(do_not_specialize=["P"])
def _best_of_tile_kernel(
    votes, page_used, keys, P, BITS: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_page = i_tile * BP + tl.arange(0, BP)
    m_page = o_page < P
    size = count_bits(tl.load(page_used + i_row * P + o_page, m_page, other=0))
    worth = tl.load(votes + i_row * P + o_page, m_page, other=0) // tl.maximum(size, 1)
    key = (worth << BITS) + ((1 << BITS) - 1 - o_page)
    key = tl.where(size > 0, key, -1)
    o_best = tl.arange(0, BS)
    i_out = i_row * tl.num_programs(1) + i_tile
    tl.store(keys + i_out * BS + o_best, tl.topk(key, BS))


@triton.jit(do_not_specialize=["P", "room", "num_keys"])
def _best_kernel(
    keys,
    page_used,
    selected,
    P,
    room,
    num_keys,
    S: tl.constexpr,
    BITS: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_key, o_best = tl.arange(0, BK), tl.arange(0, BS)
    key = tl.topk(tl.load(keys + i_row * num_keys + o_key, o_key < num_keys, other=-1), BS)
    m_best = (key >= 0) & (o_best < S)
    page = (1 << BITS) - 1 - (key & ((1 << BITS) - 1))
    size = count_bits(tl.load(page_used + i_row * P + page, m_best, other=0))
    # what does not fit leaves its room to the next
    size = tl.where(m_best, size, 1 << BITS)
    left = room.to(tl.int64)
    taken = tl.zeros((BS,), tl.int32)
    for i in range(S):
        needed = tl.sum(tl.where(o_best == i, size, 0), 0)
        fits = needed <= left
        left -= tl.where(fits, needed, 0)
        taken = tl.where((o_best == i) & everywhere(fits, o_best), 1, taken)
    place = tl.cumsum(taken, 0) - 1
    num_taken = tl.sum(taken, 0)
    tl.store(selected + i_row * S + place, page.to(tl.int32), taken == 1)
    tl.store(selected + i_row * S + o_best, -1, (o_best >= num_taken) & (o_best < S))
