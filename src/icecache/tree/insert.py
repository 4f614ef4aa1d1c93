"""Insert, the tree's half: the way to the nearest leaf, and what follows when a leaf is cut."""

from itertools import chain

import torch
from torch import Tensor

from icecache.ops.batched import nearest
from icecache.tree.cluster import split_oversized
from icecache.tree.level import NONE
from icecache.tree.tree import Tree

__all__ = ["BEAM", "cut_in_two", "find_path", "follow"]

BEAM = 16


def find_path(tree: Tree, row: int, key: Tensor) -> list[int]:
    """Return the nearest leaf of a key and its ancestors, from the leaf up; `NONE` without leaves.

    From the top down the `BEAM` nearest nodes of each level are followed. key: shape [head_dim],
    float32.
    """
    point = key - tree.leaves.centre[row]
    top = tree.top(row)
    paths: list[list[int]] = [[]]
    for number in range(top, -1, -1):
        level = tree.levels[number]
        if number == top:
            candidates = [[node] for node in range(int(level.num[row]))]
        else:
            above = tree.levels[number + 1]
            candidates = list(
                chain.from_iterable(
                    ([child, *path] for child in above.children(row, path[0], level))
                    for path in paths
                )
            )
        if not candidates:
            return [NONE]
        means = level.at(row, torch.tensor([path[0] for path in candidates])).keys()
        paths = [candidates[i] for i in nearest(point, means, BEAM if number else 1).tolist()]
    return paths[0]


def cut_in_two(points: Tensor, largest: int) -> Tensor:
    """Return which points of a group of `largest` + 1 go to its other half, shape [n], bool."""
    one = torch.zeros(points.shape[0], dtype=torch.int64)
    ids, _ = split_oversized(points, one, 1, largest, one[:1])
    return ids > 0


def follow(tree: Tree, row: int, path: list[int], added: int) -> None:
    """Bring the nodes above a leaf up to date.

    path: the leaf and its ancestors; added: a new leaf that was cut off it, or `NONE`.
    """
    for number in range(1, len(path)):
        level, node = tree.levels[number], path[number]
        if added != NONE:
            level.adopt(row, node, added, tree.levels[number - 1])
            added = _split(tree, number, row, node)
        tree.summarize_node(number, row, node)
    tree.raise_top(row)


def _split(tree: Tree, number: int, row: int, node: int) -> int:
    """Give half of a node's children to a new node, if they are too many; return it or `NONE`."""
    level, below = tree.levels[number], tree.levels[number - 1]
    children = level.children(row, node, below)
    if len(children) <= tree.most_children:
        return NONE
    upper = cut_in_two(below.at(row, torch.tensor(children)).keys(), tree.most_children).tolist()
    other = level.add(row, 1)
    level.orphan(row, node)
    level.orphan(row, other)
    for child, is_upper in reversed(list(zip(children, upper, strict=True))):
        level.adopt(row, other if is_upper else node, child, below)
    tree.summarize_node(number, row, other)
    return other
