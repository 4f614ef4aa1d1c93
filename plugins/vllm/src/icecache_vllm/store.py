"""The worker's side: the layers of every request that runs here."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.errors import IntegrityError

__all__ = ["Ended", "RequestStore", "Work"]


class Work(NamedTuple):
    """What a request, or all of them, has done: decode steps in which every layer was sparse, and
    steps, chunks of the prompt among them, that attended to everything."""

    sparse_steps: int
    dense_steps: int

    @classmethod
    def of(cls, layers: "list[IceCacheLayer]") -> "Work":
        """Return the work of a request's layers."""
        stats = [layer.stats() for layer in layers]
        sparse = min((each.sparse_steps for each in stats), default=0)
        return cls(sparse, max((each.dense_steps for each in stats), default=0))


class Ended(NamedTuple):
    """A request whose memory is free again."""

    request_id: str
    tokens: int
    work: Work
    freed_bytes: int


class _Running:
    """The layers of one request, by name, and the blocks that vLLM granted it."""

    def __init__(self, request_id: str, block_ids: list[int]) -> None:
        self.request_id, self.block_ids = request_id, block_ids
        self.layers: dict[str, IceCacheLayer] = {}

    def work(self) -> Work:
        return Work.of(list(self.layers.values()))

    def host_bytes(self) -> int:
        return sum(layer.stats().host_bytes for layer in self.layers.values())


class RequestStore:
    """One `IceCacheLayer` for each request and managed layer of this rank.

    Parameters
    ----------
    config : IceCacheConfig
    """

    def __init__(self, config: IceCacheConfig) -> None:
        self._config = config
        self._running: dict[str, _Running] = {}
        self._by_block: dict[int, _Running] = {}
        self._executor = ThreadPoolExecutor(1) if config.overlap else None

    def admit(self, request_id: str, block_ids: list[int]) -> None:
        """Take note that blocks are a request's from now on; it starts from its first token."""
        taken = [block for block in block_ids if block in self._by_block]
        if request_id in self._running or taken:
            raise IntegrityError(f"request {request_id} was given blocks {taken} that are in use")
        running = self._running[request_id] = _Running(request_id, block_ids)
        self._by_block.update(dict.fromkeys(block_ids, running))

    def drop(self, request_id: str) -> Ended | None:
        """Free a request's memory; None of one that never ran here."""
        running = self._running.pop(request_id, None)
        if running is None:
            return None
        for block in running.block_ids:
            del self._by_block[block]
        layers = running.layers.values()
        tokens = max((layer.num_tokens for layer in layers), default=0)
        ended = Ended(request_id, tokens, running.work(), running.host_bytes())
        for layer in layers:
            layer.reset()
        return ended

    def layer(self, block: int, name: str, memory: Tensor, num_tokens: int) -> IceCacheLayer:
        """Return the layer of the request that a block is granted to.

        block : int
        name : str
            Of the attention layer.
        memory : Tensor, shape [num_kv_heads, tokens, 2 * head_dim]
            The block's, of this layer.
        num_tokens : int
            How many tokens vLLM says it holds; `IntegrityError` if that is not so.
        """
        running = self._by_block.get(block)
        if running is None:
            raise IntegrityError(f"block {block} is used by a request that was never admitted")
        layer = running.layers.get(name)
        if layer is None:
            heads, _, width = memory.shape
            layer = running.layers[name] = IceCacheLayer(
                self._config,
                num_kv_heads=heads,
                head_dim=width // 2,
                dtype=memory.dtype,
                executor=self._executor,
            )
            layer.use_granted(memory)
        if layer.num_tokens != num_tokens:
            raise IntegrityError(
                f"request {running.request_id} holds {layer.num_tokens} tokens in {name}, "
                f"vLLM counts {num_tokens}"
            )
        return layer

    def work(self) -> Work:
        """Return what the running requests have done, together."""
        done = [running.work() for running in self._running.values()]
        return Work(sum(w.sparse_steps for w in done), sum(w.dense_steps for w in done))

    def host_bytes(self) -> int:
        """Return the bytes held outside of vLLM's blocks."""
        return sum(running.host_bytes() for running in self._running.values())

    def close(self) -> None:
        """Free all memory and end the thread that builds trees."""
        for request_id in list(self._running):
            self.drop(request_id)
        if self._executor is not None:
            self._executor.shutdown()
