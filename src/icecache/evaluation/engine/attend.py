"""Attention of one decode step over all tokens or a selection of them, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.evaluation.engine.tokens import Tokens

__all__ = ["Rule", "Selection", "attend_all", "attend_selected", "weigh_all"]


class Rule(NamedTuple):
    """How a layer turns logits into weights.

    Attributes
    ----------
    scaling : float
    softcap : float, optional. Logits become softcap * tanh(logits / softcap).
    sinks : shape [num_q_heads], optional. Logits that take part without a value.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


class Selection(NamedTuple):
    """The tokens that a step attends, per KV head.

    Attributes
    ----------
    positions : shape [G, n], int64
    valid : shape [G, n], bool, optional. Which of them count; by default all.
    bias : shape [G, R, n], optional. Added to the logits (weights of a sample).
    """

    positions: Tensor
    valid: Tensor | None = None
    bias: Tensor | None = None

    @property
    def num_attended(self) -> float:
        """Tokens attended, mean over the KV heads."""
        if self.valid is None:
            return float(self.positions.shape[1])
        return float(self.valid.sum(1).double().mean())


def weigh_all(query: Tensor, tokens: Tokens, rule: Rule) -> Tensor:
    """Return every token's attention weight, ``[G, R, T]``, float32; query: ``[G, R, D]``."""
    return _softmax(_capped(tokens.logits(query), rule), rule)


def attend_all(query: Tensor, tokens: Tokens, rule: Rule) -> Tensor:
    """Return full attention's output, shape ``[G, R, D]``; query: ``[G, R, D]``."""
    return tokens.weigh(weigh_all(query, tokens, rule).to(query.dtype))


def attend_selected(query: Tensor, tokens: Tokens, chosen: Selection, rule: Rule) -> Tensor:
    """Return the output over the chosen tokens alone, shape ``[G, R, D]``."""
    keys, values = tokens.gather(chosen.positions)
    logits = _capped(query @ keys.transpose(1, 2), rule)
    if chosen.bias is not None:
        logits = logits + chosen.bias
    if chosen.valid is not None:
        logits = logits.masked_fill(~chosen.valid[:, None], float("-inf"))
    return _softmax(logits, rule).to(query.dtype) @ values


def _capped(logits: Tensor, rule: Rule) -> Tensor:
    logits = logits.float() * rule.scaling
    return logits if rule.softcap is None else rule.softcap * torch.tanh(logits / rule.softcap)


def _softmax(logits: Tensor, rule: Rule) -> Tensor:
    if rule.sinks is None:
        return logits.softmax(-1)
    column = rule.sinks.float().view(*logits.shape[:2], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]
