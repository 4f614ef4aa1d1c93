"""Grouping of points by nearness: promotion, refinement, cuts of the widest and the too large.

Points come ragged: the rows of a batch lie one after the other in a flat tensor. Every step works
on all rows at once. A row is first put in an order in which near points are near, then cut into
segments of equal length; a segment's points are grouped among themselves, so the cost is linear
in the number of points. Nothing is random: the promoted points are every n-th in that order
(arXiv 2604.10539 promotes every n-th key too), so a row's groups do not depend on its batch.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.ops.batched import sum_groups

__all__ = [
    "COARSE_CELL",
    "MAX_COARSE_CELLS",
    "WIDEST_SHARE",
    "GroupRule",
    "bisect_order",
    "cut_widest",
    "group",
    "sort_within",
    "split_oversized",
]

COARSE_CELL = 512
MAX_COARSE_CELLS = 256
WIDEST_SHARE = 8
_POWER_ROUNDS = 3
_SCRATCH_ELEMENTS = 1 << 22


class GroupRule(NamedTuple):
    """How points are grouped.

    Attributes
    ----------
    target : points per promoted parent.
    largest : most points of a group.
    rounds : refinements of the parents.
    cuts : rounds in which the widest eighth of the groups is cut in two.
    segment : most points grouped among themselves.
    seed : which points are promoted.
    """

    target: int
    largest: int
    rounds: int
    cuts: int
    segment: int
    seed: int


def group(points: Tensor, row_lens: list[int], rule: GroupRule) -> tuple[Tensor, list[int]]:
    """Group the points of every row.

    Parameters
    ----------
    points : Tensor, shape [points, dim], float32
        The rows' points, one row after the other.
    row_lens : list of int
        Points per row.
    rule : GroupRule

    Returns
    -------
    ids : Tensor, shape [points], int64
        Each point's group, numbered over all rows; a row's numbers are contiguous and rise from
        row to row, and near groups have near numbers.
    groups_per_row : list of int
    """
    row = _repeated(row_lens, points.device)
    # distances between points with a large common offset lose their digits
    points = points - _row_means(points, row, len(row_lens))[row]
    order, segments_per_row = _segment_order(points, row_lens, rule)
    ids, num_groups, segment_of_group = _group_segments(points, order, rule)
    for _ in range(rule.cuts):
        ids, segment_of_group = cut_widest(points, ids, segment_of_group)
        num_groups = segment_of_group.numel()
    ids, segment_of_group = split_oversized(points, ids, num_groups, rule.largest, segment_of_group)
    return _number_by_segment(ids, segment_of_group, segments_per_row)


def split_oversized(
    points: Tensor, ids: Tensor, num_groups: int, largest: int, owner: Tensor
) -> tuple[Tensor, Tensor]:
    """Cut groups of more than `largest` points in two along their main direction, until none is.

    Parameters
    ----------
    points : Tensor, shape [points, dim], float32
    ids : Tensor, shape [points], int64
    num_groups : int
    largest : int
    owner : Tensor, shape [groups], int64
        Any label of a group; the groups cut off inherit it.

    Returns
    -------
    ids, owner : Tensor
        New groups are numbered from `num_groups` on; the first half keeps its number.
    """
    while True:
        counts = torch.bincount(ids, minlength=num_groups)
        oversized = (counts > largest).nonzero()[:, 0]
        if oversized.numel() == 0:
            return ids, owner
        compact = torch.full_like(counts, -1)
        compact[oversized] = torch.arange(oversized.numel(), device=ids.device)
        label = compact[ids]
        members = (label >= 0).nonzero()[:, 0]
        label = label[members]
        upper = _upper_half(points[members], label, counts[oversized])
        ids = ids.clone()
        ids[members[upper]] = num_groups + label[upper]
        owner = torch.cat([owner, owner[oversized]])
        num_groups += oversized.numel()


def cut_widest(points: Tensor, ids: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the groups in two whose farthest point is farthest from the mean.

    A key unlike its group hides in the group's mean, and the query that wants it misses it. Groups
    are cut where their main direction passes the mean, so that such a point is left alone.

    Parameters
    ----------
    points : Tensor, shape [points, dim], float32
    ids : Tensor, shape [points], int64
        Each point's group; none is empty.
    owner : Tensor, shape [groups], int64
        Any label of a group; of each label's groups the widest eighth is cut.

    Returns
    -------
    ids, owner : Tensor
        New groups are numbered behind the others and inherit their owner; the side of a group's
        first point keeps the number.
    """
    counts = torch.bincount(ids)
    distance = _centred(points, ids, counts).square().sum(1)
    reach = torch.zeros_like(owner, dtype=points.dtype).scatter_reduce(0, ids, distance, "amax")
    by_reach = sort_within(owner, -reach)
    per_owner = torch.bincount(owner)
    rank = torch.arange(owner.numel(), device=ids.device)
    rank -= (per_owner.cumsum(0) - per_owner)[owner[by_reach]]
    widest = by_reach[rank < (per_owner // WIDEST_SHARE)[owner[by_reach]]]
    label = torch.full_like(counts, -1)
    label[widest] = torch.arange(widest.numel(), device=ids.device)
    members = (label[ids] >= 0).nonzero()[:, 0]
    label = label[ids[members]]
    is_beyond = _project(points[members], label, counts[widest]) > 0
    # of a pair, rounding would say which is beyond
    first = torch.full_like(widest, points.shape[0]).scatter_reduce(
        0, label, torch.arange(label.numel(), device=ids.device), "amin"
    )
    moves = is_beyond != is_beyond[first[label]]
    is_cut = torch.zeros_like(widest, dtype=torch.bool)
    is_cut[label[moves]] = True
    number = counts.numel() + is_cut.cumsum(0) - 1
    ids = ids.clone()
    ids[members[moves]] = number[label[moves]]
    return ids, torch.cat([owner, owner[widest[is_cut]]])


def bisect_order(points: Tensor) -> Tensor:
    """Return an order of the points in which near ones are near, shape [points], int64.

    Halves recursively along the main direction; neighbours in the result share small cells.
    """
    num = points.shape[0]
    ids = torch.zeros(num, dtype=torch.int64, device=points.device)
    cells = 1
    for _ in range(max(0, math.ceil(math.log2(max(1, num))) - 1)):
        counts = torch.bincount(ids, minlength=cells)
        # a pair's ends are equally far out: rounding would say which comes first
        upper = _upper_half(points, ids, counts) & (counts[ids] > 2)
        ids = 2 * ids + upper.long()
        cells *= 2
    return torch.argsort(ids, stable=True)


def sort_within(ids: Tensor, key: Tensor) -> Tensor:
    """Return the stable order that sorts by group and, within a group, by key."""
    by_key = torch.argsort(key, stable=True)
    return by_key[torch.argsort(ids[by_key], stable=True)]


def _upper_half(points: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Say of each point whether it lies in the upper half of its group's main direction."""
    order = sort_within(ids, _project(points, ids, counts))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    rank -= (counts.cumsum(0) - counts)[ids]
    return rank >= (counts - counts // 2)[ids]


def _project(points: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Return where each point lies along its group's main direction, from the group's mean."""
    centred = _centred(points, ids, counts)
    by_norm = sort_within(ids, (centred * centred).sum(1))
    direction = centred[by_norm[(counts.cumsum(0) - 1).clamp(min=0)]]
    for _ in range(_POWER_ROUNDS):
        weight = (centred * direction[ids]).sum(1, keepdim=True)
        direction = sum_groups(weight * centred, ids, counts.numel())
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-20)
    return (centred * direction[ids]).sum(1)


def _centred(points: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    mean = sum_groups(points, ids, counts.numel()) / counts.clamp(min=1)[:, None]
    return points - mean[ids]


def _row_means(points: Tensor, row: Tensor, num_rows: int) -> Tensor:
    counts = torch.bincount(row, minlength=num_rows).clamp(min=1)
    return sum_groups(points, row, num_rows) / counts[:, None]


def _segment_order(
    points: Tensor, row_lens: list[int], rule: GroupRule
) -> tuple[Tensor, list[int]]:
    """Return point numbers, shape [segments, segment], -1 where a segment is shorter."""
    pieces: list[Tensor] = []
    per_row: list[int] = []
    start = 0
    for length in row_lens:
        numbers = torch.arange(start, start + length, device=points.device)
        num_segments = math.ceil(length / rule.segment)
        if num_segments > 1:
            numbers = numbers[_coarse_order(points[start : start + length])]
        pieces.extend(numbers.tensor_split(num_segments) if length else ())
        per_row.append(num_segments)
        start += length
    order = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=-1)
    return order, per_row


def _coarse_order(points: Tensor) -> Tensor:
    num = points.shape[0]
    stride = max(COARSE_CELL, math.ceil(num / MAX_COARSE_CELLS))
    parents = points[::stride]
    parents = parents[bisect_order(parents)]
    half_norm = 0.5 * (parents * parents).sum(1)
    cell = torch.empty(num, dtype=torch.int64, device=points.device)
    step = max(1, _SCRATCH_ELEMENTS // parents.shape[0])
    for i in range(0, num, step):
        cell[i : i + step] = (half_norm - points[i : i + step] @ parents.T).argmin(1)
    return torch.argsort(cell, stable=True)


def _group_segments(points: Tensor, order: Tensor, rule: GroupRule) -> tuple[Tensor, int, Tensor]:
    num_segments, width = order.shape
    max_parents = math.ceil(width / rule.target)
    ids = torch.empty(points.shape[0], dtype=torch.int64, device=points.device)
    step = max(1, _SCRATCH_ELEMENTS // (width * max_parents))
    for i in range(0, num_segments, step):
        numbers = order[i : i + step]
        real = numbers >= 0
        nearest = _promote_and_refine(points[numbers.clamp(min=0)], real, rule)
        segment = torch.arange(i, i + numbers.shape[0], device=points.device)
        offset = segment[:, None] * max_parents
        ids[numbers[real]] = (nearest + offset)[real]
    used, ids = torch.unique(ids, return_inverse=True)
    return ids, used.numel(), used // max_parents


def _promote_and_refine(x: Tensor, real: Tensor, rule: GroupRule) -> Tensor:
    """Return each point's nearest parent; x: [segments, width, dim], real: [segments, width]."""
    lens = real.sum(1)
    num_parents = (lens + rule.target - 1) // rule.target
    slot = torch.arange(int(num_parents.max()), device=x.device)
    promoted = (slot[None] * rule.target + rule.seed % rule.target).clamp(max=x.shape[1] - 1)
    promoted = torch.minimum(promoted, (lens - 1)[:, None])
    parents = x.gather(1, promoted[..., None].expand(-1, -1, x.shape[2]))
    absent = slot[None] >= num_parents[:, None]
    for round_ in range(rule.rounds + 1):
        half_norm = (0.5 * (parents * parents).sum(-1)).masked_fill(absent, math.inf)
        nearest = torch.baddbmm(half_norm[:, None], x, parents.transpose(1, 2), alpha=-1).argmin(-1)
        if round_ == rule.rounds:
            return nearest
        parents = _means(x, real, nearest, parents)
    raise AssertionError("unreachable")


def _means(x: Tensor, real: Tensor, nearest: Tensor, parents: Tensor) -> Tensor:
    segments, num_parents, dim = parents.shape
    offset = torch.arange(segments, device=x.device)[:, None] * num_parents
    flat = (nearest + offset)[real]
    total = sum_groups(x[real], flat, segments * num_parents)
    count = torch.bincount(flat, minlength=segments * num_parents)[:, None]
    mean = total / count.clamp(min=1)
    return torch.where(count > 0, mean, parents.reshape(-1, dim)).view_as(parents)


def _number_by_segment(
    ids: Tensor, segment_of_group: Tensor, segments_per_row: list[int]
) -> tuple[Tensor, list[int]]:
    order = torch.argsort(segment_of_group, stable=True)
    number = torch.empty_like(order)
    number[order] = torch.arange(order.numel(), device=order.device)
    row_of_segment = _repeated(segments_per_row, ids.device)
    per_row = torch.bincount(row_of_segment[segment_of_group], minlength=len(segments_per_row))
    return number[ids], per_row.tolist()


def _repeated(times: list[int], device: torch.device) -> Tensor:
    """Return each index as often as `times` says."""
    return torch.repeat_interleave(torch.tensor(times, dtype=torch.int64, device=device))
