"""Score: one pass over the int8 mean keys, for the queries and for the leaving token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import DeviceTree, Leaving, Scores
from icecache.ops.device.twin import MOST_DOUBT
from icecache.ops.triton.arithmetic import everywhere, logsumexp, tanh
from icecache.ops.triton.launch import check_contiguous, num_warps, on_device_of, tile

__all__ = ["score"]


def score(
    query: Tensor,
    tree: DeviceTree,
    leaving: Leaving,
    scaling: float,
    softcap: float | None,
    spread_weight: float,
) -> Scores:
    """As `twin.score`, a run a tile of leaves."""
    check_contiguous(**tree._asdict())
    num_rows, group, dim = query.shape
    capacity = tree.num_tokens.shape[1]
    leaf_tile = min(128 if dim <= 128 else 64, tile(capacity))
    runs = triton.cdiv(capacity, leaf_tile)
    scores = _empty_scores(query, capacity, runs)
    with on_device_of(query):
        _score_kernel[(num_rows, runs)](
            query.contiguous(),
            tree.centre,
            tree.key_mean,
            tree.key_scale,
            tree.spread,
            tree.num_tokens,
            tree.num_leaves,
            leaving.keys,
            leaving.leaves.view(torch.uint8),
            *scores,
            scaling,
            spread_weight,
            capacity,
            G=group,
            D=dim,
            SOFTCAP=softcap or 0.0,
            MOST=MOST_DOUBT,
            BG=tile(group),
            BD=tile(dim),
            BL=leaf_tile,
            num_warps=num_warps(dim),
        )
    return scores


def _empty_scores(query: Tensor, capacity: int, runs: int) -> Scores:
    num_rows, group, _ = query.shape
    priority = query.new_empty(num_rows, group, capacity, dtype=torch.float32)
    distance = query.new_empty(num_rows, runs, dtype=torch.float32)
    return Scores(
        priority,
        torch.empty_like(priority),
        torch.empty_like(priority),
        torch.empty_like(distance, dtype=torch.int32),
        distance,
        query.new_empty(num_rows, runs, group, dtype=torch.float32),
    )


@triton.jit(do_not_specialize=["L"])
def _score_kernel(
    query,
    centre,
    key_mean,
    key_scale,
    spread,
    num_tokens,
    num_leaves,
    left_keys,
    leaves,
    priority,
    estimate,
    doubt,
    nearest,
    distance,
    priority_lse,
    scaling,
    spread_weight,
    L,
    G: tl.constexpr,
    D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MOST: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    i_row, i_run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_group, o_dim, o_leaf = tl.arange(0, BG), tl.arange(0, BD), i_run * BL + tl.arange(0, BL)
    m_group, m_dim = o_group < G, o_dim < D
    m_leaf = o_leaf < tl.minimum(tl.load(num_leaves + i_row), L)
    p_leaf = i_row * L + o_leaf
    tokens = tl.load(num_tokens + p_leaf, m_leaf, other=0)
    m_leaf = m_leaf & (tokens > 0)
    scale = tl.load(key_scale + p_leaf, m_leaf, other=0.0)
    b_spread = tl.maximum(tl.load(spread + p_leaf, m_leaf, other=0.0), 0.0)
    b_code = tl.load(
        key_mean + p_leaf[:, None] * D + o_dim[None, :], m_leaf[:, None] & m_dim[None, :], other=0
    )  # [BL, BD]
    p_query = query + (i_row * G + o_group)[:, None] * D + o_dim[None, :]
    b_query = tl.load(p_query, m_group[:, None] & m_dim[None, :], other=0.0)  # [BG, BD]
    b_centre = tl.load(centre + i_row * D + o_dim, m_dim, other=0.0)

    # int8 codes are exact in every dtype of the query, so the products are too
    dots = tl.dot(b_query, tl.trans(b_code.to(b_query.dtype)), input_precision="ieee")  # [BG, BL]
    wide = b_query.to(tl.float32)
    logit = scaling * (dots * scale[None, :] + tl.sum(wide * b_centre[None, :], 1)[:, None])
    slope = tl.full((BG, BL), 1.0, tl.float32)
    if SOFTCAP > 0:
        squashed = tanh(logit / SOFTCAP)
        logit = SOFTCAP * squashed
        slope = 1.0 - squashed * squashed
    squared = scaling * scaling * tl.sum(wide * wide, 1) / D
    correction = 0.5 * squared[:, None] * b_spread[None, :] * slope * slope
    logit += tl.log(tl.maximum(tokens, 1).to(tl.float32))[None, :]
    none = -float("inf")
    b_priority = tl.where(m_leaf[None, :], logit + correction, none)
    b_estimate = tl.where(m_leaf[None, :], logit + spread_weight * correction, none)
    b_doubt = tl.where(m_leaf[None, :], tl.minimum(tl.sqrt(correction), MOST), 0.0)
    p_score = (i_row * G + o_group)[:, None] * L + o_leaf[None, :]
    m_score = m_group[:, None] & (o_leaf < L)[None, :]
    tl.store(priority + p_score, b_priority, m_score)
    tl.store(estimate + p_score, b_estimate, m_score)
    tl.store(doubt + p_score, b_doubt, m_score)
    i_out = i_row * tl.num_programs(1) + i_run
    tl.store(priority_lse + i_out * G + o_group, logsumexp(b_priority, 1), m_group)

    point = tl.load(left_keys + i_row * D + o_dim, m_dim, other=0.0).to(tl.float32) - b_centre
    codes = b_code.to(tl.float32)
    apart = scale * tl.sum(codes * codes, 1) - 2.0 * tl.sum(codes * point[None, :], 1)
    m_near = m_leaf & everywhere(tl.load(leaves + i_row) != 0, o_leaf)
    apart = tl.where(m_near, scale * apart, float("inf"))
    least = tl.min(apart, 0)
    first = tl.min(tl.where(m_near & (apart == least), o_leaf, 2147483647), 0)
    tl.store(distance + i_out, least)
    tl.store(nearest + i_out, tl.where(least < float("inf"), first, -1))
