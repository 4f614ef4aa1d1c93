"""Select: query heads of a KV head vote, the budget decides.

The heads vote by the sum of their softmax shares (DESIGN: one selection per KV head). With a
remainder the question is not which leaf weighs most but which is estimated worst: a leaf is worth
its share times the relative error of its estimate, the root of the spread's correction, per token
that it costs. A leaf of equal keys is estimated without error and is never worth its tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.tree.search import LeafScores

__all__ = ["Choice", "choose_best_tokens", "choose_leaves", "choose_pages_of_best_tokens", "shares"]


class Choice(NamedTuple):
    """What is attended exactly.

    Attributes
    ----------
    chosen : shape [rows, leaves or tokens], bool
    share : shape [rows, heads, leaves or tokens], float32. Estimated share of the attention.
    """

    chosen: Tensor
    share: Tensor


def choose_leaves(
    scores: LeafScores,
    count: Tensor,
    page: Tensor | None,
    room: int,
    remainder: bool,
    choose_within: Callable[[Tensor, Tensor, int], Tensor],
) -> Choice:
    """Choose leaves within `room` tokens.

    Parameters
    ----------
    scores : LeafScores
    count : Tensor, shape [rows, leaves]
    page : Tensor, shape [rows, leaves], optional
        Each leaf's page, to choose pages instead of leaves.
    room : int
    remainder : bool
    choose_within : callable
        The op.
    """
    share = shares(scores)
    worth = share * scores.correction.sqrt() if remainder else share
    worth = worth.sum(1)
    # leaves below nodes that were not expanded are not there to be chosen
    size = count.long().masked_fill(scores.logits[:, 0] == -math.inf, 0)
    if page is not None:
        pages, where = torch.unique(page, return_inverse=True)
        total = worth.new_zeros(worth.shape[0], pages.numel()).scatter_add_(1, where, worth)
        held = size.new_zeros(total.shape).scatter_add_(1, where, size)
        chosen_pages = choose_within(_per_token(total, held), held, room)
        return Choice(chosen_pages.gather(1, where) & (size > 0), share)
    return Choice(choose_within(_per_token(worth, size), size, room), share)


def choose_best_tokens(scores: LeafScores, room: int) -> Choice:
    """Choose the `room` tokens of largest summed share; scores are of single tokens."""
    share = shares(scores)
    vote = share.sum(1).masked_fill(scores.logits[:, 0] == -math.inf, -1.0)
    best, tokens = vote.topk(min(room, vote.shape[1]), dim=1)
    chosen = torch.zeros(vote.shape, dtype=torch.bool).scatter_(1, tokens, best >= 0)
    return Choice(chosen, share)


def choose_pages_of_best_tokens(scores: LeafScores, page: Tensor, num_pages: int) -> Choice:
    """Choose pages by their best token, the heads taking turns (the paper's rule).

    page: shape [rows, tokens], int64. Each head ranks the pages by its largest logit; the rank
    lists are interleaved and the first `num_pages` different pages are taken.
    """
    rows, heads, _ = scores.logits.shape
    pages, where = torch.unique(page, return_inverse=True)
    best = scores.logits.new_full((rows, heads, pages.numel()), -math.inf)
    index = where[:, None].expand(-1, heads, -1)
    best.scatter_reduce_(2, index, scores.logits, "amax")
    rank = best.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    turn = (rank * heads + torch.arange(heads)[None, :, None]).amin(1)
    turn = turn.masked_fill(best[:, 0] == -math.inf, 1 << 40)
    taken = turn.argsort(1)[:, :num_pages]
    chosen = torch.zeros(turn.shape, dtype=torch.bool).scatter_(1, taken, True)
    chosen = chosen.gather(1, where) & (scores.logits[:, 0] > -math.inf)
    return Choice(chosen, shares(scores))


def shares(scores: LeafScores) -> Tensor:
    """Return estimated shares of the attention, shape [rows, heads, leaves or tokens]."""
    likely = scores.logits + scores.correction
    total = torch.logaddexp(likely.logsumexp(-1), scores.beside)
    return (likely - total[..., None]).exp()


def _per_token(worth: Tensor, size: Tensor) -> Tensor:
    return (worth / size.clamp(min=1)).masked_fill(size == 0, -1.0)
