"""What ``--kv-transfer-config`` tells the plugin, and what the plugin refuses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from icecache import IceCacheConfig
from icecache.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["CONNECTOR", "Settings", "check_engine", "is_selected"]

CONNECTOR = "IceCacheConnector"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one engine, from ``kv_connector_extra_config``.

    Parameters
    ----------
    cache : IceCacheConfig
        Of every managed layer.
    max_host_memory : int, optional
        Bytes that pages and index of all requests may take on one rank; by default an equal
        share of half of what the machine has free when the engine starts.

    Raises
    ------
    ConfigError
        On an unknown key or a value outside its rule.
    """

    cache: IceCacheConfig
    max_host_memory: int | None = None

    def __post_init__(self) -> None:
        limit = self.max_host_memory
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise ConfigError(f"max_host_memory must be an integer, in bytes, got {limit!r}")
        if self.cache.layer_reuse != 1:
            raise ConfigError(
                "layer_reuse must be 1: vLLM's layers select on their own, "
                f"got {self.cache.layer_reuse}"
            )

    @classmethod
    def of(cls, config: "VllmConfig") -> "Settings":
        """Read the settings of an engine that has selected the plugin."""
        extra = dict(config.kv_transfer_config.kv_connector_extra_config)
        limit = extra.pop("max_host_memory", None)
        return cls(IceCacheConfig.from_kwargs(**extra), limit)


def is_selected(config: "VllmConfig") -> bool:
    """Whether an engine asks for IceCache."""
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def check_engine(config: "VllmConfig", *, is_cpu: bool) -> None:
    """Raise `ConfigError` on an engine with anything that IceCache does not go with."""
    parallel = config.parallel_config
    refused = {
        "an accelerator": not is_cpu,
        "Model Runner V2": config.use_v2_model_runner,
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        f"kv_cache_dtype={config.cache_config.cache_dtype}": config.cache_config.cache_dtype
        != "auto",
        "--disable-hybrid-kv-cache-manager": bool(
            config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
    }
    named = [name for name, is_there in refused.items() if is_there]
    if named:
        raise ConfigError(
            f"icecache-vllm runs on vLLM's CPU backend and does not go with {', '.join(named)}; "
            f"leave that out, or start without {CONNECTOR}"
        )
