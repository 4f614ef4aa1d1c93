"""What holds of a device's tree and pages between two steps."""

import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.ops.device.bits import count_bits, has_bit
from icecache.ops.device.records import DevicePages, DeviceTree

__all__ = ["check_device_tree"]


def check_device_tree(tree: DeviceTree, pages: DevicePages, leaf_size: int) -> None:
    """Check one layer's tree against its pages; changes nothing, synchronises with the device.

    Raises
    ------
    IntegrityError
        Unless every token is in exactly one leaf, every leaf's tokens in one page, summaries are
        what the tokens give, resident pages equal the host's, and nothing lies beyond the counts.
    """
    tree, pages = tree.to(torch.device("cpu")), pages.to(torch.device("cpu"))
    for row in range(tree.num_tokens.shape[0]):
        _check_masks(tree, pages, row, leaf_size)
        _check_summaries(tree, pages, row)
        _check_residency(tree, pages, row)


def _check_masks(tree: DeviceTree, pages: DevicePages, row: int, leaf_size: int) -> None:
    num_leaves, num_pages = int(tree.num_leaves[row]), int(tree.num_pages[row])
    sizes, slots = tree.num_tokens[row], tree.leaf_slots[row]
    live = sizes > 0
    index = torch.arange(sizes.shape[0])
    _demand(bool((live == (index < num_leaves)).all()), row, "leaves are numbered from 0")
    _demand(int(sizes.max()) <= leaf_size, row, f"a leaf has at most {leaf_size} tokens")
    _demand(bool((count_bits(slots) == sizes)[live].all()), row, "a leaf has a slot a token")
    page = tree.leaf_page[row][live].long()
    in_range = page.numel() == 0 or (0 <= int(page.min()) and int(page.max()) < num_pages)
    _demand(in_range, row, "a leaf's page is one of the row's")
    union = torch.zeros_like(tree.page_used[row])
    for leaf, of in zip(slots[live].tolist(), page.tolist()):
        _demand((int(union[of]) & leaf) == 0, row, "a slot belongs to one leaf")
        union[of] |= leaf
    _demand(torch.equal(union, tree.page_used[row]), row, "leaves fill the used slots")
    used = has_bit(union, pages.host.shape[3])
    _demand(torch.equal(used, pages.positions[row] >= 0), row, "used slots have positions")
    held = pages.positions[row][used].tolist()
    _demand(len(set(held)) == len(held), row, "a position is there once")
    _demand(-1 <= int(tree.open_page[row]) < num_pages, row, "the open page is one of the row's")


def _check_summaries(tree: DeviceTree, pages: DevicePages, row: int) -> None:
    for leaf in range(int(tree.num_leaves[row])):
        page = int(tree.leaf_page[row, leaf])
        real = has_bit(tree.leaf_slots[row, leaf], pages.host.shape[3])
        keys, values = _records(pages, row, page)[:, real]
        mean = keys.mean(0)
        spread = (keys - mean).square().sum(1).mean()
        kept = tree.centre[row] + tree.key_mean[row, leaf].float() * tree.key_scale[row, leaf]
        _demand(_near(kept, mean, tree.key_scale[row, leaf]), row, "mean keys are the tokens'")
        kept = tree.value_mean[row, leaf].float() * tree.value_scale[row, leaf]
        near = _near(kept, values.mean(0), tree.value_scale[row, leaf])
        _demand(near, row, "mean values are the tokens'")
        same = torch.isclose(tree.spread[row, leaf], spread, rtol=1e-3, atol=1e-5)
        _demand(bool(same), row, "spreads are the tokens'")


def _check_residency(tree: DeviceTree, pages: DevicePages, row: int) -> None:
    if pages.resident is None or pages.slot_of_page is None or pages.page_in_slot is None:
        return
    slot_of, page_in = pages.slot_of_page[row].tolist(), pages.page_in_slot[row].tolist()
    there = [(page, slot) for page, slot in enumerate(slot_of) if slot >= 0]
    back = [(page, slot) for slot, page in enumerate(page_in) if page >= 0]
    _demand(there == sorted(back), row, "the two tables of slots say the same")
    for page, slot in there:
        real = has_bit(tree.page_used[row, page], pages.host.shape[3])
        host = _records(pages, row, page)[:, real].to(pages.resident.dtype)
        same = torch.equal(host, pages.resident[row, slot][:, real])
        _demand(same, row, "a resident page equals the host's")


def _records(pages: DevicePages, row: int, page: int) -> Tensor:
    records = pages.host[row, page].float()
    return records if pages.scales is None else records * pages.scales[row, page][..., None]


def _near(kept: Tensor, true: Tensor, scale: Tensor) -> bool:
    """Say whether codes give a mean to half a unit, but for rounding."""
    return bool(((kept - true).abs() <= 0.501 * scale + 1e-5 * (1 + true.abs())).all())


def _demand(holds: bool, row: int, rule: str) -> None:
    if not holds:
        raise IntegrityError(f"device tree, row {row}: {rule}: this does not hold")
