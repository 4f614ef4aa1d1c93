"""The leaves of all rows as flat arrays, and what each leaf's summary knows of its tokens.

count       [row, leaf]         tokens, 0 = no such leaf
page        [row, leaf]         the page that holds them
slots       [row, leaf, i]      their slots in that page, NO_SLOT behind the last
key_mean    [row, leaf, dim]    int8 codes, times key_scale [row, leaf]
value_mean  [row, leaf, dim]    int8 codes, times value_scale [row, leaf]
spread      [row, leaf]         mean squared distance of the keys from key_mean
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.ops.batched import quantize_rows, summarize
from icecache.ops.native import Leaves as NativeLeaves
from icecache.ops.native import pointer

__all__ = ["NO_SLOT", "LeafTable", "LeafView"]

NO_SLOT = 255
_MIN_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class LeafView:
    """The arrays of `LeafTable` up to the longest row; views, valid until the next insert."""

    count: Tensor
    spread: Tensor
    key_mean: Tensor
    key_scale: Tensor
    value_mean: Tensor
    value_scale: Tensor


class LeafTable:
    """Leaves and their summaries, one layer, all rows (batch x KV heads).

    Parameters
    ----------
    num_rows, head_dim, leaf_size : int
    """

    def __init__(self, num_rows: int, head_dim: int, leaf_size: int) -> None:
        self.leaf_size, self.head_dim = leaf_size, head_dim
        self.num_leaves = [0] * num_rows
        self._arrays = _allocate(num_rows, 0, head_dim, leaf_size)

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return len(self.num_leaves)

    @property
    def num_tokens(self) -> int:
        """Tokens of all leaves."""
        return int(self._arrays["count"].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the leaves in use."""
        return sum(self.num_leaves) * self.leaf_bytes

    @property
    def leaf_bytes(self) -> int:
        """Bytes of one leaf, summary and slots."""
        return sum(a.element_size() * a.shape[2:].numel() for a in self._arrays.values())

    @property
    def capacity(self) -> int:
        """Leaves a row has room for."""
        return self._arrays["count"].shape[1]

    def native_leaves(self) -> tuple[NativeLeaves, Tensor]:
        """Return the arrays' addresses for the compiled ops, and the tensor of rows' lengths.

        Valid until the next `add`, `reserve` or `reorder`, and while the tensor is held.
        """
        num_leaves = torch.tensor(self.num_leaves, dtype=torch.int32)
        arrays = {name: pointer(array) for name, array in self._arrays.items()}
        return NativeLeaves(num_leaves=pointer(num_leaves), **arrays), num_leaves

    def take_native(self, num_leaves: Tensor) -> None:
        """Take the rows' lengths back from compiled ops that added leaves."""
        self.num_leaves = num_leaves.tolist()

    def view(self) -> LeafView:
        """Return the summaries up to the longest row."""
        a, longest = self._arrays, max(self.num_leaves, default=0)
        return LeafView(*(a[field.name][:, :longest] for field in fields(LeafView)))

    def counts(self) -> Tensor:
        """Return the tokens of each leaf, shape [rows, longest row], uint8."""
        return self._arrays["count"][:, : max(self.num_leaves, default=0)]

    def tokens(self, page_size: int) -> tuple[Tensor, Tensor]:
        """Return every leaf's tokens, page * page_size + slot, and which of them are real.

        Both of shape [rows, longest row, leaf_size], int64 and bool.
        """
        longest = max(self.num_leaves, default=0)
        slots = self._arrays["slots"][:, :longest].long()
        page = self._arrays["page"][:, :longest].long()
        used = torch.arange(longest)[None] < torch.tensor(self.num_leaves)[:, None]
        return page[..., None] * page_size + slots, (slots != NO_SLOT) & used[..., None]

    def tokens_at(self, leaf: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of chosen leaves, shape [rows, n] -> two of [rows, n, leaf_size]."""
        page = self._arrays["page"].gather(1, leaf).long()
        slots = self._arrays["slots"].gather(1, leaf[..., None].expand(-1, -1, self.leaf_size))
        exists = leaf < torch.tensor(self.num_leaves)[:, None]
        real = (slots != NO_SLOT) & exists[..., None]
        return page[..., None] * page_size + slots.long(), real

    def pages(self) -> Tensor:
        """Return each leaf's page, shape [rows, longest row], int32."""
        return self._arrays["page"][:, : max(self.num_leaves, default=0)]

    def leaf(self, row: int, leaf: int) -> tuple[int, list[int]]:
        """Return a leaf's page and slots."""
        slots = self._numpy("slots")[row, leaf, : self._numpy("count")[row, leaf]]
        return int(self._numpy("page")[row, leaf]), slots.tolist()

    def leaves_in(self, row: int, page: int) -> list[int]:
        """Return the row's leaves in a page."""
        found: list[int] = np.flatnonzero(
            self._numpy("page")[row, : self.num_leaves[row]] == page
        ).tolist()
        return found

    def count(self, row: int, leaf: int) -> int:
        """Return a leaf's number of tokens."""
        return int(self._numpy("count")[row, leaf])

    def add(self, row: int, num: int) -> int:
        """Open `num` leaves in a row and return the first one's number."""
        first = self.num_leaves[row]
        if first + num > self.capacity:
            self.reserve(max(first + num, self.capacity * 3 // 2))
        self.num_leaves[row] += num
        return first

    def reserve(self, capacity: int) -> None:
        """Make room for that many leaves a row."""
        old, have = self._arrays, self.capacity
        capacity = max(capacity, _MIN_CAPACITY)
        if capacity <= have:
            return
        arrays = _allocate(self.num_rows, capacity, self.head_dim, self.leaf_size)
        for name, array in old.items():
            arrays[name][:, :have] = array
        self._arrays = arrays

    def place(self, row: int, leaf: int, page: int, slots: list[int]) -> None:
        """Say where a leaf's tokens are; its summary is set by `summarize`."""
        self._numpy("page")[row, leaf] = page
        self._numpy("count")[row, leaf] = len(slots)
        self._numpy("slots")[row, leaf] = slots + [NO_SLOT] * (self.leaf_size - len(slots))

    def move_page(self, row: int, old: int, new: int) -> None:
        """Say that the row's leaves of one page are now in another, in the same slots."""
        pages = self._numpy("page")[row]
        pages[pages == old] = new

    def place_many(self, row: Tensor, leaf: Tensor, page: Tensor, slots: Tensor) -> None:
        """Say where many leaves' tokens are; slots: shape [n, leaf_size], NO_SLOT behind."""
        self._arrays["page"][row, leaf] = page.to(torch.int32)
        self._arrays["slots"][row, leaf] = slots.to(torch.uint8)
        self._arrays["count"][row, leaf] = (slots != NO_SLOT).sum(1).to(torch.uint8)

    def summarize(
        self, row: Tensor, leaf: Tensor, ids: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Recompute the summaries of leaves from all of their tokens.

        Parameters
        ----------
        row, leaf : Tensor, shape [n], int64
        ids : Tensor, shape [tokens], int64
            Which of the n leaves each token belongs to.
        keys, values : Tensor, shape [tokens, dim]

        Notes
        -----
        A leaf has a handful of tokens, so this is constant work and running means never drift.
        The spread counts the rounding of the mean to int8 in.
        """
        _, key_mean, value_mean, spread = summarize(keys, values, ids, row.shape[0])
        for name, mean in (("key", key_mean), ("value", value_mean)):
            codes, scale = quantize_rows(mean)
            self._arrays[f"{name}_mean"][row, leaf] = codes
            self._arrays[f"{name}_scale"][row, leaf] = scale
            if name == "key":
                spread = spread + scale.square() * (self.head_dim / 12)
        self._arrays["spread"][row, leaf] = spread

    def reorder(self, rows: Tensor) -> None:
        """Take rows, repeated or dropped, in a new order; pages are the caller's concern."""
        self._arrays = {name: array[rows] for name, array in self._arrays.items()}
        self.num_leaves = [self.num_leaves[row] for row in rows.tolist()]

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless counts, slots and leaf numbers agree."""
        count, slots = self._numpy("count"), self._numpy("slots")
        for row, num in enumerate(self.num_leaves):
            if (count[row, :num] == 0).any() or (count[row, num:] != 0).any():
                raise IntegrityError(f"row {row}: empty leaf, or tokens behind the last leaf")
            if not np.array_equal((slots[row, :num] != NO_SLOT).sum(-1), count[row, :num]):
                raise IntegrityError(f"row {row}: a leaf's slots differ from its count")

    def _numpy(self, name: str) -> np.ndarray:
        return self._arrays[name].numpy()


def _allocate(rows: int, capacity: int, dim: int, leaf_size: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "count": ((), "uint8"),
        "page": ((), "int32"),
        "slots": ((leaf_size,), "uint8"),
        "spread": ((), "float32"),
        "key_mean": ((dim,), "int8"),
        "key_scale": ((), "float32"),
        "value_mean": ((dim,), "int8"),
        "value_scale": ((), "float32"),
    }
    # numpy's zeros are mapped at first touch, so that room for growth costs no memory
    return {
        name: torch.from_numpy(np.zeros((rows, capacity, *shape), dtype=dtype))
        for name, (shape, dtype) in shapes.items()
    }
