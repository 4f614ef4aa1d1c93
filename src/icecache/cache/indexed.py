"""The tokens between sink and window: in pages, under the tree.

This is where the tree (which tokens belong together) and the store (where they are) meet: every
token is in exactly one leaf, every leaf in one page of its row.
"""

import torch
from torch import Tensor

from icecache.cache.flat import FlatTokens
from icecache.cache.native_insert import insert_native
from icecache.cache.placer import Placer
from icecache.config import IceCacheConfig
from icecache.errors import IntegrityError
from icecache.ops.dispatch import resolve_backend
from icecache.store.packing import pack, pack_native
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.store.residency import InPlace
from icecache.tree.build import Leaves, build_leaves
from icecache.tree.insert import assign, cut
from icecache.tree.paper import paper_leaves
from icecache.tree.table import NO_SLOT, LeafTable

__all__ = ["IndexedTokens"]

_INSERT_AT_MOST = 256
_LEAST_GROWTH, _MOST_GROWTH = 4096, 32768
_GROWTH_BYTES = 1 << 28


class IndexedTokens:
    """Pages and leaves of one layer.

    Parameters
    ----------
    config : IceCacheConfig
    num_rows : int
        Batch x KV heads.
    head_dim : int
    dtype : torch.dtype
        Of stored keys and values.
    """

    def __init__(
        self, config: IceCacheConfig, num_rows: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._native = resolve_backend(config.backend) == "native"
        self.pool = PagePool(config.page_size, head_dim, dtype)
        self.table = LeafTable(num_rows, head_dim, config.leaf_size)
        self.residency = InPlace()
        self.pages = PageTable(self.pool, num_rows)
        self.lens = [0] * num_rows

    @property
    def index_bytes(self) -> int:
        """Bytes of the summaries and of where tokens are."""
        return self.table.nbytes + self.pages.nbytes

    def add(self, tokens: FlatTokens) -> int:
        """Take tokens in: few to a row that has leaves join those, others become leaves.

        Each row decides for itself, so that it does not depend on its batch. Returns how many
        tokens joined leaves.
        """
        per_row = torch.bincount(tokens.row, minlength=self.table.num_rows)
        has_leaves = torch.tensor([have > 0 for have in self.lens])
        joining = has_leaves & (per_row <= _INSERT_AT_MOST)
        joins = joining[tokens.row]
        num_joining = int(joins.sum())
        if num_joining:
            self._join(tokens if bool(joins.all()) else tokens.pick(joins))
        if num_joining < joins.numel():
            rest = tokens.pick(~joins) if num_joining else tokens
            self._build(rest, per_row.masked_fill(joining, 0).tolist())
        self.lens = [have + new for have, new in zip(self.lens, per_row.tolist(), strict=True)]
        return num_joining

    def _join(self, tokens: FlatTokens) -> None:
        if self._native and int(torch.bincount(tokens.row).max()) == 1:
            left = insert_native(tokens, self.table, self.pool, self.pages)
            if left is None:
                return
            tokens = tokens.pick(left)
        self._insert(tokens)

    def read_all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all keys and values by position, and which are real.

        Shapes [rows, longest, head_dim] twice and [rows, longest] bool; zeros where not real.
        """
        longest = max(self.lens)
        index = torch.zeros(len(self.lens), longest, dtype=torch.int64)
        valid = torch.zeros(len(self.lens), longest, dtype=torch.bool)
        for row in range(len(self.lens)):
            tokens, _ = self.pool.tokens_of(self.pages.pages(row))
            index[row, : tokens.shape[0]] = tokens
            valid[row, : tokens.shape[0]] = True
        if longest == 0 or not valid.any():
            empty = torch.zeros(len(self.lens), 0, self.pool.head_dim, dtype=self.pool.dtype)
            return empty, empty, valid[:, :0]
        keys, values = self.pool.read(index)
        return (
            keys.masked_fill_(~valid[..., None], 0.0),
            values.masked_fill_(~valid[..., None], 0.0),
            valid,
        )

    def reorder(self, rows: Tensor) -> None:
        """Take rows in a new order, repeated or dropped; repeated rows share their pages."""
        self.table.reorder(rows)
        self.pages.reorder(rows.tolist())
        self.lens = [self.lens[row] for row in rows.tolist()]

    def _build(self, tokens: FlatTokens, per_row: list[int]) -> None:
        config = self._config
        make = paper_leaves if config.selection == "paper" else build_leaves
        leaves = make(tokens.keys.float(), per_row, config)
        page, slot = self._lay_out(leaves)
        self.pool.write(
            page * config.page_size + slot, tokens.keys, tokens.values, tokens.positions
        )
        num = sum(leaves.per_row)
        row = torch.repeat_interleave(torch.tensor(leaves.per_row))
        leaf = self._open_leaves(leaves.per_row)
        slots = torch.full((num, config.leaf_size), NO_SLOT, dtype=torch.int64)
        order = torch.argsort(leaves.ids, stable=True)
        slots[leaves.ids[order], _rank_within(leaves.ids[order])] = slot[order]
        page_of_leaf = torch.empty(num, dtype=torch.int64)
        page_of_leaf[leaves.ids] = page
        self.table.place_many(row, leaf, page_of_leaf, slots)
        self.table.summarize(row, leaf, leaves.ids, tokens.keys, tokens.values)

    def _open_leaves(self, per_row: list[int]) -> Tensor:
        room = max(num + had for num, had in zip(per_row, self.table.num_leaves, strict=True))
        self.table.reserve(room + room // 4 + self._growth_tokens // self._config.leaf_target)
        firsts = [self.table.add(row, num) for row, num in enumerate(per_row)]
        numbers = [torch.arange(f, f + n) for f, n in zip(firsts, per_row, strict=True)]
        return torch.cat(numbers)

    def _lay_out(self, leaves: Leaves) -> tuple[Tensor, Tensor]:
        """Give each leaf a page and each token a slot in it; both of shape [tokens], int64."""
        page_size = self._config.page_size
        fill = pack_native if self._native else pack
        sizes = torch.bincount(leaves.ids)
        page_of_leaf = torch.empty_like(sizes)
        first = 0
        for row, num in enumerate(leaves.per_row):
            span = slice(first, first + num)
            if self._config.selection == "paper":
                packed, num_pages = torch.arange(num), num
            else:
                packed, num_pages = fill(sizes[span], leaves.parents[span], page_size)
            pages = self._allocate(num_pages)
            page_of_leaf[span] = torch.tensor(pages, dtype=torch.int64)[packed]
            used = torch.zeros(num_pages, dtype=torch.int64).index_add_(0, packed, sizes[span])
            self.pages.hold(row, pages, (page_size - used).tolist())
            first += num
        page = page_of_leaf[leaves.ids]
        slot = torch.empty_like(page)
        order = torch.argsort(page * (leaves.parents.numel() + 1) + leaves.ids, stable=True)
        slot[order] = _rank_within(page[order])
        return page, slot

    @property
    def _growth_tokens(self) -> int:
        """Tokens a row may grow by, beside a quarter, before anything has to be moved.

        Room that is not used is address space and no memory; growing later would copy a whole
        layer within a decode step.
        """
        per_token = 2 * self.pool.head_dim * self.pool.dtype.itemsize * self.table.num_rows
        return max(_LEAST_GROWTH, min(_MOST_GROWTH, _GROWTH_BYTES // per_token))

    def _allocate(self, num_pages: int) -> list[int]:
        if self.pool.num_pages == 0:
            rows = self.table.num_rows
            growth = self._growth_tokens // self._config.page_size
            self.pool.reserve(rows * (num_pages + num_pages // 4 + growth))
        return self.pool.allocate(num_pages)

    def _insert(self, tokens: FlatTokens) -> None:
        """Put each token in its nearest leaf; see `tree.insert` and `cache.placer`."""
        nearest = assign(self.table, tokens.keys.float(), tokens.row, self._native)
        pairs = torch.stack([tokens.row, nearest], 1)
        touched, which = torch.unique(pairs, dim=0, return_inverse=True)
        leaves = [(row, leaf) for row, leaf in touched.tolist()]
        placer = Placer(self.table, self.pool, self.pages)
        old = [placer.tokens_of_leaf(row, leaf) for row, leaf in leaves]
        old_which = torch.tensor([i for i, ts in enumerate(old) for _ in ts], dtype=torch.int64)
        old_tokens = torch.tensor([t for ts in old for t in ts], dtype=torch.int64)
        old_keys, old_values = self.pool.read(old_tokens)
        all_ = FlatTokens(
            torch.cat([old_keys, tokens.keys]),
            torch.cat([old_values, tokens.values]),
            torch.cat([old_which, which]),
            torch.cat([self.pool.positions_of(old_tokens), tokens.positions]),
        )
        pieces = cut(all_.keys.float(), all_.row, len(leaves), self._config.leaf_size)
        place, leaf_of_piece = placer.settle(leaves, pieces, old_tokens.numel())
        at = torch.tensor(place)
        self.pool.write(at, all_.keys, all_.values, all_.positions)
        row_of_piece = touched[:, 0][pieces.leaf]
        self.table.summarize(row_of_piece, leaf_of_piece, pieces.ids, all_.keys, all_.values)

    def check_integrity(self, positions: list[range]) -> None:
        """Raise `IntegrityError` unless every token is where the leaves say, exactly once.

        Parameters
        ----------
        positions : list of range
            The positions that each row must hold.
        """
        self.table.check_integrity()
        held = [self.pages.pages(row) for row in range(len(self.lens))]
        self.pool.check_integrity(held)
        tokens, real = self.table.tokens(self._config.page_size)
        for row, pages in enumerate(held):
            in_pages, found = self.pool.tokens_of(pages)
            if found.tolist() != list(positions[row]):
                raise IntegrityError(f"row {row}: positions in pages are not {positions[row]}")
            in_leaves = tokens[row][real[row]].sort().values
            if not torch.equal(in_leaves, in_pages.sort().values):
                raise IntegrityError(f"row {row}: tokens in leaves differ from those in pages")
            for page in pages:
                if self.pages.free_slots(row, page) != len(self.pool.free_slots(page)):
                    raise IntegrityError(f"row {row}: free slots of page {page} are miscounted")
        self._check_summaries(tokens, real)

    def _check_summaries(self, tokens: Tensor, real: Tensor) -> None:
        row, leaf, _ = real.nonzero(as_tuple=True)
        if row.numel() == 0:
            return
        where = torch.stack([row, leaf], 1)
        leaves, ids = torch.unique(where, dim=0, return_inverse=True)
        keys, values = self.pool.read(tokens[real])
        fresh = LeafTable(self.table.num_rows, self.pool.head_dim, self.table.leaf_size)
        fresh.reserve(int(leaves[:, 1].max()) + 1)
        fresh.num_leaves = list(self.table.num_leaves)
        fresh.summarize(leaves[:, 0], leaves[:, 1], ids, keys, values)
        for name in ("key_mean", "key_scale", "value_mean", "value_scale", "spread"):
            kept = getattr(self.table.view(), name)[leaves[:, 0], leaves[:, 1]].float()
            made = getattr(fresh.view(), name)[leaves[:, 0], leaves[:, 1]].float()
            # sums of the same tokens in another order may round an int8 code the other way
            tolerance = 1.0 if name.endswith("mean") else 1e-3 * float(made.abs().max()) + 1e-6
            if float((kept - made).abs().max()) > tolerance:
                raise IntegrityError(f"{name} differs from what the tokens give")


def _rank_within(ids: Tensor) -> Tensor:
    """Return each element's rank among equal neighbours of a sorted tensor."""
    counts = torch.bincount(ids)
    starts = counts.cumsum(0) - counts
    return torch.arange(ids.numel()) - starts[ids]
