"""Attention over what was not selected, through the leaves' int8 mean values."""

import torch
import triton
import triton.language as tl

from icecache.ops.device.records import DeviceTree, Part, Scores, Selected
from icecache.ops.triton.arithmetic import divisor, safe
from icecache.ops.triton.launch import check_contiguous, on_device_of, tile

__all__ = ["attend_rest"]

_MOST_PIECES = 32
_LEAF_TILE = 64
# leaves times pages that are compared at a time: more would not stay in registers
_MOST_COMPARED = 8192


def attend_rest(scores: Scores, tree: DeviceTree, selected: Selected) -> Part:
    """As `twin.attend_rest`, in at most 32 pieces of whole tiles of leaves."""
    check_contiguous(pages=selected.pages, tokens=selected.tokens, value_mean=tree.value_mean)
    num_rows, group, capacity = scores.estimate.shape
    dim = tree.value_mean.shape[2]
    page_tile = tile(selected.pages.shape[1])
    leaf_tile = min(_LEAF_TILE, tile(capacity), max(tile(1), _MOST_COMPARED // page_tile))
    tiles = triton.cdiv(triton.cdiv(capacity, leaf_tile), _MOST_PIECES)
    pieces = triton.cdiv(capacity, tiles * leaf_tile)
    out = scores.estimate.new_empty(num_rows, pieces, group, dim)
    part = Part(out, torch.empty_like(out[..., 0]))
    with on_device_of(out):
        _rest_kernel[(num_rows, pieces)](
            scores.estimate,
            tree.value_mean,
            tree.value_scale,
            tree.leaf_page,
            tree.leaf_slots,
            tree.num_leaves,
            *selected,
            *part,
            capacity,
            tiles,
            S=selected.pages.shape[1],
            G=group,
            D=dim,
            BG=tile(group),
            BD=tile(dim),
            BL=leaf_tile,
            BS=page_tile,
            num_warps=8,
        )
    return part


@triton.jit(do_not_specialize=["L", "tiles"])
def _rest_kernel(
    estimate,
    value_mean,
    value_scale,
    leaf_page,
    leaf_slots,
    num_leaves,
    pages,
    tokens,
    out,
    lse,
    L,
    tiles,
    S: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
    BS: tl.constexpr,
):
    i_row, i_piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_group, o_dim, o_page = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BS)
    m_group, m_dim = o_group < G, o_dim < D
    page = tl.load(pages + i_row * S + o_page, o_page < S, other=-1)
    attended = tl.load(tokens + i_row * S + o_page, o_page < S, other=0)
    first = i_piece * tiles * BL
    last = tl.minimum(first + tiles * BL, tl.minimum(tl.load(num_leaves + i_row), L))
    none = -float("inf")
    largest = tl.full((BG,), none, tl.float32)
    total = tl.zeros((BG,), tl.float32)
    b_out = tl.zeros((BG, BD), tl.float32)
    for start in range(first, last, BL):
        o_leaf = start + tl.arange(0, BL)
        m_leaf = o_leaf < last
        of_leaf = tl.load(leaf_page + i_row * L + o_leaf, m_leaf, other=-2)
        of_page = tl.sum(tl.where(of_leaf[:, None] == page[None, :], attended[None, :], 0), 1)
        slots = tl.load(leaf_slots + i_row * L + o_leaf, m_leaf, other=0)
        m_leaf = m_leaf & (of_page & slots == 0)
        p_estimate = (i_row * G + o_group)[:, None] * L + o_leaf[None, :]
        b_logit = tl.load(estimate + p_estimate, m_group[:, None] & m_leaf[None, :], other=none)
        larger = tl.maximum(largest, tl.max(b_logit, 1))
        b_weight = tl.exp(b_logit - safe(larger)[:, None])  # [BG, BL]
        shrink = tl.exp(largest - safe(larger))
        total = total * shrink + tl.sum(b_weight, 1)
        scale = tl.load(value_scale + i_row * L + o_leaf, m_leaf, other=0.0)
        p_value = (i_row * L + o_leaf)[:, None] * D + o_dim[None, :]
        b_value = tl.load(value_mean + p_value, m_leaf[:, None] & m_dim[None, :], other=0)
        # codes are exact in tf32, so three products are float32's precision at tensor cores' speed
        b_scaled = b_weight * scale[None, :]
        b_out = b_out * shrink[:, None]
        b_out += tl.dot(b_scaled, b_value.to(tl.float32), input_precision="tf32x3")
        largest = larger
    b_out = b_out / divisor(total)[:, None]
    b_lse = tl.where(total > 0, safe(largest) + tl.log(divisor(total)), none)
    i_out = (i_row * tl.num_programs(1) + i_piece) * G + o_group
    p_out = i_out[:, None] * D + o_dim[None, :]
    tl.store(out + p_out, b_out, m_group[:, None] & m_dim[None, :])
    tl.store(lse + i_out, b_lse, m_group)
