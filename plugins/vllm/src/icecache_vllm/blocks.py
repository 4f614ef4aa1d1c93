"""vLLM's side of the memory: one block a request, granted only while host memory lasts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    KVCacheConfig,
    KVCacheSpec,
    UniformTypeKVCacheSpecs,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from icecache import IceCacheConfig
from icecache.cache.granted import Granted
from icecache.errors import IntegrityError

__all__ = ["IceManager", "IceSpec", "Ledger", "ice_specs"]


class Ledger:
    """Host bytes that requests may come to hold, set aside before they run.

    Parameters
    ----------
    limit : int
        Bytes for all requests together.
    bytes_of : callable
        The bytes that a request of so many tokens holds at its end.
    """

    def __init__(self, limit: int, bytes_of: Callable[[int], int]) -> None:
        self.limit = limit
        self._bytes_of = bytes_of
        self._needed: dict[str, int] = {}
        self._held: dict[str, int] = {}

    @property
    def reserved(self) -> int:
        """Bytes that running requests have set aside."""
        return sum(self._held.values())

    def expect(self, request_id: str, num_tokens: int) -> None:
        """Take note of a request before it first asks for a block."""
        self._needed[request_id] = self._bytes_of(num_tokens)

    def fits(self, request_id: str) -> bool:
        """Whether a request may run beside those that do."""
        if request_id not in self._needed:
            raise IntegrityError(f"request {request_id} was never announced to IceCache")
        others = self.reserved - self._held.get(request_id, 0)
        return others + self._needed[request_id] <= self.limit

    def take(self, request_id: str) -> None:
        """Set a request's bytes aside."""
        self._held[request_id] = self._needed[request_id]

    def give_back(self, request_id: str) -> None:
        """Let go of what a request has set aside, if it has."""
        self._held.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._needed.pop(request_id, None)
        self.give_back(request_id)


class IceManager(CircularBufferManager):  # type: ignore[misc]
    """Gives a request its one block, or none while its pages would pass the host's limit.

    A request that gets none waits at the head of vLLM's queue, as for a block of the pool.
    """

    ledger: Ledger | None = None

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        """Return 1 before a request has its block; more than there are while it must wait."""
        needed: int = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        if needed and self.ledger is not None and not self.ledger.fits(request_id):
            return int(self.block_pool.num_gpu_blocks) + 1
        return needed

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """Grant the block, and set the request's host bytes aside with it."""
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(request_id, *args, **kwargs)
        if blocks and self.ledger is not None:
            self.ledger.take(request_id)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take the block back, at the end of a request and at its preemption."""
        if self.ledger is not None:
            self.ledger.give_back(request_id)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks


@register_kv_cache_spec(manager_class=IceManager)
@dataclass(frozen=True, kw_only=True)
class IceSpec(CircularBufferSpec):  # type: ignore[misc]
    """One block a request and layer, for sink and window; never shared as a prefix."""

    @classmethod
    def in_place_of(cls, spec: KVCacheSpec, cache: IceCacheConfig) -> "IceSpec":
        """Return the spec of a full-attention layer, a whole number of its blocks in one."""
        tokens = -(-Granted.tokens_of(cache) // spec.block_size) * spec.block_size
        dropped = ("sliding_window", "attention_chunk_size", "non_causal")
        made: IceSpec = replace_as(spec, cls, drop=dropped, block_size=tokens)
        return made

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Return the width of the block table.

        The runner looks up a slot for every position, although none is used: it must find a place.
        """
        return -(-max_len // self.block_size)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers are of this kind."""
        return all(isinstance(spec, IceSpec) for spec in kv_cache_specs.values())


def ice_specs(config: KVCacheConfig) -> dict[str, tuple[int, IceSpec]]:
    """Return the managed layers by name: the index of their group, and their spec."""
    found: dict[str, tuple[int, IceSpec]] = {}
    for index, group in enumerate(config.kv_cache_groups):
        spec = group.kv_cache_spec
        for name in group.layer_names:
            is_wrapped = isinstance(spec, UniformTypeKVCacheSpecs)
            own = spec.kv_cache_specs[name] if is_wrapped else spec
            if isinstance(own, IceSpec):
                found[name] = (index, own)
    return found
