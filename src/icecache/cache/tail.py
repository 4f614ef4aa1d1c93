"""The latest tokens, contiguous: the window, and all tokens of a context that is still short.

Rows are aligned at their end; row b's tokens are the last `lens[b]` of the buffer.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icecache.cache.granted import Granted
from icecache.errors import SnapshotMismatch
from icecache.ops.bounds import check_range

__all__ = ["Tail"]


class Tail:
    """A buffer of the latest tokens of every batch row.

    Parameters
    ----------
    batch, num_kv_heads, head_dim : int
    dtype : torch.dtype
    slack : int
        Tokens of room that a full buffer gets when it moves its content to the front.
    granted : Granted, optional
        Where the tokens are kept whenever they fit there; one batch row.
    device : torch.device, optional
        By default the CPU.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        slack: int,
        *,
        granted: Granted | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.lens = [0] * batch
        self._slack = slack
        self._granted = granted
        self._end = 0
        self._keys = torch.empty(batch, num_kv_heads, 0, head_dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of keys and values."""
        return self._keys.dtype

    @property
    def keys(self) -> Tensor:
        """The keys' buffer with its spare room."""
        return self._keys

    @property
    def end(self) -> int:
        """Where in the buffer the next token goes."""
        return self._end

    @property
    def capacity(self) -> int:
        """Tokens that the buffer has room for, those that were dropped at its front included."""
        return self._keys.shape[2]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lens)

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in length."""
        return min(self.lens) != max(self.lens)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return 2 * self._keys.numel() * self._keys.element_size()

    @property
    def is_away(self) -> bool:
        """Whether tokens for which memory is granted are in memory of the tail's own."""
        return self._granted is not None and not self._is_granted()

    @property
    def granted_bytes(self) -> int:
        """Bytes of the buffer that are not this tail's own."""
        return self.nbytes if self._is_granted() else 0

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return views of shape [batch, num_kv_heads, longest, head_dim], aligned at the end."""
        start = self._end - self.longest
        return self._keys[:, :, start : self._end], self._values[:, :, start : self._end]

    def buffers(self) -> tuple[Tensor, Tensor, list[int]]:
        """Return keys and values with their spare room, and each row's first token in them."""
        return self._keys, self._values, [self._end - length for length in self.lens]

    def valid(self) -> Tensor:
        """Return which of `keys_values` are a row's own, shape [batch, longest], bool."""
        device = self._keys.device
        back = torch.arange(self.longest, 0, -1, device=device)
        return back[None] <= torch.tensor(self.lens, device=device)[:, None]

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Append tokens, shape [batch, num_kv_heads, tokens, head_dim].

        mask: shape [batch, tokens], bool, optional; what it leaves out is not stored.
        """
        num_new = keys.shape[2]
        if mask is not None:
            self._append_ragged(keys, values, mask)
            return
        self.make_room(num_new)
        self._keys[:, :, self._end : self._end + num_new] = keys
        self._values[:, :, self._end : self._end + num_new] = values
        self._end += num_new
        self.lens = [length + num_new for length in self.lens]

    def advance(self, *, slides: bool) -> None:
        """Count a token written to `end` of each row; the oldest goes if the tail slides."""
        self._end += 1
        if not slides:
            self.lens = [length + 1 for length in self.lens]

    def oldest(self, row: int, num: int) -> tuple[Tensor, Tensor]:
        """Return a batch row's oldest tokens, two of shape [num_kv_heads, num, head_dim]."""
        start = self._end - self.lens[row]
        return self._keys[row, :, start : start + num], self._values[row, :, start : start + num]

    def offsets_of_oldest(self, nums: list[int]) -> np.ndarray:
        """Return the elements of `buffers` where the rows' oldest tokens begin.

        nums: tokens of each batch row. Row by row, KV head by KV head; shape
        [num_kv_heads * sum(nums)], int64.
        """
        _, heads, capacity, dim = self._keys.shape
        first = np.arange(len(nums) * heads, dtype=np.int64).reshape(-1, heads, 1) * capacity
        first += self._end - np.asarray(self.lens)[:, None, None]
        if min(nums) == max(nums):
            return ((first + np.arange(nums[0])) * dim).ravel()
        each = [(f + np.arange(num)).ravel() for f, num in zip(first, nums, strict=True)]
        return np.concatenate(each) * dim

    def drop_oldest(self, nums: list[int]) -> None:
        """Drop each row's oldest tokens."""
        self.lens = [length - num for length, num in zip(self.lens, nums, strict=True)]

    def drop_latest(self, num: int) -> None:
        """Drop the latest tokens of all rows."""
        self._end -= num
        self.lens = [length - num for length in self.lens]

    def release(self) -> None:
        """Give back the memory that the present tokens do not need."""
        keys, values = self.keys_values()
        self._move(keys, values, self._slack)

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows in a new order."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._granted = None
        self.lens = [self.lens[row] for row in rows.tolist()]

    def fork(self) -> "Tail":
        """Return a tail with copies of the tokens."""
        other = copy.copy(self)
        other.lens = list(self.lens)
        other._granted = None
        other._move(*self.keys_values(), self._slack)
        return other

    def state(self) -> dict[str, Any]:
        """Return what the tail holds, by name; views, valid until it changes."""
        keys, values = self.keys_values()
        return {"lens": self.lens, "keys": keys, "values": values}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a state back into an empty tail of as many rows."""
        keys, values = state["keys"], state["values"]
        shape = [*self._keys.shape[:2], keys.shape[2], self._keys.shape[3]]
        for name, part in (("keys", keys), ("values", values)):
            if list(part.shape) != shape or part.dtype != self.dtype:
                raise SnapshotMismatch(
                    f"the snapshot is damaged: {name} of the window must be {self.dtype} of shape "
                    f"{shape}, got {part.dtype} of {list(part.shape)}"
                )
        check_range("lens", np.asarray(state["lens"]), 0, keys.shape[2])
        self._move(keys, values, self._slack)
        self.lens = [int(length) for length in state["lens"]]

    def make_room(self, num_new: int) -> None:
        """Let the buffer have room for so many more tokens behind the last."""
        if self._end + num_new > self._keys.shape[2]:
            keys, values = self.keys_values()
            slack = max(self._slack, keys.shape[2] // 2)
            self._move(keys, values, num_new + slack, needed=num_new)

    def _is_granted(self) -> bool:
        return self._granted is not None and self._keys is self._granted.keys

    def _move(self, keys: Tensor, values: Tensor, room: int, needed: int = 0) -> None:
        batch, heads, length, dim = keys.shape
        granted = self._granted
        if granted is not None and length + needed <= granted.keys.shape[2]:
            if self._is_granted():
                # the places overlap
                keys, values = keys.clone(), values.clone()
            granted.keys[:, :, :length], granted.values[:, :, :length] = keys, values
            self._keys, self._values, self._end = granted.keys, granted.values, length
            return
        fresh_keys = keys.new_empty(batch, heads, length + room, dim)
        fresh_values = values.new_empty(batch, heads, length + room, dim)
        fresh_keys[:, :, :length] = keys
        fresh_values[:, :, :length] = values
        self._keys, self._values, self._end = fresh_keys, fresh_values, length

    def _append_ragged(self, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        old_keys, old_values = self.keys_values()
        keep = torch.cat([self.valid(), mask], 1)
        lens = keep.sum(1)
        longest = int(lens.max())
        order = torch.argsort(keep, dim=1, stable=True)[:, keep.shape[1] - longest :]
        index = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        foreign = torch.arange(longest, 0, -1, device=lens.device)[None] > lens[:, None]
        merged_keys = torch.cat([old_keys, keys], 2).gather(2, index)
        merged_values = torch.cat([old_values, values], 2).gather(2, index)
        for merged in (merged_keys, merged_values):
            merged.masked_fill_(foreign[:, None, :, None], 0.0)
        self._move(merged_keys, merged_values, self._slack)
        self.lens = lens.tolist()
