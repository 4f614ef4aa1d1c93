"""Insert: each row's leaving token to its nearest leaf, as one program a row."""

import torch
import triton
import triton.language as tl

from icecache.ops.device.records import DevicePages, DeviceTree, Leaving, Scores
from icecache.ops.triton.arithmetic import count_bits, quantize
from icecache.ops.triton.cut import free_slot, main_half, mask_of, summarize
from icecache.ops.triton.launch import check_contiguous, num_warps, on_device_of, tile

__all__ = ["insert"]

_POWER_ROUNDS = 3


def insert(
    tree: DeviceTree, pages: DevicePages, leaving: Leaving, scores: Scores, leaf_size: int
) -> None:
    """As `twin.insert`; `host`, `scales` and `positions` may be pinned host memory."""
    check_contiguous(**tree._asdict(), **pages._asdict())
    num_rows, num_pages, _, page_size, dim = pages.host.shape
    slots = 0 if pages.page_in_slot is None else pages.page_in_slot.shape[1]
    # pointers that are not followed
    scales = tree.spread if pages.scales is None else pages.scales
    resident = pages.host if pages.resident is None else pages.resident
    slot_of_page = tree.leaf_page if pages.slot_of_page is None else pages.slot_of_page
    with on_device_of(tree.centre):
        _insert_kernel[(num_rows,)](
            *tree,
            pages.host,
            scales,
            pages.positions,
            resident,
            slot_of_page,
            leaving.keys,
            leaving.values,
            leaving.leaves.view(torch.uint8),
            leaving.position,
            scores.nearest,
            scores.distance,
            tree.num_tokens.shape[1],
            num_pages,
            slots,
            scores.nearest.shape[1],
            D=dim,
            T=page_size,
            LEAF_SIZE=leaf_size,
            ROUNDS=_POWER_ROUNDS,
            QUANTIZED=pages.scales is not None,
            RESIDENT=pages.resident is not None,
            BM=tile(leaf_size + 1),
            BD=tile(dim),
            BT=tile(page_size),
            BN=tile(scores.nearest.shape[1]),
            num_warps=num_warps(dim),
        )


@triton.jit
def _nearest_leaf(nearest, distance, i_row, N, BN: tl.constexpr):
    """Return the first of the runs' nearest leaves, -1 for none."""
    o_run = tl.arange(0, BN)
    apart = tl.load(distance + i_row * N + o_run, o_run < N, other=float("inf"))
    first = tl.min(tl.where(apart == tl.min(apart, 0), o_run, BN), 0)
    return tl.load(nearest + i_row * N + first)


@triton.jit
def _load_members(
    host, scales, p_token, m_old, new, o_dim, m_dim, m_new, D: tl.constexpr, QUANTIZED: tl.constexpr
):
    """Return members as pages keep them: values, codes and scales; the new token last."""
    mask = m_old[:, None] & m_dim[None, :]
    b_code = tl.load(host + p_token[:, None] * D + o_dim[None, :], mask, other=0)  # [BM, BD]
    b_new = tl.load(new + o_dim, m_dim, other=0.0).to(tl.float32)
    b_scale = m_new.to(tl.float32)
    if QUANTIZED:
        b_scale = tl.load(scales + p_token, m_old, other=0.0)
        codes, scale = quantize(b_new)
        b_code = tl.where(m_new[:, None], codes[None, :], b_code)
        b_scale = tl.where(m_new, scale, b_scale)
        b_token = b_code.to(tl.float32) * b_scale[:, None]
    else:
        b_token = tl.where(m_new[:, None], b_new[None, :], b_code.to(tl.float32))
        b_code = b_token
    return b_token, b_code, b_scale


