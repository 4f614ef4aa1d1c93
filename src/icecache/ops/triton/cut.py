"""What an insert computes of a leaf's members: the cut in two, the summary."""

import triton
import triton.language as tl

from icecache.ops.triton.arithmetic import quantize

__all__ = ["main_half", "summarize"]


@triton.jit
def main_half(b_key, m_member, num, ROUNDS: tl.constexpr, BM: tl.constexpr):
    """Return which members lie in the upper half along their main direction, int32 [BM].

    The rule of `twin_insert.upper_half`: power rounds from the member farthest from the mean, the
    last of equals, then the stable order along the direction found.
    """
    o_member = tl.arange(0, BM)
    mean = tl.sum(tl.where(m_member[:, None], b_key, 0.0), 0) / num
    centred = tl.where(m_member[:, None], b_key - mean[None, :], 0.0)  # [BM, BD]
    norm = tl.where(m_member, tl.sum(centred * centred, 1), -1.0)
    farthest = tl.max(tl.where(norm == tl.max(norm, 0), o_member, -1), 0)
    direction = tl.sum(tl.where((o_member == farthest)[:, None], centred, 0.0), 0)
    for _ in tl.static_range(ROUNDS):
        along = tl.sum(centred * direction[None, :], 1)
        direction = tl.sum(centred * along[:, None], 0)
        norm_of = tl.sqrt(tl.sum(direction * direction, 0))
        direction = direction / tl.maximum(norm_of, 1e-20)
    place = tl.where(m_member, tl.sum(centred * direction[None, :], 1), float("inf"))
    earlier = (place[None, :] == place[:, None]) & (o_member[None, :] < o_member[:, None])
    before = (place[None, :] < place[:, None]) | earlier
    rank = tl.sum(before.to(tl.int32), 1)
    return tl.where(m_member & (rank >= num - num // 2), 1, 0)


@triton.jit
def summarize(b_token, m_member, base, codes, scales, i_leaf, D: tl.constexpr, BD: tl.constexpr):
    """Store the int8 mean of members less a base; returns their mean squared distance from it."""
    o_dim = tl.arange(0, BD)
    m_dim = o_dim < D
    num = tl.sum(m_member.to(tl.int32), 0)
    mean = tl.sum(tl.where(m_member[:, None], b_token, 0.0), 0) / num
    b_code, scale = quantize(mean - base)
    tl.store(codes + i_leaf * D + o_dim, b_code, m_dim)
    tl.store(scales + i_leaf, scale)
    apart = tl.where(m_member[:, None] & m_dim[None, :], b_token - mean[None, :], 0.0)
    return tl.sum(tl.sum(apart * apart, 1), 0) / num
