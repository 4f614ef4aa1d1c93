"""StreamingLLM: attention sinks and the latest tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from icecache.evaluation.engine.attend import Rule, Selection
from icecache.evaluation.engine.tokens import Tokens
from icecache.evaluation.methods.base import SelectionMethod, fixed_positions

__all__ = ["Streaming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming(SelectionMethod):
    """StreamingLLM (arXiv 2309.17453): the first `sink` tokens and the latest ones, nothing else.

    Keys keep the positions they were computed at; the paper renumbers them within the cache, which
    matters beyond the model's trained length only. `window` has no meaning here: all that the sink
    leaves of the budget is window.

    Budget: sink + latest tokens. Extra memory: none; the rest of the context is gone.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"

    def policy(self, budget: int, layer: int) -> "_Latest":
        """Return a policy of sink and latest tokens."""
        return _Latest(budget, self.sink)


class _Latest:
    def __init__(self, budget: int, sink: int) -> None:
        self._budget, self._sink = budget, sink

    def start(self, tokens: Tokens) -> None:
        pass

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection:
        kept = fixed_positions(tokens.num_tokens, self._sink, self._budget - self._sink)
        return Selection(kept.expand(query.shape[0], -1))
