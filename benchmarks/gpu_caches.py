"""The caches that `gpu.py` compares, each with how a decode step of it is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_model import Context
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from icecache import IceCacheConfig
from icecache.integrations.transformers import IceCache, attach
from icecache.integrations.transformers.graph import CudaRecorder, GraphStep
from icecache.integrations.transformers.layer import ManagedLayer

__all__ = ["CACHES", "Player", "make_player"]

_SPARE = 256


class Player:
    """A cache that takes contexts in and decodes token by token.

    Parameters
    ----------
    model : PreTrainedModel
    capacity : int
        Tokens of the context.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.position = 0
        self.cache = self._make()

    def _make(self) -> Any:
        return DynamicCache(config=self.model.config)

    def take(self, layer: int, context: Context) -> None:
        """Take in one layer's keys and values as if they were a prompt's."""
        self.cache.update(*context, layer)
        self.position = context.keys.shape[2]

    def prefill(self, token_ids: Tensor) -> Tensor:
        """Run a prompt through the model; the last token's logits."""
        self.position = token_ids.shape[1]
        output = self.model(token_ids, past_key_values=self.cache, logits_to_keep=1)
        return output.logits[:, -1]

    def step(self, token_ids: Tensor) -> Tensor:
        """Decode one token, `[1, 1]`; the next one's logits."""
        positions = torch.full_like(token_ids, self.position)
        self.position += 1
        return self._forward(token_ids, positions)[:, -1]

    def _forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": token_ids, "position_ids": positions}
        return self.model(**inputs, past_key_values=self.cache).logits

    def held_bytes(self) -> tuple[int, int]:
        """Bytes of the cache on the device and on the host."""
        tensors = [getattr(x, part, None) for x in self.cache.layers for part in ("keys", "values")]
        held = [x for x in tensors if isinstance(x, Tensor)]
        host = sum(x.nbytes for x in held if x.device.type == "cpu")
        return sum(x.nbytes for x in held) - host, host

    def read_bytes(self) -> int:
        """Bytes of the cache that a step has to read from the device's memory."""
        return sum(self.held_bytes())

    def fetched_bytes(self) -> float:
        """Bytes that came from host memory so far."""
        return 0.0

    def graph_steps(self) -> int | None:
        """Steps that ran from a recorded graph so far; None where none is meant to."""
        return None

    def close(self) -> None:
        """Let the memory go."""
        self.cache = None


class Offloaded(Player):
    """transformers' own offloading: every layer's whole cache travels in every step."""

    def _make(self) -> Any:
        return DynamicCache(config=self.model.config, offloading=True)

    def fetched_bytes(self) -> float:
        """All of it, each time; the steps are counted by who asks."""
        return float(sum(self.held_bytes()))


class Static(Player):
    """A cache of fixed size, whose step is compiled where there is CUDA."""

    def _make(self) -> Any:
        return StaticCache(config=self.model.config, max_cache_len=self.capacity + _SPARE)

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        super().__init__(model, capacity)
        self._call: Callable[..., Any] = model
        if model.device.type == "cuda":
            self._call = torch.compile(model.__call__, mode="reduce-overhead", dynamic=False)

    def _forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": token_ids, "position_ids": positions}
        return self._call(**inputs, past_key_values=self.cache).logits.clone()


class Ice(Player):
    """IceCache on the device path; recorded as one CUDA graph where there is CUDA."""

    def __init__(
        self, model: PreTrainedModel, capacity: int, settings: dict[str, Any], compile: bool = False
    ) -> None:
        self._settings = IceCacheConfig.from_kwargs(max_context=capacity + _SPARE, **settings)
        super().__init__(model, capacity)
        self._attached = attach(model, self._settings, graph=False)
        self._step: Callable[..., Any] = model
        if model.device.type == "cuda":
            self._step = GraphStep(model, CudaRecorder(), compile)

    def _make(self) -> Any:
        return IceCache(self.model, self._settings)

    def take(self, layer: int, context: Context) -> None:
        """Take in one layer's keys and values; its tree is built at once."""
        managed: ManagedLayer = self.cache.layers[layer]
        managed.lazy_initialization(*context)
        managed.core.prefill(*context)
        managed.core.settle()
        managed.num_columns = self.position = context.keys.shape[2]

    def _forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": token_ids, "position_ids": positions}
        return self._step(**inputs, past_key_values=self.cache).logits

    def held_bytes(self) -> tuple[int, int]:
        """Bytes of summaries, pages and window on the device, and of pages on the host."""
        stats = self.cache.stats()
        return stats.device_bytes, stats.host_bytes

    def read_bytes(self) -> int:
        """Summaries of all leaves, and keys and values of the budget."""
        config, layers = self.model.config, self.cache.stats().layers.values()
        token = 2 * config.num_key_value_heads * config.head_dim * self.model.dtype.itemsize
        leaf = 2 * config.head_dim + 28
        return sum(leaf * s.leaves + token * self._settings.budget for s in layers)

    def fetched_bytes(self) -> float:
        """Bytes of the pages that steps brought from host memory."""
        size = 1 if self._settings.page_dtype == "int8" else self.model.dtype.itemsize
        page = 2 * self._settings.page_size * self.model.config.head_dim * size
        return float(page * sum(s.pages_fetched for s in self.cache.stats().layers.values()))

    def graph_steps(self) -> int | None:
        """Steps that were replayed; None without CUDA."""
        return self._step.steps if isinstance(self._step, GraphStep) else None

    def close(self) -> None:
        """Detach, and free all memory."""
        self._attached.detach()
        self.cache.close()


CACHES = ("icecache:host", "icecache:none", "icecache:int8", "dynamic", "offloaded", "static")


def make_player(
    name: str, model: PreTrainedModel, capacity: int, settings: dict[str, Any]
) -> Player:
    """The player of a name of `CACHES`; `icecache:host:compiled` compiles what it records."""
    if name.startswith("icecache"):
        _, where, *how = name.split(":")
        own = {"offload": "host", "page_dtype": "int8"} if where == "int8" else {"offload": where}
        return Ice(model, capacity, {**settings, **own}, compile="compiled" in how)
    return {"dynamic": Player, "offloaded": Offloaded, "static": Static}[name](model, capacity)
