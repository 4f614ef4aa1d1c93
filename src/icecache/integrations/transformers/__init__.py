"""IceCache for transformers: `attach` a model, or pass an `IceCache` as ``past_key_values``."""

from icecache.integrations.transformers.attach import Attachment, attach
from icecache.integrations.transformers.cache import IceCache
from icecache.integrations.transformers.stats import CacheStats
from icecache.integrations.transformers.support import LayerSupport, SupportReport, supports

__all__ = [
    "Attachment",
    "CacheStats",
    "IceCache",
    "LayerSupport",
    "SupportReport",
    "attach",
    "supports",
]
