"""The leaves of all rows: their summaries, and where their tokens are.

page    [row, leaf]         the page that holds them, by its number within the row
slots   [row, leaf, byte]   their slots in that page, a bit each
centre  [row, dim]          what key means are counted from, about the mean of the row's first keys
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from icecache.errors import IntegrityError, SnapshotMismatch
from icecache.ops.batched import summarize
from icecache.ops.bounds import check_range
from icecache.tree.level import Level

__all__ = ["LeafTable"]

_CENTRE_SAMPLE = 4096


class LeafTable(Level):
    """Leaves and their summaries, one layer, all rows (batch x KV heads).

    Parameters
    ----------
    num_rows, head_dim, leaf_size, page_size : int
    """

    _COUNT = "uint8"

    def __init__(self, num_rows: int, head_dim: int, leaf_size: int, page_size: int) -> None:
        self.leaf_size, self.page_size = leaf_size, page_size
        super().__init__(num_rows, head_dim)
        self.centre = torch.zeros(num_rows, head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the leaves in use and of the centres."""
        return super().nbytes + self.centre.nbytes

    @property
    def num_tokens(self) -> int:
        """Tokens of all leaves."""
        return int(self.counts().sum())

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Return every leaf's page, slot by slot, page * page_size + slot, and which are its own.

        Both of shape [rows, longest row, page_size], int64 and bool.
        """
        return self.tokens_at(torch.arange(self.longest).expand(self.num_rows, -1))

    def tokens_at(self, leaf: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same of chosen leaves, shape [rows, n] -> two of [rows, n, page_size]."""
        page = self._arrays["page"].gather(1, leaf).long()
        slots = self._arrays["slots"]
        packed = slots.gather(1, leaf[..., None].expand(-1, -1, slots.shape[2]))
        exists = leaf < torch.from_numpy(self.num)[:, None]
        own = torch.from_numpy(self._unpack(packed.numpy())) & exists[..., None]
        return page[..., None] * self.page_size + torch.arange(self.page_size), own

    def pages(self) -> Tensor:
        """Return each leaf's page, shape [rows, longest row], int32."""
        return self._arrays["page"][:, : self.longest]

    def leaf(self, row: int, leaf: int) -> tuple[int, list[int]]:
        """Return a leaf's page and slots, rising."""
        slots: list[int] = np.flatnonzero(self._unpack(self.numpy("slots")[row, leaf])).tolist()
        return int(self.numpy("page")[row, leaf]), slots

    def place(self, row: int, leaf: int, page: int, slots: list[int]) -> None:
        """Say where a leaf's tokens are; its summary is set by `summarize`."""
        own = np.zeros(self.page_size, dtype=bool)
        own[slots] = True
        self.numpy("page")[row, leaf] = page
        self.numpy("count")[row, leaf] = len(slots)
        self.numpy("slots")[row, leaf] = np.packbits(own, bitorder="little")

    def place_many(self, row: Tensor, leaf: Tensor, page: Tensor, own: Tensor) -> None:
        """Say where many leaves' tokens are; own: shape [n, page_size], bool."""
        self._arrays["page"][row, leaf] = page.to(torch.int32)
        packed = np.packbits(own.numpy(), axis=1, bitorder="little")
        self._arrays["slots"][row, leaf] = torch.from_numpy(packed)
        self.set_counts(row, leaf, own.sum(1))

    def set_centre(self, row: int, keys: Tensor) -> None:
        """Count key means of a row without leaves from the mean of keys, shape [tokens, dim].

        Keys of many models share a large offset, which would take up the int8 codes.
        """
        sample = keys[:: -(-keys.shape[0] // _CENTRE_SAMPLE)].float().numpy()
        self.centre[row] = torch.from_numpy(sample.mean(0, dtype=np.float32))

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
        self.set_summaries(row, leaf, key_mean - self.centre[row], value_mean, spread)

    def reorder(self, rows: Tensor) -> None:
        """Take rows, repeated or dropped, in a new order."""
        super().reorder(rows)
        self.centre = self.centre[rows]

    def own(self) -> None:
        """Take a copy of arrays that forks share; every change of a shared table begins here."""
        if self._is_shared:
            self.centre = self.centre.clone()
        super().own()

    def state(self) -> dict[str, Any]:
        """Return what the table holds, by name; views, valid until it changes."""
        return {**super().state(), "centre": self.centre}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back into an empty table of as many rows."""
        centre = state["centre"]
        if centre.shape != self.centre.shape or not bool(centre.isfinite().all()):
            raise SnapshotMismatch(
                f"the snapshot is damaged: centre must be finite and of shape "
                f"{list(self.centre.shape)}, got {list(centre.shape)}"
            )
        check_range("count", state["count"], 0, self.leaf_size)
        check_range("page", state["page"], 0, np.iinfo(np.int32).max)
        super().load_state(state)
        self.centre.copy_(centre)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless counts, slots and leaf numbers agree."""
        count, slots = self.numpy("count"), self.numpy("slots")
        for row, num in enumerate(self.num):
            if (count[row, :num] == 0).any() or (count[row, num:] != 0).any():
                raise IntegrityError(f"row {row}: empty leaf, or tokens behind the last leaf")
            if not np.array_equal(self._unpack(slots[row, :num]).sum(-1), count[row, :num]):
                raise IntegrityError(f"row {row}: a leaf's slots differ from its count")

    def _unpack(self, packed: np.ndarray) -> np.ndarray:
        bits = np.unpackbits(packed, axis=-1, count=self.page_size, bitorder="little")
        return bits.astype(bool)

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        shapes = super()._shapes()
        del shapes["first"]
        return {**shapes, "page": ((), "int32"), "slots": (((self.page_size + 7) // 8,), "uint8")}
