"""Teacher-forced decoding of several caches side by side, on one prefill of the model.

Every method is a row of one batch: the rows share the model's weights and tokens and differ only in
the `TokenStore`s that answer their attention. The stores arrive at the attention function as a
keyword argument of the model's forward, so that the benchmark touches no transformers cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from baseline import attention_logits, full_attention, topk_mask, weigh_values
from common import prefilled_layer
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from icecache import IceCacheConfig

ATTENTION = "icecache_benchmark"


class TokenStore(Protocol):
    """The cache of one layer and one request during decoding."""

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Take one token's key and value `[G, 1, D]`, attend its query `[H, 1, D]`."""


class FullStore:
    """Every token, attended in full; room for `spare` more is set aside at once."""

    def __init__(self, keys: Tensor, values: Tensor, spare: int) -> None:
        num_kv_heads, self.tokens, head_dim = keys.shape
        self._buffers = keys.new_empty(2, num_kv_heads, self.tokens + spare, head_dim)
        self._buffers[0, :, : self.tokens] = keys
        self._buffers[1, :, : self.tokens] = values

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self._buffers[0, :, self.tokens] = key[:, 0]
        self._buffers[1, :, self.tokens] = value[:, 0]
        self.tokens += 1
        keys, values = self._buffers[:, :, : self.tokens]
        return self._attend(query.transpose(0, 1), keys, values, scaling).transpose(0, 1)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        return full_attention(queries, keys, values, scaling)


class TopKStore(FullStore):
    """Exact top-k tokens at the config's budget, sink and window; the others are dropped."""

    def __init__(self, keys: Tensor, values: Tensor, spare: int, config: IceCacheConfig) -> None:
        super().__init__(keys, values, spare)
        self._config = config

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        logits = attention_logits(queries, keys, scaling)
        config = self._config
        mask = topk_mask(logits, config.budget, config.sink, config.window)[:, 0]
        # one step has one set per KV head, all of one size: gather instead of masking
        index = mask.nonzero()[:, 1].view(len(mask), -1)
        picked = logits.gather(-1, index[:, None, None].expand(*logits.shape[:3], -1))
        return weigh_values(
            picked, values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
        )


class IceStore:
    """An `IceCacheLayer` behind the same interface; one with a leader attends to its selection."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        config: IceCacheConfig,
        leader: IceStore | None = None,
    ) -> None:
        self.layer = prefilled_layer(config, keys, values)
        self.leader = leader

    @classmethod
    def maker(cls, config: IceCacheConfig) -> MakeStore:
        """Return what makes the stores of a row, called for one layer after the other."""
        made: list[IceStore] = []

        def make(keys: Tensor, values: Tensor) -> IceStore:
            behind = len(made) % config.layer_reuse
            made.append(cls(keys, values, config, made[-behind] if behind else None))
            return made[-1]

        return make

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.layer.append(key[None], value[None])
        given = None if self.leader is None else self.leader.layer.selection
        return self.layer.attend(query[None], scaling=scaling, positions=given)[0]


MakeStore = Callable[[Tensor, Tensor], TokenStore]
Rows = list[list[TokenStore]]  # [row][layer]


def stored_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    stores: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through each row's store; without stores the model's own dense attention."""
    if stores is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out, None
    rows = [
        row[module.layer_idx].step(query[i], key[i], value[i], scaling)
        for i, row in enumerate(stores)
    ]
    return torch.stack(rows).transpose(1, 2), None


def use_stores(model: PreTrainedModel) -> None:
    """Route the model's attention through `stored_attention`."""
    AttentionInterface.register(ATTENTION, stored_attention)
    model.set_attn_implementation(ATTENTION)


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt's keys and values per layer, `[G, T, D]` float32, and the first answer token."""

    keys: list[Tensor]
    values: list[Tensor]
    first_token: int

    @property
    def tokens(self) -> int:
        return self.keys[0].shape[1]


@torch.inference_mode()
def prefill(model: PreTrainedModel, token_ids: Tensor, banned: list[int]) -> Prefill:
    """Run the prompt `[tokens]` once, densely, in the model's dtype."""
    cache = DynamicCache()
    logits = model(token_ids[None], past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return Prefill(
        [layer.keys[0].float() for layer in cache.layers],
        [layer.values[0].float() for layer in cache.layers],
        _greedy(logits.float(), banned),
    )


def fill(prompt: Prefill, make: MakeStore) -> list[TokenStore]:
    """One store per layer, each filled with the prompt."""
    return [make(keys, values) for keys, values in zip(prompt.keys, prompt.values, strict=True)]


@torch.inference_mode()
def greedy_answer(
    model: PreTrainedModel, prompt: Prefill, steps: int, banned: list[int]
) -> tuple[list[int], Tensor]:
    """The full cache's greedy answer `[steps]` and the log-probabilities after each token.

    `banned` tokens (end of text) are never chosen, so that every answer has all its steps; they
    keep their probability.
    """
    stores = fill(prompt, lambda keys, values: FullStore(keys, values, steps))
    answer, found = [prompt.first_token], []
    for step in range(steps):
        found.append(_forward(model, answer[step], prompt.tokens + step, [stores])[0])
        answer.append(_greedy(found[-1], banned))
    return answer[:steps], torch.stack(found)


@torch.inference_mode()
def forced_steps(model: PreTrainedModel, prompt: Prefill, answer: list[int], rows: Rows) -> Tensor:
    """Log-probabilities after each answer token, for every row: `[steps, rows, vocabulary]`."""
    return torch.stack(
        [_forward(model, token, prompt.tokens + i, rows) for i, token in enumerate(answer)]
    )


def _forward(model: PreTrainedModel, token: int, position: int, rows: Rows) -> Tensor:
    token_ids = torch.full((len(rows), 1), token)
    positions = torch.full((len(rows), 1), position)
    result = model(token_ids, position_ids=positions, use_cache=False, stores=rows)
    return result.logits[:, -1].float().log_softmax(-1)


def end_token_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that would end an answer."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _greedy(logits: Tensor, banned: list[int]) -> int:
    allowed = logits.clone()
    allowed[banned] = float("-inf")
    return int(allowed.argmax())


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) in nats of log-probabilities `[..., vocabulary]`."""
    return (full.exp() * (full - other)).sum(-1)
