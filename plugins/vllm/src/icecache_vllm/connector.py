"""The connector: nothing is transferred, but the workers learn when requests begin and end."""

import time
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from icecache.cache.granting import GrantedLayers, Report
from icecache_vllm.blocks import IceManager, ice_specs
from icecache_vllm.limits import check_groups, reservations_for
from icecache_vllm.metrics import IceMetrics, IceStats
from icecache_vllm.settings import Settings, check_engine

__all__ = ["IceCacheConnector", "Lifecycle"]

# vLLM shows only loggers below its own
logger = init_logger("vllm.icecache")

_SECONDS_BETWEEN_REPORTS = 1.0


@dataclass
class Lifecycle(base.KVConnectorMetadata):
    """What the workers must know before a step: first who has ended, then who begins."""

    ended: list[str]
    begun: dict[str, list[int]]
    reports: bool


class IceCacheConnector(base.KVConnectorBase_V1, base.SupportsHMA):
    """Two objects in one class, as vLLM wants it: the scheduler's and the worker's.

    Raises
    ------
    ConfigError
        If the engine has anything that IceCache does not go with, the host memory limit cannot
        hold one request of ``max_model_len`` tokens, or prefix caching is on for the layers that
        vLLM keeps.
    UnsupportedModel
        If no layer can be managed.
    """

    # no other engine waits for anything
    requires_kv_delivery = False

    def __init__(
        self, vllm_config: VllmConfig, role: base.KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        # accelerators never ask for our backend, which says so on a CPU
        check_engine(vllm_config)
        settings, layers = Settings.of(vllm_config), ice_specs(kv_cache_config)
        check_groups(vllm_config, kv_cache_config, layers)
        if role is base.KVConnectorRole.SCHEDULER:
            self._groups = sorted({group for group, _ in layers.values()})
            self.reservations = reservations_for(vllm_config, settings, layers)
            self._begun: dict[str, list[int]] = {}
            self._last_report = 0.0
        else:
            self.layers = GrantedLayers(settings.cache)

    def on_new_request(self, request: Request) -> None:
        """Note what a request will need."""
        most = self._vllm_config.model_config.max_model_len
        asked = most if request.resumable else request.num_prompt_tokens + request.max_tokens
        self.reservations.expect(request.request_id, min(most, asked))

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Let the managers of our groups ask for host memory."""
        super().bind_kv_cache_manager(kv_cache_manager)
        for manager in kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, IceManager):
                manager.reservations = self.reservations

    def get_num_new_matched_tokens(self, request: Request, _: int) -> tuple[int, bool]:
        """Return that nothing is loaded from elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, _: int) -> None:
        """Note the blocks of a request that begins, for the first time or after a preemption."""
        block_ids = blocks.get_block_ids()
        self._begun[request.request_id] = [block_ids[group][0] for group in self._groups]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Lifecycle:
        """Return what the workers must know before this step."""
        preempted = scheduler_output.preempted_req_ids or ()
        ended = sorted({*scheduler_output.finished_req_ids, *preempted})
        begun, self._begun = self._begun, {}
        now = time.monotonic()
        reports = bool(ended) or now - self._last_report > _SECONDS_BETWEEN_REPORTS
        self._last_report = now if reports else self._last_report
        return Lifecycle(ended, begun, reports)

    def request_finished_all_groups(self, request: Request, _: Any) -> tuple[bool, None]:
        """Forget a request that has finished or was aborted."""
        self.reservations.forget(request.request_id)
        return False, None

    def bind_connector_metadata(self, connector_metadata: Lifecycle) -> None:
        """Free what has ended and admit what begins, before the forward of this step."""
        super().bind_connector_metadata(connector_metadata)
        for request_id in connector_metadata.ended:
            self.layers.end(request_id)
        for request_id, block_ids in connector_metadata.begun.items():
            self.layers.begin(request_id, block_ids)

    def get_kv_connector_stats(self) -> IceStats | None:
        """Return this rank's report; a node's log says what its first rank did."""
        schedules = self.role is base.KVConnectorRole.SCHEDULER
        if schedules or not self._get_connector_metadata().reports:
            return None
        rank, report = get_tensor_model_parallel_rank(), self.layers.report()
        if rank % self._vllm_config.parallel_config.local_world_size == 0:
            _log_ends(report)
        return IceStats.of(report, rank)

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
        if self.role is base.KVConnectorRole.WORKER:
            self.layers.close()

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, as the next three: there is no transfer."""

    wait_for_layer_load = save_kv_layer = wait_for_save = start_load_kv


def _log_ends(report: Report) -> None:
    for request_id, tokens, work, freed in report.ended:
        steps = f"{work.sparse_steps} sparse and {work.dense_steps} dense steps"
        text = "IceCache: request %s ended with %d tokens, %s; %d host bytes freed"
        logger.info(text, request_id, tokens, steps, freed)
