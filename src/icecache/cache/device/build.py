"""A build on a device: keys to leaves, leaves to pages, pages to where they live."""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.cache.device.transfer import Outbound
from icecache.config import IceCacheConfig
from icecache.errors import BackendUnavailable
from icecache.ops.batched import sum_groups
from icecache.ops.device.quantize import quantize
from icecache.ops.device.records import DevicePages, DeviceTree
from icecache.ops.native import load
from icecache.store.packing import pack, pack_native
from icecache.tree.build import Leaves, build_leaves

__all__ = ["Built", "NewTokens", "build", "lay_out", "store"]

_CENTRE_SAMPLE = 4096


class NewTokens(NamedTuple):
    """Tokens of one row, KV heads side by side.

    Attributes
    ----------
    keys, values : shape [heads, tokens, head_dim], the model's dtype
    first : position of the first.
    """

    keys: Tensor
    values: Tensor
    first: int


class Built(NamedTuple):
    """A row's new leaves and pages, numbered from 0.

    Attributes
    ----------
    leaf : shape [tokens], int64. Each token's leaf.
    page : shape [leaves], int64. Each leaf's page.
    slot : shape [tokens], int64. Each token's slot.
    num_leaves, num_pages : int
    """

    leaf: Tensor
    page: Tensor
    slot: Tensor
    num_leaves: int
    num_pages: int


def build(keys: Tensor, config: IceCacheConfig) -> list[Built]:
    """Cluster the keys of rows, [rows, tokens, head_dim], and lay out the leaves."""
    rows, tokens, _ = keys.shape
    leaves = build_leaves(keys.flatten(0, 1), [tokens] * rows, config)
    sizes = torch.bincount(leaves.ids)
    pages, counts = lay_out(leaves, sizes, config.page_size)
    built, first = [], 0
    for row, (num, num_pages) in enumerate(zip(leaves.per_row, counts, strict=True)):
        leaf = leaves.ids[row * tokens : (row + 1) * tokens] - first
        page = pages[first : first + num]
        built.append(Built(leaf, page, _slots(leaf, page), num, num_pages))
        first += num
    return built


def lay_out(leaves: Leaves, sizes: Tensor, page_size: int) -> tuple[Tensor, list[int]]:
    """Give each leaf a page of its row; returns them, on the leaves' device, and pages a row."""
    into_pages = pack_native if _has_native() else pack
    sizes_host, parents_host = sizes.cpu(), leaves.parents.cpu()
    pages, counts, first = [], [], 0
    for num in leaves.per_row:
        span = slice(first, first + num)
        packed, num_pages = into_pages(sizes_host[span], parents_host[span], page_size)
        pages.append(packed)
        counts.append(num_pages)
        first += num
    return torch.cat(pages).to(sizes.device), counts


def store(
    row: int,
    built: Built,
    tokens: NewTokens,
    tree: DeviceTree,
    pages: DevicePages,
    at: tuple[int, int],
    outbound: Outbound,
) -> None:
    """Write a row's tokens to new pages and their leaves to the tree.

    Parameters
    ----------
    row : int
    built : Built
    tokens : NewTokens
        Of this row alone: keys and values of shape [tokens, head_dim].
    tree, pages
        What is filled.
    at : tuple of int
        The row's leaves and pages so far.
    outbound : Outbound
        Carries the pages to host memory.
    """
    first_leaf, first_page = at
    if pages.scales is not None:
        # a leaf's summary is what the pages hold of its tokens, as after an insert
        tokens = tokens._replace(keys=_rounded(tokens.keys), values=_rounded(tokens.values))
    if first_leaf == 0:
        stride = -(-tokens.keys.shape[0] // _CENTRE_SAMPLE)
        tree.centre[row] = tokens.keys[::stride].float().mean(0)
    _write_pages(row, built, tokens, pages, first_page, outbound)
    _write_leaves(row, built, tokens, tree, first_leaf, first_page)
    bit = torch.ones_like(built.slot) << built.slot
    used = torch.zeros(built.num_pages, dtype=torch.int64, device=bit.device)
    tree.page_used[row, first_page : first_page + built.num_pages] = used.index_add_(
        0, built.page[built.leaf], bit
    )
    tree.num_leaves[row] = first_leaf + built.num_leaves
    tree.num_pages[row] = first_page + built.num_pages


def _write_pages(
    row: int, built: Built, tokens: NewTokens, pages: DevicePages, first: int, outbound: Outbound
) -> None:
    page_size, (num, dim) = pages.host.shape[3], tokens.keys.shape
    device, where = tokens.keys.device, built.page[built.leaf] * page_size + built.slot
    # one line more, of zeros, for the free slots
    source = torch.full((built.num_pages * page_size,), num, dtype=torch.int64, device=device)
    source[where] = torch.arange(num, device=device)
    is_free = (source == num)[:, None]
    source = source.clamp(max=num - 1)
    span = slice(first, first + built.num_pages)
    shape = (built.num_pages, page_size, dim)
    lines = torch.empty(
        (built.num_pages, 2, page_size, dim), dtype=tokens.keys.dtype, device=device
    )
    for i, part in enumerate((tokens.keys, tokens.values)):
        lines[:, i] = part[source].masked_fill_(is_free, 0).view(shape)
    if pages.scales is not None:
        codes, scales = quantize(lines)
        outbound.copy(codes, pages.host[row, span])
        outbound.copy(scales, pages.scales[row, span])
    else:
        outbound.copy(lines, pages.host[row, span])
    positions = torch.full_like(source, -1, dtype=torch.int32)
    positions[where] = torch.arange(tokens.first, tokens.first + num, device=device).int()
    outbound.copy(positions.view(-1, page_size), pages.positions[row, span])


def _rounded(x: Tensor) -> Tensor:
    codes, scales = quantize(x)
    return codes.float() * scales[..., None]


def _write_leaves(
    row: int, built: Built, tokens: NewTokens, tree: DeviceTree, first: int, first_page: int
) -> None:
    ids, num = built.leaf, built.num_leaves
    span = slice(first, first + num)
    count = torch.bincount(ids, minlength=num)
    key_mean, value_mean = (
        sum_groups(part.float(), ids, num) / count[:, None] for part in tokens[:2]
    )
    apart = (tokens.keys.float() - key_mean[ids]).square().sum(1, keepdim=True)
    tree.spread[row, span] = sum_groups(apart, ids, num)[:, 0] / count
    tree.num_tokens[row, span] = count.int()
    for codes, scale, mean in (
        (tree.key_mean, tree.key_scale, key_mean - tree.centre[row]),
        (tree.value_mean, tree.value_scale, value_mean),
    ):
        codes[row, span], scale[row, span] = quantize(mean)
    tree.leaf_page[row, span] = (first_page + built.page).int()
    bit = torch.ones_like(built.slot) << built.slot
    slots = torch.zeros(num, dtype=torch.int64, device=ids.device)
    tree.leaf_slots[row, span] = slots.index_add_(0, ids, bit)


def _slots(leaf: Tensor, page: Tensor) -> Tensor:
    """Return each token's slot: a page takes its leaves by number, a leaf its tokens in order."""
    of_token = page[leaf]
    order = torch.argsort(of_token * page.numel() + leaf, stable=True)
    counts = torch.bincount(of_token)
    starts = counts.cumsum(0) - counts
    slot = torch.empty_like(order)
    slot[order] = torch.arange(order.numel(), device=order.device) - starts[of_token[order]]
    return slot


def _has_native() -> bool:
    try:
        load()
    except BackendUnavailable:
        return False
    return True
