"""What tokens will take, before they are taken in."""

import torch

from icecache.cache.check import Expected
from icecache.config import IceCacheConfig
from icecache.store.memory import check_host_limit, check_host_memory
from icecache.tree.tree import estimate_bytes_per_token

__all__ = ["ask_for_memory", "estimate_bytes", "transient_bytes"]


def estimate_bytes(config: IceCacheConfig, rows: int, tokens: int, dim: int, size: int) -> int:
    """Return the host bytes of tokens, pages and index.

    rows: batch x KV heads; tokens: of each; dim: head_dim; size: bytes of one number.
    """
    kv = 2 * dim * size + 4
    return int(rows * tokens * (1.1 * kv + estimate_bytes_per_token(config, dim)))


def transient_bytes(rows: int, tokens: int, dim: int, dtype: torch.dtype) -> int:
    """Return the bytes that are needed beside the pages while they are filled.

    The tail and a flat copy in the model's dtype, some 32 bytes of numbers a token, and one row's
    keys in float32.
    """
    return rows * tokens * (2 * 2 * dim * dtype.itemsize + 32) + 4 * dim * tokens


def ask_for_memory(
    config: IceCacheConfig, expected: Expected, batch: int, tokens: int, held: int
) -> None:
    """Raise `HostMemoryExceeded` unless a layer that holds so many bytes may take in tokens."""
    rows, dim, dtype = batch * expected.num_kv_heads, expected.head_dim, expected.dtype
    needed = estimate_bytes(config, rows, tokens, dim, dtype.itemsize)
    check_host_limit(needed, held, config.max_host_memory)
    # only calls of some size ask the system: the question itself takes time
    if tokens > config.draft:
        check_host_memory(needed + transient_bytes(rows, tokens, dim, dtype))
