"""The pages: slots for tokens, which of them are free, and who holds which page.

Pages are plain ints; a page belongs to the rows that hold it. Rows that share a page (beams) hold
it together until one of them writes: then it gets a copy of its own. Keys and values of a page
lie side by side, so that a page moves in one piece.

    data       [page, key|value, slot, dim]   the tokens
    positions  [page, slot]                   position in the row's context, -1 = free slot
    holders    [page]                         rows that hold the page, 0 = free page
"""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.ops.bounds import check_range

__all__ = ["PagePool"]


class PagePool:
    """A growing pool of pages of one layer, in host memory.

    Parameters
    ----------
    page_size : int
        Slots of a page.
    head_dim : int
    dtype : torch.dtype
        Of keys and values; the model's.
    """

    def __init__(self, page_size: int, head_dim: int, dtype: torch.dtype) -> None:
        self.page_size, self.head_dim = page_size, head_dim
        self._data = torch.empty(0, 2, page_size, head_dim, dtype=dtype)
        self._positions = np.empty((0, page_size), dtype=np.int32)
        self._holders = np.empty(0, dtype=np.int32)
        self._free: deque[int] = deque()
        self.num_tables = 1

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored keys and values."""
        return self._data.dtype

    @property
    def address(self) -> int:
        """Address of the first page, for the compiled ops; valid until the pool grows."""
        return self._data.data_ptr()

    @property
    def positions_address(self) -> int:
        """Address of the positions; as `address`."""
        return self._positions.ctypes.data

    @property
    def holders_address(self) -> int:
        """Address of the holders; as `address`."""
        return self._holders.ctypes.data

    @property
    def num_pages(self) -> int:
        """Pages in use."""
        return self._holders.shape[0] - len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens stored, a shared page's once."""
        return int((self._positions[self._holders > 0] >= 0).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, tokens and positions."""
        return self.num_pages * self.page_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, tokens and positions."""
        slot = 2 * self.head_dim * self._data.element_size() + self._positions.itemsize
        return self.page_size * slot

    def reserve(self, num_pages: int) -> None:
        """Make sure that `num_pages` more can be allocated without growing.

        What is reserved and not used costs address space only, where the system maps memory at
        first touch.
        """
        total, have = self._holders.shape[0], len(self._free)
        if have >= num_pages:
            return
        grown = total + num_pages - have
        data = self._data.new_empty(grown, *self._data.shape[1:])
        data[:total] = self._data
        positions = np.full((grown, self.page_size), -1, dtype=np.int32)
        positions[:total] = self._positions
        holders = np.concatenate([self._holders, np.zeros(grown - total, dtype=np.int32)])
        self._data, self._positions, self._holders = data, positions, holders
        self._free.extend(range(total, grown))

    def allocate(self, num_pages: int) -> list[int]:
        """Return new empty pages, each held once; grows the pool by half when it is full."""
        if len(self._free) < num_pages:
            self.reserve(max(num_pages, self._holders.shape[0] // 2))
        pages = [self._free.popleft() for _ in range(num_pages)]
        self._holders[pages] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Add a holder to each page."""
        self._holders[pages] += 1

    def release(self, pages: list[int]) -> None:
        """Take a holder from each page; a page without one is free again."""
        self._holders[pages] -= 1
        for page in pages:
            if self._holders[page] == 0:
                self._positions[page] = -1
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether more than one row holds the page."""
        return bool(self._holders[page] > 1)

    def copy_page(self, page: int) -> int:
        """Return a new page with the same tokens in the same slots."""
        (copy,) = self.allocate(1)
        self._data[copy] = self._data[page]
        self._positions[copy] = self._positions[page]
        return copy

    def free_slots(self, page: int) -> list[int]:
        """Return the page's free slots, rising."""
        slots: list[int] = np.flatnonzero(self._positions[page] < 0).tolist()
        return slots

    def claim(self, page: int, num: int) -> list[int]:
        """Take free slots of a page, lowest first; `write` must follow."""
        slots = self.free_slots(page)[:num]
        if len(slots) < num:
            raise IntegrityError(f"page {page}: {num} slots claimed, {len(slots)} free")
        self._positions[page, slots] = 0
        return slots

    def clear(self, tokens: list[int]) -> None:
        """Free the slots of tokens, given as page * page_size + slot."""
        self._positions.reshape(-1)[tokens] = -1

    def write(self, tokens: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store tokens.

        tokens: shape [n], int64, page * page_size + slot; keys, values: shape [n, head_dim];
        positions: shape [n], int64.
        """
        page, slot = tokens // self.page_size, tokens % self.page_size
        self._data[page, 0, slot] = keys
        self._data[page, 1, slot] = values
        self._positions.reshape(-1)[tokens.numpy()] = positions.numpy()

    def positions_of(self, tokens: Tensor) -> Tensor:
        """Return the positions of tokens, shape of tokens, int64."""
        return torch.from_numpy(self._positions.reshape(-1)[tokens.numpy()].astype(np.int64))

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of tokens, each of shape [*tokens.shape, head_dim]."""
        slot = tokens % self.page_size
        key_line = (tokens - slot) * 2 + slot
        flat = self._data.view(-1, self.head_dim)
        return flat[key_line], flat[key_line + self.page_size]

    def tokens_of(self, pages: list[int]) -> tuple[Tensor, Tensor]:
        """Return the tokens in pages, by rising position, and their positions; [n], int64."""
        positions = self._positions[pages]
        which, slot = np.nonzero(positions >= 0)
        found = positions[which, slot]
        order = np.argsort(found, kind="stable")
        tokens = np.asarray(pages, dtype=np.int64)[which] * self.page_size + slot
        return torch.from_numpy(tokens[order]), torch.from_numpy(found[order].astype(np.int64))

    def state(self, pages: list[int]) -> dict[str, Any]:
        """Return what some pages hold, by name; holders are the page tables' concern."""
        # pages that lie in order are not copied
        which = slice(len(pages)) if pages == list(range(len(pages))) else pages
        return {"data": self._data[which], "positions": self._positions[which]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take pages back into an empty pool, numbered from 0, each without a holder yet."""
        num_pages = int(state["data"].shape[0])
        positions = state["positions"].numpy()
        check_range("positions", positions, -1, np.iinfo(np.int32).max)
        self.reserve(num_pages)
        self._data[:num_pages] = state["data"]
        self._positions[:num_pages] = positions

    def claim_pages(self, pages: np.ndarray) -> None:
        """Add a holder to loaded pages, free ones among them."""
        check_range("pages", pages, 0, self._holders.shape[0] - 1)
        np.add.at(self._holders, pages, 1)
        self._free = deque(np.flatnonzero(self._holders == 0).tolist())

    def poison(self) -> None:
        """Fill every free slot with NaN; for tests."""
        free = torch.from_numpy(self._positions < 0)
        self._data.transpose(1, 2)[free] = torch.nan

    def check_integrity(self, held: list[list[int]]) -> None:
        """Raise `IntegrityError` unless free and held pages are exactly the pool's.

        Parameters
        ----------
        held : list of list of int
            The pages that each row says it holds; of one table, where several share the pool.
        """
        holders = np.zeros_like(self._holders)
        for pages in held:
            if len(set(pages)) != len(pages):
                raise IntegrityError("a row holds a page twice")
            holders[pages] += 1
        too_few = (self._holders < holders).any()
        if too_few or (self.num_tables == 1 and (self._holders > holders).any()):
            raise IntegrityError("pages' holders differ from what the rows hold")
        free = sorted(self._free)
        if free != np.flatnonzero(self._holders == 0).tolist():
            raise IntegrityError("free pages are not the ones without holders")
        if (self._positions[free] >= 0).any():
            raise IntegrityError("a free page holds tokens")
