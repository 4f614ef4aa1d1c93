"""OmniKV: a few layers look at everything, the layers after them reuse what they found."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from icecache.evaluation.engine.attend import Rule, Selection
from icecache.evaluation.engine.cache import Policy
from icecache.evaluation.engine.tokens import Tokens
from icecache.evaluation.methods.base import SelectionMethod, best_tokens, fixed_positions

__all__ = ["OmniKV"]

# the paper's filter layers of a model of 32 layers
_FILTERS = (2, 8, 18)
_LAYERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniKV(SelectionMethod):
    """OmniKV (ICLR 2025, no arXiv number): the tokens that one layer needs, the next ones need too.

    Filter layers, at 2, 8 and 18 of 32 and in proportion elsewhere, score every key; the tokens
    with the largest attention, summed over all their heads, are what the layers up to the next
    filter layer attend, all heads the same. The layers before the first choose for themselves.

    Budget: sink + window + chosen tokens. In the paper the filter layers and those before them
    attend to everything, beside the budget; here they keep within it, as all layers of all methods
    do, unless `full_filters` is set. Extra memory: the full cache of the layers that score stays on
    the device, the rest in host memory.

    Parameters
    ----------
    full_filters : bool
        Let layers that score attend to everything, as the paper does; they exceed the budget then.
    """

    name: ClassVar[str] = "omnikv"
    paper: ClassVar[str] = "OmniKV, ICLR 2025"
    full_filters: bool = False

    def policies(self, budget: int, num_layers: int) -> list[Policy]:
        """Return policies that share what the filter layers found."""
        filters = {layer * num_layers // _LAYERS for layer in _FILTERS}
        first = min(filters)
        shared = _Shared()
        return [
            _Filter(budget, self, shared)
            if layer <= first or layer in filters
            else _Follower(budget, self, shared)
            for layer in range(num_layers)
        ]

    def policy(self, budget: int, layer: int) -> Policy:
        """Return a filter of its own."""
        return _Filter(budget, self, _Shared())


class _Shared:
    """The votes of the latest filter layer on the tokens from sink to window, ``[1, m]``."""

    votes: Tensor | None = None


class _Filter:
    def __init__(self, budget: int, method: OmniKV, shared: _Shared) -> None:
        self._budget, self._method, self._shared = budget, method, shared

    def start(self, tokens: Tokens) -> None:
        pass

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection | None:
        method = self._method
        shares = (tokens.logits(query).float() * rule.scaling).softmax(-1).sum((0, 1))
        self._shared.votes = shares[None, method.sink : tokens.num_tokens - method.window]
        return None if method.full_filters else _choose(self._budget, method, self._shared, tokens)


class _Follower:
    def __init__(self, budget: int, method: OmniKV, shared: _Shared) -> None:
        self._budget, self._method, self._shared = budget, method, shared

    def start(self, tokens: Tokens) -> None:
        pass

    def select(self, query: Tensor, tokens: Tokens, rule: Rule) -> Selection:
        return _choose(self._budget, self._method, self._shared, tokens)


def _choose(budget: int, method: OmniKV, shared: _Shared, tokens: Tokens) -> Selection:
    assert shared.votes is not None
    fixed = fixed_positions(tokens.num_tokens, method.sink, method.window)
    chosen = best_tokens(shared.votes, fixed, budget, method.sink)
    heads = tokens.prompt.keys.shape[0]
    return Selection(chosen.positions.expand(heads, -1))
