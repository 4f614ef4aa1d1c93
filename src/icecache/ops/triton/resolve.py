"""Resolve: which slots hold a step's pages, and which pages give way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from icecache.ops.device.records import DevicePages
from icecache.ops.device.twin_fetch import check_slots
from icecache.ops.triton.launch import check_contiguous, on_device_of, tile

__all__ = ["resolve"]

# a key is how late a slot was used, then its number: the smallest is the lowest of the oldest
_SLOT_BITS = 20
# pages times slots that are compared at a time: more would not stay in registers
_MOST_COMPARED = 8192


def resolve(selected: Tensor, pages: DevicePages, step: Tensor) -> tuple[Tensor, Tensor]:
    """As `twin.resolve`."""
    check_slots(selected, pages)
    if pages.slot_of_page is None or pages.page_in_slot is None:
        return selected.clone(), torch.full_like(selected, -1)
    slots, missing = torch.empty_like(selected), torch.empty_like(selected)
    check_contiguous(selected=selected, **pages._asdict())
    num_rows, most = selected.shape
    slot_tile = tile(pages.page_in_slot.shape[1])
    with on_device_of(selected):
        _resolve_kernel[(num_rows,)](
            selected,
            step,
            pages.slot_of_page,
            pages.page_in_slot,
            pages.last_used,
            pages.work,
            slots,
            missing,
            pages.slot_of_page.shape[1],
            S=most,
            C=pages.page_in_slot.shape[1],
            BITS=_SLOT_BITS,
            BS=tile(most),
            BC=slot_tile,
            BT=min(tile(most), max(1, _MOST_COMPARED // slot_tile)),
        )
    return slots, missing


@triton.jit(do_not_specialize=["P"])
def _resolve_kernel(
    selected,
    step,
    slot_of_page,
    page_in_slot,
    last_used,
    work,
    slots,
    missing,
    P,
    S: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_page, o_slot = tl.arange(0, BS), tl.arange(0, BC)
    p_slot = i_row * C + o_slot
    page = tl.load(selected + i_row * S + o_page, o_page < S, other=-1)
    slot = tl.load(slot_of_page + i_row * P + page, page >= 0, other=-1)
    m_hit = slot >= 0
    m_miss = (page >= 0) & (slot < 0)
    held = tl.load(page_in_slot + p_slot, o_slot < C, other=0)
    now = tl.load(step).to(tl.int64) * (2 * S)
    # slots that were used longer ago than a key can say are alike
    longest: tl.constexpr = 1 << (61 - BITS)
    ago = now - tl.load(last_used + p_slot, o_slot < C, other=0)
    late = tl.where(held < 0, 0, longest - tl.minimum(ago, longest - 1))
    wanted = tl.zeros((BC,), tl.int32)
    for start in range(0, S, BT):
        o_tile = start + tl.arange(0, BT)
        of_tile = tl.load(selected + i_row * S + o_tile, o_tile < S, other=-1)
        of_tile = tl.load(slot_of_page + i_row * P + of_tile, of_tile >= 0, other=-1)
        wanted |= tl.max((of_tile[:, None] == o_slot[None, :]).to(tl.int32), 0)
    key = (late << BITS) + o_slot
    key = tl.sort(tl.where((o_slot < C) & (wanted == 0), key, 1 << 62))
    order = tl.cumsum(m_miss.to(tl.int32), 0) - 1
    victim = tl.gather(key, tl.where(m_miss, order, 0), 0) & ((1 << BITS) - 1)
    p_victim = i_row * C + victim
    leaves = tl.load(page_in_slot + p_victim, m_miss, other=-1)
    num_asked = tl.load(work + i_row * 2) + tl.sum((page >= 0).to(tl.int64), 0)
    num_missing = tl.load(work + i_row * 2 + 1) + tl.sum(m_miss.to(tl.int64), 0)
    # every warp has read the tables before any writes
    tl.debug_barrier()
    tl.store(slot_of_page + i_row * P + leaves, -1, m_miss & (leaves >= 0))
    tl.store(slot_of_page + i_row * P + page, victim.to(tl.int32), m_miss)
    tl.store(page_in_slot + p_victim, page, m_miss)
    tl.store(last_used + i_row * C + slot, now + o_page, m_hit)
    tl.store(last_used + p_victim, now + S + o_page, m_miss)
    p_page = i_row * S + o_page
    tl.store(slots + p_page, tl.where(m_miss, victim.to(tl.int32), slot), o_page < S)
    tl.store(missing + p_page, tl.where(m_miss, page, -1), o_page < S)
    tl.store(work + i_row * 2, num_asked)
    tl.store(work + i_row * 2 + 1, num_missing)
