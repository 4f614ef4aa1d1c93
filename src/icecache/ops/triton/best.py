"""The best of many leaves or pages: of each tile first, then of what the tiles found.

A key is what a token is worth, then the number from behind: the largest key is the first of the
best, and no two are equal.
"""

import triton
import triton.language as tl
from torch import Tensor

from icecache.errors import InputError
from icecache.ops.triton.arithmetic import count_bits
from icecache.ops.triton.launch import tile

__all__ = ["NUMBER_BITS", "best_of", "number_of"]

NUMBER_BITS = 20
_LEAST_TILE, _MOST_TILE = 512, 2048


def best_of(votes: Tensor, sizes: Tensor, most: int, are_masks: bool) -> Tensor:
    """Return the keys of the best by votes a token, best first.

    Parameters
    ----------
    votes : Tensor, shape [R, N], int64
    sizes : Tensor, shape [R, N]
        Tokens, int32, or with `are_masks` occupied slots, a bit each, int64.
    most : int

    Returns
    -------
    Tensor, shape [R, at least `most`, a power of two], int64
        Negative where there is none: what has no token is never among them.

    Raises
    ------
    InputError
        If a row has more than 2**20 of them.
    """
    num_rows, number = votes.shape
    if number > 1 << NUMBER_BITS:
        kind = "pages" if are_masks else "leaves"
        raise InputError(f"a row must have at most {1 << NUMBER_BITS} {kind}, got {number}")
    best = tile(most)
    width = max(_LEAST_TILE, 2 * best, min(8 * best, _MOST_TILE))
    width = max(best, min(width, tile(number)))
    keys = votes.new_empty(num_rows, triton.cdiv(number, width), best)
    _best_of_tile_kernel[keys.shape[:2]](
        votes,
        sizes,
        keys,
        number,
        MASKS=are_masks,
        BITS=NUMBER_BITS,
        BN=width,
        BS=best,
        num_warps=_num_warps(width),
    )
    while keys.shape[1] > 1:
        keys = _best_of_keys(keys)
    return keys[:, 0]


def _best_of_keys(keys: Tensor) -> Tensor:
    """Return the best of a few tiles' best each, shape [R, fewer tiles, best]."""
    num_rows, tiles, best = keys.shape
    width = min(max(2 * best, _MOST_TILE), tile(tiles * best))
    merged = keys.new_empty(num_rows, triton.cdiv(tiles * best, width), best)
    _best_of_keys_kernel[merged.shape[:2]](
        keys, merged, tiles * best, BN=width, BS=best, num_warps=_num_warps(width)
    )
    return merged


def _num_warps(width: int) -> int:
    return 4 if width <= _LEAST_TILE else 8 if width <= 2 * _MOST_TILE else 16


@triton.jit
def number_of(key, BITS: tl.constexpr):
    """Return the leaf or page that a key is of."""
    return (1 << BITS) - 1 - (key & ((1 << BITS) - 1))


@triton.jit(do_not_specialize=["N"])
def _best_of_tile_kernel(
    votes,
    sizes,
    keys,
    N,
    MASKS: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_item = i_tile * BN + tl.arange(0, BN)
    m_item = o_item < N
    size = tl.load(sizes + i_row * N + o_item, m_item, other=0)
    if MASKS:
        size = count_bits(size)
    worth = tl.load(votes + i_row * N + o_item, m_item, other=0) // tl.maximum(size, 1)
    key = (worth << BITS) + ((1 << BITS) - 1 - o_item)
    key = tl.where(size > 0, key, -1)
    i_out = i_row * tl.num_programs(1) + i_tile
    tl.store(keys + i_out * BS + tl.arange(0, BS), tl.topk(key, BS))


@triton.jit(do_not_specialize=["N"])
def _best_of_keys_kernel(keys, merged, N, BN: tl.constexpr, BS: tl.constexpr):
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_key = i_tile * BN + tl.arange(0, BN)
    key = tl.load(keys + i_row * N + o_key, o_key < N, other=-1)
    i_out = i_row * tl.num_programs(1) + i_tile
    tl.store(merged + i_out * BS + tl.arange(0, BS), tl.topk(key, BS))
