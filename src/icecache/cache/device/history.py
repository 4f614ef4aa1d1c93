"""Exact attention of several tokens to everything: pages come back in blocks, one after the other.

The blocks' results are merged by their log-sum-exp, so that no more than a block of the history is
on the device at once.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.cache.device.index import DeviceIndex, Fresh
from icecache.ops.device.bits import has_bit

__all__ = ["Asked", "attend_history"]

_BLOCK_LOGITS = 1 << 26


class Asked(NamedTuple):
    """Queries of the latest tokens.

    Attributes
    ----------
    query : shape [rows, heads * tokens, head_dim], the query heads of each KV head
    position : shape [rows, heads * tokens], int64; negative for queries of padding
    """

    query: Tensor
    position: Tensor
    scaling: float
    softcap: float | None

    @classmethod
    def of_latest(
        cls, query: Tensor, lens: list[int], heads: int, scaling: float, softcap: float | None
    ) -> "Asked":
        """Lay out [batch, num_q_heads, tokens, head_dim]; lens: all tokens of each row."""
        batch, num_heads, tokens, dim = query.shape
        group = num_heads // heads
        ends = torch.tensor(lens, device=query.device)[:, None]
        position = ends - tokens + torch.arange(tokens, device=query.device)
        position = position.repeat_interleave(heads, 0).repeat(1, group)
        return cls(query.reshape(batch * heads, group * tokens, dim), position, scaling, softcap)


class _Keys(NamedTuple):
    """Keys and values, [rows, tokens, head_dim], and their positions, -1 for no token."""

    keys: Tensor
    values: Tensor
    position: Tensor


def attend_history(
    asked: Asked, index: DeviceIndex, fresh: Fresh | None, sink_logits: Tensor | None
) -> Tensor:
    """Return the attention output, shape of `asked.query`, float32; 0 for queries of padding.

    fresh: tokens behind the index that have not entered it; sink_logits: shape of asked.position.
    """
    out = torch.zeros(asked.query.shape, device=asked.query.device)
    total = torch.full(asked.position.shape, -math.inf, device=out.device)
    if sink_logits is not None:
        total = sink_logits.float().clone()
    for block in _blocks(index, fresh, asked.query.shape[1]):
        part, lse = _attend(asked, block)
        merged = torch.logaddexp(total, lse)
        # where both are -inf nothing has been seen yet
        weight = merged.clamp(min=torch.finfo(torch.float32).min)
        out.mul_((total - weight).exp()[..., None])
        out.add_(part * (lse - weight).exp()[..., None])
        total = merged
    return out


def _blocks(index: DeviceIndex, fresh: Fresh | None, num_queries: int) -> Iterator[_Keys]:
    fixed = index.window.fixed
    yield _Keys(fixed.keys, fixed.values, index.window.positions())
    if fresh is not None:
        yield from _fresh_blocks(index, fresh, num_queries)
    index.wait_for_transfers()
    num_pages = int(index.tree.num_pages.max())
    rows, page_size = fixed.keys.shape[0], index.pages.host.shape[3]
    step = max(1, _BLOCK_LOGITS // (rows * num_queries * page_size))
    for start in range(0, num_pages, step):
        yield _page_block(index, start, min(start + step, num_pages))


def _page_block(index: DeviceIndex, start: int, end: int) -> _Keys:
    device, pages = index.settings.device, index.pages
    records = pages.host[:, start:end].to(device, non_blocking=True)
    if pages.scales is not None:
        scales = pages.scales[:, start:end].to(device, non_blocking=True)
        records = (records.float() * scales[..., None]).to(index.settings.dtype)
    position = pages.positions[:, start:end].to(device, non_blocking=True).flatten(1)
    used = has_bit(index.tree.page_used[:, start:end], records.shape[3]).flatten(1)
    keys, values = (records[:, :, i].flatten(1, 2) for i in range(2))
    return _Keys(keys, values, torch.where(used, position.long(), -1))


def _fresh_blocks(index: DeviceIndex, fresh: Fresh, num_queries: int) -> Iterator[_Keys]:
    heads, columns = index.settings.heads, fresh.keys.shape[2]
    device = fresh.keys.device
    lens, counts = (
        torch.tensor(x, device=device)[:, None] for x in (index.window.lens, fresh.counts)
    )
    number = torch.arange(columns, device=device) - (columns - counts)
    position = torch.where(number >= 0, lens + number, -1).repeat_interleave(heads, 0)
    step = max(1, _BLOCK_LOGITS // (position.shape[0] * num_queries))
    keys, values = fresh.keys.flatten(0, 1), fresh.values.flatten(0, 1)
    for start in range(0, columns, step):
        span = slice(start, start + step)
        yield _Keys(keys[:, span], values[:, span], position[:, span])


def _attend(asked: Asked, block: _Keys) -> tuple[Tensor, Tensor]:
    real = block.position >= 0
    keys = block.keys.masked_fill(~real[..., None], 0).float()
    values = block.values.masked_fill(~real[..., None], 0).float()
    logits = torch.bmm(asked.query.float(), keys.mT) * asked.scaling
    if asked.softcap is not None:
        logits = asked.softcap * torch.tanh(logits / asked.softcap)
    seen = real[:, None] & (block.position[:, None] <= asked.position[..., None])
    logits.masked_fill_(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    safe = lse.clamp(min=torch.finfo(torch.float32).min)
    share = logits.sub_(safe[..., None]).exp_()
    return torch.bmm(share, values), lse
