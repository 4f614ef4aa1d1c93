"""One sparse step: exact over sink, selected and window, the remainder through summaries.

All of it shares one softmax, so the parts are weighed as full attention would weigh them.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.attention.select import (
    Choice,
    choose_best_tokens,
    choose_leaves,
    choose_pages_of_best_tokens,
)
from icecache.config import IceCacheConfig
from icecache.store.pool import PagePool
from icecache.store.residency import FetchPlan, Residency
from icecache.tree.exact import ExactIndex
from icecache.tree.search import SummaryIndex
from icecache.tree.table import LeafTable

__all__ = ["Fixed", "SparseStep", "attend_sparse"]


class Fixed(NamedTuple):
    """Sink and window: shape [rows, tokens, head_dim] twice and [rows, tokens] bool."""

    keys: Tensor
    values: Tensor
    valid: Tensor


class SparseStep(NamedTuple):
    """What a sparse step did.

    Attributes
    ----------
    out : shape [rows, heads, head_dim], float32
    num_attended : shape [rows], int64. Tokens attended exactly.
    num_scored : int. Leaves (or tokens, without summaries) scored, over all rows.
    share : shape [rows, heads, leaves or tokens], float32. Estimated shares of the attention.
    chosen : shape [rows, leaves or tokens], bool
    plan : FetchPlan. The pages of what was selected, each wanted once, and which were fetched.
    """

    out: Tensor
    num_attended: Tensor
    num_scored: int
    share: Tensor
    chosen: Tensor
    plan: FetchPlan


def attend_sparse(
    query: Tensor,
    fixed: Fixed,
    table: LeafTable,
    pool: PagePool,
    residency: Residency,
    config: IceCacheConfig,
    ops: ModuleType,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> SparseStep:
    """Attend one query token per head.

    Parameters
    ----------
    query : Tensor, shape [rows, heads, head_dim], float32
        The query heads of each KV head.
    sink_logits : Tensor, shape [rows, heads], optional
    """
    fixed_lse = _fixed_log_sum_exp(query, fixed, scaling, softcap, sink_logits)
    room = config.budget - int(fixed.valid.sum(1).max())
    remainder_logits = value_mean = value_scale = None
    if config.selection == "tree":
        scores = SummaryIndex(table, ops).search(query, scaling, softcap)
        page = table.pages() if config.unit == "page" else None
        choice = choose_leaves(
            scores,
            table.counts(),
            page,
            fixed_lse,
            room,
            config.estimates_remainder,
            ops.choose_within,
        )
        tokens, taken = _tokens_of(choice.chosen, table, pool.page_size)
        if config.estimates_remainder:
            estimate = scores.logits + config.spread_weight * scores.correction
            remainder_logits = estimate.masked_fill(choice.chosen[:, None], -math.inf)
            value_mean, value_scale = table.view().value_mean, table.view().value_scale
    else:
        choice, tokens, taken = _choose_exactly(
            query, fixed_lse, table, pool, config, room, scaling, softcap
        )
    keys, values, plan = _fetch(pool, residency, tokens)
    out = ops.attend_parts(
        query,
        torch.cat([fixed.keys, keys.masked_fill_(~taken[..., None], 0.0)], 1),
        torch.cat([fixed.values, values.masked_fill_(~taken[..., None], 0.0)], 1),
        torch.cat([fixed.valid, taken], 1),
        remainder_logits,
        value_mean,
        value_scale,
        sink_logits,
        scaling,
        softcap,
    )
    num_attended = fixed.valid.sum(1) + taken.sum(1)
    num_scored = sum(table.num_leaves) if config.selection == "tree" else table.num_tokens
    return SparseStep(out, num_attended, num_scored, choice.share, choice.chosen, plan)


def _fetch(
    pool: PagePool, residency: Residency, tokens: Tensor
) -> tuple[Tensor, Tensor, FetchPlan]:
    pages, where = torch.unique(tokens // pool.page_size, return_inverse=True)
    plan = residency.plan(pages.tolist())
    slots = torch.tensor(plan.slots, dtype=torch.int64)[where]
    return *pool.read(slots * pool.page_size + tokens % pool.page_size), plan


def _choose_exactly(
    query: Tensor,
    fixed_lse: Tensor,
    table: LeafTable,
    pool: PagePool,
    config: IceCacheConfig,
    room: int,
    scaling: float,
    softcap: float | None,
) -> tuple[Choice, Tensor, Tensor]:
    all_tokens, real = table.tokens(pool.page_size)
    all_tokens, real = all_tokens.flatten(1), real.flatten(1)
    all_tokens = all_tokens.masked_fill(~real, 0)
    keys, _ = pool.read(all_tokens)
    keys.masked_fill_(~real[..., None], 0.0)
    scores = ExactIndex(keys, real).search(query, scaling, softcap)
    if config.selection == "exact":
        choice = choose_best_tokens(scores, fixed_lse, room)
    else:
        page = all_tokens // pool.page_size
        num_pages = room // pool.page_size
        choice = choose_pages_of_best_tokens(scores, page, fixed_lse, num_pages)
        fits = real.sum(1, keepdim=True) <= room
        choice = choice._replace(chosen=choice.chosen | (real & fits))
    return choice, *_compact(all_tokens, choice.chosen)


def _tokens_of(chosen: Tensor, table: LeafTable, page_size: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of chosen leaves, [rows, n] int64, and which are real, [rows, n] bool."""
    leaf, is_leaf = _compact(torch.arange(chosen.shape[1]).expand_as(chosen), chosen)
    tokens, real = table.tokens_at(leaf, page_size)
    return _compact(tokens.flatten(1), (real & is_leaf[..., None]).flatten(1))


def _compact(items: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Move what is kept to the front of each row; return it, 0 behind, and which is kept."""
    counts = keep.sum(1)
    width = int(counts.max())
    row, column = keep.nonzero(as_tuple=True)
    rank = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]
    packed = items.new_zeros(keep.shape[0], width)
    packed[row, rank] = items[row, column]
    return packed, torch.arange(width)[None] < counts[:, None]


def _fixed_log_sum_exp(
    query: Tensor,
    fixed: Fixed,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    scores = ExactIndex(fixed.keys, fixed.valid).search(query, scaling, softcap)
    total = scores.logits.logsumexp(-1)
    return total if sink_logits is None else torch.logaddexp(total, sink_logits.float())
