"""Insert, in plain Python: one token joins its nearest leaf, in its page or another.

A leaf that takes a token keeps its page if there is room; what has no room moves, the smallest
first. Nothing else in the row is touched, so an insert is constant work. `native_insert` is the
same as a compiled call.
"""

import torch
from torch import Tensor

from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.insert import cut_in_two, find_path, follow
from icecache.tree.level import NONE
from icecache.tree.tree import Tree

__all__ = ["Placer"]


class Placer:
    """Puts tokens into leaves and leaves' tokens into slots.

    Parameters
    ----------
    tree : Tree
    pool : PagePool
    pages : PageTable
    """

    def __init__(self, tree: Tree, pool: PagePool, pages: PageTable) -> None:
        self._tree, self._pool, self._pages = tree, pool, pages

    def insert(self, row: int, key: Tensor, value: Tensor, position: int) -> None:
        """Insert one token; key, value: shape [head_dim]."""
        leaves = self._tree.leaves
        path = find_path(self._tree, row, key.float())
        if path[0] == NONE:
            path = [leaves.add(row, 1)]
            leaves.place(row, path[0], self._page_with(row, 1), [])
        page, slots = leaves.leaf(row, path[0])
        self._own(row, page)
        keys, values = self._pool.read(self._in_pool(row, page, slots))
        keys, values = torch.cat([keys, key[None]]), torch.cat([values, value[None]])
        pieces = self._cut(keys)
        target, leaving = self._make_room(row, path, page, pieces)
        home = [target if m in leaving else page for m in range(len(slots) + 1)]
        for m in leaving:
            if m < len(slots):
                slots[m] = self._move(row, page, slots[m], target)
                self._pages.change_free(row, target, -1)
                self._pages.change_free(row, page, 1)
        slots += self._pool.claim(int(self._pages.page_of[row, home[-1]]), 1)
        self._pages.change_free(row, home[-1], -1)
        at = self._in_pool(row, home[-1], slots[-1:])
        self._pool.write(at, key[None], value[None], torch.tensor([position]))
        numbers = [path[0], *(leaves.add(row, 1) for _ in pieces[1:])]
        for number, piece in zip(numbers, pieces, strict=True):
            leaves.place(row, number, home[piece[0]], [slots[m] for m in piece])
            one = torch.zeros(len(piece), dtype=torch.int64)
            where = torch.tensor([row]), torch.tensor([number])
            leaves.summarize(*where, one, keys[piece], values[piece])
        follow(self._tree, row, path, numbers[1] if len(numbers) > 1 else NONE)

    def _cut(self, keys: Tensor) -> list[list[int]]:
        """Return the members of the leaf, of its two halves if it is too large."""
        if keys.shape[0] <= self._tree.leaves.leaf_size:
            return [list(range(keys.shape[0]))]
        upper = cut_in_two(keys.float(), self._tree.leaves.leaf_size).tolist()
        return [[m for m, up in enumerate(upper) if up == half] for half in (False, True)]

    def _make_room(
        self, row: int, path: list[int], page: int, pieces: list[list[int]]
    ) -> tuple[int, list[int]]:
        """Make room for one more token in a page; return another page and which members go there.

        Without a free slot, the smallest other leaf of the page moves, or else the smallest piece.
        """
        if self._pages.free[row, page]:
            return page, []
        smallest = min(pieces, key=len)
        other = self._smallest_beside(row, path, page)
        if other != NONE and self._tree.leaves.count(row, other) < len(smallest):
            self._move_leaf(row, other, page)
            return page, []
        return self._page_with(row, len(smallest), page), smallest

    def _smallest_beside(self, row: int, path: list[int], page: int) -> int:
        """Return the smallest other leaf of the page among the leaf's siblings, or `NONE`."""
        leaves = self._tree.leaves
        siblings = list(range(int(leaves.num[row])))
        if len(path) > 1:
            siblings = self._tree.levels[1].children(row, path[1], leaves)
        page_of = leaves.numpy("page")[row]
        there = [leaf for leaf in siblings if page_of[leaf] == page and leaf != path[0]]
        return min(there, key=lambda leaf: leaves.count(row, leaf), default=NONE)

    def _move_leaf(self, row: int, leaf: int, page: int) -> None:
        """Move a leaf out of its page, to the fullest other page with room."""
        _, slots = self._tree.leaves.leaf(row, leaf)
        target = self._page_with(row, len(slots), page)
        moved = [self._move(row, page, slot, target) for slot in slots]
        self._tree.leaves.place(row, leaf, target, moved)
        self._pages.change_free(row, target, -len(slots))
        self._pages.change_free(row, page, len(slots))

    def _move(self, row: int, page: int, slot: int, target: int) -> int:
        """Move a token to the lowest free slot of another page; return the slot."""
        old = self._in_pool(row, page, [slot])
        keys, values = self._pool.read(old)
        (new,) = self._pool.claim(int(self._pages.page_of[row, target]), 1)
        positions = self._pool.positions_of(old)
        self._pool.write(self._in_pool(row, target, [new]), keys, values, positions)
        self._pool.clear(old.tolist())
        return new

    def _page_with(self, row: int, room: int, besides: int = NONE) -> int:
        """Return the fullest page with room, the row's own; a new one if there is none."""
        page = self._pages.fullest_with(row, room, besides)
        if page == NONE:
            self._pages.grow(row)
            return self._pages.fullest_with(row, room, besides)
        self._own(row, page)
        return page

    def _own(self, row: int, page: int) -> None:
        """Give the row a copy of its own of a page that other rows hold too."""
        in_pool = int(self._pages.page_of[row, page])
        if self._pool.is_shared(in_pool):
            self._pages.replace(row, page, self._pool.copy_page(in_pool))

    def _in_pool(self, row: int, page: int, slots: list[int]) -> Tensor:
        first = int(self._pages.page_of[row, page]) * self._pool.page_size
        return torch.tensor([first + slot for slot in slots], dtype=torch.int64)
