"""One sparse step: exact over sink, selected and window, the remainder through summaries.

All of it shares one softmax, so the parts are weighed as full attention would weigh them.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.attention.ask import Ask
from icecache.attention.given import take_given
from icecache.attention.select import (
    Choice,
    choose_best_tokens,
    choose_leaves,
    choose_pages_of_best_tokens,
    shares,
)
from icecache.config import IceCacheConfig
from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.store.residency import FetchPlan, Residency
from icecache.tree.exact import ExactIndex
from icecache.tree.search import LeafScores, TreeIndex
from icecache.tree.tree import Tree

__all__ = ["Fixed", "SparseStep", "Stored", "attend_sparse"]


class Fixed(NamedTuple):
    """Sink and window: shape [rows, tokens, head_dim] twice and [rows, tokens] bool."""

    keys: Tensor
    values: Tensor
    valid: Tensor


class Stored(NamedTuple):
    """The tokens under the tree: which belong together, and where they are."""

    tree: Tree
    pool: PagePool
    pages: PageTable
    residency: Residency


class SparseStep(NamedTuple):
    """What a sparse step did.

    Attributes
    ----------
    out : shape [rows, heads, head_dim], float32
    num_attended : shape [rows], int64. Tokens attended exactly.
    nodes_scored, leaves_scored : int. Nodes, and leaves (or tokens, without summaries), scored
        over all rows.
    share : shape [rows, heads, leaves or tokens], float32. Estimated shares of the attention.
    chosen : shape [rows, leaves or tokens], bool
    plan : FetchPlan. The pages of what was selected, each wanted once, and which were fetched.
    """

    out: Tensor
    num_attended: Tensor
    nodes_scored: int
    leaves_scored: int
    share: Tensor
    chosen: Tensor
    plan: FetchPlan


def attend_sparse(
    ask: Ask, fixed: Fixed, stored: Stored, config: IceCacheConfig, ops: ModuleType
) -> SparseStep:
    """Attend one query token per head."""
    fixed_lse = _fixed_log_sum_exp(ask, fixed)
    room = config.budget - int(fixed.valid.sum(1).max())
    leaves = stored.tree.leaves
    remainder = None
    if config.selection == "tree":
        index = TreeIndex(stored.tree, config, ops, is_flat=ask.positions is not None)
        scores = index.search(ask.query, fixed_lse, ask.scaling, ask.softcap)
        if ask.positions is None:
            page = leaves.pages() if config.unit == "page" else None
            choice = choose_leaves(
                scores, leaves.counts(), page, room, config.estimates_remainder, ops.choose_within
            )
            tokens, taken = _tokens_of(choice.chosen, stored)
        else:
            given = take_given(scores, ask.positions, stored.tree, stored.pool, stored.pages)
            scores, choice = given.scores, Choice(given.chosen, shares(given.scores))
            tokens, taken = _compact(given.tokens.flatten(1), given.wanted.flatten(1))
        if config.estimates_remainder:
            remainder = _remainder(scores, choice.chosen, stored.tree, config)
    else:
        scores, choice, tokens, taken = _choose_exactly(ask, fixed_lse, stored, config, room)
    keys, values, plan = _fetch(stored, tokens)
    out = ops.attend_parts(
        ask.query,
        torch.cat([fixed.keys, keys.masked_fill_(~taken[..., None], 0.0)], 1),
        torch.cat([fixed.values, values.masked_fill_(~taken[..., None], 0.0)], 1),
        torch.cat([fixed.valid, taken], 1),
        *(remainder or (None, None, None)),
        ask.sink_logits,
        ask.scaling,
        ask.softcap,
    )
    num_attended = fixed.valid.sum(1) + taken.sum(1)
    return SparseStep(
        out,
        num_attended,
        scores.nodes_scored,
        scores.leaves_scored,
        choice.share,
        choice.chosen,
        plan,
    )


def _remainder(
    scores: LeafScores, chosen: Tensor, tree: Tree, config: IceCacheConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, value codes and scales of what is attended through summaries."""
    estimate = scores.logits + config.spread_weight * scores.correction
    logits = estimate.masked_fill(chosen[:, None], -math.inf)
    near = tree.leaves.view()
    if scores.far is None:
        return logits, near.value_mean, near.value_scale
    far = scores.far
    return (
        torch.cat([logits, far.logits + config.spread_weight * far.correction], 2),
        torch.cat([near.value_mean, far.value_mean], 1),
        torch.cat([near.value_scale, far.value_scale], 1),
    )


def _fetch(stored: Stored, tokens: Tensor) -> tuple[Tensor, Tensor, FetchPlan]:
    pool = stored.pool
    pages, where = torch.unique(tokens // pool.page_size, return_inverse=True)
    plan = stored.residency.plan(pages.tolist())
    slots = torch.tensor(plan.slots, dtype=torch.int64)[where]
    return *pool.read(slots * pool.page_size + tokens % pool.page_size), plan


def _choose_exactly(
    ask: Ask, fixed_lse: Tensor, stored: Stored, config: IceCacheConfig, room: int
) -> tuple[LeafScores, Choice, Tensor, Tensor]:
    pool = stored.pool
    all_tokens, real = stored.tree.leaves.tokens()
    all_tokens, real = all_tokens.flatten(1).masked_fill(~real.flatten(1), 0), real.flatten(1)
    rows = torch.arange(real.shape[0])[:, None]
    all_tokens = stored.pages.in_pool(rows, all_tokens).masked_fill_(~real, 0)
    keys, _ = pool.read(all_tokens)
    keys.masked_fill_(~real[..., None], 0.0)
    scores = ExactIndex(keys, real).search(ask.query, fixed_lse, ask.scaling, ask.softcap)
    if config.selection == "exact":
        choice = choose_best_tokens(scores, room)
    else:
        page = all_tokens // pool.page_size
        choice = choose_pages_of_best_tokens(scores, page, room // pool.page_size)
        fits = real.sum(1, keepdim=True) <= room
        choice = choice._replace(chosen=choice.chosen | (real & fits))
    return scores, choice, *_compact(all_tokens, choice.chosen)


def _tokens_of(chosen: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
    """Return the tokens of chosen leaves, [rows, n] int64, and which are real, [rows, n] bool."""
    leaf, is_leaf = _compact(torch.arange(chosen.shape[1]).expand_as(chosen), chosen)
    tokens, real = stored.tree.leaves.tokens_at(leaf)
    tokens, real = _compact(tokens.flatten(1), (real & is_leaf[..., None]).flatten(1))
    rows = torch.arange(tokens.shape[0])[:, None]
    return stored.pages.in_pool(rows, tokens).masked_fill_(~real, 0), real


def _compact(items: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Move what is kept to the front of each row; return it, 0 behind, and which is kept."""
    counts = keep.sum(1)
    width = int(counts.max())
    row, column = keep.nonzero(as_tuple=True)
    rank = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]
    packed = items.new_zeros(keep.shape[0], width)
    packed[row, rank] = items[row, column]
    return packed, torch.arange(width)[None] < counts[:, None]


def _fixed_log_sum_exp(ask: Ask, fixed: Fixed) -> Tensor:
    nothing = ask.query.new_full(ask.query.shape[:2], -math.inf)
    index = ExactIndex(fixed.keys, fixed.valid)
    total = index.search(ask.query, nothing, ask.scaling, ask.softcap).logits.logsumexp(-1)
    return total if ask.sink_logits is None else torch.logaddexp(total, ask.sink_logits.float())
