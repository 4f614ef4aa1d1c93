"""Layers of many requests for an engine that tells them apart by the blocks it grants them."""

from typing import Any, NamedTuple

from torch import Tensor

from icecache.cache.layer import IceCacheLayer
from icecache.config import IceCacheConfig
from icecache.errors import IntegrityError
from icecache.ops.threads import SoloThreads

__all__ = ["Ended", "GrantedLayers", "Report", "Row", "Work"]


Packed = tuple[Tensor, Tensor, Tensor]


class Row(NamedTuple):
    """One request's new tokens in a packed batch.

    Attributes
    ----------
    block : int
        Granted to the request.
    start, stop : int
        Where the tokens are.
    num_past : int
        Tokens before them, by the engine's count.
    """

    block: int
    start: int
    stop: int
    num_past: int


class Work(NamedTuple):
    """What has been done.

    Attributes
    ----------
    sparse_steps : int
        Decode steps in which every layer selected.
    dense_steps : int
        Steps, chunks of a prompt among them, in which a layer attended to everything.
    """

    sparse_steps: int
    dense_steps: int

    @classmethod
    def total(cls, parts: "list[Work]") -> "Work":
        """Return the work of all parts."""
        return cls(sum(p.sparse_steps for p in parts), sum(p.dense_steps for p in parts))


class Ended(NamedTuple):
    """A request whose memory is free again: its length in tokens, its work, bytes freed."""

    request_id: str
    tokens: int
    work: Work
    freed_bytes: int


class Report(NamedTuple):
    """What happened since the last report, and the bytes that are held now."""

    work: Work
    ended: list[Ended]
    host_bytes: int


class _Running:
    """The layers of one request, by name, and its blocks."""

    def __init__(self, request_id: str, block_ids: list[int]) -> None:
        self.request_id, self.block_ids = request_id, block_ids
        self.layers: dict[str, IceCacheLayer] = {}

    def work(self) -> Work:
        stats = [layer.stats() for layer in self.layers.values()]
        sparse = min((each.sparse_steps for each in stats), default=0)
        return Work(sparse, max((each.dense_steps for each in stats), default=0))

    def host_bytes(self) -> int:
        return sum(layer.stats().host_bytes for layer in self.layers.values())

    def end(self) -> Ended:
        layers = self.layers.values()
        tokens = max((layer.num_tokens for layer in layers), default=0)
        ended = Ended(self.request_id, tokens, self.work(), self.host_bytes())
        for layer in layers:
            layer.reset()
        return ended


class GrantedLayers:
    """One `IceCacheLayer` for each request and attention layer, sink and window in its block.

    Parameters
    ----------
    config : IceCacheConfig
    """

    def __init__(self, config: IceCacheConfig) -> None:
        self._config = config
        self._running: dict[str, _Running] = {}
        self._by_block: dict[int, _Running] = {}
        self._executor = SoloThreads(1, "icecache") if config.overlap else None
        self._reported = Work(0, 0)
        self._ended: list[Ended] = []

    @property
    def num_running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._running)

    @property
    def host_bytes(self) -> int:
        """Bytes held outside of granted blocks."""
        return sum(running.host_bytes() for running in self._running.values())

    def begin(self, request_id: str, block_ids: list[int]) -> None:
        """Take note that blocks are a request's from now on; it starts from its first token."""
        taken = [block for block in block_ids if block in self._by_block]
        if request_id in self._running or taken:
            raise IntegrityError(f"request {request_id} was given blocks {taken} that are in use")
        running = self._running[request_id] = _Running(request_id, block_ids)
        self._by_block.update(dict.fromkeys(block_ids, running))

    def end(self, request_id: str) -> Ended | None:
        """Free a request's memory; None of one that never began here."""
        running = self._running.pop(request_id, None)
        if running is None:
            return None
        for block in running.block_ids:
            del self._by_block[block]
        ended = running.end()
        self._ended.append(ended)
        return ended

    def layer(self, block: int, name: str, memory: Tensor, num_tokens: int) -> IceCacheLayer:
        """Return a layer of the request that a block is granted to.

        Parameters
        ----------
        block : int
        name : str
            Of the attention layer.
        memory : Tensor, shape [num_kv_heads, tokens, 2 * head_dim]
            The block's, for this layer.
        num_tokens : int
            Tokens that the layer holds by the engine's count.

        Raises
        ------
        IntegrityError
            If the block is nobody's, or the layer holds another number of tokens.
        """
        running = self._by_block.get(block)
        if running is None:
            raise IntegrityError(f"block {block} is used by a request that never began")
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
                f"the engine counts {num_tokens}"
            )
        return layer

    def attend(self, row: Row, name: str, memory: Tensor, packed: Packed, **how: Any) -> Tensor:
        """Take in a request's new tokens and attend their queries.

        row, name, memory : as in `layer`; packed : query, keys and values of the batch, each
        [tokens, heads, head_dim]; how : as in `IceCacheLayer.attend`. Returns the row's part,
        [stop - start, num_q_heads, head_dim]. One token is a decode step, also a prompt's last.
        """
        layer = self.layer(row.block, name, memory, row.num_past)
        query, keys, values = (x[row.start : row.stop].transpose(0, 1)[None] for x in packed)
        if row.stop - row.start == 1:
            return layer.step(query, keys, values, **how)[0].transpose(0, 1)
        layer.append(keys, values)
        return layer.attend(query, **how)[0].transpose(0, 1)

    def report(self) -> Report:
        """Return what happened since the last report."""
        ended, self._ended = self._ended, []
        running = Work.total([each.work() for each in self._running.values()])
        done = Work.total([running, *(each.work for each in ended)])
        since = Work(*(now - before for now, before in zip(done, self._reported, strict=True)))
        self._reported = running
        return Report(since, ended, self.host_bytes)

    def close(self) -> None:
        """Free all memory and end the thread that builds trees."""
        try:
            for request_id in list(self._running):
                self.end(request_id)
        finally:
            if self._executor is not None:
                self._executor.shutdown()
