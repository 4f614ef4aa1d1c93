"""The tokens between sink and window: in pages, under the tree.

This is where the tree (which tokens belong together) and the store (where they are) meet: every
token is in exactly one leaf, every leaf in one page of its row.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from icecache.cache.fill import fill
from icecache.cache.flat import FlatTokens
from icecache.cache.native_fill import fill_native
from icecache.cache.native_insert import TokensInPlace, insert_native
from icecache.cache.placer import Placer
from icecache.config import IceCacheConfig
from icecache.errors import IntegrityError
from icecache.ops.bounds import check_range
from icecache.ops.dispatch import resolve_backend
from icecache.ops.native import DTYPES, MAX_DIM
from icecache.ops.native import Pages as NativePages
from icecache.ops.native import Tree as NativeTree
from icecache.store.packing import pack, pack_native
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.store.residency import InPlace
from icecache.tree.build import Leaves, build_leaves
from icecache.tree.paper import paper_leaves
from icecache.tree.table import LeafTable
from icecache.tree.tree import Tree

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
        native = resolve_backend(config.backend) == "native"
        self._native = native and dtype in DTYPES and head_dim <= MAX_DIM
        self.pool = PagePool(config.page_size, head_dim, dtype)
        self.tree = Tree(config, num_rows, head_dim)
        self.residency = InPlace()
        self.pages = PageTable(self.pool, num_rows)
        self.lens = [0] * num_rows

    @property
    def index_bytes(self) -> int:
        """Bytes of the summaries and of where tokens are."""
        return self.tree.nbytes + self.pages.nbytes

    @property
    def leaves(self) -> LeafTable:
        """The leaves of the tree."""
        return self.tree.leaves

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Return every leaf's page in the pool, slot by slot, and which slots are its own.

        Both of shape [rows, longest row, page_size], int64 and bool; 0 where not its own.
        """
        tokens, real = self.leaves.tokens()
        rows = torch.arange(self.leaves.num_rows)[:, None, None]
        return self.pages.in_pool(rows, tokens.masked_fill(~real, 0)).masked_fill_(~real, 0), real

    def add(self, tokens: FlatTokens) -> int:
        """Take tokens in: few to a row that has leaves join those, others become leaves.

        Each row decides for itself, so that it does not depend on its batch. Returns how many
        tokens joined leaves.
        """
        self.tree.own()
        starts = torch.tensor(tokens.row_starts(self.leaves.num_rows))
        per_row = starts.diff()
        has_leaves = torch.tensor([have > 0 for have in self.lens])
        joining = has_leaves & (per_row <= _INSERT_AT_MOST)
        num_joining = int(per_row[joining].sum())
        rest = tokens
        if num_joining == tokens.row.numel():
            self._join(tokens)
        elif num_joining:
            joins = joining[tokens.row]
            self._join(tokens.pick(joins))
            rest = tokens.pick(~joins)
        if num_joining < tokens.row.numel():
            self._build(rest, per_row.masked_fill(joining, 0).tolist())
        self.lens = [have + new for have, new in zip(self.lens, per_row.tolist(), strict=True)]
        return num_joining

    def takes_in_place(self, per_row: list[int]) -> bool:
        """Whether so many tokens a row (batch x KV heads) can be inserted from where they lie."""
        return (
            self._native
            and max(per_row) <= _INSERT_AT_MOST
            and all(have > 0 for have, new in zip(self.lens, per_row, strict=True) if new)
        )

    def join_in_place(self, tokens: TokensInPlace) -> None:
        """Insert tokens by the compiled op; `lens` is the caller's concern."""
        self.tree.own()
        insert_native(tokens, self.tree, self.pool, self.pages, self._config)

    def to_write(self) -> tuple[NativeTree, NativePages]:
        """Return the addresses for a compiled op that inserts, valid until something grows."""
        self.tree.own()
        return self.tree.native(), self.pages.native()

    def _join(self, tokens: FlatTokens) -> None:
        if self._native:
            self.join_in_place(TokensInPlace.of_flat(tokens))
            return
        placer = Placer(self.tree, self.pool, self.pages)
        positions = tokens.positions.tolist()
        for i, row in enumerate(tokens.row.tolist()):
            placer.insert(row, tokens.keys[i], tokens.values[i], positions[i])

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
        self.tree.reorder(rows)
        self.pages.reorder(rows.tolist())
        self.lens = [self.lens[row] for row in rows.tolist()]

    def fork(self) -> "IndexedTokens":
        """Return the same tokens; pages and tree are shared until one of the two writes."""
        other = copy.copy(self)
        other.tree, other.pages, other.lens = self.tree.fork(), self.pages.fork(), list(self.lens)
        return other

    def state(self) -> dict[str, Any]:
        """Return all that is held, by name; views, valid until it changes."""
        held = self.pages.held()
        return {
            "lens": self.lens,
            "pool": self.pool.state(held),
            "pages": self.pages.state(held),
            "tree": self.tree.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back; only of the same settings, into empty rows."""
        self.pool.load_state(state["pool"])
        self.pages.load_state(state["pages"])
        self.tree.load_state(state["tree"])
        page, num_pages = self.leaves.pages().numpy(), self.pages.num_pages[:, None]
        check_range("page", page - num_pages.clip(1), -(1 << 31), -1)
        self.lens = [int(length) for length in state["lens"]]

    def _build(self, tokens: FlatTokens, per_row: list[int]) -> None:
        config = self._config
        for row, keys in enumerate(torch.split(tokens.keys, per_row)):
            if keys.shape[0] and not self.lens[row]:
                self.leaves.set_centre(row, keys)
        make = paper_leaves if config.selection == "paper" else build_leaves
        leaves = make(tokens.keys, per_row, config)
        first = self._open_leaves(leaves.per_row)
        store = fill_native if self._native else fill
        store(tokens, leaves, self._lay_out(leaves), first, self.tree, self.pool, self.pages)
        self.tree.extend(first, leaves.per_row, leaves.parents)

    def _open_leaves(self, per_row: list[int]) -> list[int]:
        """Return each row's first new leaf."""
        room = max(num + int(had) for num, had in zip(per_row, self.leaves.num, strict=True))
        spare = self._growth_tokens // self._config.leaf_target
        # not at every chunk of a prompt: each time all leaves are moved
        if room + spare > self.leaves.capacity:
            self.leaves.reserve(room + room // 4 + spare)
        return [self.leaves.add(row, num) for row, num in enumerate(per_row)]

    def _lay_out(self, leaves: Leaves) -> Tensor:
        """Give each leaf a page of its row; shape [leaves], int64."""
        page_size = self._config.page_size
        into_pages = pack_native if self._native else pack
        sizes = torch.bincount(leaves.ids)
        page_of_leaf = torch.empty_like(sizes)
        first = 0
        for row, num in enumerate(leaves.per_row):
            span = slice(first, first + num)
            if self._config.selection == "paper":
                packed, num_pages = torch.arange(num), num
            else:
                packed, num_pages = into_pages(sizes[span], leaves.parents[span], page_size)
            used = torch.zeros(num_pages, dtype=torch.int64).index_add_(0, packed, sizes[span])
            pages = self._allocate(num_pages)
            page_of_leaf[span] = self.pages.hold(row, pages, (page_size - used).tolist()) + packed
            first += num
        return page_of_leaf

    @property
    def _growth_tokens(self) -> int:
        """Tokens a row may grow by, beside a quarter, before anything has to be moved.

        Room that is not used is address space and no memory; growing later would copy a whole
        layer within a decode step.
        """
        per_token = 2 * self.pool.head_dim * self.pool.dtype.itemsize * self.leaves.num_rows
        return max(_LEAST_GROWTH, min(_MOST_GROWTH, _GROWTH_BYTES // per_token))

    def _allocate(self, num_pages: int) -> list[int]:
        if self.pool.num_pages == 0:
            rows = self.leaves.num_rows
            growth = self._growth_tokens // self._config.page_size
            self.pool.reserve(rows * (num_pages + num_pages // 4 + growth))
        return self.pool.allocate(num_pages)

    def check_integrity(self, positions: list[range]) -> None:
        """Raise `IntegrityError` unless every token is where the leaves say, exactly once.

        Parameters
        ----------
        positions : list of range
            The positions that each row must hold.
        """
        self.tree.check_integrity()
        held = [self.pages.pages(row) for row in range(len(self.lens))]
        self.pool.check_integrity(held)
        self.pages.check_integrity()
        tokens, real = self.tokens()
        for row, pages in enumerate(held):
            in_pages, found = self.pool.tokens_of(pages)
            if found.tolist() != list(positions[row]):
                raise IntegrityError(f"row {row}: positions in pages are not {positions[row]}")
            in_leaves = tokens[row][real[row]].sort().values
            if not torch.equal(in_leaves, in_pages.sort().values):
                raise IntegrityError(f"row {row}: tokens in leaves differ from those in pages")
        self._check_summaries(tokens, real)

    def _check_summaries(self, tokens: Tensor, real: Tensor) -> None:
        row, leaf, _ = real.nonzero(as_tuple=True)
        if row.numel() == 0:
            return
        where = torch.stack([row, leaf], 1)
        leaves, ids = torch.unique(where, dim=0, return_inverse=True)
        keys, values = self.pool.read(tokens[real])
        sizes = self.leaves.leaf_size, self.leaves.page_size
        fresh = LeafTable(self.leaves.num_rows, self.pool.head_dim, *sizes)
        fresh.reserve(int(leaves[:, 1].max()) + 1)
        fresh.num, fresh.centre = self.leaves.num.copy(), self.leaves.centre
        fresh.summarize(leaves[:, 0], leaves[:, 1], ids, keys, values)
        kept, made = (table.at(leaves[:, 0], leaves[:, 1]) for table in (self.leaves, fresh))
        # sums of the same tokens in another order differ by float32 steps of the tokens' size,
        # and may round an int8 code the other way
        step = 1e-6 * max(1.0, float(keys.float().abs().max()), float(values.float().abs().max()))
        for name, ours, truth, tolerance in (
            ("key mean", kept.keys(), made.keys(), 1.01 * made.key_scale.float()[:, None]),
            ("value mean", kept.values(), made.values(), 1.01 * made.value_scale.float()[:, None]),
            ("key scale", kept.key_scale, made.key_scale, 1e-2 * made.key_scale.float()),
            ("value scale", kept.value_scale, made.value_scale, 1e-2 * made.value_scale.float()),
            ("spread", kept.spread, made.spread, 1e-2 * made.spread.float()),
        ):
            if bool(((ours.float() - truth.float()).abs() > tolerance + step).any()):
                raise IntegrityError(f"a leaf's {name} differs from what its tokens give")
