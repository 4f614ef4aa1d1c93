"""What ``--kv-transfer-config`` tells the plugin, and what the plugin refuses."""

from typing import NamedTuple

from vllm.config import VllmConfig

from icecache import IceCacheConfig
from icecache.errors import ConfigError

__all__ = ["CONNECTOR", "Settings", "check_engine", "is_selected"]

CONNECTOR = "IceCacheConnector"


class Settings(NamedTuple):
    """Settings of one engine.

    Attributes
    ----------
    cache : IceCacheConfig
        Of every managed layer.
    max_host_memory : int, optional
        Bytes that pages and index of all requests may take on one rank; by default an equal
        share of half of what the machine has free when the engine starts.
    """

    cache: IceCacheConfig
    max_host_memory: int | None = None

    @classmethod
    def of(cls, config: VllmConfig) -> "Settings":
        """Read ``kv_connector_extra_config``; `ConfigError` on an unknown key or a bad value."""
        extra = dict(config.kv_transfer_config.kv_connector_extra_config)
        limit, cache = extra.pop("max_host_memory", None), IceCacheConfig.from_kwargs(**extra)
        if cache.layer_reuse != 1:
            raise ConfigError(f"layer_reuse must be 1 inside vLLM, got {cache.layer_reuse}")
        return cls(cache, limit)


def is_selected(config: VllmConfig) -> bool:
    """Whether an engine asks for IceCache."""
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def check_engine(config: VllmConfig) -> None:
    """Raise `ConfigError` on an engine with anything that IceCache does not go with."""
    from vllm.platforms import current_platform

    parallel, dtype = config.parallel_config, config.cache_config.cache_dtype
    has_no_groups = config.scheduler_config.disable_hybrid_kv_cache_manager
    refused = {
        "an accelerator": not current_platform.is_cpu(),
        "Model Runner V2": config.use_v2_model_runner,
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        f"--kv-cache-dtype {dtype}": dtype != "auto",
        "--disable-hybrid-kv-cache-manager": bool(has_no_groups),
    }
    named = [name for name, is_there in refused.items() if is_there]
    if named:
        raise ConfigError(
            f"icecache-vllm runs on vLLM's CPU backend and does not go with {', '.join(named)}; "
            f"leave that out, or start without {CONNECTOR}"
        )
