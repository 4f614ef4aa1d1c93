"""The brute-force twin of `search`: every key is its own leaf, and its score is exact."""

import math

import torch
from torch import Tensor

from icecache.tree.search import LeafScores

__all__ = ["search_exact"]


def search_exact(
    keys: Tensor, valid: Tensor, query: Tensor, scaling: float, softcap: float | None
) -> LeafScores:
    """Score all tokens.

    Parameters
    ----------
    keys : Tensor, shape [rows, tokens, head_dim]; finite where not valid
    valid : Tensor, shape [rows, tokens], bool
    query : Tensor, shape [rows, heads, head_dim], float32
    scaling, softcap : as in `search`
    """
    logits = torch.bmm(query, keys.float().transpose(1, 2)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return LeafScores(logits.masked_fill(~valid[:, None], -math.inf), torch.zeros_like(logits))
