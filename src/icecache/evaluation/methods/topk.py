"""Exact top-k: the truly heaviest tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from icecache.evaluation.engine.attend import Rule
from icecache.evaluation.engine.tokens import Tokens
from icecache.evaluation.methods.base import SelectionMethod, TokenScores

__all__ = ["TopK"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(SelectionMethod):
    """Exact top-k tokens: the best that dropping tokens can do, at the price of reading every key.

    The query heads of a KV head vote by the sum of their softmax shares; the best voted tokens join
    sink and window. The ceiling of the comparison in arXiv 2604.10539.

    Budget: sink + window + chosen tokens. Extra memory: the full cache stays where it is scored.
    """

    name: ClassVar[str] = "topk"
    paper: ClassVar[str] = "exact top-k, the ceiling in arXiv 2604.10539"

    def policy(self, budget: int, layer: int) -> "_Exact":
        """Return a policy that scores every key."""
        return _Exact(budget, self.sink, self.window)


class _Exact(TokenScores):
    def start(self, tokens: Tokens) -> None:
        pass

    def estimate(self, query: Tensor, tokens: Tokens, rule: Rule) -> Tensor:
        middle = slice(self.sink, tokens.num_tokens - self.window)
        return tokens.logits(query)[..., middle] * rule.scaling
