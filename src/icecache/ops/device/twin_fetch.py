"""Residency and fetch in plain torch: which slots hold a step's pages, and what must be copied."""

import torch
from torch import Tensor

from icecache.errors import InputError
from icecache.ops.device.records import DevicePages

__all__ = ["check_slots", "gather", "resolve"]


def resolve(selected: Tensor, pages: DevicePages, step: Tensor) -> tuple[Tensor, Tensor]:
    """Give each selected page a slot.

    A miss takes the lowest free slot, else that of the page that was used longest ago; pages of
    one step count as used hits first, then misses, in the order asked for. This is the rule of
    `store.residency.LeastRecentlyUsed`.

    Parameters
    ----------
    selected : Tensor, shape [R, S], int32
        Distinct pages of a row, -1 where there is none.
    pages : DevicePages
        Its tables are changed; without slots there is nothing to do.
    step : Tensor, shape [1], int64
        Rises from call to call, by one or more.

    Returns
    -------
    slots : Tensor, shape [R, S], int32
        -1 where no page is selected.
    missing : Tensor, shape [R, S], int32
        The page to copy into the slot, -1 where it is there.

    Raises
    ------
    InputError
        If a row has fewer slots than a step selects pages.
    """
    check_slots(selected, pages)
    if pages.slot_of_page is None or pages.page_in_slot is None or pages.last_used is None:
        return selected.clone(), torch.full_like(selected, -1)
    slots, missing = torch.full_like(selected, -1), torch.full_like(selected, -1)
    if pages.work is not None:
        asked_for = (selected >= 0).sum(1)
        absent = pages.slot_of_page.gather(1, selected.clamp(min=0).long()) < 0
        pages.work.add_(torch.stack([asked_for, (absent & (selected >= 0)).sum(1)], 1))
    most, first = selected.shape[1], int(step) * 2 * selected.shape[1]
    for row, wanted in enumerate(selected.tolist()):
        slot_of_page, page_in_slot = pages.slot_of_page[row], pages.page_in_slot[row]
        last_used = pages.last_used[row]
        slot_of = slot_of_page.tolist()
        asked = [(i, page) for i, page in enumerate(wanted) if page >= 0]
        misses = [(i, page) for i, page in asked if slot_of[page] < 0]
        hit_slots = {slot_of[page] for _, page in asked}
        ages = [
            -1 if page < 0 else age for page, age in zip(page_in_slot.tolist(), last_used.tolist())
        ]
        victims = sorted((age, slot) for slot, age in enumerate(ages) if slot not in hit_slots)
        for i, page in asked:
            if slot_of[page] >= 0:
                slots[row, i] = slot_of[page]
                last_used[slot_of[page]] = first + i
        for (i, page), (_, slot) in zip(misses, victims):
            if page_in_slot[slot] >= 0:
                slot_of_page[page_in_slot[slot]] = -1
            page_in_slot[slot], slot_of_page[page] = page, slot
            slots[row, i], missing[row, i] = slot, page
            last_used[slot] = first + most + i
    return slots, missing


def gather(pages: DevicePages, slots: Tensor, missing: Tensor) -> None:
    """Copy missing pages from `host` to their slots in `resident`; int8 ones as what they mean."""
    if pages.resident is None:
        return
    row, i = (missing >= 0).nonzero(as_tuple=True)
    page, slot = missing[row, i].long(), slots[row, i].long()
    where = row.to(pages.host.device), page.to(pages.host.device)
    records = pages.host[where].to(pages.resident.device)
    if pages.scales is not None:
        records = records.float() * pages.scales[where].to(pages.resident.device)[..., None]
    pages.resident[row, slot] = records.to(pages.resident.dtype)


def check_slots(selected: Tensor, pages: DevicePages) -> None:
    """Raise `InputError` if a row has fewer slots than a step selects pages."""
    if pages.page_in_slot is not None and pages.page_in_slot.shape[1] < selected.shape[1]:
        raise InputError(
            f"a row must have a slot for each of the {selected.shape[1]} pages that a step selects "
            f"at most, got {pages.page_in_slot.shape[1]}"
        )
