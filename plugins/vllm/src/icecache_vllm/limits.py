"""What an engine's layers and memory must be like, checked before it takes requests."""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from icecache.cache.estimate import estimate_bytes
from icecache.errors import ConfigError, UnsupportedModel
from icecache.store.reservations import Reservations
from icecache_vllm.blocks import IceSpec
from icecache_vllm.settings import Settings

__all__ = ["check_groups", "reservations_for"]

logger = init_logger("vllm.icecache")


def check_groups(
    config: VllmConfig, caches: KVCacheConfig, layers: dict[str, tuple[int, IceSpec]]
) -> None:
    """Raise unless IceCache has layers to manage, and vLLM shares no prefix without them."""
    if not layers:
        raise UnsupportedModel(
            "icecache-vllm: the model has no full-attention layer that IceCache could manage; "
            "start it without IceCacheConnector"
        )
    ours = {group for group, _ in layers.values()}
    if len(caches.kv_cache_groups) > len(ours) and config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "prefix caching must be off for a model with layers that IceCache does not manage: "
            "start with --no-enable-prefix-caching"
        )


def reservations_for(
    config: VllmConfig, settings: Settings, layers: dict[str, tuple[int, IceSpec]]
) -> Reservations:
    """Return the host memory of one rank; `ConfigError` if one request can be too long for it."""

    def bytes_of(tokens: int) -> int:
        # what fits in the budget stays in vLLM's blocks
        if tokens <= settings.cache.most_dense_tokens:
            return 0
        specs = (spec for _, spec in layers.values())
        sizes = ((s.num_kv_heads, tokens, s.head_size, s.dtype.itemsize) for s in specs)
        return sum(estimate_bytes(settings.cache, *size) for size in sizes)

    parallel, longest = config.parallel_config, config.model_config.max_model_len
    sharers = parallel.local_world_size * parallel.data_parallel_size_local
    made = Reservations(settings.max_host_memory, bytes_of, longest, sharers)
    logger.info(
        "IceCache: %d layers, budget %d; %d host bytes a rank, a request of %d tokens takes %d",
        *(len(layers), settings.cache.budget, made.limit, longest, bytes_of(longest)),
    )
    return made
