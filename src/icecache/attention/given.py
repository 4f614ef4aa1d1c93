"""Attend to tokens that are given instead of chosen: another layer's selection.

Every leaf is scored for the remainder, which takes what a leaf has beside the given tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.store.page_table import PageTable
from icecache.store.pool import PagePool
from icecache.tree.search import LeafScores
from icecache.tree.tree import Tree

__all__ = ["Given", "take_given"]


class Given(NamedTuple):
    """Where given tokens are, and what their leaves have beside them.

    Attributes
    ----------
    scores : LeafScores
        Logits of what is left of each leaf, -inf where nothing is.
    chosen : shape [rows, leaves], bool. Leaves of which nothing is left.
    tokens : shape [rows, leaves, page_size], int64. The pool's slots of each leaf, 0 where none.
    wanted : shape [rows, leaves, page_size], bool. Which of them are given.
    """

    scores: LeafScores
    chosen: Tensor
    tokens: Tensor
    wanted: Tensor


def take_given(
    scores: LeafScores, positions: Tensor, tree: Tree, pool: PagePool, pages: PageTable
) -> Given:
    """Take tokens out of their leaves.

    scores: of all leaves, none descended to; positions: shape [rows, most], -1 where there is no
    token.
    """
    tokens, real = tree.leaves.tokens()
    rows = torch.arange(tokens.shape[0])[:, None, None]
    at = pages.in_pool(rows, tokens.masked_fill(~real, 0)).masked_fill_(~real, 0)
    here = pool.positions_of(at)
    wanted = torch.stack([torch.isin(h, p) for h, p in zip(here, positions, strict=True)]) & real
    count = real.sum(2)
    left = count - wanted.sum(2)
    kept = (left / count.clamp(min=1)).log()
    chosen = (left == 0) & (count > 0)
    logits = (scores.logits + kept[:, None]).masked_fill((left == 0)[:, None], -math.inf)
    return Given(scores._replace(logits=logits), chosen, at, wanted)
