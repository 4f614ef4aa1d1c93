"""Quest: pages by position behind the bounds of their keys."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from icecache.evaluation.methods.pages import BoxPolicy, PageMethod

__all__ = ["Quest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(PageMethod):
    """Quest (arXiv 2406.10774): pages of consecutive tokens, scored by an upper bound.

    A page knows the smallest and the largest value of each key channel; its score is the largest
    logit that a key within those bounds could have. Here the heads of a KV head vote and no layer
    is dense (in the paper heads choose alone and the first two layers attend to everything).

    Budget: sink + window + pages. Extra memory: two keys a page (1/16 of the cache at the default
    `page_size`), beside the full cache.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest, arXiv 2406.10774"

    def policy(self, budget: int, layer: int) -> "_Bounds":
        """Return a policy over bounds."""
        return _Bounds(budget, self)


class _Bounds(BoxPolicy):
    def box(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        return keys.amin(2), keys.amax(2)
