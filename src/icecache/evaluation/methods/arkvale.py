"""ArkVale: pages by position behind tightened bounding boxes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from icecache.evaluation.methods.pages import BoxPolicy, PageMethod

__all__ = ["ArkVale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArkVale(PageMethod):
    """ArkVale (NeurIPS 2024, no arXiv number): evicted pages are recalled when they matter again.

    A page of consecutive tokens is digested to a box: the middle of its keys' bounds, give or take
    the mean distance of the keys from there; it is scored by the largest logit within the box.
    Which pages a step attends does not depend on where they lie, so eviction and recall change
    nothing here. Pages have 16 tokens, as all others' here (the paper's have 32).

    Budget: sink + window + pages. Extra memory: two keys a page, beside the full cache in host
    memory.
    """

    name: ClassVar[str] = "arkvale"
    paper: ClassVar[str] = "ArkVale, NeurIPS 2024"

    def policy(self, budget: int, layer: int) -> "_Digests":
        """Return a policy over tightened boxes."""
        return _Digests(budget, self)


class _Digests(BoxPolicy):
    def box(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        center = (keys.amax(2) + keys.amin(2)) / 2
        distance = (keys - center[:, :, None]).abs().mean(2)
        return center - distance, center + distance
