"""The ops of a device's decode step in plain torch: the truth of `icecache.ops.triton`.

A step is `push`, `attend_fixed`, `score`, `vote`, `select`, `resolve`, `gather`, `attend_pages`,
`attend_rest`, `combine`, `insert`, in this order. The tree is read as it was before the step's
insert, and the token that waits for it is attended beside sink and window.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icecache.errors import InputError
from icecache.ops.device.bits import count_bits, has_bit
from icecache.ops.device.records import DevicePages, DeviceTree, Fixed, Leaving, Part, Scores
from icecache.ops.device.twin_fetch import gather, resolve
from icecache.ops.device.twin_insert import insert

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
    "select",
    "vote",
]

MOST_DOUBT = 16.0
VOTE_UNIT = 2.0**32


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


def vote(scores: Scores, fixed: Part, tree: DeviceTree, num_pages: int) -> Tensor:
    """Return how much each page deserves to be attended exactly, shape [R, num_pages], int64.

    A leaf deserves its estimated share of a head's attention times its doubt, as
    `attention.select` has it; summed over heads and the page's leaves in units of 1 / `VOTE_UNIT`.
    """
    total = torch.logaddexp(scores.priority_lse.logsumexp(1), fixed.lse.logsumexp(1))
    share = torch.exp(scores.priority - total.clamp(min=-1e30)[:, :, None])
    units = torch.floor(share * scores.doubt * VOTE_UNIT + 0.5).long().sum(1)
    votes = torch.zeros(units.shape[0], num_pages, dtype=torch.int64, device=units.device)
    live = tree.num_tokens > 0
    page = torch.where(live, tree.leaf_page, 0).long()
    return votes.scatter_add_(1, page, torch.where(live, units, 0))


def select(votes: Tensor, page_used: Tensor, room: int, most: int) -> Tensor:
    """Select pages by falling vote a token; of the best `most`, what still fits in `room` tokens.

    Returns
    -------
    Tensor, shape [R, most], int32
        Best first, the lowest page first of equals, -1 behind them. Empty pages are never taken.
    """
    size = count_bits(page_used)
    worth = torch.where(size > 0, votes // size.clamp(min=1), -1)
    num_rows, num_pages = worth.shape
    order = worth.argsort(dim=1, descending=True, stable=True)[:, :most]
    pages = torch.full((num_rows, most), -1, dtype=torch.int32, device=votes.device)
    left = torch.full((num_rows,), room, device=votes.device)
    taken = torch.zeros_like(left)
    rows = torch.arange(num_rows, device=votes.device)
    for i in range(min(most, num_pages)):
        page = order[:, i]
        fits = (worth[rows, page] >= 0) & (size[rows, page] <= left)
        pages[rows[fits], taken[fits]] = page[fits].int()
        left = left - torch.where(fits, size[rows, page], 0)
        taken = taken + fits
    return pages


def attend_pages(
    query: Tensor,
    pages: DevicePages,
    selected: Tensor,
    slots: Tensor,
    page_used: Tensor,
    scaling: float,
    softcap: float | None,
) -> Part:
    """Attend to the tokens of selected pages.

    selected, slots: shape [R, S], int32, the pages and where `resolve` put them.
    """
    pool = pages.host if pages.resident is None else pages.resident
    num_rows, most = selected.shape
    rows = torch.arange(num_rows, device=selected.device)[:, None]
    records = pool[rows, slots.clamp(min=0).long()]
    used = torch.where(selected < 0, 0, page_used[rows, selected.clamp(min=0).long()])
    real = has_bit(used, pool.shape[3]).flatten(1)
    return _attend(
        query,
        records[:, :, 0].flatten(1, 2),
        records[:, :, 1].flatten(1, 2),
        real,
        scaling,
        softcap,
    )


def attend_rest(scores: Scores, tree: DeviceTree, selected: Tensor) -> Part:
    """Attend to leaves of pages that are not selected, through their mean values."""
    chosen = (tree.leaf_page[:, :, None] == selected[:, None]).any(-1)
    live = (tree.num_tokens > 0) & ~chosen
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
