"""Pages and leaves of one layer for a device: allocated at once at their full size."""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.errors import DeviceMemoryExceeded
from icecache.ops.device.records import DevicePages, DeviceTree
from icecache.store.pinned import PinnedBlock

__all__ = ["DevicePool", "PoolShape", "free_device_bytes"]


class PoolShape(NamedTuple):
    """How much a pool holds.

    Attributes
    ----------
    rows : batch rows x KV heads.
    leaves, pages : most of a row.
    slots : pages of a row that the device keeps beside those in host memory.
    page_size, head_dim : int
    dtype : of the model's keys and values.
    page_dtype : of pages in host memory.
    offloads : whether pages live in host memory.
    """

    rows: int
    leaves: int
    pages: int
    slots: int
    page_size: int
    head_dim: int
    dtype: torch.dtype
    page_dtype: torch.dtype
    offloads: bool

    @property
    def summary_bytes(self) -> int:
        """Bytes of the leaves and of where tokens are, on the device."""
        leaf = 2 * self.head_dim + 3 * 4 + 2 * 4 + 8
        page = 8 + (4 if self.offloads else 0)
        row = 4 * self.head_dim + 4 * 4
        return self.rows * (self.leaves * leaf + self.pages * page + row)

    @property
    def page_bytes(self) -> int:
        """Bytes of all pages with their scales and positions, wherever they live."""
        token = 2 * self.head_dim * self.page_dtype.itemsize + 4
        token += 8 if self.page_dtype == torch.int8 else 0
        return self.rows * self.pages * self.page_size * token

    @property
    def slot_bytes(self) -> int:
        """Bytes of the pages that the device keeps of those in host memory."""
        if not self.offloads:
            return 0
        page = 2 * self.page_size * self.head_dim * self.dtype.itemsize
        return self.rows * self.slots * (page + 12)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device."""
        return self.summary_bytes + self.slot_bytes + (0 if self.offloads else self.page_bytes)

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return self.page_bytes if self.offloads else 0


class DevicePool:
    """The leaves and pages of one layer.

    Parameters
    ----------
    shape : PoolShape
    device : torch.device

    Raises
    ------
    HostMemoryExceeded, DeviceMemoryExceeded
        If the machine has not so much free; nothing was taken then.

    Attributes
    ----------
    tree : DeviceTree
    pages : DevicePages
    """

    def __init__(self, shape: PoolShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        _ask_for(shape.device_bytes, device)
        # a pool made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            self._block = _block_for(shape, device)
            self.tree = _new_tree(shape, device)
            self.pages = self._new_pages()

    def grown(self, shape: PoolShape) -> "DevicePool":
        """Return a pool of more room with the same content; nothing is resident in it."""
        other = DevicePool(shape, self.device)
        other._copy(self, None)
        return other

    def reordered(self, rows: Tensor) -> "DevicePool":
        """Return a pool with these rows of this one; rows: shape [new rows], int64, on the CPU."""
        other = DevicePool(self.shape._replace(rows=rows.numel()), self.device)
        other._copy(self, rows)
        return other

    def close(self) -> None:
        """Let CUDA let go of the host memory."""
        if self._block is not None:
            self._block.close()

    def poison(self) -> None:
        """Fill all that holds no token, and no copy of one, with NaN; for tests."""
        free = self.pages.positions < 0
        if self.pages.host.is_floating_point():
            self.pages.host.transpose(2, 3)[free] = torch.nan
        else:
            assert self.pages.scales is not None
            self.pages.scales.transpose(2, 3)[free] = torch.nan
        if self.pages.resident is not None and self.pages.page_in_slot is not None:
            self.pages.resident[self.pages.page_in_slot < 0] = torch.nan
        absent = self.tree.num_tokens == 0
        for scale in (self.tree.key_scale, self.tree.value_scale, self.tree.spread):
            scale[absent] = torch.nan

    def _new_pages(self) -> DevicePages:
        rows, pages, slots = self.shape.rows, self.shape.pages, self.shape.slots
        token = self.shape.page_size, self.shape.head_dim
        host = self._beside((rows, pages, 2, *token), self.shape.page_dtype)
        scales = None
        if self.shape.page_dtype == torch.int8:
            scales = self._beside((rows, pages, 2, token[0]), torch.float32)
        positions = self._beside((rows, pages, token[0]), torch.int32).fill_(-1)
        if not self.shape.offloads:
            return DevicePages(host, scales, positions, *[None] * 5)

        def none(*size: int) -> Tensor:
            return torch.full(size, -1, dtype=torch.int32, device=self.device)

        return DevicePages(
            host,
            scales,
            positions,
            torch.zeros(rows, slots, 2, *token, dtype=self.shape.dtype, device=self.device),
            none(rows, pages),
            none(rows, slots),
            none(rows, slots).long(),
            torch.zeros(rows, 2, dtype=torch.int64, device=self.device),
        )

    def _beside(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory where pages live."""
        if self._block is None:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return self._block.take(shape, dtype)

    def _copy(self, source: "DevicePool", rows: Tensor | None) -> None:
        # slots stay empty: host pages are always complete
        for mine, theirs in [*zip(self.tree, source.tree), *zip(self.pages[:3], source.pages[:3])]:
            if mine is None or theirs is None:
                continue
            if rows is not None:
                theirs = theirs.index_select(0, rows.to(theirs.device))
            spans = tuple(slice(size) for size in theirs.shape)
            mine[spans].copy_(theirs)


def free_device_bytes(device: torch.device) -> int | None:
    """Return the bytes that a CUDA device can still give, None for other devices.

    What torch holds and does not use counts as free.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + idle)


def _ask_for(needed: int, device: torch.device) -> None:
    free = free_device_bytes(device)
    if free is not None and needed > free:
        raise DeviceMemoryExceeded(needed, free)


def _block_for(shape: PoolShape, device: torch.device) -> PinnedBlock | None:
    if not shape.offloads:
        return None
    pages = shape.rows, shape.pages
    needed = PinnedBlock.bytes_for((*pages, 2, shape.page_size, shape.head_dim), shape.page_dtype)
    needed += PinnedBlock.bytes_for((*pages, shape.page_size), torch.int32)
    if shape.page_dtype == torch.int8:
        needed += PinnedBlock.bytes_for((*pages, 2, shape.page_size), torch.float32)
    return PinnedBlock(needed, device)


def _new_tree(shape: PoolShape, device: torch.device) -> DeviceTree:
    rows, leaves, pages, dim = shape.rows, shape.leaves, shape.pages, shape.head_dim

    def zeros(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    number, real = torch.int32, torch.float32
    return DeviceTree(
        centre=zeros(rows, dim, dtype=real),
        key_mean=zeros(rows, leaves, dim, dtype=torch.int8),
        key_scale=zeros(rows, leaves, dtype=real),
        value_mean=zeros(rows, leaves, dim, dtype=torch.int8),
        value_scale=zeros(rows, leaves, dtype=real),
        spread=zeros(rows, leaves, dtype=real),
        num_tokens=zeros(rows, leaves, dtype=number),
        leaf_page=zeros(rows, leaves, dtype=number),
        leaf_slots=zeros(rows, leaves, dtype=torch.int64),
        num_leaves=zeros(rows, dtype=number),
        page_used=zeros(rows, pages, dtype=torch.int64),
        num_pages=zeros(rows, dtype=number),
        open_page=zeros(rows, dtype=number).fill_(-1),
        full=zeros(rows, dtype=number),
    )
