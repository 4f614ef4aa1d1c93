"""Random layers of a device path, for tests and for checks on a device; poisoned where not real."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.ops.device.bits import mask_of
from icecache.ops.device.quantize import quantize
from icecache.ops.device.records import DevicePages, DeviceTree, Fixed

__all__ = ["Case", "CaseShape", "empty_case", "random_case"]


@dataclass(frozen=True)
class CaseShape:
    """Sizes of a random layer, in the words of `records`."""

    batch: int = 1
    kv_heads: int = 3
    group: int = 2
    head_dim: int = 64
    leaves: int = 21
    pages: int = 7
    slots: int = 5
    page_size: int = 16
    leaf_size: int = 8
    sink: int = 2
    window: int = 5
    dtype: torch.dtype = torch.float32
    int8_pages: bool = False
    offload: bool = True

    @property
    def rows(self) -> int:
        """R."""
        return self.batch * self.kv_heads


class Case(NamedTuple):
    """A layer and what a step gives it.

    Attributes
    ----------
    query : shape [R, G, D]
    fixed, tree, pages : the layer
    """

    query: Tensor
    fixed: Fixed
    tree: DeviceTree
    pages: DevicePages


def empty_case(shape: CaseShape) -> Case:
    """Return a layer without a token; everything that is not real is NaN or nonsense."""
    rows, dim = shape.rows, shape.head_dim
    leaves, num_pages = shape.leaves, shape.pages
    nan = math.nan
    tree = DeviceTree(
        centre=torch.randn(rows, dim),
        key_mean=torch.full((rows, leaves, dim), 99, dtype=torch.int8),
        key_scale=torch.full((rows, leaves), nan),
        value_mean=torch.full((rows, leaves, dim), 99, dtype=torch.int8),
        value_scale=torch.full((rows, leaves), nan),
        spread=torch.full((rows, leaves), nan),
        num_tokens=torch.zeros(rows, leaves, dtype=torch.int32),
        leaf_page=torch.full((rows, leaves), 1 << 30, dtype=torch.int32),
        leaf_slots=torch.full((rows, leaves), -1, dtype=torch.int64),
        num_leaves=torch.zeros(rows, dtype=torch.int32),
        page_used=torch.zeros(rows, num_pages, dtype=torch.int64),
        num_pages=torch.zeros(rows, dtype=torch.int32),
        open_page=torch.full((rows,), -1, dtype=torch.int32),
        full=torch.zeros(rows, dtype=torch.int32),
    )
    size = shape.sink + shape.window
    fixed = Fixed(
        torch.full((rows, size, dim), nan, dtype=shape.dtype),
        torch.full((rows, size, dim), nan, dtype=shape.dtype),
        torch.zeros(shape.batch, dtype=torch.int32),
        torch.full((shape.batch,), shape.sink, dtype=torch.int32),
        shape.sink,
    )
    query = torch.randn(rows, shape.group, dim).to(shape.dtype)
    return Case(query, fixed, tree, _empty_pages(shape))


def random_case(shape: CaseShape) -> Case:
    """Return a layer of random tokens: rows with no leaf, some leaves and the most leaves."""
    case = empty_case(shape)
    for row in range(shape.rows):
        # the first row is empty, the last one full
        share = row / max(1, shape.rows - 1)
        _fill_row(case, shape, row, math.ceil(share * (shape.leaves - 1)))
    size = shape.sink + shape.window
    case.fixed.lens.copy_(torch.randint(0, 3 * size, (shape.batch,)))
    case.fixed.lens[-1] = 2 * size + 1
    case.fixed.left.copy_((case.fixed.lens - shape.window).clamp(min=shape.sink))
    for row in range(shape.rows):
        held = min(size, int(case.fixed.lens[row // shape.kv_heads]))
        tokens = torch.randn(2, held, shape.head_dim)
        case.fixed.keys[row, :held], case.fixed.values[row, :held] = tokens.to(shape.dtype)
    return case


def _empty_pages(shape: CaseShape) -> DevicePages:
    rows, record = shape.rows, (2, shape.page_size, shape.head_dim)
    tables = dict.fromkeys(("resident", "slot_of_page", "page_in_slot", "last_used", "work"))
    if shape.offload:
        tables = {
            "resident": torch.full((rows, shape.slots, *record), math.nan, dtype=shape.dtype),
            "slot_of_page": torch.full((rows, shape.pages), -1, dtype=torch.int32),
            "page_in_slot": torch.full((rows, shape.slots), -1, dtype=torch.int32),
            "last_used": torch.full((rows, shape.slots), 1 << 60, dtype=torch.int64),
            "work": torch.zeros(rows, 2, dtype=torch.int64),
        }
    if shape.int8_pages:
        host = torch.full((rows, shape.pages, *record), 99, dtype=torch.int8)
        scales = torch.full((rows, shape.pages, *record[:2]), math.nan)
    else:
        host, scales = torch.full((rows, shape.pages, *record), math.nan, dtype=shape.dtype), None
    positions = torch.full((rows, shape.pages, shape.page_size), -1, dtype=torch.int32)
    return DevicePages(host=host, scales=scales, positions=positions, **tables)


def _fill_row(case: Case, shape: CaseShape, row: int, num_leaves: int) -> None:
    """Fill pages with leaves in scattered slots until there are enough, or no page is left."""
    tree = case.tree
    # positions that no token of the window gets
    leaf, position = 0, 1 << 20
    for page in range(shape.pages - 1):
        free = torch.randperm(shape.page_size).tolist()
        while leaf < num_leaves and len(free) > shape.leaf_size // 2:
            size = int(torch.randint(1, min(shape.leaf_size, len(free)) + 1, ()))
            slots, free = sorted(free[:size]), free[size:]
            case.pages.positions[row, page, slots] = torch.arange(
                position, position + size, dtype=torch.int32
            )
            _fill_leaf(case, shape, (row, leaf, page), slots)
            position, leaf = position + size, leaf + 1
        if int(tree.page_used[row, page]):
            tree.num_pages[row] = page + 1
    tree.num_leaves[row] = leaf
    tree.open_page[row] = int(tree.num_pages[row]) - 1


def _fill_leaf(case: Case, shape: CaseShape, where: tuple[int, int, int], slots: list[int]) -> None:
    row, leaf, page = where
    tree, pages = case.tree, case.pages
    tokens = torch.randn(2, len(slots), shape.head_dim).to(shape.dtype).float()
    if pages.scales is None:
        pages.host[row, page][:, slots] = tokens.to(pages.host.dtype)
    else:
        codes, scales = quantize(tokens)
        pages.host[row, page][:, slots], pages.scales[row, page][:, slots] = codes, scales
        tokens = codes.float() * scales[..., None]
    mean = tokens.mean(1)
    tree.spread[row, leaf] = (tokens[0] - mean[0]).square().sum(1).mean()
    mean[0] -= tree.centre[row]
    codes, scales = quantize(mean)
    tree.key_mean[row, leaf], tree.value_mean[row, leaf] = codes
    tree.key_scale[row, leaf], tree.value_scale[row, leaf] = scales
    tree.num_tokens[row, leaf], tree.leaf_page[row, leaf] = len(slots), page
    tree.leaf_slots[row, leaf] = mask_of(slots)
    tree.page_used[row, page] |= mask_of(slots)
