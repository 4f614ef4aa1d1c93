"""The connector: nothing is transferred, but the workers learn when requests begin and end."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger

from icecache.cache.estimate import estimate_bytes
from icecache.errors import ConfigError, UnsupportedModel
from icecache.store.memory import available_host_bytes
from icecache_vllm.blocks import IceManager, IceSpec, Ledger, ice_specs
from icecache_vllm.metrics import IceMetrics, IceStats
from icecache_vllm.settings import Settings
from icecache_vllm.store import Ended, RequestStore, Work

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["IceCacheConnector", "Lifecycle"]

# vLLM shows only loggers below its own
logger = init_logger("vllm.icecache")

_SHARE_OF_FREE = 0.5
_SECONDS_BETWEEN_REPORTS = 1.0


@dataclass
class Lifecycle(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers must know before a step: first who has ended, then who begins."""

    ended: list[str]
    admitted: dict[str, list[int]]
    reports: bool


class IceCacheConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Two objects in one class, as vLLM wants it: the scheduler's and the worker's.

    Raises
    ------
    ConfigError
        If the host memory limit cannot hold one request of ``max_model_len`` tokens, or prefix
        caching is on for the layers that vLLM keeps.
    UnsupportedModel
        If no layer can be managed.
    """

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = Settings.of(vllm_config)
        layers = ice_specs(kv_cache_config)
        _check_groups(vllm_config, kv_cache_config, layers)
        if role is KVConnectorRole.SCHEDULER:
            self._groups = sorted({group for group, _ in layers.values()})
            self._ledger = _ledger(vllm_config, self._settings, [s for _, s in layers.values()])
            self._admitted: dict[str, list[int]] = {}
            self._last_report = 0.0
        else:
            self.store = RequestStore(self._settings.cache)
            self._ended: list[Ended] = []
            self._counted = Work(0, 0)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: no other engine waits for anything."""
        return False

    def on_new_request(self, request: "Request") -> None:
        """Note what a request will need."""
        most = self._vllm_config.model_config.max_model_len
        asked = most if request.resumable else request.num_prompt_tokens + request.max_tokens
        self._ledger.expect(request.request_id, min(most, asked))

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        """Let the managers of our groups ask for host memory."""
        super().bind_kv_cache_manager(kv_cache_manager)
        for manager in kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, IceManager):
                manager.ledger = self._ledger

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Return that nothing is loaded from elsewhere."""
        return 0, False

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        """Note the blocks of a request that begins, for the first time or after a preemption."""
        block_ids = blocks.get_block_ids()
        self._admitted[request.request_id] = [block_ids[group][0] for group in self._groups]

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Lifecycle:
        """Return what the workers must know before this step."""
        preempted = scheduler_output.preempted_req_ids or ()
        ended = sorted({*scheduler_output.finished_req_ids, *preempted})
        admitted, self._admitted = self._admitted, {}
        now = time.monotonic()
        reports = bool(ended) or now - self._last_report > _SECONDS_BETWEEN_REPORTS
        if reports:
            self._last_report = now
        return Lifecycle(ended, admitted, reports)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request that has finished or was aborted."""
        self._ledger.forget(request.request_id)
        return False, None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Free what has ended and admit what begins, before the forward of this step."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Lifecycle)
        for request_id in connector_metadata.ended:
            ended = self.store.drop(request_id)
            if ended is not None:
                self._ended.append(ended)
                self._log(ended)
        for request_id, block_ids in connector_metadata.admitted.items():
            self.store.admit(request_id, block_ids)

    def get_kv_connector_stats(self) -> IceStats | None:
        """Return this rank's report; the steps are rank 0's, for they are the same on all."""
        if self.role is KVConnectorRole.SCHEDULER:
            return None
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Lifecycle)
        if not metadata.reports:
            return None
        rank = get_tensor_model_parallel_rank()
        stats = IceStats()
        stats.data["host_bytes"] = {str(rank): self.store.host_bytes()}
        ended, self._ended = self._ended, []
        if rank == 0:
            running = self.store.work()
            done = [sum(w) for w in zip(running, *(each.work for each in ended))]
            stats.data["sparse_steps"] = done[0] - self._counted.sparse_steps
            stats.data["dense_steps"] = done[1] - self._counted.dense_steps
            stats.data["requests"] = [each.work.sparse_steps for each in ended]
            self._counted = running
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> IceStats:
        """Return a report from what was sent."""
        return IceStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> IceMetrics:
        """Return the plugin's part of ``/metrics``."""
        return IceMetrics(*args, **kwargs)

    def shutdown(self) -> None:
        """Free everything."""
        if self.role is KVConnectorRole.WORKER:
            self.store.close()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing."""

    def wait_for_save(self) -> None:
        """Do nothing."""

    def _log(self, ended: Ended) -> None:
        if get_tensor_model_parallel_rank() == 0:
            logger.info(
                "IceCache: request %s ended with %d tokens, %d sparse and %d dense steps; "
                "%d host bytes freed",
                ended.request_id,
                ended.tokens,
                ended.work.sparse_steps,
                ended.work.dense_steps,
                ended.freed_bytes,
            )


def _check_groups(
    config: "VllmConfig", kv_cache_config: "KVCacheConfig", layers: dict[str, tuple[int, IceSpec]]
) -> None:
    if not layers:
        raise UnsupportedModel(
            "icecache-vllm: the model has no full-attention layer that IceCache could manage; "
            "start it without IceCacheConnector"
        )
    groups = {group for group, _ in layers.values()}
    others = len(kv_cache_config.kv_cache_groups) > len(groups)
    if others and config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "prefix caching must be off for a model with layers that IceCache does not manage: "
            "start with --no-enable-prefix-caching"
        )


def _ledger(config: "VllmConfig", settings: Settings, specs: list[IceSpec]) -> Ledger:
    def bytes_of(tokens: int) -> int:
        # what fits in the budget stays in vLLM's blocks
        if tokens <= settings.cache.most_dense_tokens:
            return 0
        sizes = ((s.num_kv_heads, tokens, s.head_size, s.dtype.itemsize) for s in specs)
        return sum(estimate_bytes(settings.cache, *size) for size in sizes)

    parallel = config.parallel_config
    limit = settings.max_host_memory
    if limit is None:
        sharers = parallel.tensor_parallel_size * parallel.data_parallel_size_local
        limit = int(_SHARE_OF_FREE * (available_host_bytes() or 1 << 62) / sharers)
    longest = config.model_config.max_model_len
    if bytes_of(longest) > limit:
        raise ConfigError(
            f"max_host_memory must be at least {bytes_of(longest):,}, the bytes that request of "
            f"--max-model-len {longest} takes on a rank, got {limit:,}; raise it or lower the other"
        )
    logger.info(
        "IceCache: %d layers, budget %d; %d host bytes a rank, of which a request of %d tokens "
        "takes %d",
        len(specs),
        settings.cache.budget,
        limit,
        longest,
        bytes_of(longest),
    )
    return Ledger(limit, bytes_of)
