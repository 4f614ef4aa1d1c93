"""The ops of `reference`, all rows and heads at once; same arguments, same results."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from icecache.ops.reference import NEGLIGIBLE

__all__ = [
    "attend_dense",
    "attend_parts",
    "choose_within",
    "merge_summaries",
    "nearest",
    "quantize_rows",
    "score_leaves",
    "sum_groups",
    "summarize",
]

# torch's attention lays keys out anew for every 64 queries of a call, from 768 on for every 256
_BLOCK_QUERIES = 1024
# of logits; of a mask, which torch holds a second time as numbers
_BLOCK_ELEMENTS = 1 << 26
_MASK_ELEMENTS = 1 << 25
_TINY = 1e-37
_FEW_ELEMENTS = 2048
_FEW_MEMBERS = 64


def sum_groups(x: Tensor, ids: Tensor, num: int) -> Tensor:
    """Return the sum of each group's elements, shape [elements, dim] -> [num, dim], float32.

    torch wakes all threads for it however few the elements are, and a decode step must not wait
    for them on a busy machine; numpy does not. Both add a group's elements in their order, so
    the way taken shows in no bit. On other devices index_add_ adds in no fixed order.
    """
    if x.device.type != "cpu":
        return sum_runs(x[torch.argsort(ids, stable=True)], torch.bincount(ids, minlength=num))
    total = torch.zeros(num, x.shape[1])
    if x.shape[0] > _FEW_ELEMENTS:
        return total.index_add_(0, ids, x)
    order = np.argsort(ids.numpy(), kind="stable")
    groups, starts, counts = np.unique(ids.numpy()[order], return_index=True, return_counts=True)
    if counts.size and counts.max() > _FEW_MEMBERS:
        return total.index_add_(0, ids, x)
    members, sums = x.numpy()[order], total.numpy()
    for k in range(int(counts.max(initial=0))):
        more = counts > k
        sums[groups[more]] += members[starts[more] + k]
    return total


def sum_runs(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the sums of runs of elements, shape [elements, dim] -> [runs, dim], float32.

    Each run is added up from its front: the same bits every time, on any device.
    """
    return torch.segment_reduce(x.float(), "sum", lengths=lengths, unsafe=True)


def summarize(keys: Tensor, values: Tensor, ids: Tensor, num: int) -> tuple[Tensor, ...]:
    """Return count, mean key, mean value and spread (mean squared distance) of each group."""
    keys, values = keys.float(), values.float()
    count = torch.bincount(ids, minlength=num)
    weight = 1.0 / count.clamp(min=1)[:, None]
    key_mean = sum_groups(keys, ids, num) * weight
    value_mean = sum_groups(values, ids, num) * weight
    squared = (keys - key_mean[ids]).square().sum(1, keepdim=True)
    spread = (sum_groups(squared, ids, num) * weight)[:, 0]
    return count, key_mean, value_mean, spread


def merge_summaries(
    keys: Tensor, values: Tensor, spread: Tensor, count: Tensor, ids: Tensor, num: int
) -> tuple[Tensor, ...]:
    """Return count, mean key, mean value and spread of groups of summaries.

    keys, values: shape [n, dim], float32; spread: shape [n]; count: shape [n], int64; ids: shape
    [n], int64, the group of each.
    """
    weight = count.float()[:, None]
    total = torch.bincount(ids, count.double(), num).long()
    share = 1.0 / total.clamp(min=1).float()[:, None]
    key_mean = sum_groups(weight * keys, ids, num) * share
    value_mean = sum_groups(weight * values, ids, num) * share
    apart = (keys - key_mean[ids]).square().sum(1, keepdim=True)
    merged = sum_groups(weight * (spread.float()[:, None] + apart), ids, num) * share
    return total, key_mean, value_mean, merged[:, 0]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and the bfloat16 scale of each last-dim row."""
    x = x.float()
    scale = (x.abs().amax(-1) / 127).bfloat16()
    step = scale.float().clamp(min=1e-30)[..., None]
    return (x / step).round().clamp(-127, 127).to(torch.int8), scale


def score_leaves(
    query: Tensor,
    centre: Tensor,
    key_mean: Tensor,
    key_scale: Tensor,
    count: Tensor,
    spread: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return log(count) + scaling q.mean and the second-order correction of its log-sum-exp.

    Parameters
    ----------
    query : Tensor, shape [rows, heads, dim], float32
    centre : Tensor, shape [rows, dim], float32
        What key means are counted from.
    key_mean : Tensor, shape [rows, leaves, dim], int8
    key_scale, spread : Tensor, shape [rows, leaves]
    count : Tensor, shape [rows, leaves]; 0 where there is no leaf, its logit is -inf

    Returns
    -------
    logits, correction : Tensor, shape [rows, heads, leaves], float32
    """
    logits = torch.bmm(query, key_mean.float().transpose(1, 2))
    logits *= (scaling * key_scale.float())[:, None]
    logits += scaling * (query * centre[:, None]).sum(-1, keepdim=True)
    norm = query.square().sum(-1, keepdim=True) * (0.5 * scaling**2 / query.shape[2])
    correction = norm * spread.float()[:, None]
    if softcap is not None:
        squashed = torch.tanh(logits / softcap)
        logits = softcap * squashed
        correction = correction * (1 - squashed.square()).square()
    logits = logits + count.float().log()[:, None]
    return logits, correction


