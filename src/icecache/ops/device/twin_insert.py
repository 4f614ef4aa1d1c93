"""Insert in plain torch: the leaving token to its nearest leaf, one row at a time.

A leaf takes the token into its page, and is cut in two if it passes `leaf_size`. A page without a
free slot loses the leaf, or the smaller half of a cut one, to the row's open page, or to a fresh
page that becomes the open one. So a page that was full stays at least half full, as long as a leaf
is at most half a page.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.ops.device.bits import has_bit, mask_of
from icecache.ops.device.quantize import quantize
from icecache.ops.device.records import DevicePages, DeviceTree, Leaving, Scores

__all__ = ["insert", "nearest_leaf", "upper_half"]

_POWER_ROUNDS = 3


class _Plan(NamedTuple):
    """Where a leaf's members go, the new token last: to `target` if they leave, else stay."""

    leaf: int
    page: int
    slots: list[int]
    upper: list[bool]
    leaving: list[bool]
    target: int


def insert(
    tree: DeviceTree, pages: DevicePages, leaving: Leaving, scores: Scores, leaf_size: int
) -> None:
    """Insert each row's leaving token in the leaf that `score` found nearest.

    Changes the tree and the pages, resident copies included. A row without room for a leaf or page
    that it needs is left as it was, and its `tree.full` set; one insert adds at most one of each.

    leaf_size: at most half a page.
    """
    nearest = nearest_leaf(scores).tolist()
    for row in leaving.leaves.nonzero()[:, 0].tolist():
        keys, values = leaving.keys[row], leaving.values[row]
        plan = _plan(tree, pages, row, nearest[row], keys, leaf_size)
        if plan is None:
            tree.full[row] = 1
            continue
        slots = _store(tree, pages, row, plan, torch.stack([keys, values]))
        pages.positions[row, slots[-1][0], slots[-1][1]] = leaving.position[row].to(
            pages.positions.device
        )
        _settle(tree, pages, row, plan, slots)


def nearest_leaf(scores: Scores) -> Tensor:
    """Return the nearest of all runs' nearest leaves, shape [R], int32; the first of equals."""
    least = scores.distance == scores.distance.amin(1, keepdim=True)
    return scores.nearest.gather(1, least.int().argmax(1, keepdim=True))[:, 0]


def upper_half(keys: Tensor) -> Tensor:
    """Say which members lie in the upper half along their main direction, shape [members], bool.

    keys: shape [members, D], float32. The rule of `tree.cluster` for one group.
    """
    num = keys.shape[0]
    centred = keys - keys.mean(0)
    norm = centred.square().sum(1)
    direction = centred[int((norm == norm.max()).nonzero()[-1])]
    for _ in range(_POWER_ROUNDS):
        direction = (centred @ direction) @ centred
        direction = direction / direction.norm().clamp(min=1e-20)
    rank = torch.empty(num, dtype=torch.int64, device=keys.device)
    order = (centred @ direction).argsort(stable=True)
    rank[order] = torch.arange(num, device=keys.device)
    return rank >= num - num // 2


def _plan(
    tree: DeviceTree, pages: DevicePages, row: int, leaf: int, key: Tensor, leaf_size: int
) -> _Plan | None:
    opens = leaf < 0
    if opens and int(tree.num_leaves[row]) > 0:
        # no leaf is near a key that is no number
        return None
    if opens:
        leaf, page, slots = 0, 0, []
    else:
        page = int(tree.leaf_page[row, leaf])
        slots = _slots(int(tree.leaf_slots[row, leaf]))
    num = len(slots) + 1
    upper = [False] * num
    if num > leaf_size:
        new = _rounded(key[None], pages)
        members = _read(pages, row, page, slots)[0]
        upper = upper_half(torch.cat([members, new])).tolist()
    leaving, target = [False] * num, page
    if not opens and len(_slots(int(tree.page_used[row, page]))) == pages.host.shape[3]:
        leaving = upper if any(upper) else [True] * num
        target = _target(tree, pages, row, page, sum(leaving))
    needs_leaf = opens or num > leaf_size
    lacks_leaf = needs_leaf and int(tree.num_leaves[row]) >= tree.num_tokens.shape[1]
    lacks_page = (0 if opens else target) >= tree.page_used.shape[1]
    if lacks_leaf or lacks_page:
        return None
    return _Plan(leaf, page, slots, upper, leaving, target)


def _target(tree: DeviceTree, pages: DevicePages, row: int, page: int, needed: int) -> int:
    """Return the open page if it takes `needed` tokens, else the first fresh one."""
    opened = int(tree.open_page[row])
    free = pages.host.shape[3] - len(_slots(int(tree.page_used[row, opened])))
    if opened >= 0 and opened != page and needed <= free:
        return opened
    return int(tree.num_pages[row])


