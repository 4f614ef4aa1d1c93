"""The tree over a layer's leaves: nodes group leaves, upper nodes group nodes.

Level 0 holds the leaves. A row has as many further levels as it takes for its top to have at most
`WIDEST_TOP` nodes; a short row has none. A node's summary is made of its children's summaries,
always from all of them, so that nothing drifts while leaves take tokens and are cut.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.errors import IntegrityError, SnapshotMismatch
from icecache.ops.batched import merge_summaries
from icecache.ops.bounds import check_range
from icecache.ops.dispatch import resolve_backend
from icecache.ops.native import MAX_DIM, MOST_LEVELS, pointer
from icecache.ops.native import Tree as NativeTree
from icecache.tree.build import group_nodes
from icecache.tree.level import NONE, Level
from icecache.tree.native_adopt import adopt_native
from icecache.tree.table import LeafTable

__all__ = ["GROWN_TOP", "WIDEST_TOP", "Tree", "estimate_bytes_per_token"]

WIDEST_TOP = 128
GROWN_TOP = 256


class Tree:
    """Leaves and nodes of one layer, all rows (batch x KV heads).

    Parameters
    ----------
    config : IceCacheConfig
    num_rows, head_dim : int
    """

    def __init__(self, config: IceCacheConfig, num_rows: int, head_dim: int) -> None:
        self._config = config
        self.leaves = LeafTable(num_rows, head_dim, config.leaf_size, config.page_size)
        self.levels: list[Level] = [self.leaves]
        self._is_native = resolve_backend(config.backend) == "native" and head_dim <= MAX_DIM
        self._native: tuple[NativeTree, list[object]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_native": None}

    @property
    def num_rows(self) -> int:
        """Rows of the tree."""
        return self.leaves.num_rows

    @property
    def most_children(self) -> int:
        """Children of a node at most."""
        return 2 * self._config.fan_out

    @property
    def num_nodes(self) -> int:
        """Nodes above the leaves, of all rows."""
        return sum(level.total for level in self.levels[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of leaves and nodes in use, and of the rows' centres."""
        return sum(level.nbytes for level in self.levels)

    def top(self, row: int) -> int:
        """Return the row's highest level."""
        return max(i for i, level in enumerate(self.levels) if i == 0 or level.num[row] > 0)

    def native(self) -> NativeTree:
        """Return the arrays' addresses for the compiled ops, valid until a level grows."""
        levels: list[object] = [level.native() for level in self.levels]
        known = [] if self._native is None else self._native[1]
        if len(known) != len(levels) or any(a is not b for a, b in zip(levels, known, strict=True)):
            tree = NativeTree(
                page=pointer(self.leaves.array("page")),
                slots=pointer(self.leaves.array("slots")),
                centre=pointer(self.leaves.centre),
                num_levels=len(levels),
            )
            for i, level in enumerate(levels):
                tree.level[i] = level
            self._native = tree, levels
        assert self._native is not None
        return self._native[0]

    def extend(self, first: list[int], per_row: list[int], parents: Tensor) -> None:
        """Take new leaves, already summarised, into the levels above.

        Parameters
        ----------
        first : list of int
            Each row's first new leaf.
        per_row : list of int
            New leaves of each row.
        parents : Tensor, shape [leaves], int64
            The node of each new leaf, numbered over all rows; a node's leaves lie together.
        """
        row = torch.repeat_interleave(torch.tensor(per_row))
        leaf = torch.cat(
            [torch.arange(f, f + n) for f, n in zip(first, per_row, strict=True)] or [parents]
        )
        grown = [r for r, num in enumerate(per_row) if num]
        takes = [r for r in grown if self.top(r) or (first[r] == 0 and self._is_wide(0, r))]
        chosen = torch.isin(row, torch.tensor(takes, dtype=torch.int64))
        if takes:
            self._make_nodes(1, row[chosen], leaf[chosen], parents[chosen])
        for level in self.levels[2:]:
            for r in takes:
                level.clear(r)
        number = 0
        while number < len(self.levels):
            if wide := [r for r in grown if self.top(r) == number and self._is_wide(number, r)]:
                self._group(number, wide)
            number += 1

    def raise_top(self, row: int) -> None:
        """Put a level above a top that grew too wide."""
        if int(self.levels[self.top(row)].num[row]) > GROWN_TOP:
            self._group(self.top(row), [row])

    def reserve_growth(self) -> None:
        """Make room for one more leaf or node in every level."""
        for level in self.levels:
            if level.longest + 1 > level.capacity:
                level.reserve(max(level.longest + 1, level.capacity * 3 // 2))

    def summarize_node(self, level: int, row: int, node: int) -> None:
        """Recompute a node from its children."""
        children = torch.tensor(self.levels[level].children(row, node, self.levels[level - 1]))
        rows, nodes = torch.full_like(children, row), torch.zeros_like(children)
        self._summarize(level, torch.tensor([row]), torch.tensor([node]), rows, children, nodes)

    def reorder(self, rows: Tensor) -> None:
        """Take rows, repeated or dropped, in a new order; pages are the caller's concern."""
        for level in self.levels:
            level.reorder(rows)
        self._native = None

    def fork(self) -> "Tree":
        """Return a tree with the same content; levels are shared until one of the two writes."""
        other = copy.copy(self)
        other.leaves = self.leaves.fork()
        other.levels = [other.leaves, *(level.fork() for level in self.levels[1:])]
        other._native = None
        return other

    def own(self) -> None:
        """Take copies of what forks share; every change of a shared tree begins here."""
        for level in self.levels:
            level.own()

    def state(self) -> dict[str, Any]:
        """Return what the tree holds, by name; views, valid until it changes."""
        return {f"level {i}": level.state() for i, level in enumerate(self.levels)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back into an empty tree of as many rows."""
        if len(state) > MOST_LEVELS:
            raise SnapshotMismatch(f"the snapshot is damaged: a tree of {len(state)} levels")
        for _ in range(1, len(state)):
            self.levels.append(Level(self.num_rows, self.leaves.head_dim))
        for i, level in enumerate(self.levels):
            level.load_state(state[f"level {i}"])
            if i:
                below = self.levels[i - 1].longest
                check_range("first", state[f"level {i}"]["first"], NONE, below - 1)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the levels hold each leaf and node exactly once."""
        self.leaves.check_integrity()
        for row in range(self.num_rows):
            top = self.top(row)
            for number in range(1, top + 1):
                self._check_level(number, row)

    def _check_level(self, number: int, row: int) -> None:
        level, below = self.levels[number], self.levels[number - 1]
        num_below = int(below.num[row])
        named = np.concatenate(
            [level.numpy("first")[row, : level.num[row]], below.numpy("next")[row, :num_below]]
        )
        # lists without a child that is named twice come to an end
        if not np.array_equal(np.sort(named[named != NONE]), np.arange(num_below)):
            raise IntegrityError(f"row {row}: level {number} does not hold each child once")
        children = [level.children(row, n, below) for n in range(int(level.num[row]))]
        found = sorted(child for each in children for child in each)
        if found != list(range(num_below)):
            raise IntegrityError(f"row {row}: level {number} does not hold each child once")
        if any(not 0 < len(each) <= self.most_children for each in children):
            raise IntegrityError(f"row {row}: a node of level {number} has too many children")
        ids = torch.tensor([node for node, each in enumerate(children) for _ in each])
        made = self._merge(
            number,
            torch.full_like(ids, row),
            torch.tensor([child for each in children for child in each]),
            ids,
        )
        kept, num = level.view(), int(level.num[row])
        if kept.count[row, :num].tolist() != made[0].tolist():
            raise IntegrityError(f"row {row}: tokens of a node of level {number} are miscounted")
        for name, mean, kept_mean, scale in (
            ("key", made[1], kept.keys()[row, :num], kept.key_scale[row, :num]),
            ("value", made[2], kept.values()[row, :num], kept.value_scale[row, :num]),
        ):
            # rounding to int8 is half a step; sums in another order may round the other way
            if bool(((mean - kept_mean).abs() > 1.01 * scale.float()[:, None] + 1e-6).any()):
                raise IntegrityError(f"row {row}: {name} mean of a node of level {number} is off")
        spread = made[3] + kept.key_scale[row, :num].float().square() * level.head_dim / 12
        if not torch.allclose(kept.spread[row, :num].float(), spread, rtol=1e-2, atol=1e-6):
            raise IntegrityError(f"row {row}: spread of a node of level {number} is off")

    def _is_wide(self, level: int, row: int) -> bool:
        return int(self.levels[level].num[row]) > WIDEST_TOP

    def _group(self, level: int, rows: list[int]) -> None:
        """Make the level above from all leaves or nodes of rows."""
        here = self.levels[level]
        lens = [int(here.num[row]) for row in rows]
        points = torch.cat([here.keys_of(row) for row in rows])
        parents, _ = group_nodes(points, lens, self._config)
        row = torch.repeat_interleave(torch.tensor(rows), torch.tensor(lens))
        child = torch.cat([torch.arange(num) for num in lens])
        order = torch.argsort(parents, stable=True)
        # a descent reads the children of a node in one piece
        for r, numbers in zip(rows, torch.split(child[order], lens), strict=True):
            here.renumber(r, numbers)
        self._make_nodes(level + 1, row, child, parents[order])

    def _make_nodes(self, level: int, row: Tensor, child: Tensor, parents: Tensor) -> None:
        """Open a node for each of `parents`; rising, so that a node's children lie together."""
        if level == len(self.levels):
            if level == MOST_LEVELS:
                raise IntegrityError(f"a tree has at most {MOST_LEVELS} levels")
            self.levels.append(Level(self.num_rows, self.leaves.head_dim))
        above, below = self.levels[level], self.levels[level - 1]
        _, ids = torch.unique_consecutive(parents, return_inverse=True)
        begins = torch.cat([torch.ones(1, dtype=torch.bool), ids[1:] != ids[:-1]])
        row_of_node = row[begins]
        per_row = torch.bincount(row_of_node, minlength=self.num_rows).tolist()
        room = max(int(have) + new for have, new in zip(above.num, per_row, strict=True))
        if room > above.capacity:
            above.reserve(room + max(room // 4, below.capacity // self.most_children))
        firsts = [above.add(r, num) if num else 0 for r, num in enumerate(per_row)]
        numbers = [torch.arange(f, f + n) for f, n in zip(firsts, per_row, strict=True)]
        node = torch.cat([numbers[r] for r in dict.fromkeys(row_of_node.tolist())])
        if self._is_native:
            dim = self.leaves.head_dim
            adopt_native(self.native(), level, dim, row, child, node[ids])
        else:
            below.link(row, child, node[ids], above)
            self._summarize(level, row_of_node, node, row, child, ids)

    def _summarize(
        self,
        level: int,
        row: Tensor,
        node: Tensor,
        row_of_child: Tensor,
        child: Tensor,
        ids: Tensor,
    ) -> None:
        """Recompute nodes, shape [n], from their children, shape [m]; ids: [m], from 0 to n."""
        above = self.levels[level]
        count, keys, values, spread = self._merge(level, row_of_child, child, ids)
        above.set_counts(row, node, count)
        above.set_summaries(row, node, keys, values, spread)

    def _merge(self, level: int, row: Tensor, child: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        below = self.levels[level - 1].at(row, child)
        return merge_summaries(
            below.keys(), below.values(), below.spread, below.count.long(), ids, int(ids.max()) + 1
        )


def estimate_bytes_per_token(config: IceCacheConfig, head_dim: int) -> float:
    """Return about how many bytes of index a token of one row takes, pages' entries included."""
    leaf = 2 * head_dim + 15 + (config.page_size + 7) // 8
    node = (2 * head_dim + 18) / (0.6 * config.fan_out)
    return (leaf + 1.3 * node) / (0.75 * config.leaf_target) + 13 / (0.75 * config.page_size)
