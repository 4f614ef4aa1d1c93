"""The slow twin of a search: which leaves are near a query, which nodes stay far."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from icecache import IceCacheConfig
from icecache.tree.level import NONE
from icecache.tree.tree import Tree


class Descent(NamedTuple):
    """What a search of one row must look at.

    Attributes
    ----------
    near : leaves to be scored
    far : level and number of the nodes that are not expanded
    nodes_scored : int
    """

    near: list[int]
    far: list[tuple[int, int]]
    nodes_scored: int


def children_of(tree: Tree, number: int, row: int) -> list[list[int]]:
    """Return the children of every node of a level, read from the arrays."""
    first, following = (
        tree.levels[number].array("first")[row].tolist(),
        tree.levels[number - 1].array("next")[row].tolist(),
    )
    found = []
    for node in range(int(tree.levels[number].num[row])):
        found.append([first[node]])
        while (child := following[found[-1][-1]]) != NONE:
            found[-1].append(child)
    return found


def estimate(
    tree: Tree,
    number: int,
    row: int,
    ids: list[int],
    q: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return what leaves or nodes weigh for a query: logits and corrections, shape [n] each."""
    s = tree.levels[number].at(row, torch.tensor(ids, dtype=torch.int64))
    logits = scaling * ((tree.leaves.centre[row] + s.keys()) @ q)
    correction = 0.5 * scaling**2 * (q @ q) * s.spread.float() / q.shape[0]
    if softcap is not None:
        slope = 1 - torch.tanh(logits / softcap) ** 2
        logits, correction = softcap * torch.tanh(logits / softcap), correction * slope**2
    return logits + s.count.float().log(), correction.clamp(max=4.0 if number else 2.0)


def slow_descent(
    tree: Tree,
    config: IceCacheConfig,
    row: int,
    queries: Tensor,
    beside: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Descent:
    """Search one row; queries: [heads, dim], beside: [heads], log-sum-exp of sink and window."""
    top = max(number for number, level in enumerate(tree.levels) if level.num[row] or not number)
    frontier = list(range(int(tree.levels[top].num[row])))
    if top == 0 or tree.leaves.num[row] <= max(config.crossover, config.budget):
        return Descent(list(range(int(tree.leaves.num[row]))), [], 0)
    far: list[tuple[int, int]] = []
    beside, scored = beside.clone(), 0
    for number in range(top, 0, -1):
        expanded = frontier
        field = config.field_of_view if number == 1 else math.ceil(config.field_of_view / 2)
        if len(frontier) > field:
            scored += len(frontier)
            worth, likely = torch.zeros(len(frontier)), []
            for q, rest in zip(queries, beside, strict=True):
                logits, correction = estimate(tree, number, row, frontier, q, scaling, softcap)
                likely.append(logits + correction)
                total = torch.logaddexp(likely[-1].logsumexp(0), rest)
                error = correction.sqrt() if config.estimates_remainder else 1.0
                worth += (likely[-1] - total).exp() * error
            by_worth = np.lexsort((np.asarray(frontier), -worth.numpy()))
            best = set(by_worth[:field].tolist())
            rest_of = [i for i in range(len(frontier)) if i not in best]
            far += [(number, frontier[i]) for i in rest_of]
            for head, estimates in enumerate(likely):
                beside[head] = torch.logaddexp(beside[head], estimates[rest_of].logsumexp(0))
            expanded = [frontier[i] for i in sorted(best)]
        children = children_of(tree, number, row)
        frontier = [child for node in expanded for child in children[node]]
    return Descent(frontier, far, scored)


def heard(share: Tensor, least: float) -> Tensor:
    """Return what entries weigh, shape [heads, n], without those below least / n for all heads."""
    kept = share * (share >= least / max(1, share.shape[1])).any(0)
    return kept * (share.sum(1) / kept.sum(1).clamp(min=1e-37))[:, None]
