"""Exact attention for what IceCache leaves to the model: sliding layers, forwards without a cache.

transformers' sdpa refuses softcap and drops learned sink logits without a word, so layers that
carry either take the explicit path below.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["plain_attention"]


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool = True,
) -> torch.Tensor:
    """Return the attention output, shape ``[batch, q_tokens, num_q_heads, value_dim]``.

    Query, key and value have shape ``[batch, heads, tokens, head_dim]``; the queries are the last
    tokens of the keys. A mask is bool (True attends) or additive, ``[batch, 1, q_tokens, tokens]``;
    with one row for several queries it is a padding mask and causality is added here.
    """
    mask = _complete(mask, query.shape[2], key.shape[2], is_causal, query.device)
    if softcap is None and sinks is None:
        # with a past there is a mask by now, which switches sdpa's upper-left is_causal off
        attended: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
        )
        return attended[0]
    if mask is None and is_causal:
        mask = _causal(query.shape[2], key.shape[2], query.device)
    logits = _logits(query, key, scaling, softcap)
    if position_bias is not None:
        logits = logits + position_bias
    if mask is not None:
        logits = _masked(logits, mask)
    weights = _softmax(logits, sinks)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    groups = query.shape[1] // value.shape[1]
    output = weights.to(value.dtype) @ value.repeat_interleave(groups, dim=1)
    return output.transpose(1, 2).contiguous()


def _complete(
    mask: torch.Tensor | None,
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    device: torch.device,
) -> torch.Tensor | None:
    if not is_causal or num_queries == 1:
        return mask
    if mask is None:
        return None if num_queries == num_keys else _causal(num_queries, num_keys, device)
    if mask.shape[2] == 1 and mask.dtype == torch.bool:
        return mask & _causal(num_queries, num_keys, device)
    return mask


def _causal(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    ones = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)


def _logits(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None, softcap: float | None
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (query @ key.repeat_interleave(groups, dim=1).transpose(2, 3)).float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _masked(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        # finite, so that a row of padding without any key stays finite too
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask


def _softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is None:
        return logits.softmax(dim=-1)
    column = sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]
