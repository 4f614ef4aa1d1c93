"""One decode step of several caches that hold the same prompt, as one batch of the model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from icecache.evaluation.engine.attention import Call, Probe, attend, hang

__all__ = ["step_rows"]


def step_rows(
    model: PreTrainedModel,
    caches: Sequence[Cache],
    tokens: Sequence[int],
    probes: Sequence[Probe | None],
) -> Tensor:
    """Feed each cache its next token; returns logits ``[caches, vocabulary]``, float32.

    The caches are rows of one batch, so that a step reads the model's weights once for all of them,
    and hold equally many tokens. Recurrent states are no cache's own to hand over: models that have
    them take one cache after the other.
    """
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in caches[0].layers):
        alone = [
            _forward(model, _Rows([cache], [probe]), [token])
            for cache, token, probe in zip(caches, tokens, probes, strict=True)
        ]
        return torch.cat(alone)
    return _forward(model, _Rows(caches, probes), tokens)


def _forward(model: PreTrainedModel, rows: "_Rows", tokens: Sequence[int]) -> Tensor:
    output = model(
        input_ids=torch.tensor(tokens, device=model.device)[:, None],
        past_key_values=rows,
        use_cache=True,
    )
    logits: Tensor = output.logits[:, -1].float()
    return logits


class _Rows(Cache):
    """Caches of one request each as a cache of a batch; lengths are asked of the first."""

    def __init__(self, caches: Sequence[Cache], probes: Sequence[Probe | None]) -> None:
        super().__init__(layers=caches[0].layers)
        self._caches, self._probes = caches, probes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand each row to its cache; what they return waits for the attention function."""
        held = [
            cache.update(keys, values, layer_idx, *args, **kwargs)
            for cache, keys, values in zip(
                self._caches, torch.split(key_states, 1), torch.split(value_states, 1), strict=True
            )
        ]
        hang(key_states, partial(self._attend, held))
        return key_states, value_states

    def _attend(self, held: list[tuple[Tensor, Tensor]], call: Call) -> Tensor:
        masks: Sequence[Tensor | None] = [None] * len(held)
        if call.mask is not None:
            masks = torch.split(call.mask.expand(len(held), *call.mask.shape[1:]), 1)
        outputs = [
            attend(Call(call.module, query, keys, values, mask, call.rule), probe)
            for query, (keys, values), mask, probe in zip(
                torch.split(call.query, 1), held, masks, self._probes, strict=True
            )
        ]
        return torch.cat(outputs)
