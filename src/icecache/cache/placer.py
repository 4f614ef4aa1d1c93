"""Where the tokens of an inserted leaf go.

A leaf that takes tokens keeps its page if there is room; what has no room moves, the smallest
leaf first. Nothing else in the row is touched, so an insert is constant work.
"""

import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.insert import NO_LEAF, Pieces
from icecache.tree.table import LeafTable

__all__ = ["Placer"]


class Placer:
    """Gives leaves' tokens their slots.

    Parameters
    ----------
    table : LeafTable
    pool : PagePool
    pages : PageTable
    """

    def __init__(self, table: LeafTable, pool: PagePool, pages: PageTable) -> None:
        self._table, self._pool, self._pages = table, pool, pages

    def tokens_of_leaf(self, row: int, leaf: int) -> list[int]:
        if leaf == NO_LEAF:
            return []
        page, slots = self._table.leaf(row, leaf)
        return [page * self._pool.page_size + slot for slot in slots]

    def settle(
        self, leaves: list[tuple[int, int]], pieces: Pieces, num_old: int
    ) -> tuple[list[int], Tensor]:
        """Give every piece a leaf number and its tokens a place; tokens' order is `pieces.ids`'.

        Returns the tokens' places, page * page_size + slot, and the pieces' leaves.
        """
        size = self._pool.page_size
        members: list[list[int]] = [[] for _ in range(pieces.leaf.shape[0])]
        for number, piece in enumerate(pieces.ids.tolist()):
            members[piece].append(number)
        of_leaf: list[list[int]] = [[] for _ in leaves]
        for piece, touched in enumerate(pieces.leaf.tolist()):
            of_leaf[touched].append(piece)
        place = [NO_LEAF] * pieces.ids.shape[0]
        leaf_of_piece = [0] * len(members)
        first_old = 0
        placed: dict[int, set[int]] = {}
        for (row, leaf), its_pieces in zip(leaves, of_leaf, strict=True):
            # read again: an earlier leaf of this call may have moved the page they share
            old = self.tokens_of_leaf(row, leaf)
            place[first_old : first_old + len(old)] = old
            first_old += len(old)
            settled = placed.setdefault(row, set())
            self._settle_leaf(row, leaf, [members[p] for p in its_pieces], place, settled)
            for i, piece in enumerate(its_pieces):
                number = leaf if i == 0 and leaf != NO_LEAF else self._table.add(row, 1)
                leaf_of_piece[piece] = number
                at = [place[m] for m in members[piece]]
                self._table.place(row, number, at[0] // size, [t % size for t in at])
                settled.add(number)
        if first_old != num_old:
            raise IntegrityError(f"{num_old} tokens read, {first_old} placed again")
        return place, torch.tensor(leaf_of_piece)

    def _settle_leaf(
        self, row: int, leaf: int, pieces: list[list[int]], place: list[int], settled: set[int]
    ) -> None:
        """Find slots for the pieces of one leaf, in `place`; what has a slot keeps it if it can.

        While the leaf's page has too little room, the smallest of the leaf's pieces and of the
        other leaves there moves to the fullest page with room for it: small leaves fill the gaps
        that large ones leave. `settled`: leaves of this call whose tokens are not written yet.
        """
        held, size = self._pages, self._pool.page_size
        old = [m for piece in pieces for m in piece if place[m] != NO_LEAF]
        leaving = list(pieces)
        if old:
            page = self._own(row, place[old[0]] // size)
            for m in old:
                place[m] = page * size + place[m] % size
            leaving, staying = [], sorted(pieces, key=len)
            others = self._leaves_in(row, page, settled | {leaf})
            while sum(map(len, staying)) > held.free_slots(row, page) + sum(
                place[m] != NO_LEAF for piece in staying for m in piece
            ):
                if others and others[0][0] < len(staying[0]):
                    self._move_leaf(row, others.pop(0)[1], page)
                    continue
                leaving.append(staying.pop(0))
                gone = [m for m in leaving[-1] if place[m] != NO_LEAF]
                self._vacate(row, page, [place[m] for m in gone])
                for m in gone:
                    place[m] = NO_LEAF
            self._fill(row, page, [m for p in staying for m in p if place[m] == NO_LEAF], place)
            if held.free_slots(row, page) == size:
                held.drop(row, page)
        for piece in leaving:
            target = self._own(row, held.fullest_with(row, len(piece)))
            self._fill(row, target, piece, place)

    def _leaves_in(self, row: int, page: int, besides: set[int]) -> list[tuple[int, int]]:
        """Return (tokens, leaf) of the leaves in a page, smallest first."""
        found = self._table.leaves_in(row, page)
        return sorted((self._table.count(row, leaf), leaf) for leaf in found if leaf not in besides)

    def _move_leaf(self, row: int, leaf: int, page: int) -> None:
        """Move a leaf out of its page, to the fullest other page with room."""
        held, size = self._pages, self._pool.page_size
        tokens = self.tokens_of_leaf(row, leaf)
        keys, values = self._pool.read(torch.tensor(tokens))
        positions = self._pool.positions_of(torch.tensor(tokens))
        target = self._own(row, held.fullest_with(row, len(tokens), besides=page))
        place = [NO_LEAF] * len(tokens)
        self._fill(row, target, list(range(len(tokens))), place)
        self._pool.write(torch.tensor(place), keys, values, positions)
        self._vacate(row, page, tokens)
        self._table.place(row, leaf, target, [t % size for t in place])

    def _own(self, row: int, page: int) -> int:
        """Return the page, or the row's own copy of it where other rows hold it too."""
        if not self._pool.is_shared(page):
            return page
        copy = self._pool.copy_page(page)
        self._pages.replace(row, page, copy)
        self._table.move_page(row, page, copy)
        return copy

    def _vacate(self, row: int, page: int, tokens: list[int]) -> None:
        if not tokens:
            return
        self._pool.clear(tokens)
        self._pages.change_free(row, page, len(tokens))

    def _fill(self, row: int, page: int, members: list[int], place: list[int]) -> None:
        if not members:
            return
        slots = self._pool.claim(page, len(members))
        for m, slot in zip(members, slots, strict=True):
            place[m] = page * self._pool.page_size + slot
        self._pages.change_free(row, page, -len(members))
