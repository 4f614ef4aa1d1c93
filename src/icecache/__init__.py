"""IceCache: long-context language models on little memory.

The key-value cache lives in host memory, in pages of tokens that belong together, under an index
that grows while the model generates; a decode step attends to a few hundred tokens exactly and to
all others through summaries (after arXiv 2604.10539).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from icecache.cache.layer import IceCacheLayer
from icecache.cache.stats import LayerStats, Phase
from icecache.config import IceCacheConfig

if TYPE_CHECKING:
    from icecache.engine import Engine
    from icecache.integrations.transformers import IceCache, attach, supports

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "IceCache",
    "IceCacheConfig",
    "IceCacheLayer",
    "LayerStats",
    "Phase",
    "attach",
    "supports",
]


def __getattr__(name: str) -> Any:
    if name in ("IceCache", "attach", "supports"):
        return getattr(import_module("icecache.integrations.transformers"), name)
    if name == "Engine":
        return import_module("icecache.engine").Engine
    raise AttributeError(f"module 'icecache' has no attribute {name!r}")
