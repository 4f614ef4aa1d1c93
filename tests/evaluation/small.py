"""Methods small enough for the contexts of tests."""

import torch

from icecache.evaluation.methods.base import Method
from icecache.evaluation.methods.icecache import IceCacheMethod, IceCachePaper, IceCacheReuse
from icecache.evaluation.methods.registry import METHODS
from tests.integrations.zoo import SMALL

__all__ = ["ICE", "IDS", "RUNNABLE", "small_method"]

IDS = torch.randint(3, 127, (60,), generator=torch.Generator().manual_seed(1)).tolist()
ICE = {key: value for key, value in SMALL.items() if key != "budget"}


def small_method(name: str) -> Method:
    """Return a method with a sink and window that a few dozen tokens pass."""
    if name == "icecache":
        return IceCacheMethod(ICE)
    if name == "icecache-r":
        return IceCacheReuse({**ICE, "layer_reuse": 2})
    if name == "icecache-paper":
        return IceCachePaper(
            {"sink": 4, "window": 8, "page_size": 8, "leaf_size": 8, "leaf_target": 6}
        )
    options = {"sink": "4", "window": "8"}
    if name in ("quest", "arkvale"):
        options["page_size"] = "8"
    return METHODS[name].from_options({} if name == "full" else options)


RUNNABLE = list(METHODS)