def choose_within(priority: Tensor, size: Tensor, room: int) -> Tensor:
    """Say what is chosen: of the `room` best, by falling priority, whatever still fits.

    priority: shape [rows, n], float32, negative where never chosen; size: shape [rows, n], at
    least 1 where it may be chosen. Each pass takes the longest run that fits and thereby rules
    out the one that ended it, so the result equals going through them one by one.
    """
    width = min(priority.shape[1], max(room, 0))
    if width == 0:
        return torch.zeros(priority.shape, dtype=torch.bool)
    # topk alone breaks ties by how long the row is; the first of equals must win
    edge = priority.topk(width, dim=1).values[:, -1:]
    above, tied = priority > edge, priority == edge
    kept = above | (tied & (tied.cumsum(1) <= width - above.sum(1, keepdim=True)))
    candidates = kept.nonzero()[:, 1].view(priority.shape[0], width)
    best, order = priority.gather(1, candidates).sort(dim=1, descending=True, stable=True)
    candidates = candidates.gather(1, order)
    sizes = size.gather(1, candidates).long()
    open_ = best >= 0
    taken = torch.zeros_like(open_)
    left = torch.full((priority.shape[0], 1), room)
    while True:
        fits = open_ & ~taken & (sizes <= left)
        if not bool(fits.any()):
            break
        # what was passed over while it did not fit never fits again: room only shrinks
        taken |= fits & ((sizes * fits).cumsum(1) <= left)
        left = room - (sizes * taken).sum(1, keepdim=True)
    return torch.zeros(priority.shape, dtype=torch.bool).scatter_(1, candidates, taken)


def nearest(point: Tensor, means: Tensor, most: int) -> Tensor:
    """Return the numbers of the `most` nearest means, nearest first, the first of equals first.

    point: shape [dim]; means: shape [n, dim]; both float32 -> shape [at most `most`], int64.
    """
    distance = 0.5 * means.square().sum(1) - means @ point
    return torch.argsort(distance, stable=True)[:most]


