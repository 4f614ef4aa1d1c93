"""Record what each attention layer is asked while a model answers with the full cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from icecache.cli.session import Advance, prefill
from icecache.errors import InputError, UnsupportedModel
from icecache.integrations.transformers import supports

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Asked", "Recording", "record"]

_NAME = "icecache-recorder"


@dataclass(frozen=True, slots=True)
class Asked:
    """One query token of one layer: shape ``[num_q_heads, head_dim]``, float32."""

    query: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Recording:
    """One layer: keys and values ``[1, num_kv_heads, tokens, head_dim]``, and the last queries.

    The queries are those of the last ``len(asked)`` tokens, in order.
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    asked: list[Asked]


def record(
    model: "PreTrainedModel", ids: torch.Tensor, steps: int, advance: Advance
) -> list[Recording]:
    """Prefill, decode `steps` tokens greedily, and return every layer that IceCache manages.

    Raises
    ------
    InputError
        IceCache manages none of the model's layers.
    UnsupportedModel
        IceCache cannot run this model.
    """
    report = supports(model)
    report.require()
    managed = [layer.index for layer in report.layers if layer.status == "managed"]
    if not managed:
        raise InputError(f"IceCache manages no layer of this {report.model_type} model")
    cache = DynamicCache(config=model.config)
    with _recorder(model) as asked, torch.inference_mode():
        logits = prefill(model, ids, cache, advance)
        asked.clear()
        for _ in range(steps):
            token = logits.argmax(-1, keepdim=True)
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
    return [
        Recording(index, cache.layers[index].keys, cache.layers[index].values, asked[index])
        for index in managed
    ]


@contextmanager
def _recorder(model: "PreTrainedModel") -> Iterator[dict[int, list[Asked]]]:
    asked: dict[int, list[Asked]] = {}

    def attend(
        module: Any, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        for name in ("softcap", "s_aux"):
            if kwargs.get(name) is not None:
                raise UnsupportedModel(
                    f"inspect draws plain softmax attention, this model's layers use {name}; "
                    "icecache generate --compare measures such a model"
                )
        if query.shape[2] == 1:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            found = Asked(query[0, :, 0].float(), scaling)
            asked.setdefault(module.layer_idx, []).append(found)
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, *args, **kwargs)
        return output

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield asked
    finally:
        model.set_attn_implementation(before)