@triton.jit(do_not_specialize=["L", "P", "C", "N"])
def _insert_kernel(
    centre,
    key_mean,
    key_scale,
    value_mean,
    value_scale,
    spread,
    num_tokens,
    leaf_page,
    leaf_slots,
    num_leaves,
    page_used,
    num_pages,
    open_page,
    full,
    host,
    scales,
    positions,
    resident,
    slot_of_page,
    left_keys,
    left_values,
    leaves,
    left_position,
    nearest,
    distance,
    L,
    P,
    C,
    N,
    D: tl.constexpr,
    T: tl.constexpr,
    LEAF_SIZE: tl.constexpr,
    ROUNDS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    RESIDENT: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    if tl.load(leaves + i_row) != 0:
        o_member, o_dim = tl.arange(0, BM), tl.arange(0, BD)
        o_slot = tl.arange(0, BT).to(tl.int64)
        m_dim = o_dim < D
        i_near = _nearest_leaf(nearest, distance, i_row, N, BN)
        opens = i_near < 0
        leaf = tl.maximum(i_near, 0)
        slots = tl.where(opens, 0, tl.load(leaf_slots + i_row * L + leaf))
        page = tl.where(opens, 0, tl.load(leaf_page + i_row * L + leaf))
        used = tl.load(page_used + i_row * P + page)

        # which slot each member has, the new token behind them without one
        bit = tl.where(o_slot < T, (slots >> (o_slot & 63)) & 1, 0)
        rank = tl.cumsum(bit, 0) - 1
        match = (rank[None, :] == o_member[:, None]) & (bit[None, :] == 1)
        slot = tl.sum(tl.where(match, o_slot[None, :].to(tl.int32), 0), 1)  # [BM]
        num = count_bits(slots).to(tl.int32) + 1
        m_member, m_old, m_new = o_member < num, o_member < num - 1, o_member == num - 1
        p_key = (i_row * P + page) * 2 * T + slot
        b_key, k_code, k_scale = _load_members(
            host, scales, p_key, m_old, left_keys + i_row * D, o_dim, m_dim, m_new, D, QUANTIZED
        )
        b_value, v_code, v_scale = _load_members(
            host,
            scales,
            p_key + T,
            m_old,
            left_values + i_row * D,
            o_dim,
            m_dim,
            m_new,
            D,
            QUANTIZED,
        )
        b_position = tl.load(positions + (i_row * P + page) * T + slot, m_old, other=-1)
        b_position = tl.where(m_new, tl.load(left_position + i_row), b_position)

        upper = tl.zeros((BM,), tl.int32)
        cuts = num > LEAF_SIZE
        if cuts:
            upper = main_half(b_key, m_member, num, ROUNDS, BM)
        # from a full page the upper half leaves, or a leaf that is not cut
        leaving = tl.zeros((BM,), tl.int32)
        if count_bits(used) == T:
            leaving = tl.where(m_member & (cuts == 0), 1, upper)
        moves = tl.max(leaving, 0)
        moved = tl.sum(leaving, 0)
        fresh = tl.load(num_pages + i_row)
        opened = tl.load(open_page + i_row)
        open_used = tl.load(page_used + i_row * P + tl.maximum(opened, 0))
        takes = (opened >= 0) & (opened != page) & (count_bits(open_used) + moved <= T)
        target = tl.where(moves == 1, tl.where(takes, opened, fresh), page)
        target_used = tl.where((moves == 1) & takes, open_used, 0)
        held = tl.load(num_leaves + i_row)
        lacks = ((opens | cuts) & (held >= L)) | (target >= P)
        # every warp has read before any writes
        tl.debug_barrier()
        if lacks:
            tl.store(full + i_row, 1)
        else:
            m_leaves = leaving == 1
            m_moved = m_old & m_leaves
            stays = used & ~mask_of(slot, m_moved)
            order = tl.cumsum(leaving, 0) - 1
            to = tl.where(
                m_leaves,
                free_slot(target_used, order, T, BT),
                tl.where(m_new, free_slot(stays, o_member * 0, T, BT), slot),
            )
            home = tl.where(m_leaves, target, page)
            m_written = m_leaves | m_new
            p_to = (i_row * P + home) * 2 * T + to
            mask = m_written[:, None] & m_dim[None, :]
            p_host = p_to[:, None] * D + o_dim[None, :]
            tl.store(host + p_host, k_code, mask)
            tl.store(host + p_host + T * D, v_code, mask)
            if QUANTIZED:
                tl.store(scales + p_to, k_scale, m_written)
                tl.store(scales + p_to + T, v_scale, m_written)
            if RESIDENT:
                into = tl.load(slot_of_page + i_row * P + home, m_written, other=-1)
                p_copy = ((i_row * C + into) * 2 * T + to)[:, None] * D + o_dim[None, :]
                m_copy = mask & (into >= 0)[:, None]
                tl.store(resident + p_copy, b_key, m_copy)
                tl.store(resident + p_copy + T * D, b_value, m_copy)
            # the new token may stay in a slot that another one leaves
            taken = tl.max(tl.where(m_new & (leaving == 0), to, -1), 0)
            p_position = (i_row * P + page) * T + slot
            tl.store(positions + p_position, -1, m_moved & (slot != taken))
            tl.store(positions + (i_row * P + home) * T + to, b_position, m_written)
            stays = stays | mask_of(to, m_new & (leaving == 0))
            tl.store(page_used + i_row * P + page, stays)
            if moves == 1:
                tl.store(page_used + i_row * P + target, target_used | mask_of(to, m_leaves))
            if target >= fresh:
                tl.store(num_pages + i_row, target + 1)
                tl.store(open_page + i_row, target)
            if opens | cuts:
                tl.store(num_leaves + i_row, held + 1)

            b_centre = tl.load(centre + i_row * D + o_dim, m_dim, other=0.0)
            for half in range(0, 1 + cuts.to(tl.int32)):
                m_half = m_member & (upper == half)
                size = tl.sum(m_half.to(tl.int32), 0)
                i_leaf = i_row * L + tl.where(half == 0, leaf, held)
                tl.store(num_tokens + i_leaf, size)
                tl.store(leaf_page + i_leaf, tl.max(tl.where(m_half, home, -1), 0))
                tl.store(leaf_slots + i_leaf, mask_of(to, m_half))
                apart = summarize(
                    b_key, m_half, size, b_centre, key_mean, key_scale, i_leaf, o_dim, m_dim
                )
                tl.store(spread + i_leaf, apart)
                summarize(b_value, m_half, size, 0.0, value_mean, value_scale, i_leaf, o_dim, m_dim)
