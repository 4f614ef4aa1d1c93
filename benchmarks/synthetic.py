"""Random keys with the traits of real ones, from a thousand tokens to a million.

Clusters in families, topics that drift, a common offset, few directions that carry most of the
variance, and queries that grow sharper with the logarithm of the context. Recorded layers of two
models (heads of 64) have 0.25 to 0.60 of their variance in 8 directions, logits of standard
deviation 2.5 to 4.7, and 0.75 to 0.99 of the attention in 256 tokens, sink and window included, at
4k as at 14k. That a million tokens leave it there is an assumption: queries of one sharpness would
find 0.4. These keys lack what sink and window have in recordings, 0.1 to 0.9 of the attention.
"""

from __future__ import annotations

import math

import torch
from common import KVRecord
from torch import Tensor

_FAMILY = 32
_DECAY = 0.4
_SHARPNESS = 1.92


def clustered_record(
    tokens: int,
    *,
    num_kv_heads: int = 2,
    queries_per_kv_head: int = 4,
    head_dim: int = 64,
    steps: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> KVRecord:
    """A record of `tokens` tokens in about one cluster per 24 tokens; keys and values in `dtype`.

    A topic keeps to a few clusters of one family for some tens of tokens, as text does; each query
    looks for one cluster, and the query heads of a KV head for the same one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_clusters = max(4, tokens // 24)
    topics = torch.randint(num_clusters, (tokens // 64 + 1,), generator=generator)
    drift = torch.randint(4, (tokens,), generator=generator)
    labels = (topics.repeat_interleave(64)[:tokens] + drift) % num_clusters
    wanted = labels[torch.randint(tokens, (steps,), generator=generator)]
    scale = _direction_scales(head_dim)
    # the logit that a query gives its own cluster is the same for every size of head
    sharpness = _SHARPNESS * math.log(tokens) / math.sqrt(head_dim)
    families = normal(num_kv_heads, -(-num_clusters // _FAMILY), head_dim)
    family = torch.arange(num_clusters) // _FAMILY
    # a head's keys in one go would take four times the record's memory on the way
    shape = (num_kv_heads, tokens, head_dim)
    keys, values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    noise, queries = torch.empty(shape[1:]), []
    for head in range(num_kv_heads):
        centres = 0.64 * scale * (families[head, family] + normal(num_clusters, head_dim))
        meanings = normal(num_clusters, head_dim)
        noise.normal_(generator=generator).mul_(0.5 * scale).add_(3.0 * normal(head_dim))
        keys[head] = noise.add_(centres[labels])
        noise.normal_(generator=generator)
        values[head] = noise.add_(meanings[labels])
        aside = 0.3 * scale * normal(steps, queries_per_kv_head, head_dim)
        queries.append(sharpness * (centres[wanted, None] + aside))
    return KVRecord(layer=0, keys=keys, values=values, queries=torch.cat(queries, 1))


def _direction_scales(head_dim: int) -> Tensor:
    """Standard deviations of the directions, a falling power, their mean square 1."""
    scale = torch.arange(1, head_dim + 1).float() ** -_DECAY
    return scale / scale.square().mean().sqrt()
