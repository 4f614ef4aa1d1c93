"""Random keys with the traits of real ones: clusters, a common offset, topics that drift."""

from __future__ import annotations

import torch
from common import KVRecord
from torch import Tensor


def clustered_record(
    tokens: int,
    *,
    num_kv_heads: int = 2,
    queries_per_kv_head: int = 4,
    head_dim: int = 64,
    steps: int = 16,
    seed: int = 0,
) -> KVRecord:
    """A record of `tokens` tokens in about one cluster per 24 tokens.

    A topic keeps to a few clusters for some tens of tokens, as text does; each query looks for one
    cluster, and the query heads of a KV head for the same one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_clusters = max(4, tokens // 24)
    centres = 0.9 * normal(num_kv_heads, num_clusters, head_dim)
    meanings = normal(num_kv_heads, num_clusters, head_dim)
    topics = torch.randint(num_clusters, (tokens // 64 + 1,), generator=generator)
    drift = torch.randint(4, (tokens,), generator=generator)
    labels = (topics.repeat_interleave(64)[:tokens] + drift) % num_clusters
    offset = 3.0 * normal(num_kv_heads, 1, head_dim)
    wanted = labels[torch.randint(tokens, (steps,), generator=generator)]
    queries = centres[:, wanted, None] + 0.3 * normal(
        num_kv_heads, steps, queries_per_kv_head, head_dim
    )
    return KVRecord(
        layer=0,
        keys=centres[:, labels] + offset + 0.5 * normal(num_kv_heads, tokens, head_dim),
        values=meanings[:, labels] + normal(num_kv_heads, tokens, head_dim),
        queries=queries.transpose(0, 1).flatten(1, 2),
    )
