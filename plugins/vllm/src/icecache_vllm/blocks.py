"""vLLM's side of the memory: one block a request, granted only while host memory lasts."""

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1 import kv_cache_interface as caches
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from icecache import IceCacheConfig
from icecache.cache.granted import Granted
from icecache.store.reservations import Reservations

__all__ = ["IceManager", "IceSpec", "ice_specs"]

_DROPPED = ("sliding_window", "attention_chunk_size", "non_causal")


class IceManager(CircularBufferManager):
    """Gives a request its one block, or none while its pages would pass the host's limit.

    A request that gets none waits at the head of vLLM's queue, as for a block of the pool.
    """

    reservations: Reservations

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        """Return 1 before a request has its block; more than there are while it must wait."""
        needed: int = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        if needed and not self.reservations.fits(request_id):
            return int(self.block_pool.num_gpu_blocks) + 1
        return needed

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """Grant the block, and set the request's host bytes aside with it."""
        self.reservations.take(request_id)
        return super().allocate_new_blocks(request_id, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take the block back, at the end of a request and at its preemption."""
        self.reservations.give_back(request_id)
        return super().pop_blocks_for_free(request_id)


@register_kv_cache_spec(manager_class=IceManager)
@dataclass(frozen=True, kw_only=True)
class IceSpec(caches.CircularBufferSpec):
    """One block a request and layer, for sink and window; never shared as a prefix."""

    @classmethod
    def in_place_of(cls, spec: caches.KVCacheSpec, cache: IceCacheConfig) -> "IceSpec":
        """Return the spec of a full-attention layer, a whole number of its blocks in one."""
        tokens = -(-Granted.tokens_of(cache) // spec.block_size) * spec.block_size
        return caches.replace_as(spec, cls, drop=_DROPPED, block_size=tokens)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Return the width of the block table.

        The runner looks up a slot for every position, although none is used: it must find a place.
        """
        return -(-max_len // self.block_size)


def ice_specs(config: caches.KVCacheConfig) -> dict[str, tuple[int, IceSpec]]:
    """Return the managed layers by name: the index of their group, and their spec."""
    found: dict[str, tuple[int, IceSpec]] = {}
    for index, group in enumerate(config.kv_cache_groups):
        for name in group.layer_names:
            spec = group.kv_cache_spec
            if isinstance(spec, caches.UniformTypeKVCacheSpecs):
                spec = spec.kv_cache_specs[name]
            if isinstance(spec, IceSpec):
                found[name] = (index, spec)
    return found
