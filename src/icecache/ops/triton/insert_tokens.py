"""How an insert reads a leaf's members from their page and writes those that move."""

import triton
import triton.language as tl

from icecache.ops.triton.arithmetic import quantize

__all__ = ["free_slot", "load_members", "mask_of", "slots_in_order", "store_members"]


@triton.jit
def slots_in_order(mask, order, T: tl.constexpr, BT: tl.constexpr):
    """Return for each number in `order` the set bit of that rank, lowest first, int32."""
    o_slot = tl.arange(0, BT).to(tl.int64)
    bit = tl.where(o_slot < T, (mask >> (o_slot & 63)) & 1, 0)
    rank = tl.cumsum(bit, 0) - 1
    match = (rank[None, :] == order[:, None]) & (bit[None, :] == 1)
    return tl.sum(tl.where(match, o_slot[None, :].to(tl.int32), 0), 1)


@triton.jit
def free_slot(used, order, T: tl.constexpr, BT: tl.constexpr):
    """Return for each number in `order` the free slot of that rank, lowest first, int32."""
    return slots_in_order(~used, order, T, BT)


@triton.jit
def mask_of(slot, m_slot):
    """Return the mask of distinct slots."""
    one = tl.full(slot.shape, 1, tl.int64)
    return tl.sum(tl.where(m_slot, one << slot.to(tl.int64), 0), 0)


@triton.jit
def load_members(pools, i_token, m_old, new, m_new, D: tl.constexpr, BD: tl.constexpr):
    """Return members as pages keep them, the new token last: float32, codes and scales."""
    host, scales, _ = pools
    o_dim = tl.arange(0, BD)
    m_dim = o_dim < D
    mask = m_old[:, None] & m_dim[None, :]
    b_code = tl.load(host + i_token[:, None] * D + o_dim[None, :], mask, other=0)  # [BM, BD]
    b_new = tl.load(new + o_dim, m_dim, other=0.0).to(tl.float32)
    b_scale = m_new.to(tl.float32)
    if scales is not None:
        b_scale = tl.load(scales + i_token, m_old, other=0.0)
        codes, scale = quantize(b_new)
        b_code = tl.where(m_new[:, None], codes[None, :], b_code)
        b_scale = tl.where(m_new, scale, b_scale)
        b_token = b_code.to(tl.float32) * b_scale[:, None]
    else:
        b_token = tl.where(m_new[:, None], b_new[None, :], b_code.to(tl.float32))
        b_code = b_token
    return b_token, b_code, b_scale


@triton.jit
def store_members(pools, members, i_token, i_copy, masks, D: tl.constexpr, BD: tl.constexpr):
    """Write members to their host page and, where that is resident, through to its copy.

    pools: host, scales and resident copies, None for those that there are not.
    """
    host, scales, resident = pools
    b_token, b_code, b_scale = members
    m_written, m_resident = masks
    o_dim = tl.arange(0, BD)
    m_dim = (o_dim < D)[None, :]
    tl.store(host + i_token[:, None] * D + o_dim[None, :], b_code, m_written[:, None] & m_dim)
    if scales is not None:
        tl.store(scales + i_token, b_scale, m_written)
    if resident is not None:
        p_copy = i_copy[:, None] * D + o_dim[None, :]
        tl.store(resident + p_copy, b_token, m_resident[:, None] & m_dim)
