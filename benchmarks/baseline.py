"""The yardsticks, in plain PyTorch and independent of the package: full attention and exact top-k.

Shapes, here and in the other benchmarks: queries `[steps, num_q_heads, head_dim]`, keys and values
`[num_kv_heads, tokens, head_dim]`, outputs like the queries. Query head `h` reads KV head
`h // (num_q_heads // num_kv_heads)`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_logits(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Scaled logits, `[num_kv_heads, queries_per_kv_head, steps, tokens]`."""
    steps, num_q_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[0]
    grouped = queries.view(steps, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    return torch.einsum("sgrd,gtd->grst", grouped, keys) * scaling


def weigh_values(logits: Tensor, values: Tensor) -> Tensor:
    """Softmax over the tokens, then the weighted values: `[steps, num_q_heads, head_dim]`."""
    out = torch.einsum("grst,gtd->sgrd", logits.softmax(-1), values)
    return out.flatten(1, 2)


def full_attention(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention over every token."""
    return weigh_values(attention_logits(queries, keys, scaling), values)


def topk_mask(logits: Tensor, budget: int, sink: int, window: int) -> Tensor:
    """Which tokens exact top-k attends: bool `[num_kv_heads, steps, tokens]`.

    The query heads of a KV head vote by the sum of their softmax shares over the whole context; the
    `budget - sink - window` best tokens join the first `sink` and the last `window`.
    """
    tokens = logits.shape[-1]
    if tokens <= budget:
        return torch.ones_like(logits[:, 0], dtype=torch.bool)
    votes = logits.softmax(-1).sum(1)  # [G, S, T]
    kept = torch.zeros(tokens, dtype=torch.bool, device=logits.device)
    kept[:sink] = True
    kept[tokens - window :] = True
    votes = votes.masked_fill(kept, -1.0)
    best = votes.topk(budget - sink - window, dim=-1).indices
    return kept.expand(votes.shape).clone().scatter_(-1, best, True)


def topk_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    *,
    budget: int,
    sink: int,
    window: int,
) -> Tensor:
    """Exact attention over the tokens of `topk_mask`; the others are dropped."""
    logits = attention_logits(queries, keys, scaling)
    mask = topk_mask(logits, budget, sink, window)
    return weigh_values(logits.masked_fill(~mask[:, None], float("-inf")), values)


def relative_errors(output: Tensor, truth: Tensor) -> Tensor:
    """|output - truth| / |truth| per step and query head: `[steps, num_q_heads]`, float64."""
    truth = truth.double()
    return (output.double() - truth).norm(dim=-1) / truth.norm(dim=-1)
