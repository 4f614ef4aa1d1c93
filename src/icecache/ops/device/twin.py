"""The ops of a device's decode step in plain torch: the truth of `icecache.ops.triton`.

A step is `push`, `attend_fixed`, `score`, `vote`, `select_leaves` or `select_pages`, `resolve`,
`gather`, `attend_pages`, `attend_rest`, `combine`, `insert`, in this order. The tree is read as it
was before the step's insert, and the token that waits for it is attended beside sink and window.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icecache.errors import InputError
from icecache.ops.device.bits import has_bit
from icecache.ops.device.records import (
    DevicePages,
    DeviceTree,
    Fixed,
    Leaving,
    Part,
    Scores,
    Selected,
)
from icecache.ops.device.twin_fetch import gather, resolve
from icecache.ops.device.twin_insert import insert
from icecache.ops.device.twin_select import VOTE_UNIT, select_leaves, select_pages, vote

__all__ = [
    "MOST_DOUBT",
    "VOTE_UNIT",
    "attend_fixed",
    "attend_pages",
    "attend_rest",
    "check_parts",
    "combine",
    "gather",
    "insert",
    "push",
    "resolve",
    "score",
    "select_leaves",
    "select_pages",
    "vote",
]

MOST_DOUBT = 16.0


def push(fixed: Fixed, new_keys: Tensor, new_values: Tensor) -> Leaving:
    """Write one token a row to sink or window; returns what it displaces.

    Parameters
    ----------
    fixed : Fixed
        Changed: the token is written, `lens` rise by one, and so does `left` where a window is
        full and loses its oldest token.
    new_keys, new_values : Tensor, shape [R, D]
    """
    num_rows, size, _ = fixed.keys.shape
    window = size - fixed.sink
    heads = num_rows // fixed.lens.shape[0]
    lens, left = fixed.lens.repeat_interleave(heads), fixed.left.repeat_interleave(heads)
    into = torch.where(lens < size, lens, fixed.sink + (lens - fixed.sink) % window).long()
    rows = torch.arange(num_rows, device=lens.device)
    leaves = lens - left == window
    keys = torch.where(leaves[:, None], fixed.keys[rows, into], 0)
    values = torch.where(leaves[:, None], fixed.values[rows, into], 0)
    fixed.keys[rows, into] = new_keys.to(fixed.keys.dtype)
    fixed.values[rows, into] = new_values.to(fixed.values.dtype)
    fixed.left.add_((fixed.lens - fixed.left == window).int())
    fixed.lens.add_(1)
    return Leaving(keys, values, leaves, torch.where(leaves, left, -1).int())


def attend_fixed(
    query: Tensor, fixed: Fixed, leaving: Leaving, scaling: float, softcap: float | None
) -> Part:
    """Attend to sink, window and the leaving token.

    query: shape [R, G, D], the model's dtype. A model's logits are `scaling * q.k`, squashed to
    `softcap * tanh(logits / softcap)` if it has a softcap.
    """
    real = _real_entries(fixed)
    keys = torch.cat([fixed.keys, leaving.keys[:, None]], 1)
    values = torch.cat([fixed.values, leaving.values[:, None]], 1)
    return _attend(
        query, keys, values, torch.cat([real, leaving.leaves[:, None]], 1), scaling, softcap
    )


def score(
    query: Tensor,
    tree: DeviceTree,
    leaving: Leaving,
    scaling: float,
    softcap: float | None,
    spread_weight: float,
) -> Scores:
    """Score every leaf for the queries, and find the leaf nearest to the leaving key.

    `estimate` holds `spread_weight` times the second-order correction, `priority` all of it.
    """
    q = query.float()
    codes = tree.key_mean.float()
    dots = (q @ codes.mT) * tree.key_scale[:, None] + q @ tree.centre[:, :, None]
    logits, slope = scaling * dots, torch.ones((), device=q.device)
    if softcap is not None:
        squashed = torch.tanh(logits / softcap)
        logits, slope = softcap * squashed, 1 - squashed**2
    live = tree.num_tokens > 0
    squared = scaling**2 * q.square().sum(-1, keepdim=True) / q.shape[-1]
    correction = 0.5 * squared * tree.spread.clamp(min=0)[:, None] * slope**2
    logits = logits + tree.num_tokens.clamp(min=1).float().log()[:, None]
    mask = live[:, None].expand_as(logits)
    priority = torch.where(mask, logits + correction, -math.inf)
    estimate = torch.where(mask, logits + spread_weight * correction, -math.inf)
    doubt = torch.where(mask, correction.sqrt().clamp(max=MOST_DOUBT), 0.0)
    nearest, distance = _nearest(tree, leaving)
    lse = priority.logsumexp(-1)[:, None]
    return Scores(priority, estimate, doubt, nearest, distance, lse)


def attend_pages(
    query: Tensor,
    pages: DevicePages,
    selected: Selected,
    slots: Tensor,
    scaling: float,
    softcap: float | None,
) -> Part:
    """Attend to the selected tokens of selected pages.

    slots: shape [R, S], int32, where `resolve` put the pages.
    """
    pool = pages.host if pages.resident is None else pages.resident
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    records = pool[rows, slots.clamp(min=0).long()]
    real = has_bit(selected.tokens, pool.shape[3]).flatten(1)
    return _attend(
        query,
        records[:, :, 0].flatten(1, 2),
        records[:, :, 1].flatten(1, 2),
        real,
        scaling,
        softcap,
    )


def attend_rest(scores: Scores, tree: DeviceTree, selected: Selected) -> Part:
    """Attend to leaves whose tokens are not selected, through their mean values."""
    num_rows, num_pages = tree.page_used.shape
    live = tree.num_tokens > 0
    # a page more, for entries that select none
    tokens = torch.zeros(num_rows, num_pages + 1, dtype=torch.int64, device=live.device)
    into = torch.where(selected.pages < 0, num_pages, selected.pages).long()
    tokens.scatter_(1, into, selected.tokens)
    of_page = tokens.gather(1, torch.where(live, tree.leaf_page, num_pages).long())
    live = live & (of_page & tree.leaf_slots == 0)
    means = tree.value_mean.float() * tree.value_scale[..., None]
    return _weigh(scores.estimate, means, live)


def combine(parts: Sequence[Part], sink_logits: Tensor | None) -> Tensor:
    """Merge one to three parts into one attention, shape [R, G, D], float32.

    sink_logits: shape [R, G], float32, a learned logit that takes attention and gives nothing. A
    head that attends to nothing puts out 0.
    """
    check_parts(parts)
    lse = torch.cat([part.lse for part in parts], 1)
    out = torch.cat([part.out for part in parts], 1)
    total = lse.logsumexp(1)
    if sink_logits is not None:
        total = torch.logaddexp(total, sink_logits.float())
    weight = torch.exp(lse - total.clamp(min=-1e30)[:, None])
    return (weight[..., None] * out).sum(1)


def _real_entries(fixed: Fixed) -> Tensor:
    """Return which entries of sink and window hold a token, shape [R, sink + window], bool."""
    num_rows, size, _ = fixed.keys.shape
    heads, window = num_rows // fixed.lens.shape[0], size - fixed.sink
    lens, left = fixed.lens[:, None], fixed.left[:, None]
    entry = torch.arange(size, device=lens.device)
    in_ring = left + (entry - left) % window
    position = torch.where(entry < fixed.sink, entry, in_ring)
    return (position < lens).repeat_interleave(heads, 0)


def check_parts(parts: Sequence[Part]) -> None:
    """Raise `InputError` unless there are one to three parts."""
    if not 1 <= len(parts) <= 3:
        raise InputError(f"combine merges one to three parts, got {len(parts)}")


def _nearest(tree: DeviceTree, leaving: Leaving) -> tuple[Tensor, Tensor]:
    codes = tree.key_mean.float()
    point = leaving.keys.float() - tree.centre
    dots = (codes @ point[:, :, None])[..., 0]
    distance = tree.key_scale * (tree.key_scale * codes.square().sum(-1) - 2 * dots)
    live = (tree.num_tokens > 0) & leaving.leaves[:, None]
    distance = torch.where(live, distance, math.inf)
    # argmin does not promise the first of equals
    least = distance.amin(1, keepdim=True)
    first = (distance == least).int().argmax(1, keepdim=True).int()
    return torch.where(least < math.inf, first, -1), least


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    real: Tensor,
    scaling: float,
    softcap: float | None,
) -> Part:
    keys = torch.where(real[..., None], keys, 0).float()
    logits = scaling * (query.float() @ keys.mT)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return _weigh(logits, values, real)


def _weigh(logits: Tensor, values: Tensor, real: Tensor) -> Part:
    logits = torch.where(real[:, None], logits, -math.inf)
    lse = logits.logsumexp(-1)
    weight = torch.exp(logits - lse.clamp(min=-1e30)[..., None])
    out = weight @ torch.where(real[..., None], values, 0).float()
    return Part(out[:, None], lse[:, None])
