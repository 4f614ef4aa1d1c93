"""Attention of layers left to the model, against a plain softmax in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from icecache.integrations.transformers.fallback import plain_attention

BATCH, KV_HEADS, HEADS, KEYS, DIM = 2, 2, 4, 9, 8
PADDING = torch.arange(KEYS)[None] >= torch.tensor([[0], [3]])


def _truth(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    may: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
) -> Tensor:
    query, key, value = query.double(), key.double(), value.double()
    out = torch.zeros(BATCH, query.shape[2], HEADS, DIM, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(HEADS):
            group = h // (HEADS // KV_HEADS)
            logits = query[b, h] @ key[b, group].T * (scaling or DIM**-0.5)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if position_bias is not None:
                logits = logits + position_bias[b, h].double()
            logits = logits.masked_fill(~may[b], -math.inf)
            if sinks is not None:
                column = sinks[h].double().expand(logits.shape[0], 1)
                logits = torch.cat([logits, column], 1)
            out[b, :, h] = logits.softmax(1)[:, :KEYS] @ value[b, group]
    return out


@pytest.mark.parametrize("mask_kind", ["none", "padding", "full", "additive"])
@pytest.mark.parametrize("num_queries", [1, 4, KEYS])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_plain_attention(
    mask_kind: str,
    num_queries: int,
    is_causal: bool,
    softcap: float | None,
    with_sinks: bool,
    with_bias: bool,
) -> None:
    query = torch.randn(BATCH, HEADS, num_queries, DIM) * 2
    key, value = torch.randn(2, BATCH, KV_HEADS, KEYS, DIM)
    causal = torch.ones(num_queries, KEYS, dtype=torch.bool).tril(KEYS - num_queries)
    mask: Tensor | None = None
    may = (causal if is_causal else torch.ones_like(causal)).expand(BATCH, -1, -1)
    if mask_kind == "padding":
        mask = PADDING[:, None, None]
        may = may & PADDING[:, None]
    elif mask_kind != "none":
        # whoever gives a row for each query means it as it is
        may = causal & PADDING[:, None] & (torch.arange(KEYS) != 4)
        mask = may[:, None]
    if mask_kind == "additive":
        mask = torch.where(may[:, None], 0.0, torch.finfo(torch.float32).min)
    options: dict[str, Any] = {
        "scaling": 0.4,
        "softcap": softcap,
        "sinks": torch.randn(HEADS) if with_sinks else None,
        "position_bias": torch.randn(BATCH, HEADS, num_queries, KEYS) if with_bias else None,
    }
    got = plain_attention(_module(), query, key, value, mask, is_causal=is_causal, **options)
    want = _truth(query, key, value, may, **options)
    # queries that are padding themselves have no answer, but must have a number
    real = may.any(-1)
    assert torch.isfinite(got).all()
    assert (got.double() - want)[real].abs().max() < 1e-5


def _module() -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS
    return module.eval()