def _store(
    tree: DeviceTree, pages: DevicePages, row: int, plan: _Plan, token: Tensor
) -> list[tuple[int, int]]:
    """Move what leaves, write the token; returns page and slot of every member."""
    where = [(plan.page, slot) for slot in plan.slots]
    for i, slot in enumerate(plan.slots):
        if plan.leaving[i]:
            to = _take_slot(tree, pages, row, plan.target)
            _copy(pages, row, (plan.page, slot), (plan.target, to))
            tree.page_used[row, plan.page] &= ~mask_of([slot])
            where[i] = plan.target, to
    home = plan.target if plan.leaving[-1] else plan.page
    slot = _take_slot(tree, pages, row, home)
    if pages.scales is None:
        pages.host[row, home, :, slot] = token.to(pages.host.device, pages.host.dtype)
    else:
        codes, scales = quantize(token)
        pages.host[row, home, :, slot] = codes.to(pages.host.device)
        pages.scales[row, home, :, slot] = scales.to(pages.scales.device)
    _write_through(pages, row, home, slot)
    if plan.target >= int(tree.num_pages[row]):
        tree.num_pages[row] += 1
        tree.open_page[row] = plan.target
    return [*where, (home, slot)]


def _copy(pages: DevicePages, row: int, source: tuple[int, int], to: tuple[int, int]) -> None:
    pages.host[row, to[0], :, to[1]] = pages.host[row, source[0], :, source[1]]
    if pages.scales is not None:
        pages.scales[row, to[0], :, to[1]] = pages.scales[row, source[0], :, source[1]]
    pages.positions[row, to[0], to[1]] = pages.positions[row, source[0], source[1]]
    pages.positions[row, source[0], source[1]] = -1
    _write_through(pages, row, *to)


def _write_through(pages: DevicePages, row: int, page: int, slot: int) -> None:
    if pages.resident is None or pages.slot_of_page is None:
        return
    into = int(pages.slot_of_page[row, page])
    if into >= 0:
        token = _read(pages, row, page, [slot])[:, 0]
        pages.resident[row, into, :, slot] = token.to(pages.resident.device, pages.resident.dtype)


def _settle(
    tree: DeviceTree, pages: DevicePages, row: int, plan: _Plan, where: list[tuple[int, int]]
) -> None:
    """Write down the leaf and, if it was cut, the new leaf that takes the upper half."""
    halves = [False, True] if any(plan.upper) else [False]
    for half in halves:
        members = [at for at, upper in zip(where, plan.upper) if upper == half]
        leaf = int(tree.num_leaves[row]) if half else plan.leaf
        page, slots = members[0][0], [slot for _, slot in members]
        keys, values = _read(pages, row, page, slots).to(tree.centre.device)
        mean = keys.mean(0)
        tree.num_tokens[row, leaf] = len(slots)
        tree.leaf_page[row, leaf], tree.leaf_slots[row, leaf] = page, mask_of(slots)
        tree.spread[row, leaf] = (keys - mean).square().sum(1).mean()
        codes = quantize(torch.stack([mean - tree.centre[row], values.mean(0)]))
        tree.key_mean[row, leaf], tree.value_mean[row, leaf] = codes[0]
        tree.key_scale[row, leaf], tree.value_scale[row, leaf] = codes[1]
        tree.num_leaves[row] = max(int(tree.num_leaves[row]), leaf + 1)


def _read(pages: DevicePages, row: int, page: int, slots: list[int]) -> Tensor:
    """Return keys and values of a page's slots, shape [2, slots, D], float32."""
    records = pages.host[row, page][:, slots].float()
    if pages.scales is not None:
        records = records * pages.scales[row, page][:, slots, None]
    return records


def _rounded(keys: Tensor, pages: DevicePages) -> Tensor:
    """Return keys as pages keep them, float32."""
    if pages.scales is None:
        return keys.float().to(pages.host.device)
    codes, scales = quantize(keys.to(pages.host.device))
    return codes.float() * scales[..., None]


def _take_slot(tree: DeviceTree, pages: DevicePages, row: int, page: int) -> int:
    used = int(tree.page_used[row, page])
    taken = has_bit(torch.tensor(used), pages.host.shape[3]).tolist()
    slot = taken.index(False)
    tree.page_used[row, page] |= mask_of([slot])
    return slot


def _slots(mask: int) -> list[int]:
    return [slot for slot in range(64) if mask >> slot & 1]