def attend_parts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    remainder_logits: Tensor | None,
    value_mean: Tensor | None,
    value_scale: Tensor | None,
    sink_logits: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attend exactly to keys and through summaries to the rest, in one softmax.

    Parameters
    ----------
    query : Tensor, shape [rows, heads, dim], float32
    keys, values : Tensor, shape [rows, tokens, dim], any float dtype; finite where not valid
    valid : Tensor, shape [rows, tokens], bool
    remainder_logits : Tensor, shape [rows, heads, leaves], float32, optional
        -inf where a leaf is attended exactly.
    value_mean, value_scale : Tensor, shape [rows, leaves, dim] int8 and [rows, leaves]
    sink_logits : Tensor, shape [rows, heads], optional
        Learned logits that take part in the softmax without a value.

    Returns
    -------
    Tensor, shape [rows, heads, dim], float32; 0 where a head sees nothing
    """
    num_exact = keys.shape[1]
    logits = torch.bmm(query, keys.float().transpose(1, 2)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    parts = [logits.masked_fill(~valid[:, None], -math.inf)]
    if remainder_logits is not None:
        parts.append(remainder_logits)
    if sink_logits is not None:
        parts.append(sink_logits.float()[..., None])
    joined = torch.cat(parts, -1)
    blind = (joined == -math.inf).all(-1, keepdim=True)
    share = torch.softmax(joined.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    out = torch.bmm(share[..., :num_exact], values.float())
    if remainder_logits is not None and value_mean is not None and value_scale is not None:
        rest = share[..., num_exact : num_exact + remainder_logits.shape[2]]
        rest = _keep_entries(rest, (remainder_logits[:, 0] > -math.inf).sum(1))
        out = torch.baddbmm(out, rest * value_scale.float()[:, None], value_mean.float())
    return out


def _keep_entries(share: Tensor, num: Tensor) -> Tensor:
    """Give the weight of entries that no head gives much to the others, head by head.

    share: shape [rows, heads, entries], their part of all attention; num: [rows], int64, the
    entries that are there. What is dropped is below `NEGLIGIBLE` of 1 / entries each.
    """
    least = NEGLIGIBLE / num.clamp(min=1).float()[:, None, None]
    kept = share * (share.amax(1, keepdim=True) >= least)
    return kept * (share.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=_TINY))


def attend_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attend causally; the queries are the last tokens of each row.

    Parameters
    ----------
    query : Tensor, shape [batch, heads, queries, dim]
    keys, values : Tensor, shape [batch, kv_heads, tokens, dim]; finite where not valid
    valid : Tensor, shape [batch, tokens], bool, optional
    sink_logits : Tensor, shape [heads], optional

    Returns
    -------
    Tensor, shape of query, dtype of query; 0 where a query sees no token.
    """
    num_queries, num_keys = query.shape[2], keys.shape[2]
    if valid is None and softcap is None and sink_logits is None and num_queries in (1, num_keys):
        return functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            is_causal=num_queries > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    blocks = []
    is_plain = softcap is None and sink_logits is None
    # with a mask, other devices hold the logits of all heads
    has_logits = not is_plain or query.device.type != "cpu"
    most = _BLOCK_ELEMENTS // query.shape[1] if has_logits else _MASK_ELEMENTS
    step = max(1, min(most // (query.shape[0] * num_keys), _BLOCK_QUERIES))
    for start in range(0, num_queries, step):
        block = query[:, :, start : start + step]
        number = start + torch.arange(block.shape[2], device=query.device)
        # no query of the block sees a key behind its own
        end = num_keys - num_queries + start + block.shape[2]
        seen = _seen(valid, num_keys, num_queries, number)[..., :end]
        k, v = keys[:, :, :end], values[:, :, :end]
        if is_plain:
            # without padding a query sees at least its own key
            blind = None if valid is None else ~seen.any(-1, keepdim=True)
            blocks.append(_attend_masked(block, k, v, seen, blind, scaling))
        else:
            blocks.append(_attend_capped(block, k, v, seen, scaling, softcap, sink_logits))
    return torch.cat(blocks, 2)


def _seen(valid: Tensor | None, num_keys: int, num_queries: int, query: Tensor) -> Tensor:
    """Return which keys queries may see, [batch or 1, 1, queries, keys]; rows count their own."""
    if valid is None:
        last = num_keys - num_queries + query
        return (torch.arange(num_keys, device=query.device)[None] <= last[:, None])[None, None]
    number = valid.cumsum(1)
    last = number[:, -1:] - num_queries + query[None]
    return ((number[:, None] - 1 <= last[..., None]) & valid[:, None])[:, None]


def _attend_masked(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, blind: Tensor | None, scaling: float
) -> Tensor:
    out = functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=seen if blind is None else seen | blind,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out if blind is None else out.masked_fill(blind, 0.0)


def _attend_capped(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    batch, heads, num_queries, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.float().reshape(batch, kv_heads, -1, dim)
    logits = torch.matmul(grouped, keys.float().transpose(2, 3)) * scaling
    logits = logits.view(batch, heads, num_queries, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    blind = ~seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~(seen | blind), -math.inf)
    if sink_logits is not None:
        sink = sink_logits.float().view(1, heads, 1, 1).expand(batch, -1, num_queries, -1)
        logits = torch.cat([logits, sink], -1)
    share = torch.softmax(logits, -1)[..., : keys.shape[2]]
    share = share.reshape(batch, kv_heads, -1, keys.shape[2])
    out = torch.matmul(share, values.float()).view(batch, heads, num_queries, -1)
    return out.masked_fill(blind, 0.0).to(query.dtype)
