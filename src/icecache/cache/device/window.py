"""Sink and window of one layer on a device, and what the host knows of them."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from icecache.cache.device.build import NewTokens
from icecache.cache.device.settings import DeviceSettings
from icecache.ops.device.records import Fixed, Leaving

__all__ = ["DeviceWindow"]


class DeviceWindow:
    """The first and the latest tokens of every row.

    Parameters
    ----------
    settings : DeviceSettings
    batch : int

    Attributes
    ----------
    fixed : Fixed
        The tokens, on the device.
    lens : list of int
        Tokens of each batch row, all of them.
    left : list of int
        The first position of each batch row's window; those from the sink to it have left.
    """

    def __init__(self, settings: DeviceSettings, batch: int) -> None:
        config = settings.config
        self._settings = settings
        self.lens, self.left = [0] * batch, [config.sink] * batch
        shape = batch * settings.heads, config.sink + config.window, settings.dim
        # made in inference mode they could not be written outside of it
        with torch.inference_mode(False):
            lens = torch.zeros(batch, dtype=torch.int32, device=settings.device)
            keys = torch.zeros(shape, dtype=settings.dtype, device=settings.device)
            left = torch.full_like(lens, config.sink)
            self.fixed = Fixed(keys, torch.zeros_like(keys), lens, left, config.sink)
            nothing = torch.zeros(shape[0], settings.dim, dtype=settings.dtype, device=lens.device)
            nowhere = torch.full((shape[0],), -1, dtype=torch.int32, device=lens.device)
        self.nothing_leaves = Leaving(nothing, nothing, nowhere >= 0, nowhere)

    @property
    def may_crop(self) -> list[int]:
        """Tokens that each batch row can lose: what has not gone into the tree."""
        sink = self._settings.config.sink
        ends = zip(self.lens, self.left, strict=True)
        return [n if left == sink else n - left for n, left in ends]

    @property
    def num_fixed(self) -> list[int]:
        """Tokens of each batch row in sink and window."""
        sink = self._settings.config.sink
        ends = zip(self.lens, self.left, strict=True)
        return [min(n, sink) + max(0, n - left) for n, left in ends]

    @property
    def is_full(self) -> list[bool]:
        """Whether each batch row's next token displaces one."""
        window = self._settings.config.window
        return [n - left == window for n, left in zip(self.lens, self.left, strict=True)]

    def push(self, ops: ModuleType, keys: Tensor, values: Tensor) -> Leaving:
        """Take one token of each row, [batch, num_kv_heads, 1, head_dim]; what it displaces."""
        rows = (part.reshape(-1, self._settings.dim) for part in (keys, values))
        leaving: Leaving = ops.push(self.fixed, *rows)
        self.count_push()
        return leaving

    def count_push(self) -> None:
        """Take note of a token that each row has got."""
        is_full = self.is_full
        self.lens = [n + 1 for n in self.lens]
        self.left = [left + one for left, one in zip(self.left, is_full, strict=True)]

    def slide(self, row: int, keys: Tensor, values: Tensor) -> NewTokens:
        """Move a batch row on by its new tokens; returns what leaves it. `publish` comes after.

        keys, values: shape [num_kv_heads, tokens, head_dim].
        """
        config, heads = self._settings.config, self._settings.heads
        own = slice(row * heads, (row + 1) * heads)
        length, left = self.lens[row], self.left[row]
        fill = min(keys.shape[1], max(0, config.sink - length))
        new_length = length + keys.shape[1]
        new_left = max(left, new_length - config.window)
        first = max(length, config.sink)
        held_leaving = self._ring(left, min(new_left, first))
        kept = max(first, new_left)
        moved: list[Tensor] = []
        for held, part in ((self.fixed.keys[own], keys), (self.fixed.values[own], values)):
            held[:, length : length + fill] = part[:, :fill]
            rest = part[:, fill:]
            moved.append(torch.cat([held[:, held_leaving], rest[:, : kept - first]], 1))
            if new_length > kept:
                held[:, self._ring(kept, new_length)] = rest[:, kept - first :]
        self.lens[row], self.left[row] = new_length, new_left
        return NewTokens(moved[0], moved[1], left)

    def crop(self, nums: list[int]) -> None:
        """Drop the latest tokens of each batch row."""
        self.lens = [n - num for n, num in zip(self.lens, nums, strict=True)]
        self.publish()

    def publish(self) -> None:
        """Tell the device what the host counts."""
        self.fixed.lens.copy_(torch.tensor(self.lens, dtype=torch.int32))
        self.fixed.left.copy_(torch.tensor(self.left, dtype=torch.int32))

    def reordered(self, rows: list[int]) -> "DeviceWindow":
        """Return a window with these batch rows of this one."""
        heads = self._settings.heads
        other = DeviceWindow(self._settings, len(rows))
        each = [row * heads + head for row in rows for head in range(heads)]
        where = torch.tensor(each, device=self.fixed.keys.device)
        for mine, theirs in zip(other.fixed[:2], self.fixed[:2], strict=True):
            mine.copy_(theirs[where])
        other.lens = [self.lens[row] for row in rows]
        other.left = [self.left[row] for row in rows]
        other.publish()
        return other

    def positions(self) -> Tensor:
        """Return the position of each entry, -1 for no token; shape [rows, entries], int64."""
        fixed, size = self.fixed, self.fixed.keys.shape[1]
        entry = torch.arange(size, device=fixed.lens.device)
        left, lens = fixed.left[:, None].long(), fixed.lens[:, None]
        in_ring = left + (entry - left) % (size - fixed.sink)
        position = torch.where(entry < fixed.sink, entry, in_ring)
        real = torch.where(position < lens, position, -1)
        return real.repeat_interleave(self._settings.heads, 0)

    def mark(self) -> tuple[list[int], list[int]]:
        """Return what the host counts, for `rewind`."""
        return list(self.lens), list(self.left)

    def rewind(self, mark: Any) -> None:
        """Count as at a mark."""
        self.lens, self.left = mark

    def _ring(self, start: int, end: int) -> Tensor:
        """Return where the window keeps positions from start to end."""
        sink, window = self._settings.config.sink, self._settings.config.window
        positions = torch.arange(start, max(start, end), device=self._settings.device)
        return sink + (positions - sink) % window
