"""The brute-force twin of `TreeIndex`: every key is its own leaf, and its score is exact."""

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

    def search(
        self, query: Tensor, beside: Tensor, scaling: float, softcap: float | None
    ) -> LeafScores:
        """Score all keys; query: [rows, heads, head_dim], beside: [rows, heads], both float32."""
        logits = torch.bmm(query, self.keys.float().transpose(1, 2)) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        masked = logits.masked_fill(~self.valid[:, None], -math.inf)
        scored = int(self.valid.sum())
        return LeafScores(masked, torch.zeros_like(logits), beside, None, 0, scored)
