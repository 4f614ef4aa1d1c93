"""The brute-force twin of `SummaryIndex`: every key is its own leaf, and its score is exact."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icecache.tree.search import LeafScores

__all__ = ["ExactIndex"]


class ExactIndex(NamedTuple):
    """Keys scored one by one.

    Attributes
    ----------
    keys : shape [rows, tokens, head_dim]; finite where not valid
    valid : shape [rows, tokens], bool
    """

    keys: Tensor
    valid: Tensor

    def search(self, query: Tensor, scaling: float, softcap: float | None) -> LeafScores:
        """Score all keys; query: shape [rows, heads, head_dim], float32."""
        logits = torch.bmm(query, self.keys.float().transpose(1, 2)) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        masked = logits.masked_fill(~self.valid[:, None], -math.inf)
        return LeafScores(masked, torch.zeros_like(logits))
