"""One attention layer's cache: `IceCacheLayer`."""
