"""The leaves of all rows: their summaries, and where their tokens are.

page    [row, leaf]         the page that holds them, by its number within the row
slots   [row, leaf, i]      their slots in that page, NO_SLOT behind the last
"""

import numpy as np
import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.ops.batched import summarize
from icecache.tree.level import Level

__all__ = ["NO_SLOT", "LeafTable"]

NO_SLOT = 255


class LeafTable(Level):
    """Leaves and their summaries, one layer, all rows (batch x KV heads).

    Parameters
    ----------
    num_rows, head_dim, leaf_size : int
    """

    _COUNT = "uint8"

    def __init__(self, num_rows: int, head_dim: int, leaf_size: int) -> None:
        self.leaf_size = leaf_size
        super().__init__(num_rows, head_dim)

    @property
    def num_tokens(self) -> int:
        """Tokens of all leaves."""
        return int(self.counts().sum())

    def tokens(self, page_size: int) -> tuple[Tensor, Tensor]:
        """Return every leaf's tokens, page * page_size + slot, and which of them are real.

        Both of shape [rows, longest row, leaf_size], int64 and bool.
        """
        leaf = torch.arange(self.longest).expand(self.num_rows, -1)
        return self.tokens_at(leaf, page_size)

    def tokens_at(self, leaf: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of chosen leaves, shape [rows, n] -> two of [rows, n, leaf_size]."""
        page = self._arrays["page"].gather(1, leaf).long()
        slots = self._arrays["slots"].gather(1, leaf[..., None].expand(-1, -1, self.leaf_size))
        exists = leaf < torch.from_numpy(self.num)[:, None]
        real = (slots != NO_SLOT) & exists[..., None]
        return page[..., None] * page_size + slots.long(), real

    def pages(self) -> Tensor:
        """Return each leaf's page, shape [rows, longest row], int32."""
        return self._arrays["page"][:, : self.longest]

    def leaf(self, row: int, leaf: int) -> tuple[int, list[int]]:
        """Return a leaf's page and slots."""
        slots = self.numpy("slots")[row, leaf, : self.numpy("count")[row, leaf]]
        return int(self.numpy("page")[row, leaf]), slots.tolist()

    def place(self, row: int, leaf: int, page: int, slots: list[int]) -> None:
        """Say where a leaf's tokens are; its summary is set by `summarize`."""
        self.numpy("page")[row, leaf] = page
        self.numpy("count")[row, leaf] = len(slots)
        self.numpy("slots")[row, leaf] = slots + [NO_SLOT] * (self.leaf_size - len(slots))

    def place_many(self, row: Tensor, leaf: Tensor, page: Tensor, slots: Tensor) -> None:
        """Say where many leaves' tokens are; slots: shape [n, leaf_size], NO_SLOT behind."""
        self._arrays["page"][row, leaf] = page.to(torch.int32)
        self._arrays["slots"][row, leaf] = slots.to(torch.uint8)
        self.set_counts(row, leaf, (slots != NO_SLOT).sum(1))

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
        """
        _, key_mean, value_mean, spread = summarize(keys, values, ids, row.shape[0])
        self.set_summaries(row, leaf, key_mean, value_mean, spread)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless counts, slots and leaf numbers agree."""
        count, slots = self.numpy("count"), self.numpy("slots")
        for row, num in enumerate(self.num):
            if (count[row, :num] == 0).any() or (count[row, num:] != 0).any():
                raise IntegrityError(f"row {row}: empty leaf, or tokens behind the last leaf")
            if not np.array_equal((slots[row, :num] != NO_SLOT).sum(-1), count[row, :num]):
                raise IntegrityError(f"row {row}: a leaf's slots differ from its count")

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        shapes = super()._shapes()
        del shapes["first"]
        return {**shapes, "page": ((), "int32"), "slots": ((self.leaf_size,), "uint8")}
