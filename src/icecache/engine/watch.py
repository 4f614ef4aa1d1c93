"""How much of the attention a request's steps capture."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from icecache.cache.layer import IceCacheLayer
from icecache.cache.stats import Phase

__all__ = ["Watch"]

_SMOOTHING = 0.1


class Watch:
    """Looks at one layer a step, in turn: to look at all would slow the request down.

    Attributes
    ----------
    mass : float, optional
        Share of the attention that falls on what is attended exactly, by the estimate of the
        summaries; a running mean over layers and steps.
    turn : int
        The layer whose turn it is.
    """

    def __init__(self) -> None:
        self.mass: float | None = None
        self.turn = 0

    def look(
        self, index: int, layers: Sequence[IceCacheLayer], query: Tensor, settings: dict[str, Any]
    ) -> None:
        """Take note of a layer's step, if it is its turn; query: shape [1, heads, 1, dim]."""
        if index != self.turn:
            return
        self.turn = (index + 1) % len(layers)
        layer = layers[index]
        seen = 1.0
        if layer.phase is Phase.INDEXED:
            step = layer.inspect(query, **settings)
            missed = step.share.masked_fill(step.chosen[:, None], 0.0).sum(-1)
            seen = 1.0 - float(missed.mean())
        self.mass = seen if self.mass is None else self.mass + _SMOOTHING * (seen - self.mass)
