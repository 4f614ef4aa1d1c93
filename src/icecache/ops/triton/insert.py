"""Insert: each row's leaving token to its nearest leaf, as one program a row."""

import torch
import triton
import triton.language as tl

from icecache.ops.device.records import DevicePages, DeviceTree, Leaving, Scores
from icecache.ops.triton.arithmetic import count_bits
from icecache.ops.triton.cut import main_half, summarize
from icecache.ops.triton.insert_tokens import (
    free_slot,
    load_members,
    mask_of,
    slots_in_order,
    store_members,
)
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
    with on_device_of(tree.centre):
        _insert_kernel[(num_rows,)](
            *tree,
            pages.host,
            pages.scales,
            pages.positions,
            pages.resident,
            pages.slot_of_page,
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
def _target(page_used, num_pages, open_page, i_row, page, leaving, P, T: tl.constexpr):
    """Return the page that takes what leaves, its used slots, and the first fresh page."""
    fresh = tl.load(num_pages + i_row)
    opened = tl.load(open_page + i_row)
    used = tl.load(page_used + i_row * P + tl.maximum(opened, 0))
    fits = count_bits(used) + tl.sum(leaving, 0) <= T
    takes = (opened >= 0) & (opened != page) & fits
    moves = tl.max(leaving, 0) == 1
    target = tl.where(moves, tl.where(takes, opened, fresh), page)
    return target, tl.where(moves & takes, used, 0), fresh


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
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    if tl.load(leaves + i_row) != 0:
        o_member = tl.arange(0, BM)
        i_near = _nearest_leaf(nearest, distance, i_row, N, BN)
        opens = i_near < 0
        leaf = tl.maximum(i_near, 0)
        slots = tl.where(opens, 0, tl.load(leaf_slots + i_row * L + leaf))
        page = tl.where(opens, 0, tl.load(leaf_page + i_row * L + leaf))
        used = tl.load(page_used + i_row * P + page)

        # the new token comes behind the leaf's, without a slot
        slot = slots_in_order(slots, o_member, T, BT)  # [BM]
        num = count_bits(slots).to(tl.int32) + 1
        m_member, m_old, m_new = o_member < num, o_member < num - 1, o_member == num - 1
        pools = (host, scales, resident)
        i_key = (i_row * P + page) * 2 * T + slot
        key = load_members(pools, i_key, m_old, left_keys + i_row * D, m_new, D, BD)
        value = load_members(pools, i_key + T, m_old, left_values + i_row * D, m_new, D, BD)
        b_position = tl.load(positions + (i_row * P + page) * T + slot, m_old, other=-1)
        b_position = tl.where(m_new, tl.load(left_position + i_row), b_position)

        upper = tl.zeros((BM,), tl.int32)
        cuts = num > LEAF_SIZE
        if cuts:
            upper = main_half(key[0], m_member, num, ROUNDS, BM)
        # from a full page the upper half leaves, or a leaf that is not cut
        leaving = tl.zeros((BM,), tl.int32)
        if count_bits(used) == T:
            leaving = tl.where(m_member & (cuts == 0), 1, upper)
        target, target_used, fresh = _target(
            page_used, num_pages, open_page, i_row, page, leaving, P, T
        )
        held = tl.load(num_leaves + i_row)
        # no leaf is near a key that is no number
        lacks = ((opens | cuts) & (held >= L)) | (target >= P) | (opens & (held > 0))
        # every warp has read before any writes
        tl.debug_barrier()
        if lacks:
            tl.store(full + i_row, 1)
        else:
            m_leaves, m_stays = leaving == 1, m_new & (leaving == 0)
            stay = used & ~mask_of(slot, m_old & m_leaves)
            away = free_slot(target_used, tl.cumsum(leaving, 0) - 1, T, BT)
            to = tl.where(m_stays, free_slot(stay, o_member * 0, T, BT), slot)
            to = tl.where(m_leaves, away, to)
            home = tl.where(m_leaves, target, page)
            m_written = m_leaves | m_new
            into = home
            if resident is not None:
                into = tl.load(slot_of_page + i_row * P + home, m_written, other=-1)
            masks = (m_written, into >= 0)
            i_to, i_copy = (i_row * P + home) * 2 * T + to, (i_row * C + into) * 2 * T + to
            store_members(pools, key, i_to, i_copy, masks, D, BD)
            store_members(pools, value, i_to + T, i_copy + T, masks, D, BD)
            # the new token may stay in a slot that another one leaves
            taken = tl.max(tl.where(m_stays, to, -1), 0)
            m_freed = m_old & m_leaves & (slot != taken)
            tl.store(positions + (i_row * P + page) * T + slot, -1, m_freed)
            tl.store(positions + (i_row * P + home) * T + to, b_position, m_written)
            tl.store(page_used + i_row * P + page, stay | mask_of(to, m_stays))
            if target != page:
                tl.store(page_used + i_row * P + target, target_used | mask_of(to, m_leaves))
            if target >= fresh:
                tl.store(num_pages + i_row, target + 1)
                tl.store(open_page + i_row, target)
            if opens | cuts:
                tl.store(num_leaves + i_row, held + 1)

            m_dim = tl.arange(0, BD) < D
            b_centre = tl.load(centre + i_row * D + tl.arange(0, BD), m_dim, other=0.0)
            for half in range(0, 1 + cuts.to(tl.int32)):
                m_half = m_member & (upper == half)
                i_leaf = i_row * L + tl.where(half == 0, leaf, held)
                tl.store(num_tokens + i_leaf, tl.sum(m_half.to(tl.int32), 0))
                tl.store(leaf_page + i_leaf, tl.max(tl.where(m_half, home, -1), 0))
                tl.store(leaf_slots + i_leaf, mask_of(to, m_half))
                apart = summarize(key[0], m_half, b_centre, key_mean, key_scale, i_leaf, D, BD)
                tl.store(spread + i_leaf, apart)
                summarize(value[0], m_half, 0.0, value_mean, value_scale, i_leaf, D, BD)
