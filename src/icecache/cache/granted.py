"""Memory of another's pool in which a layer keeps its sink and window."""

from typing import NamedTuple

import torch
from torch import Tensor

from icecache.config import IceCacheConfig
from icecache.errors import InputError

__all__ = ["Granted"]


class Granted(NamedTuple):
    """A serving engine's memory for one layer of one sequence, used in place.

    Attributes
    ----------
    sink_keys, sink_values : shape [1, num_kv_heads, sink, head_dim], contiguous
    keys, values : shape [1, num_kv_heads, tokens, head_dim], contiguous. The window, and all
        tokens of a context within the budget.
    """

    sink_keys: Tensor
    sink_values: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def tokens_of(cls, config: IceCacheConfig) -> int:
        """Return the least tokens, keys and values each, of memory to `carve`."""
        return config.sink + config.most_dense_tokens + 1

    @classmethod
    def carve(cls, memory: Tensor, config: IceCacheConfig, num_kv_heads: int) -> "Granted":
        """Divide memory of one block; what the sink leaves is the window's.

        memory: shape [num_kv_heads, tokens, 2 * head_dim], contiguous, in the layer's dtype.
        """
        if memory.dim() != 3 or not memory.is_contiguous() or memory.shape[0] != num_kv_heads:
            raise InputError(
                f"granted memory must be contiguous, [{num_kv_heads}, tokens, 2 * head_dim], "
                f"got shape {list(memory.shape)} with strides {list(memory.stride())}"
            )
        _, tokens, width = memory.shape
        if tokens < cls.tokens_of(config):
            raise InputError(
                f"granted memory must hold {cls.tokens_of(config)} tokens, got {tokens}"
            )
        sizes = (config.sink, config.sink, tokens - config.sink, tokens - config.sink)
        dim = width // 2
        parts = torch.split(memory.view(-1), [num_kv_heads * size * dim for size in sizes])
        shapes = ((1, num_kv_heads, size, dim) for size in sizes)
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
