"""The one dense prefill of a prompt that all methods start from."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DummyLayer,
    get_layer_types_and_kwargs,
)

from icecache.evaluation.engine.attention import Call, evaluation_attention, hang, run_plainly
from icecache.evaluation.engine.tokens import PromptTokens
from icecache.integrations.transformers.support import decoder_config, supports

__all__ = ["OBSERVED", "Prefill", "run_prefill"]

OBSERVED = 64


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt's keys and values, and what the model says next.

    Parameters
    ----------
    prompts : dict of int to PromptTokens
        By layer index, the full-attention layers.
    layers : tuple
        transformers' cache layers after the prompt, of all layers.
    num_tokens : int
    logits : Tensor, shape [vocabulary], float32
        After the last prompt token.
    """

    prompts: dict[int, PromptTokens]
    layers: tuple[Any, ...]
    num_tokens: int
    logits: Tensor

    def kept_layers(self) -> list[Any]:
        """Return the layers left to the model; those in `prompts` are empty stand-ins."""
        return [
            DummyLayer() if index in self.prompts else layer
            for index, layer in enumerate(self.layers)
        ]


class _Recorder:
    """Keeps the latest queries of each full-attention layer; holds no cache, so no cycle."""

    def __init__(self, full_layers: tuple[int, ...]) -> None:
        self.full_layers = full_layers
        self.queries: dict[int, Tensor] = {}
        self.scaling: dict[int, float] = {}

    def attend(self, layer_idx: int, call: Call) -> Tensor:
        # a layer that shares another's keys calls with that layer's index, later
        if layer_idx in self.full_layers and layer_idx not in self.queries:
            latest = call.query[0, :, -OBSERVED:].contiguous()
            self.queries[layer_idx] = latest.view(call.key.shape[1], -1, *latest.shape[1:]).clone()
            self.scaling[layer_idx] = call.rule.scaling
        return run_plainly(call)


class _RecordingCache(Cache):
    """transformers' own layers under a recorder."""

    def __init__(self, config: Any, recorder: _Recorder) -> None:
        kinds, arguments = get_layer_types_and_kwargs(config)
        super().__init__(
            layers=[
                DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs) for kind, kwargs in zip(kinds, arguments)
            ]
        )
        self._recorder = recorder

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        hang(keys, partial(self._recorder.attend, layer_idx))
        return keys, values


@torch.inference_mode()
def run_prefill(model: PreTrainedModel, token_ids: list[int]) -> Prefill:
    """Run a prompt through the model once, with full attention.

    Raises
    ------
    UnsupportedModel
        If the model cannot run with IceCache either.
    """
    report = supports(model)
    report.require()
    recorder = _Recorder(report.managed)
    cache = _RecordingCache(decoder_config(model.config), recorder)
    with evaluation_attention(model):
        output = model(
            input_ids=torch.tensor([token_ids], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    prompts = {
        index: PromptTokens(
            cache.layers[index].keys[0],
            cache.layers[index].values[0],
            recorder.queries[index],
            recorder.scaling[index],
        )
        for index in report.managed
    }
    return Prefill(prompts, tuple(cache.layers), len(token_ids), output.logits[0, -1].float())
